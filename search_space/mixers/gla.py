"""Gated linear attention: a matrix by head whose key channels fade by factors chosen from the token, read through a
head norm and a swish gate.

Letters: B batch, T time, D width, H heads, K key width, V value width of a head.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.channel_decay.ops import channel_decay, channel_decay_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame, nearest_divisor
from search_space.parts import Norm, fit_heads
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach

CHUNK = 64
HEADS = 4
RANK = 16


@dataclass(frozen=True, kw_only=True)
class GLA(MixerSpec):
    """Gated linear attention (arXiv:2312.06635): low-rank decay by key channel, head norm, swish gate."""

    name: ClassVar[str] = "gla"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Yang 2023, arXiv:2312.06635"

    heads: int | None = choice(4, 8, 16, unit="heads")
    head_dim: int | None = choice(64, 128, 256, 512, unit="head", searched=True)
    """Width of a head's values; four heads share the width where nothing is written."""
    key_ratio: float = choice(0.5, 1.0)
    """Key width over value width."""
    temperature: int = choice(16, 4, 8)
    """What the log-decays are divided by: more of it remembers longer at first."""
    rank: int | None = choice(16, 32, 64, unit="rank")
    """Of the decay's projection."""
    taps: int = choice(0, 4, searched=True)
    """Of a short convolution over queries, keys and values; 0 for none."""

    def sized(self, frame: Frame) -> Self:
        head_dim = self.head_dim
        if head_dim is None and self.heads is None:
            head_dim = nearest_divisor(frame.width, frame.width / HEADS)
        heads, head_dim = fit_heads(frame, self.heads, head_dim)
        return replace(self, heads=heads, head_dim=head_dim, rank=self.rank or RANK)

    @property
    def key_dim(self) -> int:
        """Key width of a head, once its value width is known."""
        assert self.head_dim
        return int(self.head_dim * self.key_ratio)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim and spec.rank
        keys, values = spec.heads * spec.key_dim, spec.heads * spec.head_dim
        weights = frame.width * (2 * keys + 3 * values + spec.rank) + spec.rank * keys
        taps = (2 * keys + values) * spec.taps
        matrix = keys * spec.head_dim
        held = frame.batch * matrix * 4
        tail = frame.batch * (2 * keys + values) * (spec.taps - 1) * frame.dtype_bytes
        cache = [CacheTensor(name="matrix", stored_bytes=held, read_bytes=held)]
        if spec.taps:
            cache.append(CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail))
        return Cost(
            params=weights + taps + keys + spec.head_dim,
            flops_prefill=2 * (weights + taps) + 2 * CHUNK * (keys + values) + 4 * matrix,
            flops_decode=2 * (weights + taps) + 5 * matrix,
            cache=tuple(cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return GLAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class GLAState:
    """Matrix [B, H, K, V], float32, and the last inputs of the convolution, tail [B, 3, H (2 K + V)], or None."""

    matrix: Tensor
    tail: Tensor | None


class GLAMixer(Mixer):
    """Project, convolve if asked, fade and write, normalise each head, gate, project."""

    def __init__(self, spec: GLA, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim and spec.rank
        self.frame, self.heads, self.key_dim, self.head_dim = frame, spec.heads, spec.key_dim, spec.head_dim
        self.temperature = spec.temperature
        keys, values = self.heads * self.key_dim, self.heads * self.head_dim
        self.parts = [keys, keys, values]
        self.enter = nn.Linear(frame.width, 2 * keys + values, bias=False)
        self.taps: nn.Parameter | None = None
        if spec.taps:
            bound = spec.taps**-0.5
            self.taps = nn.Parameter(torch.empty(2 * keys + values, spec.taps).uniform_(-bound, bound))
        self.forget_down = nn.Linear(frame.width, spec.rank, bias=False)
        self.forget_up = nn.Linear(spec.rank, keys)
        self.gate = nn.Linear(frame.width, values, bias=False)
        self.norm = Norm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(values, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> GLAState:  # noqa: ARG002
        device = self.enter.weight.device
        tail = None
        if self.taps is not None:
            channels, taps = self.taps.shape
            tail = torch.zeros(batch, taps - 1, channels, device=device, dtype=DTYPES[self.frame.dtype])
        return GLAState(
            matrix=torch.zeros(batch, self.heads, self.key_dim, self.head_dim, device=device), tail=tail
        )

    def scan_inputs(self, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys [..., H, K], values [..., H, V] and log-decays [..., H, K] of x [..., D]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split(self.parts, dim=-1))
        log_decay = F.logsigmoid(self.forget_up(self.forget_down(x)).float()) / self.temperature
        return q * self.key_dim**-0.5, k, v, log_decay.unflatten(-1, (self.heads, -1))

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, V], gate it by x [..., D], project."""
        y: Tensor = self.out(self.norm(read, self.gate(x).view(read.shape)).flatten(-2))
        return y

    def forward(self, x: Tensor, state: GLAState | None = None) -> tuple[Tensor, Any]:
        mixed, tail = self.enter(x), None
        if self.taps is not None:
            before = None if state is None or state.tail is None else state.tail.to(mixed.dtype)
            mixed, tail = short_convolution(mixed, self.taps, None, before, activation="silu")
        read, matrix = channel_decay(
            *self.scan_inputs(mixed, x), state.matrix if state else None, chunk=CHUNK
        )
        return self.finish(read, x), self.kept(matrix, tail) if state else None

    def step(self, x: Tensor, state: GLAState) -> tuple[Tensor, GLAState]:
        mixed, tail = self.enter(x), None
        if self.taps is not None:
            assert state.tail is not None
            mixed, tail = short_convolution_step(
                mixed, self.taps, None, state.tail.to(mixed.dtype), activation="silu"
            )
        read, matrix = channel_decay_step(*self.scan_inputs(mixed, x), state.matrix)
        return self.finish(read, x), self.kept(matrix, tail)

    def kept(self, matrix: Tensor, tail: Tensor | None) -> GLAState:
        """The state, its tail in the frame's type."""
        return GLAState(matrix=matrix, tail=None if tail is None else tail.to(DTYPES[self.frame.dtype]))

"""Retention: a matrix by head that fades at a fixed rate of its own, rotary positions, a norm by head and a gate.

Letters: B batch, T time, D width, H heads, K key head width, V value head width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.norm.ops import rms_norm
from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from search_space.frame import Frame
from search_space.parts import fit_heads
from search_space.rotary import turn_pairs, turns
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

CHUNK = 64
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class RetNet(MixerSpec):
    """Multi-scale retention (arXiv:2307.08621): decay 1 − 2^(−5−h) in head h, rotary positions, norm by head, swish gate."""

    name: ClassVar[str] = "retnet"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Sun et al. 2023, arXiv:2307.08621"

    heads: int | None = choice(4, 8, 16, 32, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head", searched=True)
    value_dim: int | None = choice(128, 256, 432, 512, unit="head")
    """Value width of a head; twice the key width where it is left out."""
    exponent: int = choice(5, 3, 7)
    """The first head forgets within 2^exponent tokens, each further one within twice as many."""
    rotary: bool = choice(True, False)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=256)
        return replace(self, heads=heads, head_dim=head_dim, value_dim=self.value_dim or 2 * head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim and spec.value_dim
        key, value = spec.heads * spec.head_dim, spec.heads * spec.value_dim
        weights = frame.width * (2 * key + 3 * value)
        matrix = spec.head_dim * value
        held = frame.batch * matrix * 4
        return Cost(
            params=weights,
            flops_prefill=2 * weights + 2 * CHUNK * (key + value) + 4 * matrix,
            flops_decode=2 * weights + 5 * matrix,
            cache=(CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return RetNetMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class RetNetState:
    """Matrix [B, H, K, V], float32; `length` tokens were seen."""

    matrix: Tensor
    length: int


class RetNetMixer(Mixer):
    """Project, turn queries and keys, retain, normalise each head, gate, project."""

    def __init__(self, spec: RetNet, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim and spec.value_dim
        self.heads, self.head_dim, self.value_dim = spec.heads, spec.head_dim, spec.value_dim
        self.rotary, self.base = spec.rotary, frame.rotary_base
        key, value = self.heads * self.head_dim, self.heads * self.value_dim
        self.query = nn.Linear(frame.width, key, bias=False)
        self.key = nn.Linear(frame.width, key, bias=False)
        self.value = nn.Linear(frame.width, value, bias=False)
        self.gate = nn.Linear(frame.width, value, bias=False)
        self.out = nn.Linear(value, frame.width, bias=False)
        for layer in (self.query, self.key, self.value, self.gate):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=0.5)
        kept = 1 - 2.0 ** -(spec.exponent + torch.arange(self.heads, dtype=torch.float64))
        self.register_buffer("log_decay", kept.log().float(), persistent=False)
        self.log_decay: Tensor

    def start(self, batch: int, max_len: int) -> RetNetState:  # noqa: ARG002
        shape = (batch, self.heads, self.head_dim, self.value_dim)
        return RetNetState(matrix=torch.zeros(shape, device=self.query.weight.device), length=0)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] at positions from `start` on to queries, keys [B, T, H, K] and values [B, T, H, V]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        k = k * self.head_dim**-0.5
        if self.rotary:
            position = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
            share = torch.linspace(0, 1, self.head_dim // 2, device=x.device)
            by = turns(position[:, None] * self.base**-share, self.head_dim // 2)[:, None]
            q, k = turn_pairs(q, by), turn_pairs(k, by)
        return q, k, v

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, V], gate by x [..., D], project."""
        gate = self.gate(x).view(read.shape)
        y: Tensor = self.out(rms_norm(read, None, eps=EPSILON, gate=gate, dtype=x.dtype).flatten(-2))
        return y

    def forward(self, x: Tensor, state: RetNetState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        decay = self.log_decay.expand(*x.shape[:2], -1)
        read, matrix = scalar_decay(q, k, v, decay, state.matrix if state else None, chunk=CHUNK)
        kept = RetNetState(matrix=matrix, length=state.length + x.shape[1]) if state else None
        return self.finish(read, x), kept

    def step(self, x: Tensor, state: RetNetState) -> tuple[Tensor, RetNetState]:
        q, k, v = (part.squeeze(1) for part in self.project(x.unsqueeze(1), state.length))
        decay = self.log_decay.expand(x.shape[0], -1)
        read, matrix = scalar_decay_step(q, k, v, decay, state.matrix)
        return self.finish(read, x), RetNetState(matrix=matrix, length=state.length + 1)

"""Kimi delta attention: a matrix by head in which every key channel fades by itself, and writes correct what is there.

Letters: B batch, T time, D width, H heads, K key width, V value width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.channel_delta.ops import channel_delta, channel_delta_step
from search_space.frame import Frame
from search_space.parts import (
    Norm,
    convolve,
    convolve_step,
    decay_bias,
    first_taps,
    fit_heads,
    log_rates,
    unit,
)
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class KDA(MixerSpec):
    """Kimi Linear's layer (arXiv:2510.26692): gated delta rule by channel, short convolutions, low-rank gates.

    With `negative`, writes of strength up to two turn what a key holds around (arXiv:2411.12537).
    """

    name: ClassVar[str] = "kda"
    family: ClassVar[str] = "delta"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Kimi Team 2025, arXiv:2510.26692"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head", searched=True)
    value_ratio: int = choice(1, 2)
    """A value's width over a key's."""
    rank_ratio: float = choice(1.0, 0.5, 0.25)
    """The rank of both gates over a key's width."""
    bound: int = choice(0, 5)
    """The log-decay of a token stays above minus this; 0: it has no bound."""
    taps: int = choice(4, 0)
    negative: bool = choice(False, True)
    gate: str = choice("sigmoid", "silu", "none")

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        heads, key, value = spec.heads, spec.head_dim, spec.head_dim * spec.value_ratio
        rank, channels = int(key * spec.rank_ratio), heads * (2 * key + value)
        weights = frame.width * (channels + heads * (1 + value) + rank) + rank * heads * key
        if spec.gate != "none":
            weights += rank * (frame.width + heads * value)
        taps = channels * spec.taps
        chunk = heads * (CHUNK * (6 * key + 4 * value) + 6 * key * value + 2 * CHUNK * CHUNK / 3)
        held = frame.batch * heads * key * value * 4
        tail = frame.batch * channels * max(0, spec.taps - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + heads + heads * key + value,
            flops_prefill=2 * (weights + taps) + chunk,
            flops_decode=2 * (weights + taps) + 7 * heads * key * value,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return KDAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class KDAState:
    """Matrix [B, H, K, V], float32, and the last inputs of the convolutions, tail [B, taps - 1, H (2 K + V)]."""

    matrix: Tensor
    tail: Tensor


class KDAMixer(Mixer):
    """Project, convolve, normalise queries and keys, run the delta rule, normalise each head, gate, project."""

    def __init__(self, spec: KDA, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.spec, self.frame, self.heads, self.head_dim = spec, frame, spec.heads, spec.head_dim
        self.value_dim, rank = spec.head_dim * spec.value_ratio, int(spec.head_dim * spec.rank_ratio)
        keys, values = self.heads * self.head_dim, self.heads * self.value_dim
        self.parts = [keys, keys, values]
        self.enter = nn.Linear(frame.width, 2 * keys + values, bias=False)
        self.taps = first_taps(2 * keys + values, spec.taps)
        self.forget_down = nn.Linear(frame.width, rank, bias=False)
        self.forget_up = nn.Linear(rank, keys, bias=False)
        self.log_rate = nn.Parameter(torch.zeros(self.heads) if spec.bound else log_rates(self.heads))
        self.step_bias = nn.Parameter(decay_bias(keys))
        self.write = nn.Linear(frame.width, self.heads, bias=False)
        self.gate_down = self.gate_up = None
        if spec.gate != "none":
            self.gate_down = nn.Linear(frame.width, rank, bias=False)
            self.gate_up = nn.Linear(rank, values, bias=False)
        self.norm = Norm(self.value_dim, eps=1e-5)
        self.out = nn.Linear(values, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KDAState:  # noqa: ARG002
        device, kept = self.enter.weight.device, max(0, self.spec.taps - 1)
        return KDAState(
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.value_dim, device=device),
            tail=torch.zeros(batch, kept, sum(self.parts), device=device, dtype=DTYPES[self.frame.dtype]),
        )

    def delta_inputs(self, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and log-decays [..., H, K], values [..., H, V], write strengths [..., H], of x [..., D]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split(self.parts, dim=-1))
        q = unit(q, scale=self.head_dim**-0.5, dtype=torch.float32)
        k = unit(k, dtype=torch.float32)
        step = (self.forget_up(self.forget_down(x)).float() + self.step_bias.float()).unflatten(
            -1, (self.heads, -1)
        )
        rate = self.log_rate.float().exp()[:, None]
        bound = self.spec.bound
        log_decay = -bound * torch.sigmoid(rate * step) if bound else -rate * F.softplus(step)
        beta = torch.sigmoid(self.write(x).float())
        return q, k, v.float(), log_decay, 2.0 * beta if self.spec.negative else beta

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, V], gate it by x [..., D], project."""
        if self.gate_down is None or self.gate_up is None:
            normed = self.norm(read).to(x.dtype)
        else:
            gate = self.gate_up(self.gate_down(x)).view(read.shape)
            normed = self.norm(read, gate, activation=self.spec.gate)
        y: Tensor = self.out(normed.flatten(-2))
        return y

    def forward(self, x: Tensor, state: KDAState | None = None) -> tuple[Tensor, Any]:
        mixed, tail = convolve(self.enter(x), self.taps, state.tail if state else None)
        inputs = self.delta_inputs(mixed, x)
        read, matrix = channel_delta(*inputs, state.matrix if state else None, chunk=CHUNK)
        return self.finish(read, x), KDAState(matrix=matrix, tail=tail) if state else None

    def step(self, x: Tensor, state: KDAState) -> tuple[Tensor, KDAState]:
        mixed, tail = convolve_step(self.enter(x), self.taps, state.tail)
        read, matrix = channel_delta_step(*self.delta_inputs(mixed, x), state.matrix)
        return self.finish(read, x), KDAState(matrix=matrix, tail=tail)

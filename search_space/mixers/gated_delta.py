"""Gated DeltaNet: each head keeps one matrix that fades by a number a token; every write corrects what its key holds.

Letters: B batch, T time, D width, G key heads, K key width, H value heads, V value width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.scalar_delta.ops import scalar_delta, scalar_delta_step
from search_space.frame import Frame, round_to
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
class GatedDelta(MixerSpec):
    """The gated delta rule (arXiv:2412.06464) as in Qwen3-Next: keys fill three quarters of the width, values twice that.

    With `negative`, writes of strength up to two turn what a key holds around (arXiv:2411.12537), as in Olmo Hybrid.
    """

    name: ClassVar[str] = "gated_delta"
    family: ClassVar[str] = "delta"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464"

    heads: int | None = choice(8, 16, 32, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head", searched=True)
    value_heads: int = choice(1, 2)
    """Value heads for each key head."""
    value_ratio: int = choice(2, 1)
    """A value's width over a key's."""
    taps: int = choice(4, 0)
    negative: bool = choice(False, True)
    gate: str = choice("silu", "sigmoid", "none")

    def sized(self, frame: Frame) -> Self:
        inner = round_to(0.75 * frame.width, 8)
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=256, inner=inner)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        key, value, heads = spec.head_dim, spec.head_dim * spec.value_ratio, spec.heads * spec.value_heads
        channels = 2 * spec.heads * key + heads * value
        projections = channels + heads * (2 + value * (1 if spec.gate == "none" else 2))
        weights, taps = frame.width * projections, channels * spec.taps
        chunk = heads * (CHUNK * (6 * key + 4 * value) + 6 * key * value + 2 * CHUNK * CHUNK / 3)
        held = frame.batch * heads * key * value * 4
        tail = frame.batch * channels * max(0, spec.taps - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + 2 * heads + value,
            flops_prefill=2 * (weights + taps) + chunk,
            flops_decode=2 * (weights + taps) + 7 * heads * key * value,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return GatedDeltaMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaState:
    """Matrix [B, H, K, V], float32, and the last inputs of the convolution, tail [B, taps - 1, 2 G K + H V]."""

    matrix: Tensor
    tail: Tensor


class GatedDeltaMixer(Mixer):
    """Project, convolve, normalise queries and keys, run the delta rule, normalise each head, gate, project."""

    def __init__(self, spec: GatedDelta, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.spec, self.frame, self.head_dim = spec, frame, spec.head_dim
        self.heads, self.value_dim = spec.heads * spec.value_heads, spec.head_dim * spec.value_ratio
        keys, values = spec.heads * spec.head_dim, self.heads * self.value_dim
        self.parts = [keys, keys, values]
        self.enter = nn.Linear(frame.width, 2 * keys + values, bias=False)
        self.taps = first_taps(2 * keys + values, spec.taps)
        self.forget = nn.Linear(frame.width, self.heads, bias=False)
        self.log_rate = nn.Parameter(log_rates(self.heads, least=0.01))
        self.step_bias = nn.Parameter(decay_bias(self.heads))
        self.write = nn.Linear(frame.width, self.heads, bias=False)
        self.gate = None if spec.gate == "none" else nn.Linear(frame.width, values, bias=False)
        self.norm = Norm(self.value_dim, eps=1e-5)
        self.out = nn.Linear(values, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> GatedDeltaState:  # noqa: ARG002
        device, kept = self.enter.weight.device, max(0, self.spec.taps - 1)
        return GatedDeltaState(
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.value_dim, device=device),
            tail=torch.zeros(batch, kept, sum(self.parts), device=device, dtype=DTYPES[self.frame.dtype]),
        )

    def delta_inputs(self, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys [..., G, K], values [..., H, V], log-decays and write strengths [..., H], of x [..., D]."""
        q, k, v = mixed.float().split(self.parts, dim=-1)
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
        q, k = unit(q, scale=self.head_dim**-0.5), unit(k)
        step = F.softplus(self.forget(x).float() + self.step_bias.float())
        beta = torch.sigmoid(self.write(x).float()) * (2.0 if self.spec.negative else 1.0)
        v = v.unflatten(-1, (self.heads, self.value_dim))
        return q, k, v, -self.log_rate.float().exp() * step, beta

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, V], gate it by x [..., D], project."""
        if self.gate is None:
            normed = self.norm(read).to(x.dtype)
        else:
            normed = self.norm(read, self.gate(x).view(read.shape), activation=self.spec.gate)
        y: Tensor = self.out(normed.flatten(-2))
        return y

    def forward(self, x: Tensor, state: GatedDeltaState | None = None) -> tuple[Tensor, Any]:
        mixed, tail = convolve(self.enter(x), self.taps, state.tail if state else None)
        inputs = self.delta_inputs(mixed, x)
        read, matrix = scalar_delta(*inputs, state.matrix if state else None, chunk=CHUNK)
        return self.finish(read, x), GatedDeltaState(matrix=matrix, tail=tail) if state else None

    def step(self, x: Tensor, state: GatedDeltaState) -> tuple[Tensor, GatedDeltaState]:
        mixed, tail = convolve_step(self.enter(x), self.taps, state.tail)
        read, matrix = scalar_delta_step(*self.delta_inputs(mixed, x), state.matrix)
        return self.finish(read, x), GatedDeltaState(matrix=matrix, tail=tail)

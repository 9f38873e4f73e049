"""Mamba-2: each head keeps one matrix that fades by a factor chosen from the token, behind a short convolution.

Letters: B batch, T time, D width, H heads, P head width, N state size, G groups that share write and read vectors.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.parts import decay_bias, fit_heads, log_rates
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec

TAPS = 4
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Mamba2(MixerSpec):
    """State-space duality (arXiv:2405.21060): scalar decay by head, gated norm, twice the width inside."""

    name: ClassVar[str] = "mamba2"
    family: ClassVar[str] = "state_space"
    source: ClassVar[str] = "Dao and Gu 2024, arXiv:2405.21060"

    state: int | None = choice(16, 32, 64, 128, 256, unit="state", searched=True)
    heads: int | None = choice(16, 32, 64, 80, 128, unit="heads")
    head_dim: int | None = choice(32, 64, 80, 128, unit="head")
    groups: int | None = choice(1, 2, 4, 8, unit="groups")

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=64, inner=2 * frame.width)
        groups = self.groups or 1
        if heads % groups:
            raise ValueError(
                f"mamba2: groups={groups} does not divide its {heads} heads at width {frame.width}"
            )
        return replace(
            self, state=self.state or frame.state_size(128), heads=heads, head_dim=head_dim, groups=groups
        )

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state and spec.heads and spec.head_dim and spec.groups
        inner, shared = spec.heads * spec.head_dim, 2 * spec.groups * spec.state
        weights = frame.width * (3 * inner + shared + spec.heads)
        taps = (inner + shared) * TAPS
        matrix = inner * spec.state
        held, tail = frame.batch * matrix * 4, frame.batch * (inner + shared) * (TAPS - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + inner + shared + 3 * spec.heads + inner,
            flops_prefill=2 * (weights + taps) + 2 * CHUNK * (spec.heads * spec.state + inner) + 4 * matrix,
            flops_decode=2 * (weights + taps) + 5 * matrix,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return Mamba2Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class Mamba2State:
    """Matrix [B, H, N, P], float32, and the last inputs of the convolution, tail [B, 3, inner + 2 G N]."""

    matrix: Tensor
    tail: Tensor


class Mamba2Mixer(Mixer):
    """Project, convolve, scan, gate and normalise by group, project."""

    def __init__(self, spec: Mamba2, frame: Frame) -> None:
        super().__init__()
        assert spec.state and spec.heads and spec.head_dim and spec.groups
        self.frame = frame
        self.state_size, self.heads, self.head_dim, self.groups = (
            spec.state,
            spec.heads,
            spec.head_dim,
            spec.groups,
        )
        self.inner, self.shared = self.heads * self.head_dim, 2 * self.groups * self.state_size
        self.enter = nn.Linear(frame.width, 2 * self.inner + self.shared + self.heads, bias=False)
        channels = self.inner + self.shared
        self.taps = nn.Parameter(torch.empty(channels, TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.taps_bias = nn.Parameter(torch.zeros(channels))
        self.log_rate = nn.Parameter(log_rates(self.heads))
        self.step_bias = nn.Parameter(decay_bias(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> Mamba2State:  # noqa: ARG002
        device = self.enter.weight.device
        return Mamba2State(
            matrix=torch.zeros(batch, self.heads, self.state_size, self.head_dim, device=device),
            tail=torch.zeros(
                batch, TAPS - 1, self.inner + self.shared, device=device, dtype=DTYPES[self.frame.dtype]
            ),
        )

    def scan_inputs(self, mixed: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """After the convolution: read and write vectors [..., G, N], inputs, scaled inputs [..., H, P], log-decays."""
        x, write, read = mixed.split([self.inner, self.shared // 2, self.shared // 2], dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))
        group = (self.groups, self.state_size)
        dt = F.softplus(step.float() + self.step_bias.float())
        return (
            read.unflatten(-1, group),
            write.unflatten(-1, group),
            x,
            x * dt[..., None].to(x.dtype),
            -self.log_rate.float().exp() * dt,
        )

    def finish(self, scanned: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Skip connection, gate, RMS norm by group, output projection; scanned and x are [..., H, P]."""
        y = (scanned.to(x.dtype) + x * self.skip[:, None].to(x.dtype)).flatten(-2) * F.silu(gate)
        grouped = y.float().unflatten(-1, (self.groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + 1e-5)
        result: Tensor = self.out((grouped.flatten(-2) * self.norm_weight.float()).to(gate.dtype))
        return result

    def forward(self, x: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Any]:
        gate, mixed, step = self.enter(x).split([self.inner, self.inner + self.shared, self.heads], dim=-1)
        mixed, tail = short_convolution(
            mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype) if state else None, activation="silu"
        )
        read, write, inputs, scaled, log_decay = self.scan_inputs(mixed, step)
        y, matrix = scalar_decay(read, write, scaled, log_decay, state.matrix if state else None, chunk=CHUNK)
        kept = replace(state, matrix=matrix, tail=tail.to(state.tail.dtype)) if state else None
        return self.finish(y, inputs, gate), kept

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        gate, mixed, step = self.enter(x).split([self.inner, self.inner + self.shared, self.heads], dim=-1)
        mixed, tail = short_convolution_step(
            mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype), activation="silu"
        )
        read, write, inputs, scaled, log_decay = self.scan_inputs(mixed, step)
        y, matrix = scalar_decay_step(read, write, scaled, log_decay, state.matrix)
        return self.finish(y, inputs, gate), replace(state, matrix=matrix, tail=tail.to(state.tail.dtype))

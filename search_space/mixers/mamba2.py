"""Mamba-2: each head keeps one matrix that fades by a factor chosen from the token, behind a short convolution.

Letters: B batch, T time, D width, H heads, P head width, N state size, G groups that share write and read vectors.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm.ops import rms_norm
from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.parts import decay_bias, fit_groups, fit_heads, log_rates
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach

NEAREST = 1 - 2.0**-20
"""How near to nought a signed decay may come: its logarithm must stay a number."""


@dataclass(frozen=True, kw_only=True)
class Mamba2(MixerSpec):
    """State-space duality (arXiv:2405.21060): scalar decay by head, gated norm, twice the width inside."""

    name: ClassVar[str] = "mamba2"
    family: ClassVar[str] = "state_space"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Dao and Gu 2024, arXiv:2405.21060"

    state: int | None = choice(16, 32, 64, 128, 256, unit="state", searched=True)
    heads: int | None = choice(16, 32, 64, 80, 128, unit="heads")
    head_dim: int | None = choice(32, 64, 80, 128, unit="head")
    groups: int | None = choice(1, 2, 4, 8, unit="groups")
    taps: int = choice(4, 0)
    """Tokens that the short convolution sees; 0 for none."""
    negative: bool = choice(False, True)
    """Decays from -1 to 1 in place of 0 to 1, 2 exp(a) − 1 for exp(a): a state that can flip (arXiv:2411.12537)."""
    chunk: int | None = choice(64, 16, 32, 128, 256, unit="chunk")
    """Tokens that are computed at once: what a prefill costs, not what the layer is."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=64, inner=2 * frame.width)
        groups = fit_groups(self.name, frame, heads, self.groups)
        state = self.state or frame.state_size(128)
        # Work within chunks grows with their length, work between them falls: the root of what a head keeps is between.
        chunk = min(64, max(16, 1 << (math.isqrt(state * head_dim).bit_length() - 1)))
        return replace(
            self, state=state, heads=heads, head_dim=head_dim, groups=groups, chunk=self.chunk or chunk
        )

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state and spec.heads and spec.head_dim and spec.groups and spec.chunk
        inner, shared = spec.heads * spec.head_dim, 2 * spec.groups * spec.state
        weights = frame.width * (3 * inner + shared + spec.heads)
        taps = (inner + shared) * spec.taps
        matrix = inner * spec.state
        cache = [("matrix", frame.batch * matrix * 4)]
        if spec.taps:
            cache.append(("tail", frame.batch * (inner + shared) * (spec.taps - 1) * frame.dtype_bytes))
        bias = inner + shared if spec.taps else 0
        scan = 2 * spec.chunk * (spec.heads * spec.state + inner) + 4 * matrix
        return Cost(
            params=weights + taps + bias + 3 * spec.heads + inner,
            flops_prefill=2 * (weights + taps) + scan,
            flops_decode=2 * (weights + taps) + 5 * matrix,
            cache=tuple(CacheTensor(name=name, stored_bytes=held, read_bytes=held) for name, held in cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return Mamba2Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class Mamba2State:
    """Matrix [B, H, N, P], float32, and the last inputs of the convolution, if any, tail [B, 3, inner + 2 G N]."""

    matrix: Tensor
    tail: Tensor | None


class Mamba2Mixer(Mixer):
    """Project, convolve, scan, gate and normalise by group, project."""

    def __init__(self, spec: Mamba2, frame: Frame) -> None:
        super().__init__()
        assert spec.state and spec.heads and spec.head_dim and spec.groups and spec.chunk
        self.frame, self.negative, self.chunk = frame, spec.negative, spec.chunk
        self.state_size, self.heads, self.head_dim, self.groups = (
            spec.state,
            spec.heads,
            spec.head_dim,
            spec.groups,
        )
        self.inner, self.shared = self.heads * self.head_dim, 2 * self.groups * self.state_size
        self.enter = nn.Linear(frame.width, 2 * self.inner + self.shared + self.heads, bias=False)
        self.taps = self.taps_bias = None
        if spec.taps:
            shape, reach = (self.inner + self.shared, spec.taps), spec.taps**-0.5
            self.taps = nn.Parameter(torch.empty(shape).uniform_(-reach, reach))
            self.taps_bias = nn.Parameter(torch.zeros(self.inner + self.shared))
        self.log_rate = nn.Parameter(log_rates(self.heads))
        self.step_bias = nn.Parameter(decay_bias(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> Mamba2State:  # noqa: ARG002
        device, tail = self.enter.weight.device, None
        if self.taps is not None:
            shape = (batch, self.taps.shape[1] - 1, self.inner + self.shared)
            tail = torch.zeros(shape, device=device, dtype=DTYPES[self.frame.dtype])
        matrix = torch.zeros(batch, self.heads, self.state_size, self.head_dim, device=device)
        return Mamba2State(matrix=matrix, tail=tail)

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
        y = (scanned.to(x.dtype) + x * self.skip[:, None].to(x.dtype)).flatten(-2)
        normed = rms_norm(y, self.norm_weight.float(), eps=1e-5, gate=gate, before=True, groups=self.groups)
        result: Tensor = self.out(normed)
        return result

    def forward(self, x: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Any]:
        gate, mixed, step = self.enter(x).split([self.inner, self.inner + self.shared, self.heads], dim=-1)
        tail = None
        if self.taps is None:
            mixed = F.silu(mixed)
        else:
            before = state.tail.to(mixed.dtype) if state and state.tail is not None else None
            mixed, tail = short_convolution(mixed, self.taps, self.taps_bias, before, activation="silu")
        read, write, inputs, scaled, log_decay = self.scan_inputs(mixed, step)
        flips = None
        if self.negative:
            # S_t = P_t S'_t with P the product of the signs so far: S' fades by magnitudes, and is written with P.
            log_decay, sign = signed(log_decay)
            flips = sign.cumprod(dim=1)
            scaled = scaled * flips[..., None].to(scaled.dtype)
        matrix = state.matrix if state else None
        y, matrix = scalar_decay(read, write, scaled, log_decay, matrix, chunk=self.chunk)
        if flips is not None:
            y, matrix = y * flips[..., None].to(y.dtype), matrix * flips[:, -1, :, None, None]
        return self.finish(y, inputs, gate), Mamba2State(
            matrix=matrix, tail=kept(tail, state)
        ) if state else None

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        gate, mixed, step = self.enter(x).split([self.inner, self.inner + self.shared, self.heads], dim=-1)
        tail = None
        if self.taps is None or state.tail is None:
            mixed = F.silu(mixed)
        else:
            before = state.tail.to(mixed.dtype)
            mixed, tail = short_convolution_step(mixed, self.taps, self.taps_bias, before, activation="silu")
        read, write, inputs, scaled, log_decay = self.scan_inputs(mixed, step)
        matrix = state.matrix
        if self.negative:
            log_decay, sign = signed(log_decay)
            matrix = matrix * sign[..., None, None]
        y, matrix = scalar_decay_step(read, write, scaled, log_decay, matrix)
        return self.finish(y, inputs, gate), Mamba2State(matrix=matrix, tail=kept(tail, state))


def kept(tail: Tensor | None, state: Mamba2State) -> Tensor | None:
    """The new tail in the type of the old one."""
    return None if tail is None or state.tail is None else tail.to(state.tail.dtype)


def signed(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the magnitude of 2 exp(log_decay) − 1, and its sign."""
    beyond = torch.expm1(log_decay)
    positive = beyond >= -0.5
    magnitude = torch.log1p(torch.where(positive, 2 * beyond, -2 - 2 * beyond).clamp(min=-NEAREST))
    return magnitude, torch.where(positive, 1.0, -1.0)

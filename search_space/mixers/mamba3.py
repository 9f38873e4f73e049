"""Mamba-3: a matrix by head, written by the trapezoidal rule, whose channels turn by angles chosen from the token.

Letters: B batch, T time, D width, H heads, P head width, N state size, G groups that share write and read vectors,
R ranks (rows that a token writes and reads), A angles.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.trapezoid.ops import trapezoid, trapezoid_step
from search_space.frame import Frame
from search_space.parts import Norm, decay_bias, fit_groups, fit_heads, open_heads
from search_space.rotary import turn_pairs, turns
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach

ROWS = 32
"""Rows that are computed at once: chunks of 32 / R tokens, as published for float32."""
SLOWEST, EPSILON = 1e-4, 1e-5


@dataclass(frozen=True, kw_only=True)
class Mamba3(MixerSpec):
    """Mamba-3 (arXiv:2603.15569): no convolution; with more than one rank several writes and reads a token (MIMO).

    Adjacent channels turn as pairs, as published for one rank; published weights of several ranks pair halves.
    """

    name: ClassVar[str] = "mamba3"
    family: ClassVar[str] = "state_space"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Lahoti et al. 2026, arXiv:2603.15569"

    state: int | None = choice(32, 64, 128, unit="state", searched=True)
    heads: int | None = choice(16, 32, 64, 128, unit="heads")
    head_dim: int | None = choice(32, 64, 128, unit="head")
    groups: int | None = choice(1, 2, 4, 8, unit="groups")
    rank: int = choice(1, 2, 4)
    rotary: float = choice(0.5, 1.0)
    """Share of the state that turns."""
    norm: bool = choice(False, True)
    """Whether each head is normalised before its gate."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=64, inner=2 * frame.width)
        groups = fit_groups(self.name, frame, heads, self.groups)
        return replace(
            self, state=self.state or frame.state_size(128), heads=heads, head_dim=head_dim, groups=groups
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of gate, input, write, read, step, rate, share of the fresh write, angle; once the sizes are filled in."""
        assert self.state and self.heads and self.head_dim and self.groups
        inner, shared = self.heads * self.head_dim, self.rank * self.groups * self.state
        return (inner, inner, shared, shared, *(self.heads,) * 3, int(self.state * self.rotary) // 2)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state and spec.heads and spec.head_dim
        inner, angles, rank = spec.heads * spec.head_dim, spec.widths[-1], spec.rank
        weights = frame.width * (sum(spec.widths) + inner)
        extra = 2 * spec.state * (1 + rank * spec.heads) + 2 * spec.heads
        extra += inner * ((3 * rank if rank > 1 else 0) + spec.norm)
        matrix, within = inner * spec.state, 2 * ROWS * rank * spec.heads * (spec.state + spec.head_dim)
        cache = (
            ("matrix", matrix * 4),
            ("angle", spec.heads * angles * 4),
            ("key", rank * spec.heads * spec.state * frame.dtype_bytes),
            ("value", inner * frame.dtype_bytes),
        )
        return Cost(
            params=weights + extra,
            flops_prefill=2 * weights + within + 4 * rank * matrix,
            flops_decode=2 * weights + (1 + 6 * rank) * matrix,
            cache=tuple(
                CacheTensor(name=name, stored_bytes=frame.batch * held, read_bytes=frame.batch * held)
                for name, held in cache
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return Mamba3Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class Mamba3State:
    """Matrix [B, H, N, P] and angle [B, H, A], float32; key [B, R, H, N] and value [B, H, P] of the last token."""

    matrix: Tensor
    angle: Tensor
    key: Tensor
    value: Tensor


class Mamba3Mixer(Mixer):
    """Project, norm and turn write and read vectors, scan, skip, gate, project."""

    def __init__(self, spec: Mamba3, frame: Frame) -> None:
        super().__init__()
        assert spec.state and spec.heads and spec.head_dim and spec.groups
        self.widths, self.dtype = spec.widths, DTYPES[frame.dtype]
        self.rank, self.groups = spec.rank, spec.groups
        self.state_size, self.heads, self.head_dim = spec.state, spec.heads, spec.head_dim
        rows = (self.rank, self.heads, self.head_dim)
        self.enter = nn.Linear(frame.width, sum(self.widths), bias=False)
        self.step_bias = nn.Parameter(decay_bias(self.heads))
        self.write_norm, self.read_norm = (Norm(self.state_size, eps=EPSILON) for _ in range(2))
        self.write_bias = nn.Parameter(torch.ones(self.rank, self.heads, self.state_size))
        self.read_bias = nn.Parameter(torch.ones(self.rank, self.heads, self.state_size))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.spread = self.gate_spread = self.gather = None
        if self.rank > 1:
            self.spread, self.gather = (nn.Parameter(torch.ones(rows) / self.rank) for _ in range(2))
            self.gate_spread = nn.Parameter(torch.ones(rows))
        self.norm_weight = nn.Parameter(torch.ones(self.heads, self.head_dim)) if spec.norm else None
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> Mamba3State:  # noqa: ARG002
        device, heads, state = self.enter.weight.device, self.heads, self.state_size
        return Mamba3State(
            matrix=torch.zeros(batch, heads, state, self.head_dim, device=device),
            angle=torch.zeros(batch, heads, self.widths[-1], device=device),
            key=torch.zeros(batch, self.rank, heads, state, device=device, dtype=self.dtype),
            value=torch.zeros(batch, heads, self.head_dim, device=device, dtype=self.dtype),
        )

    def vectors(self, x: Tensor, norm: nn.Module, bias: Tensor) -> Tensor:
        """[..., R·G·N] to normalised, biased vectors of each rank and head [..., R, H, N], float32."""
        normed: Tensor = norm(x.float().unflatten(-1, (self.rank, self.groups, self.state_size)))
        return normed.repeat_interleave(self.heads // self.groups, dim=-2) + bias.float()

    def rows(self, value: Tensor, weight: Tensor | None) -> Tensor:
        """[..., H, P] to one row a rank [..., R, H, P]."""
        return value.unsqueeze(-3) if weight is None else value.unsqueeze(-3) * weight.to(value.dtype)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of x [..., D]: gate and input [..., H, P], write and read vectors [..., R, H, N], not turned yet, then
        log-decays, late and fresh weights [..., H] and the angles [..., H, A] by which a token turns what follows."""
        gate, value, write, read, step, rate, share, angle = self.enter(x).split(self.widths, dim=-1)
        dt = F.softplus(step.float() + self.step_bias.float())
        rate = rate.float()
        # 1 + x above nought, 1 / (1 − x) below: smooth, and never nought.
        rate = (rate.clamp(min=0) + torch.reciprocal(1 - rate.clamp(max=0))).clamp(min=SLOWEST)
        share = torch.sigmoid(share.float())
        return (
            gate.unflatten(-1, (self.heads, -1)),
            value.unflatten(-1, (self.heads, -1)),
            self.vectors(write, self.write_norm, self.write_bias),
            self.vectors(read, self.read_norm, self.read_bias),
            -rate * dt,
            (1 - share) * dt,
            share * dt,
            math.pi * torch.tanh(angle.float()).unsqueeze(-2) * dt.unsqueeze(-1),
        )

    def finish(self, read: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Skip connection, norm, gate, sum over ranks, projection; read and value [..., R, H, P], gate [..., H, P]."""
        y = read.to(gate.dtype) + value * self.skip[:, None].to(gate.dtype)
        y = open_heads(y, self.rows(gate, self.gate_spread), self.norm_weight, eps=EPSILON)
        if self.gather is not None:
            y = y * self.gather.to(y.dtype)
        result: Tensor = self.out(y.sum(-3).flatten(-2))
        return result

    def forward(self, x: Tensor, state: Mamba3State | None = None) -> tuple[Tensor, Any]:
        gate, value, k, q, log_decay, late, fresh, turn = self.scan_inputs(x)
        total = turn.double().cumsum(1)
        if state is not None:
            total = total + state.angle.unsqueeze(1)
        angle = total.remainder(2 * math.pi).float()
        by = turns(angle, self.state_size // 2).unsqueeze(2)
        q, k = turn_pairs(q, by), turn_pairs(k, by)
        v = self.rows(value, self.spread)
        previous = (state.key, self.rows(state.value, self.spread)) if state else None
        matrix, chunk = state.matrix if state else None, max(1, ROWS // self.rank)
        read, matrix = trapezoid(q, k, v, log_decay, late, fresh, matrix, previous, chunk=chunk)
        y = self.finish(read, v, gate)
        return y, self.kept(matrix, angle[:, -1], k[:, -1], value[:, -1]) if state else None

    def step(self, x: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        gate, value, k, q, log_decay, late, fresh, turn = self.scan_inputs(x)
        angle = (state.angle + turn).remainder(2 * math.pi)
        by = turns(angle, self.state_size // 2).unsqueeze(1)
        q, k = turn_pairs(q, by), turn_pairs(k, by)
        v, previous = self.rows(value, self.spread), (state.key, self.rows(state.value, self.spread))
        read, matrix = trapezoid_step(q, k, v, log_decay, late, fresh, state.matrix, previous)
        return self.finish(read, v, gate), self.kept(matrix, angle, k, value)

    def kept(self, matrix: Tensor, angle: Tensor, key: Tensor, value: Tensor) -> Mamba3State:
        """The state after a token; copies, because a view would keep a whole prefill alive."""
        key, value = (part.to(self.dtype, copy=True) for part in (key, value))
        return Mamba3State(matrix=matrix, angle=angle.clone(), key=key, value=value)

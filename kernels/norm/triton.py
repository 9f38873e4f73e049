"""Norms over the last dimension, with their gate, in one Triton kernel forwards and one backwards.

Letters: B entries of the first axis with a weight each, N rows of an entry, G groups that are normalised apart, D width
of a group, P programs that share an entry's rows.  After arXiv:1910.07467.

A program holds whole rows of one group and takes a few of them at a time. Backwards it makes anew what it needs of the
forward pass. What its rows add to the gradient of the weight it keeps in registers and writes apart; torch sums these
parts, so that two runs agree to the bit. Rows need only be regular: a part of a projection's output is read where it
lies.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import Configuration
from kernels.launch import configure, launch

OPERATOR = "norm"


@triton.jit
def _opened(gate, SILU: tl.constexpr):
    """The activation of a gate, and its derivative."""
    share = tl.sigmoid(gate)
    opened = share
    slope = share * (1.0 - share)
    if SILU:
        opened = gate * share
        slope = share + gate * slope
    return opened, slope


@triton.jit
def _reciprocal(u, eps, D: tl.constexpr, UNIT: tl.constexpr):
    """1 / √(Σ u² + eps) of each row, or of the mean in place of the sum."""
    total = tl.sum(u * u, 1)
    if not UNIT:
        total = total / D
    return tl.rsqrt(total + eps)[:, None]


@triton.jit
def _weight(weight, at, mask):
    """The weight of a group as a row, or one."""
    return 1.0 if weight is None else tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N"])
def _forward(
    x,
    gate,
    weight,
    output,
    N,
    x_stride,
    gate_stride,
    eps,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    ROWS: tl.constexpr = ELEMENTS // BLOCK_D if ELEMENTS > BLOCK_D else 1
    entry = (tl.program_id(1) // G).to(tl.int64)
    g = tl.program_id(1) % G
    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = entry * N + row.to(tl.int64)
    own = (row < N)[:, None] & (d < D)[None, :]
    u = tl.load(x + rows[:, None] * x_stride + (g * D + d)[None, :], mask=own, other=0.0).to(tl.float32)
    if GATE != "none":
        at_gate = rows[:, None] * gate_stride + (g * D + d)[None, :]
        opened, _ = _opened(tl.load(gate + at_gate, mask=own, other=0.0).to(tl.float32), SILU)
    if GATE == "before":
        u = u * opened
    y = u * (_reciprocal(u, eps, D, UNIT) * scale) * _weight(weight, (entry * G + g) * D + d, d < D)
    if GATE == "after":
        y = y * opened
    at = rows[:, None] * (G * D) + (g * D + d)[None, :]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["N"])
def _backward(
    x,
    gate,
    weight,
    d_output,
    d_x,
    d_gate,
    d_weight,
    N,
    x_stride,
    gate_stride,
    d_stride,
    eps,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    TURNS: tl.constexpr,
):
    ROWS: tl.constexpr = ELEMENTS // BLOCK_D if ELEMENTS > BLOCK_D else 1
    entry = (tl.program_id(1) // G).to(tl.int64)
    g = tl.program_id(1) % G
    d = tl.arange(0, BLOCK_D)
    # Only the weight's gradient gains by a program that takes more than one turn.
    SPAN: tl.constexpr = ROWS if weight is None else ROWS * TURNS
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0) * SPAN
    for start in range(first, tl.minimum(first + SPAN, N), ROWS):
        row = start + tl.arange(0, ROWS)
        rows = entry * N + row.to(tl.int64)
        own = (row < N)[:, None] & (d < D)[None, :]
        at = rows[:, None] * (G * D) + (g * D + d)[None, :]
        at_x = rows[:, None] * x_stride + (g * D + d)[None, :]
        at_gate = rows[:, None] * gate_stride + (g * D + d)[None, :]
        at_d = rows[:, None] * d_stride + (g * D + d)[None, :]
        u = tl.load(x + at_x, mask=own, other=0.0).to(tl.float32)
        d_y = tl.load(d_output + at_d, mask=own, other=0.0).to(tl.float32)
        if UNIT:
            d_y = d_y * scale
        if GATE != "none":
            opened, slope = _opened(tl.load(gate + at_gate, mask=own, other=0.0).to(tl.float32), SILU)
        if GATE == "before":
            u = u * opened
        reciprocal = _reciprocal(u, eps, D, UNIT)
        normed = u * reciprocal
        w = _weight(weight, (entry * G + g) * D + d, d < D)
        if GATE == "after":
            tl.store(d_gate + at, (d_y * normed * w * slope).to(d_gate.dtype.element_ty), mask=own)
            d_y = d_y * opened
        total += d_y * normed
        d_y = d_y * w
        held = tl.sum(d_y * normed, 1)[:, None]
        if not UNIT:
            held = held / D
        if GATE == "before":
            # Read again, because registers do not hold a wide row of so many things.
            closed = tl.load(x + at_x, mask=own, other=0.0, eviction_policy="evict_first").to(tl.float32)
            again = tl.load(gate + at_gate, mask=own, other=0.0, eviction_policy="evict_first").to(tl.float32)
            opened, slope = _opened(again, SILU)
            normed = closed * opened * reciprocal
        d_u = reciprocal * (d_y - normed * held)
        if GATE == "before":
            tl.store(d_gate + at, (d_u * closed * slope).to(d_gate.dtype.element_ty), mask=own)
            d_u = d_u * opened
        tl.store(d_x + at, d_u.to(d_x.dtype.element_ty), mask=own)
    if weight is not None:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(d_weight + part * D + d, tl.sum(total, 0), mask=d < D)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What a call asks beside its tensors."""

    width: int
    eps: float
    dtype: torch.dtype
    scale: float = 1.0
    unit: bool = False
    activation: str = "silu"
    before: bool = False
    groups: int = 1


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, options: _Options) -> Tensor:
        width = options.width * options.groups
        rows, doors = _rows(x, width), None if gate is None else _rows(gate, width)
        output = torch.empty(x.shape, dtype=options.dtype, device=x.device)
        row = configure(OPERATOR, "forward", (options.width,), x)
        sizes, entries = _sizes(gate, options), _entries(weight)
        own = len(rows) // entries
        launch(
            OPERATOR,
            _forward,
            (triton.cdiv(own, _at_once(sizes, row)), entries * options.groups),
            (rows, doors, weight, output, own, *_strides(rows, doors), options.eps, options.scale),
            sizes,
            row,
            like=x,
        )
        ctx.save_for_backward(rows, weight, doors)
        ctx.options, ctx.shape = options, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        options, d_output = ctx.options, _rows(grads[0], x.shape[-1])
        row = configure(OPERATOR, "backward", (options.width,), x)
        sizes, entries = _sizes(gate, options), _entries(weight)
        own = len(x) // entries
        turns = 1 if weight is None else row.blocks["TURNS"]
        programs = triton.cdiv(own, turns * _at_once(sizes, row))
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
        d_weight = None
        if weight is not None:
            d_weight = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
        strides = (*_strides(x, gate), d_output.stride(0))
        launch(
            OPERATOR,
            _backward,
            (programs, entries * options.groups),
            (x, gate, weight, d_output, d_x, d_gate, d_weight, own, *strides, options.eps, options.scale),
            sizes,
            row,
            like=x,
        )
        if d_weight is not None:
            d_weight = d_weight.sum(0).to(weight.dtype)
        return d_x.view(ctx.shape), d_weight, None if d_gate is None else d_gate.view(ctx.shape), None


def _rows(x: Tensor, width: int) -> Tensor:
    """Whatever ends in so many numbers as [R, W] with those side by side; copied only where its rows are not regular."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _strides(x: Tensor, gate: Tensor | None) -> tuple[int, int]:
    """From row to row of each."""
    return x.stride(0), 0 if gate is None else gate.stride(0)


def _entries(weight: Tensor | None) -> int:
    """How many weights there are."""
    return len(weight) if weight is not None and weight.dim() == 2 else 1


def _sizes(gate: Tensor | None, options: _Options) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "G": options.groups,
        "D": options.width,
        "BLOCK_D": int(triton.next_power_of_2(options.width)),
        "UNIT": options.unit,
        "SILU": options.activation == "silu",
        "GATE": "none" if gate is None else "before" if options.before else "after",
    }


def _at_once(sizes: dict[str, Any], row: Configuration) -> int:
    """Rows that a program takes at a time, as the kernels reckon it."""
    return max(1, row.blocks["ELEMENTS"] // int(sizes["BLOCK_D"]))


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    activation: str,
    before: bool,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """One launch; shapes as in `ops.rms_norm`."""
    options = _Options(
        width=x.shape[-1] // groups,
        eps=eps,
        dtype=dtype,
        activation=activation,
        before=before,
        groups=groups,
    )
    result: Tensor = _Norm.apply(x, None if weight is None else weight.contiguous(), gate, options)
    return result


def unit_norm(x: Tensor, eps: float, scale: float, dtype: torch.dtype) -> Tensor:
    """One launch; shapes as in `ops.unit_norm`."""
    width, groups = x.shape[-1], 1
    if x.dim() > 1 and not x.is_contiguous() and x.stride()[-2:] == (width, 1):
        # Heads side by side in a part of a projection's output: taken as groups, its rows are regular.
        groups = x.shape[-2]
    options = _Options(width=width, eps=eps, dtype=dtype, scale=scale, unit=True, groups=groups)
    result: Tensor = _Norm.apply(x, None, None, options)
    return result

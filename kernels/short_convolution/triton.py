"""Depthwise causal convolution in one Triton kernel forwards and one backwards, and a step.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.

A program makes a tile of tokens by channels, with bias, activation and the carried tail. Backwards the tiles begin W-1
places before the text, so that the gradient of the tail is one of the tokens' like any other, and overlap by W-1 tokens,
all of which see a place; what was not yet activated is made anew. Tiles of time write their shares of the weight's and
the bias's gradients apart; they are summed afterwards, so that two runs agree to the bit.

To the interpreter a program is dear and a wide tile is not: it has rows of its own in the table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import by_rows, configure, launch
from kernels.packing import chunk_offsets

OPERATOR = "short_convolution"


@triton.jit
def _tile(T, cu_seqlens, offsets, owners, BEFORE: tl.constexpr, PLACES: tl.constexpr):
    """The document of this program, its first row and length, and where in it the tile begins, -BEFORE at the least."""
    program = tl.program_id(0)
    if cu_seqlens is not None:
        document = tl.load(owners + program).to(tl.int64)
        first = tl.load(cu_seqlens + document).to(tl.int64)
        length = (tl.load(cu_seqlens + document + 1).to(tl.int64) - first).to(tl.int32)
        tile = program - tl.load(offsets + document).to(tl.int32)
    else:
        tiles = tl.cdiv(T + BEFORE, PLACES)
        document = (program // tiles).to(tl.int64)
        first = document * T
        length = T
        tile = program % tiles
    return document, first, length, tile * PLACES - BEFORE


@triton.jit
def _seen(x, tail, X_ROW, document, first, length, start, i, channels, C: tl.constexpr, W: tl.constexpr):
    """What was fed in at the places start + i [BLOCK_T]: of the text, or of the tail before it."""
    t, own = start + i, (channels < C)[None, :]
    at = x + (first + t)[:, None] * X_ROW + channels[None, :]
    seen = tl.load(at, mask=own & ((t >= 0) & (t < length))[:, None], other=0.0).to(tl.float32)
    if tail is not None:
        if start < 0:
            at = tail + (document * (W - 1) + W - 1 + t)[:, None] * C + channels[None, :]
            before = own & ((t < 0) & (t > -W))[:, None]
            seen += tl.load(at, mask=before, other=0.0).to(tl.float32)
    return seen


@triton.jit
def _open(y):
    """The logistic function, with no exponent above nought."""
    small = tl.exp(-tl.abs(y))
    return tl.where(y >= 0, 1.0, small) / (1.0 + small)


@triton.jit(do_not_specialize=["T"])
def _forward(
    x,
    weight,
    bias,
    tail,
    output,
    last,
    cu_seqlens,
    offsets,
    owners,
    T,
    X_ROW,
    C: tl.constexpr,
    W: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    document, first, length, start = _tile(T, cu_seqlens, offsets, owners, 0, BLOCK_T)
    i = tl.arange(0, BLOCK_T)
    t = start + i
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    weight_at = weight + (document * C + channels if OWN_WEIGHT else channels) * W
    bias_at = (document * C + channels) if OWN_BIAS else channels
    y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for lag in tl.static_range(W):
        seen = _seen(x, tail, X_ROW, document, first, length, start - lag, i, channels, C, W)
        tap = tl.load(weight_at + W - 1 - lag, mask=own, other=0.0).to(tl.float32)
        y += seen * tap[None, :]
        if lag < W - 1:
            # What the last token sees is the tail that it leaves.
            at = last + (document * (W - 1) + W - 2 - lag) * C + channels[None, :]
            at = tl.broadcast_to(at, [BLOCK_T, BLOCK_C])
            here = own[None, :] & (t == length - 1)[:, None]
            tl.store(at, seen.to(last.dtype.element_ty), mask=here)
    if bias is not None:
        y += tl.load(bias + bias_at, mask=own, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * _open(y)
    at = output + (first + t)[:, None] * C + channels[None, :]
    tl.store(at, y.to(output.dtype.element_ty), mask=own[None, :] & (t < length)[:, None])


@triton.jit(do_not_specialize=["T"])
def _backward(
    x,
    weight,
    bias,
    tail,
    d_output,
    d_last,
    d_x,
    d_filter,
    d_tail,
    aside,
    cu_seqlens,
    offsets,
    owners,
    T,
    X_ROW,
    C: tl.constexpr,
    W: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PLACES: tl.constexpr = BLOCK_T - W + 1
    document, first, length, start = _tile(T, cu_seqlens, offsets, owners, W - 1, PLACES)
    i = tl.arange(0, BLOCK_T)
    t = start + i
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    weight_at = weight + (document * C + channels if OWN_WEIGHT else channels) * W
    bias_at = (document * C + channels) if OWN_BIAS else channels
    at = d_output + (first + t)[:, None] * C + channels[None, :]
    d_y = tl.load(at, mask=own[None, :] & ((t >= 0) & (t < length))[:, None], other=0.0).to(tl.float32)
    # By how many places back they look.
    seen, taps = (), ()
    for lag in tl.static_range(W):
        seen = seen + (_seen(x, tail, X_ROW, document, first, length, start - lag, i, channels, C, W),)
        tap = tl.load(weight_at + W - 1 - lag, mask=own, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    if SILU:
        y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if bias is not None:
            y += tl.load(bias + bias_at, mask=own, other=0.0).to(tl.float32)[None, :]
        for lag in tl.static_range(W):
            y += seen[lag] * taps[lag]
        gate = _open(y)
        d_y = d_y * gate * (1.0 + y * (1.0 - gate))
        # Rows must move against one another: through memory, which this program alone writes and reads.
        row = aside + (tl.program_id(0).to(tl.int64) * BLOCK_T + i)[:, None] * C + channels[None, :]
        tl.store(row, d_y, mask=own[None, :])
        tl.debug_barrier()
    # The last W-1 tokens are the next tile's too, and counted there.
    counted = tl.where((i < PLACES)[:, None], d_y, 0.0)
    part = d_filter + tl.program_id(0).to(tl.int64) * (W + 1) * C + channels
    tl.store(part + W * C, tl.sum(counted, 0), mask=own)
    d_seen = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for lag in tl.static_range(W):
        tl.store(part + (W - 1 - lag) * C, tl.sum(counted * seen[lag], 0), mask=own)
        if lag > 0:
            if SILU:
                d_y = tl.load(row + lag * C, mask=own[None, :] & (i < PLACES)[:, None], other=0.0)
            else:
                later = own[None, :] & ((t + lag >= 0) & (t + lag < length))[:, None]
                d_y = tl.load(at + lag * C, mask=later, other=0.0).to(tl.float32)
        d_seen += d_y * taps[lag]
    if d_last is not None:
        place = t - length + W - 1
        at = d_last + (document * (W - 1) + place)[:, None] * C + channels[None, :]
        here = own[None, :] & ((place >= 0) & (t < length))[:, None]
        d_seen += tl.load(at, mask=here, other=0.0).to(tl.float32)
    mine = own[None, :] & ((i < PLACES) & (t < length))[:, None]
    at = d_x + (first + t)[:, None] * C + channels[None, :]
    tl.store(at, d_seen.to(d_x.dtype.element_ty), mask=mine & (t >= 0)[:, None])
    if d_tail is not None:
        at = d_tail + (document * (W - 1) + W - 1 + t)[:, None] * C + channels[None, :]
        tl.store(at, d_seen.to(d_tail.dtype.element_ty), mask=mine & (t < 0)[:, None])


@triton.jit
def _step(
    x,
    weight,
    bias,
    tail,
    output,
    last,
    C: tl.constexpr,
    W: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    weight_at = weight + (b * C + channels if OWN_WEIGHT else channels) * W
    bias_at = (b * C + channels) if OWN_BIAS else channels
    y = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        y += tl.load(bias + bias_at, mask=own, other=0.0).to(tl.float32)
    for tap in tl.static_range(W):
        if tap < W - 1:
            seen = tl.load(tail + (b * (W - 1) + tap) * C + channels, mask=own, other=0.0)
        else:
            seen = tl.load(x + b * C + channels, mask=own, other=0.0)
        y += seen.to(tl.float32) * tl.load(weight_at + tap, mask=own, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(last + (b * (W - 1) + tap - 1) * C + channels, seen, mask=own)
    if SILU:
        y = y * _open(y)
    tl.store(output + b * C + channels, y.to(output.dtype.element_ty), mask=own)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, channels = x.shape
        taps = weight.shape[-1]
        row = configure(OPERATOR, "forward", (taps,), x)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, owners, tiles = _tiles(cu_seqlens, batch, time, 0, row.blocks["BLOCK_T"])
        rows, apart = by_rows(x)
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        last = torch.empty(documents, taps - 1, channels, dtype=x.dtype, device=x.device)
        launch(
            OPERATOR,
            _forward,
            (tiles, triton.cdiv(channels, row.blocks["BLOCK_C"])),
            (rows, weight, bias, tail, output, last, cu_seqlens, offsets, owners, time, apart),
            {"C": channels, "W": taps, **_owned(weight, bias, cu_seqlens), "SILU": silu},
            row,
            like=x,
        )
        ctx.save_for_backward(x, weight, bias, tail, cu_seqlens)
        ctx.silu = silu
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, cu_seqlens = ctx.saved_tensors
        batch, time, channels = x.shape
        taps = weight.shape[-1]
        row = configure(OPERATOR, "backward", (taps,), x)
        block = row.blocks["BLOCK_T"]
        offsets, owners, tiles = _tiles(cu_seqlens, batch, time, taps - 1, block - taps + 1)
        rows, apart = by_rows(x)
        d_output, d_last = grads
        d_output = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if d_output is None else d_output
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_tail = None if tail is None else torch.empty_like(tail)
        # Of each tap, then of the bias.
        d_filter = torch.empty(tiles, taps + 1, channels, dtype=torch.float32, device=x.device)
        aside = None
        if ctx.silu:
            aside = torch.empty(tiles, block, channels, dtype=torch.float32, device=x.device)
        launch(
            OPERATOR,
            _backward,
            (tiles, triton.cdiv(channels, row.blocks["BLOCK_C"])),
            (
                *(rows, weight, bias, tail, d_output.contiguous()),
                *(None if d_last is None else d_last.contiguous(), d_x, d_filter, d_tail, aside),
                *(cu_seqlens, offsets, owners, time, apart),
            ),
            {"C": channels, "W": taps, **_owned(weight, bias, cu_seqlens), "SILU": ctx.silu},
            row,
            like=x,
        )
        d_weight = _summed(d_filter[:, :taps], batch, weight.dim() == 3).mT.to(weight.dtype)
        d_bias = None
        if bias is not None:
            d_bias = _summed(d_filter[:, taps], batch, bias.dim() == 2).to(bias.dtype)
        return d_x, d_weight, d_bias, d_tail, None, None


def _owned(weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, bool]:
    """Which parameters programs of one launch have for themselves: packed documents share those of their one row."""
    alone = cu_seqlens is None
    return {
        "OWN_WEIGHT": alone and weight.dim() == 3,
        "OWN_BIAS": alone and bias is not None and bias.dim() == 2,
    }


def _summed(parts: Tensor, batch: int, own: bool) -> Tensor:
    """The gradient of a parameter from what each tile adds to it."""
    return parts.unflatten(0, (batch, -1)).sum(1) if own else parts.sum(0)


def _tiles(
    cu_seqlens: Tensor | None, batch: int, time: int, before: int, block: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """Where each document's tiles begin, the document of each tile, and how many tiles there are at most.

    Each document is as much as `before` places longer at its beginning. Asks the device nothing.
    """
    if cu_seqlens is None:
        return None, None, batch * int(triton.cdiv(time + before, block))
    documents = len(cu_seqlens) - 1
    longer = cu_seqlens + before * torch.arange(documents + 1, device=cu_seqlens.device)
    offsets, count = chunk_offsets(longer, 1, time + before * documents, block)
    assert offsets is not None
    owners = torch.searchsorted(offsets[1:], torch.arange(count, device=offsets.device), right=True)
    # Tiles that are not needed lie behind the end of the last document.
    return offsets, owners.clamp_(max=documents - 1), count


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All tokens in one launch; shapes as in `ops.short_convolution`. Sums are taken in float32."""
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ShortConvolution.apply(
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if tail is None or tail.shape[1] == 0 else tail.to(x.dtype).contiguous(),
            cu_seqlens,
            activation == "silu",
        )
    return result


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.short_convolution_step`. Carries no gradient."""
    batch, channels = x.shape
    taps = weight.shape[-1]
    row = configure(OPERATOR, "step", (taps,), x)
    output = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    last = torch.empty(batch, taps - 1, channels, dtype=x.dtype, device=x.device)
    launch(
        OPERATOR,
        _step,
        (batch, triton.cdiv(channels, row.blocks["BLOCK_C"])),
        (
            x.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            tail.to(x.dtype).contiguous(),
            output,
            last,
        ),
        {"C": channels, "W": taps, **_owned(weight, bias, None), "SILU": activation == "silu"},
        row,
        like=x,
    )
    return output, last

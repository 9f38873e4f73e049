"""Mamba's selective scan in two Triton kernels, each walking the text in one launch, and a step.

Letters: B batch, T time, C channels, N numbers a channel keeps.  After arXiv:2312.00752.

A program holds the states of a tile of channels in registers and walks the text token by token, forwards, or backwards
for the gradients. What a chunk's tokens bring is loaded before the walk through the chunk begins, so that memory is
waited for once a chunk and not once a token. The forward pass leaves the state before each chunk; the backward pass
walks the chunk once more from there. What tiles of channels add to the gradients of the write and read vectors, and
what texts add to those of the rates, is written apart and summed afterwards, so that two runs agree to the bit.

To the interpreter a program is dear and a wide tile is not: it has rows of its own in the table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.fused import document_bounds
from kernels.launch import by_rows, configure, launch
from kernels.packing import chunk_offsets

OPERATOR = "selective_scan"
CHUNK = 8
"""Tokens of a chunk, unrolled: the forward and the backward pass must agree on it, so it is not in the table."""


@triton.jit(do_not_specialize=["T", "CARRIED"])
def _forward(
    x,
    delta,
    rate,
    write,
    read,
    skip,
    state,
    output,
    last,
    starts,
    cu_seqlens,
    offsets,
    T,
    CARRIED,
    X_ROW,
    DELTA_ROW,
    WRITE_ROW,
    READ_ROW,
    RATE_ENTRY,
    SKIP_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own, kept = channels < C, numbers < N
    tile = channels[:, None] * N + numbers[None, :]
    inside = own[:, None] & kept[None, :]
    rates = tl.load(rate + document * RATE_ENTRY + tile, mask=inside, other=0.0).to(tl.float32)
    skips = tl.load(skip + document * SKIP_ENTRY + channels, mask=own, other=0.0).to(tl.float32)
    S = tl.load(state + document * C * N + tile, mask=inside & (CARRIED != 0), other=0.0)
    for c in range(0, tl.cdiv(length, CHUNK)):
        if starts is not None:
            tl.store(starts + (chunk + c) * C * N + tile, S, mask=inside)
        # Behind the end a step of nought fades nothing and writes nothing.
        values, steps, writes, reads = (), (), (), ()
        for j in tl.static_range(CHUNK):
            here, there = own & (c * CHUNK + j < length), kept & (c * CHUNK + j < length)
            row = first + c * CHUNK + j
            value = tl.load(x + row * X_ROW + channels, mask=here, other=0.0)
            step = tl.load(delta + row * DELTA_ROW + channels, mask=here, other=0.0)
            written = tl.load(write + row * WRITE_ROW + numbers, mask=there, other=0.0)
            shown = tl.load(read + row * READ_ROW + numbers, mask=there, other=0.0)
            values = values + (value.to(tl.float32),)
            steps = steps + (step.to(tl.float32),)
            writes = writes + (written.to(tl.float32),)
            reads = reads + (shown.to(tl.float32),)
        for j in tl.static_range(CHUNK):
            S = S * tl.exp(steps[j][:, None] * rates) + (steps[j] * values[j])[:, None] * writes[j][None, :]
            y = tl.sum(S * reads[j][None, :], 1) + skips * values[j]
            at = output + (first + c * CHUNK + j) * C + channels
            tl.store(at, y.to(output.dtype.element_ty), mask=own & (c * CHUNK + j < length))
    tl.store(last + document * C * N + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T", "TOTAL"])
def _backward(
    x,
    delta,
    rate,
    write,
    read,
    skip,
    starts,
    d_output,
    d_last,
    d_x,
    d_delta,
    d_rate,
    d_write,
    d_read,
    d_skip,
    d_state,
    cu_seqlens,
    offsets,
    T,
    TOTAL,
    X_ROW,
    DELTA_ROW,
    WRITE_ROW,
    READ_ROW,
    RATE_ENTRY,
    SKIP_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    part = tl.program_id(0).to(tl.int64) * TOTAL
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own, kept = channels < C, numbers < N
    tile = channels[:, None] * N + numbers[None, :]
    inside = own[:, None] & kept[None, :]
    rates = tl.load(rate + document * RATE_ENTRY + tile, mask=inside, other=0.0).to(tl.float32)
    skips = tl.load(skip + document * SKIP_ENTRY + channels, mask=own, other=0.0).to(tl.float32)
    d_rates = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_skips = tl.zeros([BLOCK_C], tl.float32)
    # The gradient of the state that a token leaves, and once it has faded of the one that it finds.
    D = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if d_last is not None:
        D += tl.load(d_last + document * C * N + tile, mask=inside, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        S = tl.load(starts + (chunk + c) * C * N + tile, mask=inside, other=0.0)
        states = (S,)
        values, steps, writes, asks = (), (), (), ()
        for j in tl.static_range(CHUNK):
            here, there = own & (c * CHUNK + j < length), kept & (c * CHUNK + j < length)
            row = first + c * CHUNK + j
            value = tl.load(x + row * X_ROW + channels, mask=here, other=0.0)
            step = tl.load(delta + row * DELTA_ROW + channels, mask=here, other=0.0)
            written = tl.load(write + row * WRITE_ROW + numbers, mask=there, other=0.0)
            ask = tl.load(d_output + row * C + channels, mask=here, other=0.0)
            values = values + (value.to(tl.float32),)
            steps = steps + (step.to(tl.float32),)
            writes = writes + (written.to(tl.float32),)
            asks = asks + (ask.to(tl.float32),)
        for j in tl.static_range(CHUNK):
            S = S * tl.exp(steps[j][:, None] * rates) + (steps[j] * values[j])[:, None] * writes[j][None, :]
            states = states + (S,)
        for j in tl.static_range(CHUNK - 1, -1, -1):
            here, there = own & (c * CHUNK + j < length), kept & (c * CHUNK + j < length)
            row = first + c * CHUNK + j
            value, step, ask = values[j], steps[j], asks[j]
            shown = tl.load(read + row * READ_ROW + numbers, mask=there, other=0.0).to(tl.float32)
            at = (part + row) * N + numbers
            tl.store(d_read + at, tl.sum(states[j + 1] * ask[:, None], 0), mask=there)
            D += ask[:, None] * shown[None, :]
            tl.store(d_write + at, tl.sum(D * (step * value)[:, None], 0), mask=there)
            d_scaled = tl.sum(D * writes[j][None, :], 1)
            D = D * tl.exp(step[:, None] * rates)
            d_exponent = D * states[j]
            d_rates += d_exponent * step[:, None]
            d_skips += ask * value
            d_step = tl.sum(d_exponent * rates, 1) + d_scaled * value
            d_value = d_scaled * step + skips * ask
            tl.store(d_delta + row * C + channels, d_step.to(d_delta.dtype.element_ty), mask=here)
            tl.store(d_x + row * C + channels, d_value.to(d_x.dtype.element_ty), mask=here)
    tl.store(d_rate + document * C * N + tile, d_rates, mask=inside)
    tl.store(d_skip + document * C + channels, d_skips, mask=own)
    tl.store(d_state + document * C * N + tile, D, mask=inside)


@triton.jit
def _step(
    x,
    delta,
    rate,
    write,
    read,
    skip,
    state,
    output,
    last,
    RATE_ENTRY,
    SKIP_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    b = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own, kept = channels < C, numbers < N
    tile = channels[:, None] * N + numbers[None, :]
    inside = own[:, None] & kept[None, :]
    value = tl.load(x + b * C + channels, mask=own, other=0.0).to(tl.float32)
    step = tl.load(delta + b * C + channels, mask=own, other=0.0).to(tl.float32)
    written = tl.load(write + b * N + numbers, mask=kept, other=0.0).to(tl.float32)
    shown = tl.load(read + b * N + numbers, mask=kept, other=0.0).to(tl.float32)
    skips = tl.load(skip + b * SKIP_ENTRY + channels, mask=own, other=0.0).to(tl.float32)
    rates = tl.load(rate + b * RATE_ENTRY + tile, mask=inside, other=0.0).to(tl.float32)
    S = tl.load(state + b * C * N + tile, mask=inside, other=0.0).to(tl.float32)
    S = S * tl.exp(step[:, None] * rates) + (step * value)[:, None] * written[None, :]
    tl.store(last + b * C * N + tile, S, mask=inside)
    y = tl.sum(S * shown[None, :], 1) + skips * value
    tl.store(output + b * C + channels, y.to(output.dtype.element_ty), mask=own)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        skip: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, channels = x.shape
        size = rate.shape[-1]
        row = configure(OPERATOR, "forward", (size,), x)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, CHUNK)
        rows, apart = _rows(x, delta, write, read)
        output = torch.empty(batch, time, channels, dtype=x.dtype, device=x.device)
        last = torch.empty(documents, channels, size, dtype=torch.float32, device=x.device)
        starts = None
        if learns:
            starts = torch.empty(chunks, channels, size, dtype=torch.float32, device=x.device)
        launch(
            OPERATOR,
            _forward,
            (_tiles(channels, size, row.blocks["TILE"]), documents),
            (
                # One kernel whether a state is carried or not: where none is, it reads nothing.
                *(rows[0], rows[1], rate, rows[2], rows[3], skip, last if state is None else state),
                *(output, last, starts, cu_seqlens, offsets, time, int(state is not None), *apart),
                *_entries(rate, skip, cu_seqlens),
            ),
            {"C": channels, "N": size, "BLOCK_N": triton.next_power_of_2(size), "CHUNK": CHUNK},
            row,
            like=x,
        )
        ctx.save_for_backward(x, delta, rate, write, read, skip, starts, cu_seqlens)
        ctx.has_state = state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, delta, rate, write, read, skip, starts, cu_seqlens = ctx.saved_tensors
        batch, time, channels = x.shape
        size = rate.shape[-1]
        row = configure(OPERATOR, "backward", (size,), x)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, _ = chunk_offsets(cu_seqlens, batch, time, CHUNK)
        rows, apart = _rows(x, delta, write, read)
        d_output, d_last = grads
        d_output = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if d_output is None else d_output
        tiles = _tiles(channels, size, row.blocks["TILE"])

        def wide(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=x.device)

        d_x, d_delta = (torch.empty(x.shape, dtype=part.dtype, device=x.device) for part in (x, delta))
        d_rate, d_skip = wide(documents, channels, size), wide(documents, channels)
        # Of the write and of the read vectors, so that one sum serves both.
        d_vectors = wide(2, tiles, batch, time, size)
        d_state = wide(documents, channels, size)
        launch(
            OPERATOR,
            _backward,
            (tiles, documents),
            (
                *(rows[0], rows[1], rate, rows[2], rows[3], skip, starts, d_output.contiguous()),
                *(None if d_last is None else d_last.contiguous(), d_x, d_delta, d_rate, d_vectors[0]),
                *(d_vectors[1], d_skip, d_state, cu_seqlens, offsets, time, batch * time, *apart),
                *_entries(rate, skip, cu_seqlens),
            ),
            {"C": channels, "N": size, "BLOCK_N": triton.next_power_of_2(size), "CHUNK": CHUNK},
            row,
            like=x,
        )
        d_write, d_read = d_vectors.sum(1)
        return (
            d_x,
            d_delta,
            _summed(d_rate, rate, batch),
            d_write.to(write.dtype),
            d_read.to(read.dtype),
            _summed(d_skip, skip, batch),
            d_state if ctx.has_state else None,
            None,
            None,
        )


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors by rows, then how far the rows of each lie apart."""
    laid = [by_rows(tensor) for tensor in tensors]
    return [tensor for tensor, _ in laid], [apart for _, apart in laid]


def _entries(rate: Tensor, skip: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """How far the parameters of batch entries lie apart, nought where all share them: as the documents of a row do."""
    alone = cu_seqlens is None
    return (
        rate.stride(0) if alone and rate.dim() == 3 else 0,
        skip.stride(0) if alone and skip.dim() == 2 else 0,
    )


def _summed(parts: Tensor, parameter: Tensor, batch: int) -> Tensor:
    """The gradient of a parameter from what each document adds to it."""
    own = parameter.dim() == parts.dim()
    return (parts.unflatten(0, (batch, -1)).sum(1) if own else parts.sum(0)).to(parameter.dtype)


def _tiles(channels: int, size: int, tile: int) -> int:
    """How many tiles of states there are."""
    return int(triton.cdiv(channels, tile // triton.next_power_of_2(size)))


def selective_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The whole text in one launch; shapes as in `ops.selective_scan`. All arithmetic is in float32."""
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _SelectiveScan.apply(
            *(x, delta, rate.contiguous(), write, read, skip.contiguous()),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
            wants_gradient(x, delta, rate, write, read, skip, state),
        )
    return result


def step(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.selective_scan_step`. Carries no gradient."""
    batch, channels = x.shape
    size = rate.shape[-1]
    row = configure(OPERATOR, "step", (size,), x)
    rate, skip = rate.contiguous(), skip.contiguous()
    apart = _entries(rate, skip, None)
    output = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    last = torch.empty(batch, channels, size, dtype=torch.float32, device=x.device)
    launch(
        OPERATOR,
        _step,
        (_tiles(channels, size, row.blocks["TILE"]), batch),
        (*(part.contiguous() for part in (x, delta, rate, write, read, skip, state)), output, last, *apart),
        {"C": channels, "N": size, "BLOCK_N": triton.next_power_of_2(size)},
        row,
        like=x,
    )
    return output, last

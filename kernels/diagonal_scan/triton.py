"""Diagonal linear recurrence in two Triton kernels, each walking the text in one launch, and a step; so its modes.

Letters: B batch, T time, C channels, N modes of a channel.  After RG-LRU, arXiv:2402.19427, and S4D, arXiv:2206.11893.

A program walks a tile of channels token by token, forwards, or backwards for the gradients. What a chunk's tokens bring
is loaded before the walk through the chunk begins, so that memory is waited for once a chunk and not once a token. A
factor is only ever multiplied, so that a decay of nought is as good as any. The forward pass leaves the state before
each chunk; the backward pass walks the chunk once more from there.

Modes that fade alike at every token keep their factors in registers, and their states too: what a token writes is read
off at once, so that no state of a token but the last reaches the memory. What texts add to the gradients of the poles
and weights is written apart and summed afterwards, so that two runs agree to the bit.

Complex numbers come as pairs of real ones, named re and im; real ones are re alone. To the interpreter a program is
dear and a wide tile is not: it has rows of its own in the table.
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

OPERATOR = "diagonal_scan"
CHUNK = 16
"""Tokens of a chunk, unrolled; half as many where each number is two. Not in the table, because the forward and the
backward pass must agree on it."""
MODE_CHUNK = 8
"""The same where a channel has many modes."""


@triton.jit
def _factor(re, im):
    """exp of a complex log-decay: real and imaginary part, to float32's precision at any angle."""
    # Written out, since the library's sine keeps a table in memory, which counts as spilled registers.
    wide = im.to(tl.float64)
    # Quarters of a circle, the nearest whole number of which is taken off.
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)
    rest = (wide - quarters * 1.5707963267948966).to(tl.float32)
    # Angles so large that even float64 loses the circle in them turn somehow, but make nothing larger.
    rest = tl.where(tl.abs(rest) > 0.8, 0.0, rest)
    place = (quarters - 4 * tl.floor(quarters * 0.25)).to(tl.int32)
    # Minimax polynomials on an eighth of a circle to both sides, from the Cephes library.
    square = rest * rest
    cosine = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1 - 0.5 * square + square * square * cosine
    sine = -1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4)
    sine = rest + rest * square * sine
    even = place % 2 == 0
    size = tl.exp(re)
    along = tl.where((place == 1) | (place == 2), -size, size) * tl.where(even, cosine, sine)
    across = tl.where(place >= 2, -size, size) * tl.where(even, sine, cosine)
    return along, across


@triton.jit(do_not_specialize=["T", "CARRIED"])
def _forward(
    log_decay,
    x,
    state,
    output,
    last,
    starts,
    cu_seqlens,
    offsets,
    T,
    CARRIED,
    C: tl.constexpr,
    COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    entry = (document * C + channels) * PARTS
    carried = own & (CARRIED != 0)
    h_re = tl.load(state + entry, mask=carried, other=0.0)
    if COMPLEX:
        h_im = tl.load(state + entry + 1, mask=carried, other=0.0)
    for c in range(0, tl.cdiv(length, CHUNK)):
        if starts is not None:
            start = starts + ((chunk + c) * C + channels) * PARTS
            tl.store(start, h_re, mask=own)
            if COMPLEX:
                tl.store(start + 1, h_im, mask=own)
        # Behind the end a log-decay of nought fades nothing.
        gates_re, gates_im, news_re, news_im = (), (), (), ()
        for j in tl.static_range(CHUNK):
            live = own & (c * CHUNK + j < length)
            at = ((first + c * CHUNK + j) * C + channels) * PARTS
            gates_re = gates_re + (tl.load(log_decay + at, mask=live, other=0.0).to(tl.float32),)
            news_re = news_re + (tl.load(x + at, mask=live, other=0.0).to(tl.float32),)
            if COMPLEX:
                gates_im = gates_im + (tl.load(log_decay + at + 1, mask=live, other=0.0),)
                news_im = news_im + (tl.load(x + at + 1, mask=live, other=0.0),)
        for j in tl.static_range(CHUNK):
            live = own & (c * CHUNK + j < length)
            at = ((first + c * CHUNK + j) * C + channels) * PARTS
            if COMPLEX:
                fade_re, fade_im = _factor(gates_re[j], gates_im[j])
                turned = fade_re * h_im + fade_im * h_re + news_im[j]
                h_re = fade_re * h_re - fade_im * h_im + news_re[j]
                h_im = turned
                tl.store(output + at + 1, h_im, mask=live)
            else:
                h_re = tl.exp(gates_re[j]) * h_re + news_re[j]
            tl.store(output + at, h_re.to(output.dtype.element_ty), mask=live)
    tl.store(last + entry, h_re, mask=own)
    if COMPLEX:
        tl.store(last + entry + 1, h_im, mask=own)


@triton.jit(do_not_specialize=["T"])
def _backward(
    log_decay,
    x,
    starts,
    d_output,
    d_last,
    d_log_decay,
    d_x,
    d_state,
    cu_seqlens,
    offsets,
    T,
    C: tl.constexpr,
    COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    entry = (document * C + channels) * PARTS
    # The gradient of the state that a token leaves, and once it has faded of the one that it finds.
    d_re = tl.zeros([BLOCK_C], tl.float32)
    d_im = tl.zeros([BLOCK_C], tl.float32)
    if d_last is not None:
        d_re = tl.load(d_last + entry, mask=own, other=0.0)
        if COMPLEX:
            d_im = tl.load(d_last + entry + 1, mask=own, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        start = starts + ((chunk + c) * C + channels) * PARTS
        states_re, states_im = (tl.load(start, mask=own, other=0.0),), ()
        if COMPLEX:
            states_im = states_im + (tl.load(start + 1, mask=own, other=0.0),)
        gates_re, gates_im, news_re, news_im, asks_re, asks_im = (), (), (), (), (), ()
        for j in tl.static_range(CHUNK):
            live = own & (c * CHUNK + j < length)
            at = ((first + c * CHUNK + j) * C + channels) * PARTS
            gates_re = gates_re + (tl.load(log_decay + at, mask=live, other=0.0).to(tl.float32),)
            news_re = news_re + (tl.load(x + at, mask=live, other=0.0).to(tl.float32),)
            asks_re = asks_re + (tl.load(d_output + at, mask=live, other=0.0).to(tl.float32),)
            if COMPLEX:
                gates_im = gates_im + (tl.load(log_decay + at + 1, mask=live, other=0.0),)
                news_im = news_im + (tl.load(x + at + 1, mask=live, other=0.0),)
                asks_im = asks_im + (tl.load(d_output + at + 1, mask=live, other=0.0),)
        fades_re, fades_im = (), ()
        for j in tl.static_range(CHUNK):
            if COMPLEX:
                fade_re, fade_im = _factor(gates_re[j], gates_im[j])
                fades_re, fades_im = fades_re + (fade_re,), fades_im + (fade_im,)
                found_re, found_im = states_re[j], states_im[j]
                states_re = states_re + (fade_re * found_re - fade_im * found_im + news_re[j],)
                states_im = states_im + (fade_re * found_im + fade_im * found_re + news_im[j],)
            else:
                fades_re = fades_re + (tl.exp(gates_re[j]),)
                states_re = states_re + (fades_re[j] * states_re[j] + news_re[j],)
        for j in tl.static_range(CHUNK - 1, -1, -1):
            live = own & (c * CHUNK + j < length)
            at = ((first + c * CHUNK + j) * C + channels) * PARTS
            d_re += asks_re[j]
            tl.store(d_x + at, d_re.to(d_x.dtype.element_ty), mask=live)
            if COMPLEX:
                d_im += asks_im[j]
                tl.store(d_x + at + 1, d_im, mask=live)
                # By the conjugates, as PyTorch means the gradient of a complex number.
                turned = fades_re[j] * d_im - fades_im[j] * d_re
                d_re = fades_re[j] * d_re + fades_im[j] * d_im
                d_im = turned
                d_gate = states_re[j] * d_re + states_im[j] * d_im
                tl.store(d_log_decay + at + 1, states_re[j] * d_im - states_im[j] * d_re, mask=live)
            else:
                d_re = fades_re[j] * d_re
                d_gate = states_re[j] * d_re
            tl.store(d_log_decay + at, d_gate.to(d_log_decay.dtype.element_ty), mask=live)
    tl.store(d_state + entry, d_re, mask=own)
    if COMPLEX:
        tl.store(d_state + entry + 1, d_im, mask=own)


@triton.jit(do_not_specialize=["TOTAL"])
def _step(log_decay, x, state, last, TOTAL, COMPLEX: tl.constexpr, BLOCK_C: tl.constexpr):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    place = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    live, at = place < TOTAL, place * PARTS
    gate_re = tl.load(log_decay + at, mask=live, other=0.0).to(tl.float32)
    new_re = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    h_re = tl.load(state + at, mask=live, other=0.0).to(tl.float32)
    if COMPLEX:
        fade_re, fade_im = _factor(gate_re, tl.load(log_decay + at + 1, mask=live, other=0.0))
        new_im = tl.load(x + at + 1, mask=live, other=0.0)
        h_im = tl.load(state + at + 1, mask=live, other=0.0)
        tl.store(last + at + 1, fade_re * h_im + fade_im * h_re + new_im, mask=live)
        new_re += fade_re * h_re - fade_im * h_im
    else:
        new_re += tl.exp(gate_re) * h_re
    tl.store(last + at, new_re, mask=live)


@triton.jit(do_not_specialize=["T", "CARRIED"])
def _modes_forward(
    log_pole,
    weight,
    u,
    state,
    output,
    last,
    starts,
    cu_seqlens,
    offsets,
    T,
    CARRIED,
    U_ROW,
    POLE_ENTRY,
    WEIGHT_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    COMPLEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own = channels < C
    tile = (channels[:, None] * N + numbers[None, :]) * PARTS
    inside = own[:, None] & (numbers < N)[None, :]
    carried = inside & (CARRIED != 0)
    poles, weights = log_pole + document * POLE_ENTRY + tile, weight + document * WEIGHT_ENTRY + tile
    fade_re = tl.load(poles, mask=inside, other=0.0)
    weight_re = tl.load(weights, mask=inside, other=0.0)
    entry = document * C * N * PARTS + tile
    h_re = tl.load(state + entry, mask=carried, other=0.0)
    if COMPLEX:
        fade_re, fade_im = _factor(fade_re, tl.load(poles + 1, mask=inside, other=0.0))
        # A mode stands for its conjugate too.
        weight_re, weight_im = 2 * weight_re, 2 * tl.load(weights + 1, mask=inside, other=0.0)
        h_im = tl.load(state + entry + 1, mask=carried, other=0.0)
    else:
        fade_re = tl.exp(fade_re)
    for c in range(0, tl.cdiv(length, CHUNK)):
        if starts is not None:
            start = starts + (chunk + c) * C * N * PARTS + tile
            tl.store(start, h_re, mask=inside)
            if COMPLEX:
                tl.store(start + 1, h_im, mask=inside)
        news = ()
        for j in tl.static_range(CHUNK):
            live = own & (c * CHUNK + j < length)
            new = tl.load(u + (first + c * CHUNK + j) * U_ROW + channels, mask=live, other=0.0)
            news = news + (new.to(tl.float32),)
        for j in tl.static_range(CHUNK):
            # Behind the end nothing fades.
            within = c * CHUNK + j < length
            if COMPLEX:
                turned = fade_re * h_im + fade_im * h_re
                found = fade_re * h_re - fade_im * h_im + news[j][:, None]
                h_re, h_im = tl.where(within, found, h_re), tl.where(within, turned, h_im)
                y = tl.sum(weight_re * h_re - weight_im * h_im, 1)
            else:
                h_re = tl.where(within, fade_re * h_re + news[j][:, None], h_re)
                y = tl.sum(weight_re * h_re, 1)
            at = output + (first + c * CHUNK + j) * C + channels
            tl.store(at, y.to(output.dtype.element_ty), mask=own & within)
    tl.store(last + entry, h_re, mask=inside)
    if COMPLEX:
        tl.store(last + entry + 1, h_im, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _modes_backward(
    log_pole,
    weight,
    u,
    starts,
    d_output,
    d_last,
    d_log_pole,
    d_weight,
    d_u,
    d_state,
    cu_seqlens,
    offsets,
    T,
    U_ROW,
    POLE_ENTRY,
    WEIGHT_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    COMPLEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    document = tl.program_id(1).to(tl.int64)
    first, length, chunk = document_bounds(document, T, cu_seqlens, offsets, CHUNK)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own = channels < C
    tile = (channels[:, None] * N + numbers[None, :]) * PARTS
    inside = own[:, None] & (numbers < N)[None, :]
    poles, weights = log_pole + document * POLE_ENTRY + tile, weight + document * WEIGHT_ENTRY + tile
    fade_re = tl.load(poles, mask=inside, other=0.0)
    weight_re = tl.load(weights, mask=inside, other=0.0)
    entry = document * C * N * PARTS + tile
    # The gradient of the state that a token leaves, and once it has faded of the one that it finds.
    d_re = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_im = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_pole_re = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_pole_im = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_weight_re = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    d_weight_im = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if d_last is not None:
        d_re += tl.load(d_last + entry, mask=inside, other=0.0)
    if COMPLEX:
        fade_re, fade_im = _factor(fade_re, tl.load(poles + 1, mask=inside, other=0.0))
        weight_re, weight_im = 2 * weight_re, 2 * tl.load(weights + 1, mask=inside, other=0.0)
        if d_last is not None:
            d_im += tl.load(d_last + entry + 1, mask=inside, other=0.0)
    else:
        fade_re = tl.exp(fade_re)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        start = starts + (chunk + c) * C * N * PARTS + tile
        states_re, states_im = (tl.load(start, mask=inside, other=0.0),), ()
        if COMPLEX:
            states_im = states_im + (tl.load(start + 1, mask=inside, other=0.0),)
        news, asks = (), ()
        for j in tl.static_range(CHUNK):
            live = own & (c * CHUNK + j < length)
            row = first + c * CHUNK + j
            news = news + (tl.load(u + row * U_ROW + channels, mask=live, other=0.0).to(tl.float32),)
            asks = asks + (tl.load(d_output + row * C + channels, mask=live, other=0.0).to(tl.float32),)
        for j in tl.static_range(CHUNK):
            if COMPLEX:
                found_re, found_im = states_re[j], states_im[j]
                states_re = states_re + (fade_re * found_re - fade_im * found_im + news[j][:, None],)
                states_im = states_im + (fade_re * found_im + fade_im * found_re,)
            else:
                states_re = states_re + (fade_re * states_re[j] + news[j][:, None],)
        for j in tl.static_range(CHUNK - 1, -1, -1):
            within = c * CHUNK + j < length
            ask = asks[j][:, None]
            d_re += ask * weight_re
            d_weight_re += ask * states_re[j + 1]
            at = d_u + (first + c * CHUNK + j) * C + channels
            tl.store(at, tl.sum(d_re, 1).to(d_u.dtype.element_ty), mask=own & within)
            if COMPLEX:
                # By the conjugates, as PyTorch means the gradient of a complex number.
                d_im -= ask * weight_im
                d_weight_im -= ask * states_im[j + 1]
                turned = fade_re * d_im - fade_im * d_re
                faded = fade_re * d_re + fade_im * d_im
                share = states_re[j] * faded + states_im[j] * turned
                d_pole_re += tl.where(within, share, 0.0)
                d_pole_im += tl.where(within, states_re[j] * turned - states_im[j] * faded, 0.0)
                d_re, d_im = tl.where(within, faded, d_re), tl.where(within, turned, d_im)
            else:
                faded = fade_re * d_re
                d_pole_re += tl.where(within, states_re[j] * faded, 0.0)
                d_re = tl.where(within, faded, d_re)
    tl.store(d_state + entry, d_re, mask=inside)
    tl.store(d_log_pole + entry, d_pole_re, mask=inside)
    if COMPLEX:
        tl.store(d_state + entry + 1, d_im, mask=inside)
        tl.store(d_log_pole + entry + 1, d_pole_im, mask=inside)
        tl.store(d_weight + entry, 2 * d_weight_re, mask=inside)
        tl.store(d_weight + entry + 1, 2 * d_weight_im, mask=inside)
    else:
        tl.store(d_weight + entry, d_weight_re, mask=inside)


@triton.jit
def _modes_step(
    pole,
    weight,
    u,
    state,
    output,
    last,
    POLE_ENTRY,
    WEIGHT_ENTRY,
    C: tl.constexpr,
    N: tl.constexpr,
    COMPLEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    BLOCK_C: tl.constexpr = TILE // BLOCK_N
    b = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    numbers = tl.arange(0, BLOCK_N)
    own = channels < C
    tile = (channels[:, None] * N + numbers[None, :]) * PARTS
    inside = own[:, None] & (numbers < N)[None, :]
    poles, weights, entry = pole + b * POLE_ENTRY + tile, weight + b * WEIGHT_ENTRY + tile, b * C * N * PARTS
    new = tl.load(u + b * C + channels, mask=own, other=0.0).to(tl.float32)[:, None]
    fade_re = tl.load(poles, mask=inside, other=0.0)
    weight_re = tl.load(weights, mask=inside, other=0.0)
    h_re = tl.load(state + entry + tile, mask=inside, other=0.0)
    if COMPLEX:
        fade_im = tl.load(poles + 1, mask=inside, other=0.0)
        weight_im = tl.load(weights + 1, mask=inside, other=0.0)
        h_im = tl.load(state + entry + tile + 1, mask=inside, other=0.0)
        found = fade_re * h_re - fade_im * h_im + new
        turned = fade_re * h_im + fade_im * h_re
        tl.store(last + entry + tile, found, mask=inside)
        tl.store(last + entry + tile + 1, turned, mask=inside)
        y = 2 * tl.sum(weight_re * found - weight_im * turned, 1)
    else:
        found = fade_re * h_re + new
        tl.store(last + entry + tile, found, mask=inside)
        y = tl.sum(weight_re * found, 1)
    tl.store(output + b * C + channels, y.to(output.dtype.element_ty), mask=own)


class _DiagonalScan(torch.autograd.Function):
    """On real tensors alone, with a last axis of two parts where they stand for complex ones."""

    @staticmethod
    def forward(
        ctx: Any,
        log_decay: Tensor,
        x: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        in_pairs: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, channels = x.shape[:3]
        row = configure(OPERATOR, "forward", (), x)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        chunk = CHUNK // 2 if in_pairs else CHUNK
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, chunk)
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        last = torch.empty(documents, *x.shape[2:], dtype=torch.float32, device=x.device)
        starts = None
        if learns:
            starts = torch.empty(chunks, *x.shape[2:], dtype=torch.float32, device=x.device)
        launch(
            OPERATOR,
            _forward,
            (triton.cdiv(channels, row.blocks["BLOCK_C"]), documents),
            (
                # One kernel whether a state is carried or not: where none is, it reads nothing.
                *(log_decay, x, last if state is None else state, output, last, starts),
                *(cu_seqlens, offsets, time, int(state is not None)),
            ),
            {"C": channels, "COMPLEX": in_pairs, "CHUNK": chunk},
            row,
            like=x,
        )
        ctx.save_for_backward(log_decay, x, starts, cu_seqlens)
        ctx.in_pairs, ctx.has_state = in_pairs, state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        log_decay, x, starts, cu_seqlens = ctx.saved_tensors
        batch, time, channels = x.shape[:3]
        row = configure(OPERATOR, "backward", (), x)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        chunk = CHUNK // 2 if ctx.in_pairs else CHUNK
        offsets, _ = chunk_offsets(cu_seqlens, batch, time, chunk)
        d_output, d_last = grads
        d_output = torch.zeros_like(x) if d_output is None else d_output.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        d_log_decay, d_x = torch.empty_like(log_decay), torch.empty_like(x)
        d_state = torch.empty(documents, *x.shape[2:], dtype=torch.float32, device=x.device)
        launch(
            OPERATOR,
            _backward,
            (triton.cdiv(channels, row.blocks["BLOCK_C"]), documents),
            (log_decay, x, starts, d_output, d_last, d_log_decay, d_x, d_state, cu_seqlens, offsets, time),
            {"C": channels, "COMPLEX": ctx.in_pairs, "CHUNK": chunk},
            row,
            like=x,
        )
        return d_log_decay, d_x, d_state if ctx.has_state else None, None, None, None


def _parts(x: Tensor) -> Tensor:
    """Contiguous real numbers; complex ones as pairs along a last axis."""
    return torch.view_as_real(x.resolve_conj().contiguous()) if x.is_complex() else x.contiguous()


def _whole(x: Tensor, like: Tensor) -> Tensor:
    """`_parts` undone."""
    return torch.view_as_complex(x) if like.is_complex() else x


def diagonal_scan(
    log_decay: Tensor, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole text in one launch; shapes as in `ops.diagonal_scan`. All arithmetic is in float32."""
    with torch.autocast(x.device.type, enabled=False):
        output, last = _DiagonalScan.apply(
            _parts(log_decay),
            _parts(x),
            None if state is None else _parts(state if state.is_complex() else state.float()),
            cu_seqlens,
            x.is_complex(),
            wants_gradient(log_decay, x, state),
        )
        return _whole(output, x), _whole(last, x)


def step(log_decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """One token in one launch; shapes as in `ops.diagonal_scan_step`. Carries no gradient."""
    values = _parts(x)
    row = configure(OPERATOR, "step", (), values)
    last = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    launch(
        OPERATOR,
        _step,
        (triton.cdiv(x.numel(), row.blocks["BLOCK_C"]),),
        (_parts(log_decay), values, _parts(state), last, x.numel()),
        {"COMPLEX": x.is_complex()},
        row,
        like=values,
    )
    return _whole(last, x)


class _ModeScan(torch.autograd.Function):
    """On real tensors alone, as `_DiagonalScan`."""

    @staticmethod
    def forward(
        ctx: Any,
        log_pole: Tensor,
        weight: Tensor,
        u: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        in_pairs: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, _ = u.shape
        # Of one entry of the batch: channels, modes, and two parts where numbers are complex.
        held = log_pole.shape[-3:] if in_pairs else log_pole.shape[-2:]
        row = configure(OPERATOR, "modes_forward", (held[1],), u)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, MODE_CHUNK)
        rows, apart = by_rows(u)
        output = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        last = torch.empty(documents, *held, dtype=torch.float32, device=u.device)
        starts = torch.empty(chunks, *held, dtype=torch.float32, device=u.device) if learns else None
        launch(
            OPERATOR,
            _modes_forward,
            (_tiles(held, row.blocks["TILE"]), documents),
            (
                *(log_pole, weight, rows, last if state is None else state, output, last, starts),
                *(cu_seqlens, offsets, time, int(state is not None), apart),
                *(_entry(x, held, cu_seqlens) for x in (log_pole, weight)),
            ),
            {**_mode_sizes(held, in_pairs), "CHUNK": MODE_CHUNK},
            row,
            like=u,
        )
        ctx.save_for_backward(log_pole, weight, u, starts, cu_seqlens)
        ctx.held, ctx.in_pairs, ctx.has_state = held, in_pairs, state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        log_pole, weight, u, starts, cu_seqlens = ctx.saved_tensors
        batch, time, _ = u.shape
        row = configure(OPERATOR, "modes_backward", (ctx.held[1],), u)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, _ = chunk_offsets(cu_seqlens, batch, time, MODE_CHUNK)
        rows, apart = by_rows(u)
        d_output, d_last = grads
        d_output = torch.zeros(u.shape, dtype=u.dtype, device=u.device) if d_output is None else d_output
        d_u = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        d_log_pole, d_weight, d_state = torch.empty(
            3, documents, *ctx.held, dtype=torch.float32, device=u.device
        )
        launch(
            OPERATOR,
            _modes_backward,
            (_tiles(ctx.held, row.blocks["TILE"]), documents),
            (
                *(log_pole, weight, rows, starts, d_output.contiguous()),
                *(None if d_last is None else d_last.contiguous(), d_log_pole, d_weight, d_u, d_state),
                *(cu_seqlens, offsets, time, apart),
                *(_entry(x, ctx.held, cu_seqlens) for x in (log_pole, weight)),
            ),
            {**_mode_sizes(ctx.held, ctx.in_pairs), "CHUNK": MODE_CHUNK},
            row,
            like=u,
        )
        d_log_pole, d_weight = (
            parts.unflatten(0, (batch, -1)).sum(1) if own.dim() == parts.dim() else parts.sum(0)
            for own, parts in ((log_pole, d_log_pole), (weight, d_weight))
        )
        return d_log_pole, d_weight, d_u, d_state if ctx.has_state else None, None, None, None


def _mode_sizes(held: torch.Size, in_pairs: bool) -> dict[str, Any]:
    channels, modes = held[:2]
    return {"C": channels, "N": modes, "BLOCK_N": triton.next_power_of_2(modes), "COMPLEX": in_pairs}


def _tiles(held: torch.Size, tile: int) -> int:
    """How many tiles of modes there are."""
    return int(triton.cdiv(held[0], tile // triton.next_power_of_2(held[1])))


def _entry(x: Tensor, held: torch.Size, cu_seqlens: Tensor | None) -> int:
    """How far the poles or weights of batch entries lie apart, nought where all share them."""
    return held.numel() if x.dim() > len(held) and cu_seqlens is None else 0


def mode_scan(
    log_pole: Tensor, weight: Tensor, u: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole text in one launch; shapes as in `ops.mode_scan`. All arithmetic is in float32."""
    with torch.autocast(u.device.type, enabled=False):
        output, last = _ModeScan.apply(
            *(_wide_parts(log_pole), _wide_parts(weight), u, None if state is None else _wide_parts(state)),
            cu_seqlens,
            log_pole.is_complex(),
            wants_gradient(log_pole, weight, u, state),
        )
        return output, _whole(last, log_pole)


def mode_scan_step(pole: Tensor, weight: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.mode_scan_step`. Carries no gradient."""
    batch, channels = u.shape
    held, in_pairs = _wide_parts(state), state.is_complex()
    row = configure(OPERATOR, "modes_step", (state.shape[-1],), u)
    poles, weights = _wide_parts(pole), _wide_parts(weight)
    output = torch.empty(batch, channels, dtype=u.dtype, device=u.device)
    last = torch.empty_like(held)
    launch(
        OPERATOR,
        _modes_step,
        (_tiles(held.shape[1:], row.blocks["TILE"]), batch),
        (
            *(poles, weights, u.contiguous(), held, output, last),
            *(_entry(x, held.shape[1:], None) for x in (poles, weights)),
        ),
        _mode_sizes(held.shape[1:], in_pairs),
        row,
        like=u,
    )
    return output, _whole(last, state)


def _wide_parts(x: Tensor) -> Tensor:
    """`_parts` in float32."""
    return _parts(x if x.is_complex() else x.float())

"""The generalised delta rule in Triton: two launches forward, two backward, and a step.

Letters: B batch, N documents (or B), T time, H heads, K key, V value, C tokens of a chunk; n chunks of all documents.
After RWKV-7, arXiv:2503.14456 (the rule), and arXiv:2312.06635 (decays between blocks).

As in the chunk form, with y_i = Sᵀ_{i−1} a_i what the corrections read, a chunk is a linear recurrence with rows
{q, a}, which read, and columns {k, b}, which write v and y. So a program for every chunk and head first writes, for
all chunks at once,
    reads [2, C, K]     q and a, times all decays since the chunk's start: up to the token for q, before it for a,
    writes [2, C, K]    k and b, times all decays until its end,
    scores [2 C, 2 C]   rows against columns, times the decays between them,
    inverse [C, C]      (1 − the scores of a and b)⁻¹,
and then a program for every document, head and tile of values walks the chunks:
    y = inverse (scores_ak v + reads_a S),   o = scores_qk v + scores_qb y + reads_q S,
    S ← fade S + writes_kᵀ v + writes_bᵀ y.
For the gradients one kernel walks back in the same manner and leaves those of y and of the state behind every chunk,
and another takes those of rows, columns and decays, again for all chunks at once.

Rows and columns lie in one tile of 2 C lines, q before a and k before b. A chunk is halved again and again: of two
neighbouring blocks the earlier one holds the columns and the later one the rows, so that decays are factors of at
most one and scores are matrix products. The exponents are matrix products too, of zeros and ones with the
log-decays, and so are the gradients of the log-decays: each sums what it parts, and nothing cancels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.fused import chunk_bounds, document_bounds, load_decays, split_decays, split_pairs
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets

OPERATOR = "low_rank_delta"
EXACT = tl.constexpr("tf32x3")
"""How the inverse is made and applied: all that is corrected goes through it."""


@triton.jit
def _both(first, second, at, own, kind):
    """Two tensors' lines one below the other: those of kind 0 from the first, those of kind 1 from the second."""
    upper = tl.load(first + at, mask=own & (kind == 0), other=0.0)
    return upper + tl.load(second + at, mask=own & (kind == 1), other=0.0)


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _pairs(
    q,
    k,
    gate,
    a,
    b,
    scores,
    inverses,
    reads,
    writes,
    fades,
    cu_seqlens,
    offsets,
    T,
    DOCUMENTS,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    dtype = scores.dtype.element_ty
    s, line = tl.arange(0, CHUNK), tl.arange(0, 2 * CHUNK)
    i, kind = line % CHUNK, line // CHUNK
    # The last token whose decay a row has passed: `a` reads the state before it fades.
    last = i - kind
    token = first * H + h
    live, alive = i < left, s < left
    score = tl.zeros([2 * CHUNK, 2 * CHUNK], tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        place = i[:, None] * (H * K) + keys[None, :]
        own = live[:, None] & (keys < K)[None, :]
        row = _both(q + token * K, a + token * K, place, own, kind[:, None])
        column = _both(k + token * K, b + token * K, place, own, kind[:, None])
        at_s = s[:, None] * (H * K) + keys[None, :]
        high, low = load_decays(gate + token * K, at_s, alive[:, None] & (keys < K)[None, :])
        # Columns and decays once more, upright: [K, 2 C] and [K, C].
        beside = i[None, :] * (H * K) + keys[:, None]
        inside = live[None, :] & (keys < K)[:, None]
        upright = _both(k + token * K, b + token * K, beside, inside, kind[None, :])
        at_s = s[None, :] * (H * K) + keys[:, None]
        upper, lower = load_decays(gate + token * K, at_s, alive[None, :] & (keys < K)[:, None])
        # A token with itself: q reads what k and b have just written, and `a` does not.
        alone = tl.dot(row, upright, input_precision=PRECISION)
        score += tl.where((line[:, None] == i[None, :]), alone, 0.0)
        for level in range(0, LEVELS):
            half = 1 << level
            since = split_decays(i[:, None], last[:, None], s[None, :], half)
            until = split_decays(i[None, :], last[None, :], s[:, None], half)
            faded = row.to(tl.float32) * tl.exp(tl.dot(since, high) + tl.dot(since, low))
            kept = upright.to(tl.float32) * tl.exp(tl.dot(upper, until) + tl.dot(lower, until))
            pairs = tl.dot(faded.to(dtype), kept.to(dtype), input_precision=PRECISION)
            score += tl.where(split_pairs(i[:, None], i[None, :], half), pairs, 0.0)
        since = (s[None, :] <= last[:, None]).to(tl.float16)
        until = (s[None, :] > i[:, None]).to(tl.float16)
        read = row.to(tl.float32) * tl.exp(tl.dot(since, high) + tl.dot(since, low))
        write = column.to(tl.float32) * tl.exp(tl.dot(until, high) + tl.dot(until, low))
        doubled = (2 * i * H + kind)[:, None] * K + keys[None, :]
        tl.store(reads + 2 * token * K + doubled, read.to(dtype), mask=own)
        tl.store(writes + 2 * token * K + doubled, write.to(dtype), mask=own)
        fade = tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0))
        tl.store(fades + (chunk.to(tl.int64) * H + h) * K + keys, fade, mask=keys < K)
    square = (2 * i * H + kind)[:, None] * (2 * CHUNK) + line[None, :]
    tl.store(scores + 4 * token * CHUNK + square, score.to(dtype), mask=live[:, None])
    # Blocks of the triangle's inverse are joined two by two; outside of a and b it is one.
    both = (kind[:, None] == 1) & (kind[None, :] == 1)
    chain = tl.where(both, score, 0.0)
    inverse = tl.where(line[:, None] == line[None, :], 1.0, tl.zeros([2 * CHUNK, 2 * CHUNK], tl.float32))
    for level in range(0, LEVELS):
        corner = tl.where(split_pairs(i[:, None], i[None, :], 1 << level), chain, 0.0)
        later = tl.dot(inverse, corner, input_precision=EXACT)
        inverse += tl.dot(later, inverse, input_precision=EXACT)
    square = i[:, None] * (H * CHUNK) + i[None, :]
    tl.store(inverses + token * CHUNK + square, inverse, mask=both & live[:, None])


@triton.jit(do_not_specialize=["T"])
def _forward(
    v,
    scores,
    inverses,
    reads,
    writes,
    fades,
    state,
    output,
    last,
    starts,
    corrections,
    cu_seqlens,
    offsets,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(0) // TILES
    n = (row // H).to(tl.int64)
    h = row % H
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = 2 * i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * (H * CHUNK) + i[None, :]
    wide = 4 * i[:, None] * (H * CHUNK) + i[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state is not None:
        S += tl.load(state + (n * H + h) * K * V + tile, mask=inside, other=0.0)
    for c in range(0, tl.cdiv(length, CHUNK)):
        t = c * CHUNK + i
        live = t < length
        token = (first + c * CHUNK) * H + h
        before = (chunk + c) * H + h
        own_v = live[:, None] & (values < V)[None, :]
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0)
        own_k = live[:, None] & (keys < K)[None, :]
        read = tl.load(reads + 2 * token * K + at_k, mask=own_k, other=0.0)
        ask = tl.load(reads + 2 * token * K + K + at_k, mask=own_k, other=0.0)
        write = tl.load(writes + 2 * token * K + at_k, mask=own_k, other=0.0)
        put = tl.load(writes + 2 * token * K + K + at_k, mask=own_k, other=0.0)
        inverse = tl.load(inverses + token * CHUNK + square, mask=live[:, None], other=0.0)
        score = tl.load(scores + 4 * token * CHUNK + wide, mask=live[:, None], other=0.0)
        echo = tl.load(scores + 4 * token * CHUNK + CHUNK + wide, mask=live[:, None], other=0.0)
        hear = tl.load(scores + 4 * token * CHUNK + 2 * CHUNK + wide, mask=live[:, None], other=0.0)
        fade = tl.load(fades + before * K + keys, mask=keys < K, other=0.0)
        rounded = S.to(value.dtype)
        known = tl.dot(hear, value, input_precision=PRECISION)
        known += tl.dot(ask, rounded, input_precision=PRECISION)
        heard = tl.dot(inverse, known, input_precision=EXACT).to(value.dtype)
        out = tl.dot(score, value, input_precision=PRECISION)
        out += tl.dot(read, rounded, input_precision=PRECISION)
        out += tl.dot(echo, heard, input_precision=PRECISION)
        tl.store(output + token * V + at_v, out.to(output.dtype.element_ty), mask=own_v)
        if starts is not None:
            tl.store(starts + before * K * V + tile, rounded, mask=inside)
            tl.store(corrections + token * V + at_v, heard, mask=own_v)
        S = S * fade[:, None]
        S += tl.dot(tl.trans(write), value, input_precision=PRECISION)
        S += tl.dot(tl.trans(put), heard, input_precision=PRECISION)
    tl.store(last + (n * H + h) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward(
    scores,
    inverses,
    reads,
    writes,
    fades,
    d_output,
    d_last,
    d_v,
    d_corrections,
    ends,
    d_state,
    cu_seqlens,
    offsets,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(0) // TILES
    n = (row // H).to(tl.int64)
    h = row % H
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = 2 * i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    # Rows for what was written and columns for what reads it.
    square = i[None, :] * (H * CHUNK) + i[:, None]
    wide = 4 * i[None, :] * (H * CHUNK) + i[:, None]
    # The gradient of the state after the chunk.
    D = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_last is not None:
        D += tl.load(d_last + (n * H + h) * K * V + tile, mask=inside, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        t = c * CHUNK + i
        live = t < length
        token = (first + c * CHUNK) * H + h
        after = (chunk + c) * H + h
        own_v = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        own_k = live[:, None] & (keys < K)[None, :]
        read = tl.load(reads + 2 * token * K + at_k, mask=own_k, other=0.0)
        ask = tl.load(reads + 2 * token * K + K + at_k, mask=own_k, other=0.0)
        write = tl.load(writes + 2 * token * K + at_k, mask=own_k, other=0.0)
        put = tl.load(writes + 2 * token * K + K + at_k, mask=own_k, other=0.0)
        inverse = tl.load(inverses + token * CHUNK + square, mask=live[None, :], other=0.0)
        score = tl.load(scores + 4 * token * CHUNK + wide, mask=live[None, :], other=0.0)
        echo = tl.load(scores + 4 * token * CHUNK + CHUNK + wide, mask=live[None, :], other=0.0)
        hear = tl.load(scores + 4 * token * CHUNK + 2 * CHUNK + wide, mask=live[None, :], other=0.0)
        fade = tl.load(fades + after * K + keys, mask=keys < K, other=0.0)
        rounded = D.to(d_out.dtype)
        tl.store(ends + after * K * V + tile, rounded, mask=inside)
        kept = tl.dot(echo, d_out, input_precision=PRECISION)
        kept += tl.dot(put, rounded, input_precision=PRECISION)
        d_heard = tl.dot(inverse, kept, input_precision=EXACT).to(d_out.dtype)
        tl.store(d_corrections + token * V + at_v, d_heard, mask=own_v)
        d_value = tl.dot(score, d_out, input_precision=PRECISION)
        d_value += tl.dot(write, rounded, input_precision=PRECISION)
        d_value += tl.dot(hear, d_heard, input_precision=PRECISION)
        tl.store(d_v + token * V + at_v, d_value.to(d_v.dtype.element_ty), mask=own_v)
        D = D * fade[:, None]
        D += tl.dot(tl.trans(read), d_out, input_precision=PRECISION)
        D += tl.dot(tl.trans(ask), d_heard, input_precision=PRECISION)
    if d_state is not None:
        tl.store(d_state + (n * H + h) * K * V + tile, D, mask=inside)


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _pairs_backward(
    q,
    k,
    v,
    gate,
    a,
    b,
    corrections,
    starts,
    ends,
    d_output,
    d_corrections,
    d_q,
    d_k,
    d_gate,
    d_a,
    d_b,
    cu_seqlens,
    offsets,
    T,
    DOCUMENTS,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    dtype = d_q.dtype.element_ty
    s, line = tl.arange(0, CHUNK), tl.arange(0, 2 * CHUNK)
    i, kind = line % CHUNK, line // CHUNK
    last = i - kind
    keys = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    across = (chunk.to(tl.int64) * H + h) * K
    token = first * H + h
    live, alive = i < left, s < left

    # Products with the gradients of outputs, corrections and states, summed over tiles of values.
    d_score = tl.zeros([2 * CHUNK, 2 * CHUNK], tl.float32)
    # The same with rows for columns and columns for rows, made anew.
    d_turned = tl.zeros([2 * CHUNK, 2 * CHUNK], tl.float32)
    d_row = tl.zeros([2 * CHUNK, BLOCK_K], tl.float32)
    d_column = tl.zeros([2 * CHUNK, BLOCK_K], tl.float32)
    held = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        at_v = i[:, None] * (H * V) + values[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        value = _both(v + token * V, corrections + token * V, at_v, own_v, kind[:, None])
        d_out = _both(d_output + token * V, d_corrections + token * V, at_v, own_v, kind[:, None])
        # And once more upright, [V, 2 C].
        at_v = i[None, :] * (H * V) + values[:, None]
        own_v = live[None, :] & (values < V)[:, None]
        upright = _both(v + token * V, corrections + token * V, at_v, own_v, kind[None, :])
        d_upright = _both(d_output + token * V, d_corrections + token * V, at_v, own_v, kind[None, :])
        # The state before the chunk and the gradient of the one after it, transposed: [V, K].
        turned = keys[None, :] * V + values[:, None]
        inside = (keys < K)[None, :] & (values < V)[:, None]
        S = tl.load(starts + across * V + turned, mask=inside, other=0.0)
        D = tl.load(ends + across * V + turned, mask=inside, other=0.0)
        d_score += tl.dot(d_out, upright, input_precision=PRECISION)
        d_turned += tl.dot(value, d_upright, input_precision=PRECISION)
        d_row += tl.dot(d_out, S, input_precision=PRECISION)
        d_column += tl.dot(value, D, input_precision=PRECISION)
        held += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)

    place = i[:, None] * (H * K) + keys[None, :]
    own = live[:, None] & (keys < K)[None, :]
    row = _both(q + token * K, a + token * K, place, own, kind[:, None])
    column = _both(k + token * K, b + token * K, place, own, kind[:, None])
    at_s = s[:, None] * (H * K) + keys[None, :]
    own_s = alive[:, None] & (keys < K)[None, :]
    high, low = load_decays(gate + token * K, at_s, own_s)
    since = (s[None, :] <= last[:, None]).to(tl.float16)
    until = (s[None, :] > i[:, None]).to(tl.float16)
    d_row = d_row * tl.exp(tl.dot(since, high) + tl.dot(since, low))
    d_column = d_column * tl.exp(tl.dot(until, high) + tl.dot(until, low))
    # The same ones with rows for decays.
    passed = (s[:, None] <= last[None, :]).to(tl.float32)
    ahead = (s[:, None] > i[None, :]).to(tl.float32)
    change = tl.dot(passed, d_row * row.to(tl.float32), input_precision=SUMS)
    change += tl.dot(ahead, d_column * column.to(tl.float32), input_precision=SUMS)
    change += (held * tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0)))[None, :]
    # A token with itself: q reads what k and b have just written, and no decay lies between.
    alone = tl.where(line[:, None] == i[None, :], d_score, 0.0)
    d_row += tl.dot(alone.to(dtype), column, input_precision=PRECISION)
    alone = tl.where(i[:, None] == line[None, :], d_turned, 0.0)
    d_column += tl.dot(alone.to(dtype), row, input_precision=PRECISION)
    row, column = row.to(tl.float32), column.to(tl.float32)
    for level in range(0, LEVELS):
        half = 1 << level
        between = split_decays(i[:, None], last[:, None], s[None, :], half)
        factor = tl.exp(tl.dot(between, high) + tl.dot(between, low))
        above = tl.where(split_pairs(i[:, None], i[None, :], half), d_score, 0.0).to(dtype)
        below = tl.where(split_pairs(i[None, :], i[:, None], half), d_turned, 0.0).to(dtype)
        later = tl.dot(above, (column * factor).to(dtype), input_precision=PRECISION) * factor
        earlier = tl.dot(below, (row * factor).to(dtype), input_precision=PRECISION) * factor
        d_row += later
        d_column += earlier
        between = split_decays(i[None, :], last[None, :], s[:, None], half)
        change += tl.dot(between.to(tl.float32), later * row + earlier * column, input_precision=SUMS)
    tl.store(d_gate + token * K + at_s, change, mask=own_s)
    tl.store(d_q + token * K + place, d_row.to(dtype), mask=own & (kind == 0)[:, None])
    tl.store(d_a + token * K + place, d_row.to(dtype), mask=own & (kind == 1)[:, None])
    tl.store(d_k + token * K + place, d_column.to(dtype), mask=own & (kind == 0)[:, None])
    tl.store(d_b + token * K + place, d_column.to(dtype), mask=own & (kind == 1)[:, None])


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    a,
    b,
    state,
    output,
    last,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = (tl.program_id(0) // TILES).to(tl.int64)
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    own = keys < K
    inside = own[:, None] & (values < V)[None, :]
    at = row * K * V + keys[:, None] * V + values[None, :]
    query = tl.load(q + row * K + keys, mask=own, other=0.0).to(tl.float32)
    key = tl.load(k + row * K + keys, mask=own, other=0.0).to(tl.float32)
    seek = tl.load(a + row * K + keys, mask=own, other=0.0).to(tl.float32)
    correct = tl.load(b + row * K + keys, mask=own, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(gate + row * K + keys, mask=own, other=0.0).to(tl.float32))
    value = tl.load(v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    recalled = tl.sum(S * seek[:, None], 0)
    S = S * decay[:, None] + correct[:, None] * recalled[None, :] + key[:, None] * value[None, :]
    tl.store(last + at, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + row * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _LowRankDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = k.shape
        value = v.shape[-1]
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        row = configure(OPERATOR, "pairs", (key, value), v)
        chunk = row.blocks["CHUNK"]
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, chunk)

        def wide(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=v.device)

        scores, inverses = v.new_empty(batch, time, heads, 4 * chunk), wide(batch, time, heads, chunk)
        reads, writes = (v.new_empty(batch, time, heads, 2 * key) for _ in range(2))
        fades = wide(chunks, heads, key)
        launch(
            OPERATOR,
            _pairs,
            (chunks, heads),
            (q, k, gate, a, b, scores, inverses, reads, writes, fades, cu_seqlens, offsets, time, documents),
            {"H": heads, "K": key, "LEVELS": chunk.bit_length() - 1, "PRECISION": dot_precision(v.dtype)},
            row,
            like=v,
        )
        row = configure(OPERATOR, "forward", (key, value), v)
        output, last = torch.empty_like(v), wide(documents, heads, key, value)
        starts = v.new_empty(chunks, heads, key, value) if keep else None
        corrections = None if starts is None else torch.empty_like(v)
        launch(
            OPERATOR,
            _forward,
            (documents * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
            (
                v,
                scores,
                inverses,
                reads,
                writes,
                fades,
                state,
                output,
                last,
                starts,
                corrections,
                cu_seqlens,
                offsets,
                time,
            ),
            _sizes(k, v, chunk),
            row,
            like=v,
        )
        ctx.save_for_backward(
            q,
            k,
            v,
            gate,
            a,
            b,
            scores,
            inverses,
            reads,
            writes,
            fades,
            starts,
            corrections,
            cu_seqlens,
            offsets,
        )
        ctx.has_state, ctx.chunk = state is not None, chunk
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (q, k, v, gate, a, b, scores, inverses, reads, writes, fades, starts, corrections, *packed) = (
            ctx.saved_tensors
        )
        cu_seqlens, offsets = packed
        chunk: int = ctx.chunk
        batch, time, heads, key = k.shape
        value = v.shape[-1]
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        row = configure(OPERATOR, "backward", (key, value), v)
        d_v, d_corrections, ends = torch.empty_like(v), torch.empty_like(v), torch.empty_like(starts)
        d_state = None
        if ctx.has_state:
            d_state = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        launch(
            OPERATOR,
            _backward,
            (documents * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
            (
                scores,
                inverses,
                reads,
                writes,
                fades,
                d_output,
                d_last,
                d_v,
                d_corrections,
                ends,
                d_state,
                cu_seqlens,
                offsets,
                time,
            ),
            _sizes(k, v, chunk),
            row,
            like=v,
        )
        row = configure(OPERATOR, "pairs_backward", (key, value), v)
        d_q, d_k, d_gate, d_a, d_b = (torch.empty_like(x) for x in (q, k, gate, a, b))
        launch(
            OPERATOR,
            _pairs_backward,
            (fades.shape[0], heads, triton.cdiv(key, row.blocks["BLOCK_K"])),
            (
                q,
                k,
                v,
                gate,
                a,
                b,
                corrections,
                starts,
                ends,
                d_output,
                d_corrections,
                d_q,
                d_k,
                d_gate,
                d_a,
                d_b,
                cu_seqlens,
                offsets,
                time,
                documents,
            ),
            {
                "H": heads,
                "K": key,
                "V": value,
                "CHUNK": chunk,
                "LEVELS": chunk.bit_length() - 1,
                "PRECISION": dot_precision(v.dtype),
                # The gradients of log-decays: sums in float32 of what is no more precise than v's type.
                "SUMS": dot_precision(v.dtype) if v.dtype == torch.float32 else "tf32",
            },
            row,
            like=v,
        )
        return d_q, d_k, d_v, d_gate, d_a, d_b, d_state, None, None


def _sizes(k: Tensor, v: Tensor, chunk: int) -> dict[str, Any]:
    """What the kernels that walk are compiled for."""
    return {
        "H": k.shape[2],
        "K": k.shape[3],
        "V": v.shape[3],
        "BLOCK_K": padded(k.shape[3]),
        "CHUNK": chunk,
        "PRECISION": dot_precision(v.dtype),
    }


def low_rank_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ops.low_rank_delta`. Products are taken in v's type, sums, decays and triangles in float32."""
    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _LowRankDelta.apply(
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            log_decay.float().contiguous(),
            a.to(v.dtype).contiguous(),
            b.to(v.dtype).contiguous(),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
            wants_gradient(q, k, v, log_decay, a, b, state),
        )
    return result


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.low_rank_delta_step`. Carries no gradient."""
    batch, heads, key = k.shape
    value = v.shape[-1]
    row = configure(OPERATOR, "step", (key, value), v)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(batch, heads, key, value, dtype=torch.float32, device=v.device)
    launch(
        OPERATOR,
        _step,
        (batch * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
        (*(x.contiguous() for x in (q, k, v, log_decay, a, b, state)), output, last),
        {"K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

"""Attention over chosen keys in Triton kernels: the index's scores and choice, what it learns, the reading, a single query.

Letters: B batch, T queries, S keys (S ≥ T), L rows from one batch entry's keys to the next's, C queries of one launch,
J index heads, I index width, N chosen keys, H heads, K key, V value (V ≤ K), R = K − V.  After DeepSeek-V3.2,
arXiv:2512.02556.

A row for every pair of query and key, or every chosen key's part of a gradient, is held for as many queries at once as
`HELD` allows, and for no more: beyond that the queries are walked in spans. What queries add to the gradient of a key is
written apart, one row for each choice, and summed along the key's own list in a fixed order, so that two runs agree to
the bit. No accumulator is transposed on its way into another product (see the traps of Hopper): where keys must be the
rows of a product, it is taken in that form.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.configurations import Configuration
from kernels.launch import configure, dot_precision, launch, padded

OPERATOR = "selected_attention"
HELD = 2**26
"""Numbers of the largest tensor that is neither an input nor an output."""
ALIGNED = tl.constexpr(16)
"""Rows of such a tensor begin at multiples of so many numbers, so that a thread can load several of them at once."""
GROUPS = 8
"""Into so many parts, at most, the index heads are dealt out where a tile of keys gathers its gradient."""
TILE_OF_QUERIES = 128


@triton.jit
def _contract(
    left,
    at_left,
    live_left,
    right,
    at_right,
    live_right,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Products of rows of `left` with rows of `right`, BLOCK_C of their WIDTH numbers at a time."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < WIDTH)[None, :]
        first = tl.load(left + at_left + c[None, :], mask=live_left[:, None] & inside, other=0.0)
        second = tl.load(right + at_right + c[None, :], mask=live_right[:, None] & inside, other=0.0)
        total = tl.dot(first.to(second.dtype), tl.trans(second), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "S", "L", "C", "first"])
def _scores(
    q,
    k,
    weights,
    output,
    T,
    S,
    L,
    C,
    first,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ_j w_j ReLU(q_j · k_s) of C queries [B, C, S]; with RANKS as whole numbers of the same order, also what is not seen."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    i = tl.arange(0, BLOCK_I)
    # Query t of this launch sees the keys up to S - T + first + t.
    seen = s[None, :] <= (S - T + first + t)[:, None]
    some = tl.program_id(1) * BLOCK_S <= S - T + first + tl.minimum((tl.program_id(0) + 1) * BLOCK_T, C) - 1
    at_k = (b * L + s.to(tl.int64))[:, None] * WIDTH
    # Keys stay where they are, unless they are so wide that they come piece by piece, anew for every head.
    if BLOCK_C >= WIDTH:
        key = tl.load(k + at_k + i[None, :], mask=(s < S)[:, None] & (i < WIDTH)[None, :], other=0.0)
    # A row for every pair of a query and one of BLOCK_J heads.
    row = tl.arange(0, BLOCK_T * BLOCK_J)
    own = tl.program_id(0) * BLOCK_T + row // BLOCK_J
    total = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for j in range(0, tl.where(some, J, 0), BLOCK_J):
        head = j + row % BLOCK_J
        live = (own < C) & (head < J)
        at = (b * T + first + own.to(tl.int64)) * J + head
        at_q = at[:, None] * WIDTH
        weight = tl.load(weights + at, mask=live, other=0.0).to(tl.float32)
        if BLOCK_C >= WIDTH:
            own_q = live[:, None] & (i < WIDTH)[None, :]
            query = tl.load(q + at_q + i[None, :], mask=own_q, other=0.0)
            product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        else:
            rows: tl.constexpr = BLOCK_T * BLOCK_J
            product = _contract(q, at_q, live, k, at_k, s < S, WIDTH, rows, BLOCK_S, PRECISION, BLOCK_C)
        # Not the larger of it and nought: what is no number stays so.
        product = tl.where(product < 0, 0.0, product) * weight[:, None]
        if BLOCK_J == 1:
            total += product
        else:
            total += tl.sum(tl.reshape(product, [BLOCK_T, BLOCK_J, BLOCK_S]), 1)
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    at = (b * C + t.to(tl.int64))[:, None] * stride + s[None, :]
    inside = (t < C)[:, None] & (s < stride)[None, :]
    if RANKS:
        total = tl.where(total != total, float("inf"), total)
        # Both noughts are one.
        bits = tl.where(total == 0, 0.0, total).to(tl.int32, bitcast=True)
        tl.store(output + at, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), mask=inside)
    else:
        tl.store(output + at, tl.where(seen, total, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["T", "S", "C", "first", "N"])
def _select(ranks, chosen, T, S, C, first, N, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The places of each query's N largest ranks, ascending: the least of them is found bit by bit, then all are packed."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, BLOCK_S)
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    own = (ranks + (b * C + t) * stride)[:, None]
    out = (chosen + (b * T + first + t) * N)[:, None]
    live = (t < C)[:, None]
    seen = tl.where(t < C, S - T + first + t + 1, 0)
    most = tl.max(seen, 0)
    lowest = tl.full([], -2147483648, tl.int32)
    one = tl.full([], 1, tl.int32)
    least = tl.zeros([ROWS], tl.int32) + lowest
    held = seen
    bit = 31
    # Always `held` ranks are at least `least`, and N or more, where so many are seen; bits that part no more are not asked.
    while (bit >= 0) & (tl.max(held, 0) > N):
        higher = least ^ (one << bit)
        count = tl.zeros([ROWS, BLOCK_S], tl.int32)
        for start in range(0, most, BLOCK_S):
            at = (start + s)[None, :]
            rank = tl.load(own + at, mask=live & (at < stride), other=lowest)
            count += ((rank >= higher[:, None]) & (at < seen[:, None])).to(tl.int32)
        total = tl.sum(count, 1)
        least = tl.where(total >= N, higher, least)
        held = tl.where(total >= N, total, held)
        bit -= 1
    # Of equal ones the earliest are too many.
    spare = tl.maximum(held - N, 0)
    taken = tl.maximum(N - seen, 0)
    for start in range(0, tl.max(taken, 0), BLOCK_S):
        at = (start + s)[None, :]
        tl.store(out + at, -1, mask=live & (at < taken[:, None]))
    met = tl.zeros([ROWS], tl.int32)
    for start in range(0, most, BLOCK_S):
        at = (start + s)[None, :]
        there = at < seen[:, None]
        rank = tl.load(own + at, mask=live & (at < stride), other=lowest)
        equal = (there & (rank == least[:, None])).to(tl.int32)
        turn = met[:, None] + tl.cumsum(equal, 1)
        pick = (there & ((rank > least[:, None]) | ((equal > 0) & (turn > spare[:, None])))).to(tl.int32)
        place = taken[:, None] + tl.cumsum(pick, 1) - 1
        tl.store(out + place, tl.broadcast_to(at, [ROWS, BLOCK_S]).to(tl.int64), mask=pick > 0)
        met += tl.sum(equal, 1)
        taken += tl.sum(pick, 1)


@triton.jit(do_not_specialize=["T", "S", "C", "first"])
def _queries_backward(
    q,
    k,
    weights,
    slopes,
    d_q,
    d_weights,
    T,
    S,
    C,
    first,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the gradients of all scores of C queries, [B, C, S], those of their index queries and weights."""
    j = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_I)
    live = t < C
    last = S - T + first + t
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    at = (b * T + first + t.to(tl.int64)) * J + j
    own = live[:, None] & (i < WIDTH)[None, :]
    at_q = at[:, None] * WIDTH
    if BLOCK_C >= WIDTH:
        query = tl.load(q + at_q + i[None, :], mask=own, other=0.0)
    weight = tl.load(weights + at, mask=live, other=0.0).to(tl.float32)
    d_query = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    d_weight = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, S - T + first + tl.minimum((tl.program_id(0) + 1) * BLOCK_T, C), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at_k = (b * S + s.to(tl.int64))[:, None] * WIDTH
        key = tl.load(k + at_k + i[None, :], mask=(s < S)[:, None] & (i < WIDTH)[None, :], other=0.0)
        seen = live[:, None] & (s[None, :] <= last[:, None])
        at_s = (b * C + t.to(tl.int64))[:, None] * stride + s[None, :]
        slope = tl.load(slopes + at_s, mask=live[:, None] & (s < stride)[None, :], other=0.0)
        if BLOCK_C >= WIDTH:
            product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        else:
            product = _contract(q, at_q, live, k, at_k, s < S, WIDTH, BLOCK_T, BLOCK_S, PRECISION, BLOCK_C)
        slope = tl.where(seen & (product > 0), slope, 0.0)
        d_weight += tl.sum(slope * product, 1)
        slope = slope * weight[:, None]
        d_query = tl.dot(slope.to(key.dtype), key, d_query, input_precision=PRECISION)
    tl.store(d_q + at_q + i[None, :], d_query.to(d_q.dtype.element_ty), mask=own)
    tl.store(d_weights + at, d_weight, mask=live)


@triton.jit(do_not_specialize=["T", "S", "C", "first", "B"])
def _keys_backward(
    q,
    k,
    weights,
    slopes,
    d_k,
    T,
    S,
    C,
    first,
    B,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The same for the index's keys, added to what earlier queries gave: [G, B, S, I], a part for each G-th head."""
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    i = tl.arange(0, BLOCK_I)
    own = (s < S)[:, None] & (i < WIDTH)[None, :]
    key = tl.load(k + (b * S + s.to(tl.int64))[:, None] * WIDTH + i[None, :], mask=own, other=0.0)
    at = ((g * B + b) * S + s.to(tl.int64))[:, None] * WIDTH + i[None, :]
    d_key = tl.load(d_k + at, mask=own, other=0.0)
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    # The first of the C queries that sees a key of this tile, at the beginning of a tile of queries.
    begin = tl.maximum(tl.program_id(0) * BLOCK_S - (S - T + first), 0) // BLOCK_T * BLOCK_T
    for j in range(g, J, tl.num_programs(1)):
        for start in range(begin, C, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            live = t < C
            at_q = (b * T + first + t.to(tl.int64)) * J + j
            mask = live[:, None] & (i < WIDTH)[None, :]
            query = tl.load(q + at_q[:, None] * WIDTH + i[None, :], mask=mask, other=0.0)
            weight = tl.load(weights + at_q, mask=live, other=0.0).to(tl.float32)
            seen = live[None, :] & (s[:, None] <= (S - T + first + t)[None, :])
            at_s = (b * C + t.to(tl.int64))[None, :] * stride + s[:, None]
            slope = tl.load(slopes + at_s, mask=live[None, :] & (s < stride)[:, None], other=0.0)
            product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            slope = tl.where(seen & (product > 0), slope, 0.0) * weight[None, :]
            d_key = tl.dot(slope.to(query.dtype), query, d_key, input_precision=PRECISION)
    tl.store(d_k + at, d_key, mask=own)


@triton.jit(do_not_specialize=["T", "S", "N"])
def _places(
    q,
    k,
    weights,
    chosen,
    output,
    T,
    S,
    N,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The scores of one query's chosen keys."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_I)
    place = tl.load(chosen + row * N + n, mask=n < N, other=-1)
    seen = place >= 0
    at_k = (row // T * S + place)[:, None] * WIDTH + i[None, :]
    key = tl.load(k + at_k, mask=seen[:, None] & (i < WIDTH)[None, :], other=0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        at_q = (row * J + j)[:, None] * WIDTH + i[None, :]
        query = tl.load(q + at_q, mask=(j < J)[:, None] & (i < WIDTH)[None, :], other=0.0)
        weight = tl.load(weights + row * J + j, mask=j < J, other=0.0).to(tl.float32)
        product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        total += tl.sum(tl.where(product < 0, 0.0, product) * weight[None, :], 1)
    tl.store(output + row * N + n, tl.where(seen, total, float("-inf")), mask=n < N)


@triton.jit(do_not_specialize=["T", "S", "C", "first", "N", "B"])
def _places_backward(
    q,
    k,
    weights,
    chosen,
    d_output,
    d_q,
    d_weights,
    d_rows,
    T,
    S,
    C,
    first,
    N,
    B,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Of one query and BLOCK_J heads: d_q, d_weights, and what each choice gives its key, [parts, B, C, N, I]."""
    local = tl.program_id(0).to(tl.int64)
    row = local // C * T + first + local % C
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    i = tl.arange(0, BLOCK_I)
    at_q = (row * J + j)[:, None] * WIDTH + i[None, :]
    query = tl.load(q + at_q, mask=(j < J)[:, None] & (i < WIDTH)[None, :], other=0.0)
    weight = tl.load(weights + row * J + j, mask=j < J, other=0.0).to(tl.float32)
    # Transposed, so that one form of every product serves the queries and the keys.
    d_query = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    d_weight = tl.zeros([BLOCK_J], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        place = tl.load(chosen + row * N + n, mask=n < N, other=-1)
        seen = place >= 0
        at_k = (row // T * S + place)[:, None] * WIDTH + i[None, :]
        key = tl.load(k + at_k, mask=seen[:, None] & (i < WIDTH)[None, :], other=0.0)
        slope = tl.load(d_output + row * N + n, mask=seen, other=0.0).to(tl.float32)
        product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        slopes = tl.where(product > 0, slope[:, None], 0.0)
        d_weight += tl.sum(slopes * product, 0)
        slopes = (slopes * weight[None, :]).to(query.dtype)
        d_query = tl.dot(tl.trans(key), slopes, d_query, input_precision=PRECISION)
        d_key = tl.dot(slopes, query, input_precision=PRECISION)
        at = ((tl.program_id(1) * B * C + local) * N + n)[:, None] * WIDTH + i[None, :]
        tl.store(d_rows + at, d_key, mask=(n < N)[:, None] & (i < WIDTH)[None, :])
    turned = (row * J + j)[None, :] * WIDTH + i[:, None]
    own = (j < J)[None, :] & (i < WIDTH)[:, None]
    tl.store(d_q + turned, d_query.to(d_q.dtype.element_ty), mask=own)
    tl.store(d_weights + row * J + j, d_weight, mask=j < J)


@triton.jit(do_not_specialize=["P", "E"])
def _collect(
    d_rows, order, bounds, total, P, E, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Add to one key's row of `total` [B S, W] the rows on its list, in their order: d_rows [P, E, W]."""
    key = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    begin, end = tl.load(bounds + key), tl.load(bounds + key + 1)
    kept = tl.load(total + key * WIDTH + w, mask=w < WIDTH, other=0.0)
    for start in range(begin, end, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        place = tl.load(order + e, mask=e < end, other=0)
        for part in range(0, P):
            at = (part * E.to(tl.int64) + place)[:, None] * WIDTH + w[None, :]
            rows = tl.load(d_rows + at, mask=(e < end)[:, None] & (w < WIDTH)[None, :], other=0.0)
            kept += tl.sum(rows, 0)
    tl.store(total + key * WIDTH + w, kept, mask=w < WIDTH)


@triton.jit(do_not_specialize=["T", "S"])
def _masses(
    q,
    k,
    masses,
    T,
    S,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """log Σ_s exp(scale q_h · k_s) over what each query sees: [B, T, H]."""
    # All on one axis of the grid: the others end at 65535, which heads of many batch entries may pass.
    tile, pair = tl.program_id(0) % tl.cdiv(T, BLOCK_T), tl.program_id(0) // tl.cdiv(T, BLOCK_T)
    b, h = (pair // H).to(tl.int64), pair % H
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    at = (b * T + t.to(tl.int64)) * H + h
    at_q = at[:, None] * K
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, S - T + tl.minimum((tile + 1) * BLOCK_T, T), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at_k = ((b * S + s.to(tl.int64)) * H + h)[:, None] * K
        score = _contract(q, at_q, t < T, k, at_k, s < S, K, BLOCK_T, BLOCK_S, PRECISION, BLOCK_C) * scale
        # Every query sees the first key, so that there is a largest score from the first tile on.
        score = tl.where(s[None, :] <= (S - T + t)[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        top = higher
    tl.store(masses + at, top + tl.log(mass), mask=t < T)


@triton.jit(do_not_specialize=["T", "S", "C", "first"])
def _index_masses(scores, masses, T, S, C, first, BLOCK_S: tl.constexpr):
    """log Σ_s exp(I_s) over what each of C queries sees, of scores I [B, C, S]."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    row = scores + (b * C + t) * stride
    seen = S - T + first + t + 1
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    for start in range(0, seen, BLOCK_S):
        # What is not seen scores −∞.
        score = tl.load(row + start + s, mask=start + s < stride, other=float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(score - higher), 0)
        top = higher
    tl.store(masses + b * C + t, top + tl.log(mass))


@triton.jit(do_not_specialize=["T", "S", "C", "first"])
def _difference(
    q,
    k,
    masses,
    scores,
    index_masses,
    slopes,
    divergences,
    T,
    S,
    C,
    first,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile's part of Σ_s p_s (log p_s − log softmax(I)_s), [tiles of keys, B, C], and softmax(I) − p where asked for."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = t < C
    seen = live[:, None] & (s[None, :] <= (S - T + first + t)[:, None])
    some = tl.program_id(1) * BLOCK_S <= S - T + first + tl.minimum((tl.program_id(0) + 1) * BLOCK_T, C) - 1
    share = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for h in range(0, tl.where(some, H, 0)):
        at = (b * T + first + t.to(tl.int64)) * H + h
        at_q, at_k = at[:, None] * K, ((b * S + s.to(tl.int64)) * H + h)[:, None] * K
        score = _contract(q, at_q, live, k, at_k, s < S, K, BLOCK_T, BLOCK_S, PRECISION, BLOCK_C) * scale
        mass = tl.load(masses + at, mask=live, other=0.0)
        share += tl.exp(tl.where(seen, score - mass[:, None], float("-inf")))
    share = share / H
    stride = tl.cdiv(S, ALIGNED) * ALIGNED
    at = (b * C + t.to(tl.int64))[:, None] * stride + s[None, :]
    inside = live[:, None] & (s < stride)[None, :]
    mass = tl.load(index_masses + b * C + t, mask=live, other=0.0)
    index = tl.load(scores + at, mask=inside, other=0.0) - mass[:, None]
    # A share of nought adds nothing.
    surprise = tl.log(tl.where(share > 0, share, 1.0)) - tl.where(seen, index, 0.0)
    part = tl.sum(share * surprise, 1)
    tl.store(divergences + (tl.program_id(1) * tl.num_programs(2) + b) * C + t, part, mask=live)
    if slopes is not None:
        tl.store(slopes + at, tl.exp(tl.where(seen, index, float("-inf"))) - share, mask=inside)


@triton.jit(do_not_specialize=["T", "L", "N", "M"])
def _attend(
    q,
    k,
    chosen,
    output,
    masses,
    T,
    L,
    N,
    M,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One query's BLOCK_H heads over its chosen keys, or over SPAN of them: outputs [M, V] and log-masses [M] a span."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    v, r = tl.arange(0, BLOCK_V), V + tl.arange(0, BLOCK_R)
    at_q = (row * H + h)[:, None] * K
    # Queries stay where they are, unless they are so wide that they come piece by piece, anew for every tile of keys.
    if BLOCK_C >= K:
        query = tl.load(q + at_q + v[None, :], mask=(h < H)[:, None] & (v < V)[None, :], other=0.0)
    if BLOCK_C >= K and K > V:
        rest = tl.load(q + at_q + r[None, :], mask=(h < H)[:, None] & (r < K)[None, :], other=0.0)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    begin = tl.program_id(2) * SPAN
    end = tl.minimum(begin + SPAN, N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        place = tl.load(chosen + row * N + n, mask=n < end, other=-1)
        seen = place >= 0
        at_k = (row // T * L + place)[:, None] * K
        value = tl.load(k + at_k + v[None, :], mask=seen[:, None] & (v < V)[None, :], other=0.0)
        if BLOCK_C >= K:
            score = tl.dot(query, tl.trans(value), input_precision=PRECISION)
        else:
            score = _contract(q, at_q, h < H, k, at_k, seen, K, BLOCK_H, BLOCK_N, PRECISION, BLOCK_C)
        if BLOCK_C >= K and K > V:
            tail = tl.load(k + at_k + r[None, :], mask=seen[:, None] & (r < K)[None, :], other=0.0)
            score = tl.dot(rest, tl.trans(tail), score, input_precision=PRECISION)
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # Where nothing was seen yet there is no largest score to subtract.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - finite[:, None])
        fade = tl.exp(top - finite)
        mass = mass * fade + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * fade[:, None], input_precision=PRECISION)
        top = higher
    mixed = mixed / tl.where(mass > 0, mass, 1.0)[:, None]
    at = tl.program_id(2).to(tl.int64) * M + row * H + h
    own = (h < H)[:, None] & (v < V)[None, :]
    tl.store(output + at[:, None] * V + v[None, :], mixed.to(output.dtype.element_ty), mask=own)
    tl.store(
        masses + at,
        tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf")),
        mask=h < H,
    )


@triton.jit(do_not_specialize=["M", "P"])
def _merge(parts, part_masses, output, masses, M, P, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """P spans of one head's chosen keys into one: [P, M, V] and [P, M] → [M, V] and [M]."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([BLOCK_V], tl.float32)
    for part in range(0, P):
        at = part * M.to(tl.int64) + row
        own = tl.load(part_masses + at)
        read = tl.load(parts + at * V + v, mask=v < V, other=0.0)
        higher = tl.maximum(top, own)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp(top - finite), tl.exp(own - finite)
        mass = mass * fade + share
        mixed = mixed * fade + read * share
        top = higher
    whole = tl.where(mass > 0, mass, 1.0)
    tl.store(output + row * V + v, (mixed / whole).to(output.dtype.element_ty), mask=v < V)
    tl.store(masses + row, tl.where(mass > 0, top + tl.log(whole), float("-inf")))


@triton.jit(do_not_specialize=["T", "L", "N"])
def _shares(
    q,
    k,
    chosen,
    masses,
    shares,
    T,
    L,
    N,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of all heads' weights of BLOCK_N chosen keys of one query."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.load(chosen + row * N + n, mask=n < N, other=-1)
    seen = place >= 0
    at_k = (row // T * L + place)[:, None] * K
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        at_q = (row * H + h)[:, None] * K
        score = _contract(k, at_k, seen, q, at_q, h < H, K, BLOCK_N, BLOCK_H, PRECISION, BLOCK_C)
        mass = tl.load(masses + row * H + h, mask=h < H, other=0.0)
        live = seen[:, None] & (h < H)[None, :]
        total += tl.sum(tl.exp(tl.where(live, score * scale - mass[None, :], float("-inf"))), 1)
    tl.store(shares + row * N + n, total / H, mask=n < N)


@triton.jit(do_not_specialize=["T", "S", "C", "first", "N"])
def _attend_backward(
    q,
    k,
    chosen,
    output,
    masses,
    d_output,
    d_q,
    weights,
    slopes,
    T,
    S,
    C,
    first,
    N,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of one query's BLOCK_H heads: d_q, the weights and the gradients of the scores, [B, C, H, N]."""
    local = tl.program_id(0).to(tl.int64)
    row = local // C * T + first + local % C
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    v, r = tl.arange(0, BLOCK_V), V + tl.arange(0, BLOCK_R)
    own_v, own_r = (h < H)[:, None] & (v < V)[None, :], (h < H)[:, None] & (r < K)[None, :]
    at_q, at_o = (row * H + h)[:, None] * K, (row * H + h)[:, None] * V
    d_out = tl.load(d_output + at_o + v[None, :], mask=own_v, other=0.0).to(q.dtype.element_ty)
    out = tl.load(output + at_o + v[None, :], mask=own_v, other=0.0).to(tl.float32)
    held = tl.sum(out * d_out.to(tl.float32), 1)
    mass = tl.load(masses + row * H + h, mask=h < H, other=0.0)
    d_query = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    if BLOCK_C >= K:
        query = tl.load(q + at_q + v[None, :], mask=own_v, other=0.0)
    if BLOCK_C >= K and K > V:
        rest = tl.load(q + at_q + r[None, :], mask=own_r, other=0.0)
    if K > V:
        d_rest = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        place = tl.load(chosen + row * N + n, mask=n < N, other=-1)
        seen = place >= 0
        at_k = (row // T * S + place)[:, None] * K
        value = tl.load(k + at_k + v[None, :], mask=seen[:, None] & (v < V)[None, :], other=0.0)
        if K > V:
            tail = tl.load(k + at_k + r[None, :], mask=seen[:, None] & (r < K)[None, :], other=0.0)
        if BLOCK_C >= K:
            score = tl.dot(query, tl.trans(value), input_precision=PRECISION)
            slope = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        else:
            score = _contract(q, at_q, h < H, k, at_k, seen, K, BLOCK_H, BLOCK_N, PRECISION, BLOCK_C)
            slope = _contract(d_output, at_o, h < H, k, at_k, seen, V, BLOCK_H, BLOCK_N, PRECISION, BLOCK_C)
        if BLOCK_C >= K and K > V:
            score = tl.dot(rest, tl.trans(tail), score, input_precision=PRECISION)
        weight = tl.exp(tl.where(seen[None, :], score * scale - mass[:, None], float("-inf")))
        slope = (weight * (slope - held[:, None]) * scale).to(value.dtype)
        d_query = tl.dot(slope, value, d_query, input_precision=PRECISION)
        if K > V:
            d_rest = tl.dot(slope, tail, d_rest, input_precision=PRECISION)
        at = (local * H + h)[:, None] * N + n[None, :]
        own = (h < H)[:, None] & (n < N)[None, :]
        tl.store(weights + at, weight.to(value.dtype), mask=own)
        tl.store(slopes + at, slope, mask=own)
    tl.store(d_q + at_q + v[None, :], d_query.to(d_q.dtype.element_ty), mask=own_v)
    if K > V:
        tl.store(d_q + at_q + r[None, :], d_rest.to(d_q.dtype.element_ty), mask=own_r)


@triton.jit(do_not_specialize=["T", "C", "first", "N"])
def _choices_backward(
    q,
    d_output,
    weights,
    slopes,
    d_rows,
    T,
    C,
    first,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What BLOCK_N choices of one query give BLOCK_K columns of their keys, [B, C, N, K], from weights and slopes."""
    local = tl.program_id(0).to(tl.int64)
    row = local // C * T + first + local % C
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        at = (local * H + h)[:, None] * N + n[None, :]
        own = (h < H)[:, None] & (n < N)[None, :]
        weight = tl.load(weights + at, mask=own, other=0.0)
        slope = tl.load(slopes + at, mask=own, other=0.0)
        at = (row * H + h)[:, None]
        query = tl.load(q + at * K + c[None, :], mask=(h < H)[:, None] & (c < K)[None, :], other=0.0)
        d_out = tl.load(d_output + at * V + c[None, :], mask=(h < H)[:, None] & (c < V)[None, :], other=0.0)
        total = tl.dot(tl.trans(slope), query, total, input_precision=PRECISION)
        total = tl.dot(tl.trans(weight), d_out.to(query.dtype), total, input_precision=PRECISION)
    at = (local * N + n)[:, None] * K + c[None, :]
    tl.store(d_rows + at, total, mask=(n < N)[:, None] & (c < K)[None, :])


def _spans(time: int, numbers: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of spans of queries, each of which needs so many numbers."""
    size = max(1, HELD // numbers)
    if size > TILE_OF_QUERIES:
        size = size // TILE_OF_QUERIES * TILE_OF_QUERIES
    for start in range(0, time, size):
        yield start, min(time, start + size)


def _fitted(kernel: str, widths: tuple[int, ...], like: Tensor, **heads: int) -> Configuration:
    """A kernel's row, whose tile of heads is no larger than their number needs."""
    row = configure(OPERATOR, kernel, widths, like)
    least = {name: min(row.blocks[name], padded(count)) for name, count in heads.items()}
    return replace(row, blocks={**row.blocks, **least})


def _fresh(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _as_rows(k: Tensor) -> Tensor:
    """k [B, S, W] itself where its rows lie one behind another, as in the filled part of a cache; else a copy."""
    width = k.shape[2]
    lies = k.stride(2) == 1 and k.stride(1) == width and k.stride(0) % width == 0
    return k if lies else k.contiguous()


def _apart(k: Tensor) -> int:
    """How many rows the beginnings of two batch entries lie apart."""
    return k.stride(0) // k.shape[2]


def _index_sizes(q: Tensor) -> dict[str, Any]:
    return {
        "J": q.shape[2],
        "WIDTH": q.shape[3],
        "BLOCK_I": padded(q.shape[3]),
        "PRECISION": dot_precision(q.dtype),
    }


def _all_scores(
    q: Tensor, k: Tensor, weights: Tensor, start: int, end: int, *, ranks: bool, one: bool = False
) -> Tensor:
    """Scores of the queries from start to end [B, C, S and more], or their ranks; `one` where there is one query a row."""
    batch, time = q.shape[:2]
    keys, count = k.shape[1], end - start
    row = configure(OPERATOR, "scores_step" if one else "scores", (q.shape[3],), q)
    stride = triton.cdiv(keys, ALIGNED.value) * ALIGNED.value
    output = _fresh(q, batch, count, stride, dtype=torch.int32 if ranks else torch.float32)
    grid = (triton.cdiv(count, row.blocks["BLOCK_T"]), triton.cdiv(keys, row.blocks["BLOCK_S"]), batch)
    arguments = (q, k, weights, output, time, keys, _apart(k), count, start)
    launch(OPERATOR, _scores, grid, arguments, {**_index_sizes(q), "RANKS": ranks}, row, like=q)
    return output


def _alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, which holds either."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    return q.to(dtype).contiguous(), k.to(dtype).contiguous()


@torch.no_grad()
def select_keys(q: Tensor, k: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Two launches a span of queries; shapes as in `ops.select_keys`."""
    batch, time = q.shape[:2]
    keys = k.shape[1]
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k, weights = q.to(dtype).contiguous(), _as_rows(k.to(dtype)), weights.contiguous()
    chosen = _fresh(q, batch, time, min(keep, keys), dtype=torch.long)
    one = time == 1
    row = configure(OPERATOR, "select_step" if one else "select", (q.shape[3],), q)
    for start, end in _spans(time, batch * keys):
        ranks = _all_scores(q, k, weights, start, end, ranks=True, one=one)
        arguments = (ranks, chosen, time, keys, end - start, start, chosen.shape[2])
        grid = (triton.cdiv(end - start, row.blocks["ROWS"]), batch)
        launch(OPERATOR, _select, grid, arguments, {}, row, like=q)
    return chosen


def _add_by_key(d_rows: Tensor, chosen: Tensor, total: Tensor) -> None:
    """Add d_rows [P, B, C, N, W] to `total` [B, S, W] at the places chosen [B, C, N], each in the order of queries."""
    batch, keys, width = total.shape
    offset = torch.arange(0, batch * keys, keys, device=chosen.device)[:, None, None]
    # Choices of nothing come last, behind every list. B·S numbers fit, being rows that are themselves held.
    rows = torch.where(chosen < 0, batch * keys, chosen + offset).flatten().int()
    ordered, order = rows.sort(stable=True)
    every = torch.arange(batch * keys + 1, dtype=torch.int32, device=chosen.device)
    bounds = torch.searchsorted(ordered, every)
    row = configure(OPERATOR, "collect", (width,), d_rows)
    grid = (batch * keys, triton.cdiv(width, row.blocks["BLOCK_W"]))
    arguments = (d_rows, order, bounds, total, d_rows.shape[0], chosen.numel())
    launch(OPERATOR, _collect, grid, arguments, {"WIDTH": width}, row, like=d_rows)


class _Places(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        batch, time, heads, width = q.shape
        count = chosen.shape[2]
        row = _fitted("places", (width,), q, BLOCK_J=heads)
        output = _fresh(q, batch, time, count)
        grid = (batch * time, triton.cdiv(count, row.blocks["BLOCK_N"]))
        arguments = (q, k, weights, chosen, output, time, k.shape[1], count)
        launch(OPERATOR, _places, grid, arguments, _index_sizes(q), row, like=q)
        ctx.save_for_backward(q, k, weights, chosen)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights, chosen = ctx.saved_tensors
        batch, time, heads, width = q.shape
        keys, count = k.shape[1], chosen.shape[2]
        row = _fitted("places_backward", (width,), q, BLOCK_J=heads)
        parts = triton.cdiv(heads, row.blocks["BLOCK_J"])
        grad, d_q = grad.contiguous(), torch.empty_like(q)
        d_weights = torch.empty_like(weights, dtype=torch.float32)
        d_k = torch.zeros_like(k, dtype=torch.float32)
        for start, end in _spans(time, parts * batch * count * width):
            d_rows = _fresh(q, parts, batch, end - start, count, width)
            arguments = (q, k, weights, chosen, grad, d_q, d_weights, d_rows)
            sizes = (time, keys, end - start, start, count, batch)
            grid = (batch * (end - start), parts)
            launch(OPERATOR, _places_backward, grid, (*arguments, *sizes), _index_sizes(q), row, like=q)
            _add_by_key(d_rows, chosen[:, start:end], d_k)
        return d_q, d_k.to(k.dtype), d_weights.to(weights.dtype), None


class _Dense:
    """Gathers, span by span, what the gradients of all scores give the index: d_q, d_k and d_weights."""

    def __init__(self, q: Tensor, k: Tensor, weights: Tensor) -> None:
        self.q, self.k, self.weights = q, k, weights
        self.d_q, self.d_weights = torch.empty_like(q), torch.empty_like(weights, dtype=torch.float32)
        self.parts = min(GROUPS, q.shape[2])
        self.d_k = torch.zeros(self.parts, *k.shape, dtype=torch.float32, device=k.device)

    def add(self, slopes: Tensor, start: int, end: int) -> None:
        """`slopes` [B, C, S and more] belong to the scores of the queries from start to end."""
        q, k, weights = self.q, self.k, self.weights
        batch, time, heads, width = q.shape
        sizes = (time, k.shape[1], end - start, start)
        row = configure(OPERATOR, "queries_backward", (width,), q)
        grid = (triton.cdiv(end - start, row.blocks["BLOCK_T"]), heads, batch)
        arguments = (q, k, weights, slopes, self.d_q, self.d_weights)
        launch(OPERATOR, _queries_backward, grid, (*arguments, *sizes), _index_sizes(q), row, like=q)
        row = configure(OPERATOR, "keys_backward", (width,), q)
        grid = (triton.cdiv(k.shape[1], row.blocks["BLOCK_S"]), self.parts, batch)
        launch(
            OPERATOR,
            _keys_backward,
            grid,
            (q, k, weights, slopes, self.d_k, *sizes, batch),
            _index_sizes(q),
            row,
            like=q,
        )


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, weights)
        return _all_scores(q, k, weights, 0, q.shape[1], ranks=False)[..., : k.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights = ctx.saved_tensors
        dense = _Dense(q, k, weights)
        slopes = torch.nn.functional.pad(grad, (0, -k.shape[1] % ALIGNED.value)).contiguous()
        dense.add(slopes, 0, q.shape[1])
        return dense.d_q, dense.d_k.sum(0).to(k.dtype), dense.d_weights.to(weights.dtype)


def index_scores(q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor:
    """One launch, two for the gradients and one more that gathers the keys'; shapes as in `ops.index_scores`."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = _alike(q, k)
        weights = weights.contiguous()
        scores: Tensor = (
            _Scores.apply(q, k, weights)
            if chosen is None
            else _Places.apply(q, k, weights, chosen.long().contiguous())
        )
    return scores


class _Divergence(torch.autograd.Function):
    """The gradients come with the divergence, since both are made of the same tiles, and are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        learns: bool,
    ) -> Tensor:
        batch, time, heads, key = queries.shape
        count, widths = keys.shape[1], (q.shape[3], key)
        sizes = {"H": heads, "K": key, "PRECISION": dot_precision(queries.dtype)}
        row = configure(OPERATOR, "masses", widths, queries)
        masses = _fresh(q, batch, time, heads)
        grid = (triton.cdiv(time, row.blocks["BLOCK_T"]) * batch * heads,)
        arguments = (queries, keys, masses, time, count, scale)
        launch(OPERATOR, _masses, grid, arguments, sizes, row, like=queries)
        dense = _Dense(q, k, weights) if learns else None
        divergence = []
        whole, row = (configure(OPERATOR, name, widths, queries) for name in ("index_masses", "difference"))
        tiles = triton.cdiv(count, row.blocks["BLOCK_S"])
        for start, end in _spans(time, batch * count):
            own, place = end - start, (time, count, end - start, start)
            scores = _all_scores(q, k, weights, start, end, ranks=False)
            index_masses = _fresh(q, batch, own)
            arguments = (scores, index_masses, *place)
            launch(OPERATOR, _index_masses, (own, batch), arguments, {}, whole, like=queries)
            slopes = torch.empty_like(scores) if learns else None
            parts = _fresh(q, tiles, batch, own)
            grid = (triton.cdiv(own, row.blocks["BLOCK_T"]), tiles, batch)
            given = (queries, keys, masses, scores, index_masses, slopes, parts, *place, scale)
            launch(OPERATOR, _difference, grid, given, sizes, row, like=queries)
            divergence.append(parts.sum((0, 2)))
            if dense is not None:
                assert slopes is not None
                dense.add(slopes, start, end)
        if dense is not None:
            ctx.save_for_backward(dense.d_q, dense.d_k.sum(0), dense.d_weights)
            ctx.dtypes = q.dtype, k.dtype, weights.dtype
        return torch.stack(divergence).sum(0) / time

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        each = grad / gradients[0].shape[1]
        own = [
            (x * each.view(-1, *[1] * (x.dim() - 1))).to(dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*own, None, None, None, None)


def index_divergence(
    q: Tensor, k: Tensor, weights: Tensor, queries: Tensor, keys: Tensor, scale: float
) -> Tensor:
    """Four launches, and two for the gradients, a span of queries; a mean for each batch entry."""
    learns = wants_gradient(q, k, weights)
    with torch.autocast(q.device.type, enabled=False):
        q, k = _alike(q, k)
        queries, keys = _alike(queries.detach(), keys.detach())
        divergence: Tensor = _Divergence.apply(q, k, weights.contiguous(), queries, keys, scale, learns)
    return divergence


def _attention_sizes(q: Tensor, value: int) -> dict[str, Any]:
    heads, key = q.shape[2:]
    return {
        "H": heads,
        "K": key,
        "V": value,
        "BLOCK_V": padded(value),
        "BLOCK_R": padded(key - value),
        "PRECISION": dot_precision(q.dtype),
    }


def _read(q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and log-masses [B, T, H]; the chosen keys of a single query are dealt out to many programs."""
    batch, time, heads, key = q.shape
    count, widths = chosen.shape[2], (value, key - value)
    row = _fitted("attend_step" if time == 1 else "attend", widths, q, BLOCK_H=heads)
    parts = triton.cdiv(count, row.blocks["SPAN"])
    output, masses = _fresh(q, batch, time, heads, value, dtype=q.dtype), _fresh(q, batch, time, heads)
    rows = batch * time * heads
    target = (output, masses)
    if parts > 1:
        target = (_fresh(q, parts, rows, value), _fresh(q, parts, rows))
    grid = (batch * time, triton.cdiv(heads, row.blocks["BLOCK_H"]), parts)
    arguments = (q, k, chosen, *target, time, _apart(k), count, rows, scale)
    launch(OPERATOR, _attend, grid, arguments, _attention_sizes(q, value), row, like=q)
    if parts > 1:
        row = configure(OPERATOR, "merge", widths, q)
        sizes = {"V": value, "BLOCK_V": padded(value)}
        launch(OPERATOR, _merge, (rows,), (*target, output, masses, rows, parts), sizes, row, like=q)
    return output, masses


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, masses = _read(q, k, chosen, value, scale)
        ctx.save_for_backward(q, k, chosen, output, masses)
        ctx.scale = scale
        ctx.mark_non_differentiable(masses)
        return output, masses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, chosen, output, masses = ctx.saved_tensors
        batch, time, heads, key = q.shape
        keys, count, value = k.shape[1], chosen.shape[2], output.shape[3]
        widths, sizes = (value, key - value), _attention_sizes(q, value)
        narrow = {name: sizes[name] for name in ("H", "K", "V", "PRECISION")}
        reading = _fitted("attend_backward", widths, q, BLOCK_H=heads)
        giving = _fitted("choices_backward", widths, q, BLOCK_H=heads)
        grad, d_q = grad.contiguous(), torch.empty_like(q)
        d_k = torch.zeros_like(k, dtype=torch.float32)
        for start, end in _spans(time, batch * count * (key + heads)):
            own = end - start
            weights, slopes = (_fresh(q, batch, own, heads, count, dtype=q.dtype) for _ in range(2))
            grid = (batch * own, triton.cdiv(heads, reading.blocks["BLOCK_H"]))
            given = (q, k, chosen, output, masses, grad, d_q, weights, slopes)
            place = (time, keys, own, start, count, ctx.scale)
            launch(OPERATOR, _attend_backward, grid, (*given, *place), sizes, reading, like=q)
            d_rows = _fresh(q, 1, batch, own, count, key)
            tiles = triton.cdiv(count, giving.blocks["BLOCK_N"]), triton.cdiv(key, giving.blocks["BLOCK_K"])
            taken = (q, grad, weights, slopes, d_rows, time, own, start, count)
            launch(OPERATOR, _choices_backward, (batch * own, *tiles), taken, narrow, giving, like=q)
            _add_by_key(d_rows, chosen[:, start:end], d_k)
        return d_q, d_k.to(k.dtype), None, None, None


@torch.no_grad()
def _mean_shares(q: Tensor, k: Tensor, chosen: Tensor, masses: Tensor, value: int, scale: float) -> Tensor:
    batch, time, heads, key = q.shape
    count = chosen.shape[2]
    row = _fitted("shares", (value, key - value), q, BLOCK_H=heads)
    shares = _fresh(q, batch, time, count)
    grid = (batch * time, triton.cdiv(count, row.blocks["BLOCK_N"]))
    arguments = (q, k, chosen, masses, shares, time, _apart(k), count, scale)
    sizes = {"H": heads, "K": key, "PRECISION": dot_precision(q.dtype)}
    launch(OPERATOR, _shares, grid, arguments, sizes, row, like=q)
    return shares


def selected_attention(
    q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float, shares: bool
) -> tuple[Tensor, Tensor | None]:
    """One launch, and one for the shares; one more for a single query; shapes as in `ops.selected_attention`."""
    recorded = wants_gradient(q, k)
    with torch.autocast(q.device.type, enabled=False):
        q, chosen = q.to(k.dtype).contiguous(), chosen.long().contiguous()
        k, read = (k.contiguous(), _Attend.apply) if recorded else (_as_rows(k), _read)
        output, masses = read(q, k, chosen, value, scale)
        weights = _mean_shares(q, k, chosen, masses, value, scale) if shares else None
    return output, weights

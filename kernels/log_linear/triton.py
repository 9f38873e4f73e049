"""Log-linear attention in Triton: the decay's levels in two launches forward and two backward, and a step of both bases.

Letters: B batch, T time, H heads, G groups that share q and k, L levels, K key, V value, C tokens of a chunk, n chunks
of a text, W walks.  After arXiv:2506.04761.

Level l ≥ 1 of a token holds a block of 2^(l-1) tokens. Blocks within its own chunk are read by pairs of tokens, each
weighed by the highest bit in which their places differ. A block of 2^t chunks is the left half of one of twice as
many, and the chunks of the right half read it. So walk t goes through blocks of 2^(t+1) chunks: it writes a state
while bit t of the chunk's number is 0, and lets it be read while that is 1. All walks go at once and leave their
states before each chunk; then every chunk of every head is a program of its own. The backward pass does the same from
the end, where readers write and writers read. No accumulator is transposed on its way into another product (see the
traps of Hopper).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta import Walks
from kernels.fused import chunk_place, chunk_sums, document_bounds, pair_decays
from kernels.launch import configure, dot_precision, launch, padded
from kernels.log_linear import chunked, triton_delta
from kernels.log_linear.levels import by_level, first_states, levels_of, meet, weighed

OPERATOR = "log_linear"


@triton.jit(do_not_specialize=["T", "WALKS", "BEFORE"])
def _walk(
    keys,
    values,
    gate,
    weights,
    first,
    states,
    last,
    T,
    WALKS,
    BEFORE,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BACK: tl.constexpr,
):
    """The states of a walk before each chunk and, if they are read there, at the end; with BACK from the end.

    BEFORE counts the chunks of the text before the first one here; FAR is the level that walk 0 reads.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % (tiles_k * tiles_v)
    n = (tl.program_id(0) // (H * tiles_k * tiles_v)).to(tl.int64)
    h = tl.program_id(0) // (tiles_k * tiles_v) % H
    walk = tl.program_id(1)
    begin, length, chunk = document_bounds(n, T, None, None, CHUNK)
    i = tl.arange(0, CHUNK)
    rows = tile // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    count = tl.cdiv(length, CHUNK)
    # What no chunk reads at the end lies in other walks as well.
    read_last = ((BEFORE + count - 1) >> walk) & 1 == 1
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first is not None:
        given = inside & read_last if BACK else inside
        S += tl.load(first + ((n * H + h) * WALKS + walk) * K * V + at, mask=given, other=0.0)
    for turn in range(0, count):
        c = count - 1 - turn if BACK else turn
        number = BEFORE + c
        fresh = (number >> (walk + 1)) << (walk + 1) == number
        if not BACK:
            S = tl.where(fresh, 0.0, S)
        place = (((chunk + c) * H + h) * WALKS + walk) * K * V
        tl.store(states + place + at, S.to(states.dtype.element_ty), mask=inside)
        live = i < length - c * CHUNK
        token = begin + (c * CHUNK).to(tl.int64)
        fades = tl.load(gate + token * H + h + i * H, mask=live, other=0.0)
        _whole, _rest, since, until, fade = chunk_sums(fades)
        S = S * fade
        if (number >> walk) & 1 == (1 if BACK else 0):
            at_k = (token * G + h // (H // G)) * K + i[:, None] * (G * K) + rows[None, :]
            at_v = (token * H + h) * V + i[:, None] * (H * V) + columns[None, :]
            key = tl.load(keys + at_k, mask=live[:, None] & (rows < K)[None, :], other=0.0)
            value = tl.load(values + at_v, mask=live[:, None] & (columns < V)[None, :], other=0.0)
            edge = until
            if BACK:
                at_w = (token * H + h) * L + tl.minimum(FAR + walk, L - 1)
                edge = since * tl.load(weights + at_w + i * (H * L), mask=live, other=0.0)
            kept = (value.to(tl.float32) * edge[:, None]).to(value.dtype)
            S += tl.dot(tl.trans(key), kept, input_precision=PRECISION)
        if BACK:
            S = tl.where(fresh, 0.0, S)
    if last is not None:
        kept = S if BACK else tl.where(read_last, S, 0.0)
        tl.store(last + ((n * H + h) * WALKS + walk) * K * V + at, kept, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _low(
    k,
    v,
    gate,
    low,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The levels that the last token finds in its own chunk, [N, H, NEAR, K, V]."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % (tiles_k * tiles_v)
    n = (tl.program_id(0) // (H * tiles_k * tiles_v)).to(tl.int64)
    h = tl.program_id(0) // (tiles_k * tiles_v) % H
    level = tl.program_id(1)
    begin, length, _chunk = document_bounds(n, T, None, None, CHUNK)
    i = tl.arange(0, CHUNK)
    rows = tile // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    done = (length - 1) // CHUNK * CHUNK
    left = length - done
    token = begin + done
    own = (i < left) & meet(i, left - 1, level, NEAR)
    fades = tl.load(gate + token * H + h + i * H, mask=i < left, other=0.0)
    _whole, _rest, _since, until, _fade = chunk_sums(fades)
    at_k = (token * G + h // (H // G)) * K + i[:, None] * (G * K) + rows[None, :]
    at_v = (token * H + h) * V + i[:, None] * (H * V) + columns[None, :]
    key = tl.load(k + at_k, mask=own[:, None] & (rows < K)[None, :], other=0.0)
    value = tl.load(v + at_v, mask=own[:, None] & (columns < V)[None, :], other=0.0)
    kept = (value.to(tl.float32) * until[:, None]).to(value.dtype)
    S = tl.dot(tl.trans(key), kept, input_precision=PRECISION)
    at = ((n * H + h) * NEAR + level) * K * V + rows[:, None] * V + columns[None, :]
    tl.store(low + at, S, mask=(rows < K)[:, None] & (columns < V)[None, :])


@triton.jit
def _read(
    left_rows,
    right_rows,
    states,
    others,
    gate,
    weights,
    output,
    mine,
    d_gate,
    d_far,
    left,
    number,
    start,
    WALKS,
    H: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    STRIDE: tl.constexpr,
    M: tl.constexpr,
    OTHER: tl.constexpr,
    N: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_t λ_t exp(D) left S_t + (left rightᵀ ∘ decays ∘ λ) others: a tile of one chunk's output, or of dq.

    left and right [C, M] have their rows STRIDE apart, others [C, N] OTHER; the states [M, N] have steps of ACROSS and
    ALONG. For dq, where `mine` are the queries, what readers add to the gradients of decays and weights as well.
    """
    i, m, columns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    live = i < left
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for low in range(0, M, BLOCK_M):
        at = i[:, None] * STRIDE + (low + m)[None, :]
        own = live[:, None] & (low + m < M)[None, :]
        row, other = (
            tl.load(left_rows + at, mask=own, other=0.0),
            tl.load(right_rows + at, mask=own, other=0.0),
        )
        pairs += tl.dot(row, tl.trans(other), input_precision=PRECISION)
    fades = tl.load(gate + i * H, mask=live, other=0.0)
    whole, rest, since, _until, _fade = chunk_sums(fades)
    pairs = pairs * pair_decays(whole, rest, CHUNK, False)
    pairs = weighed(pairs, weights, live, H, L, NEAR, CHUNK, False)
    own = live[:, None] & (columns < N)[None, :]
    other = tl.load(others + i[:, None] * OTHER + columns[None, :], mask=own, other=0.0)
    result = tl.dot(pairs.to(other.dtype), other, input_precision=PRECISION)
    passed = tl.zeros([CHUNK], tl.float32)
    for walk in range(0, WALKS):
        if (number >> walk) & 1 == 1:
            through = tl.zeros([CHUNK, BLOCK_N], tl.float32)
            for low in range(0, M, BLOCK_M):
                at = i[:, None] * STRIDE + (low + m)[None, :]
                row = tl.load(left_rows + at, mask=live[:, None] & (low + m < M)[None, :], other=0.0)
                at = walk * M * N + (low + m)[:, None] * ACROSS + columns[None, :] * ALONG
                inside = (low + m < M)[:, None] & (columns < N)[None, :]
                S = tl.load(states + at, mask=inside, other=0.0)
                through += tl.dot(row, S, input_precision=PRECISION)
            weight = tl.load(weights + i * (H * L) + tl.minimum(FAR + walk, L - 1), mask=live, other=0.0)
            result += through * (weight * since)[:, None]
            if mine is not None:
                query = tl.load(mine + i[:, None] * OTHER + columns[None, :], mask=own, other=0.0)
                found = tl.sum(through * query.to(tl.float32), 1) * since
                tl.store(d_far + i * (H * WALKS) + walk, found, mask=live)
                passed += found * weight
        elif mine is not None:
            tl.store(d_far + i * (H * WALKS) + walk, tl.zeros([CHUNK], tl.float32), mask=live)
    if mine is not None:
        tl.store(d_gate + i * H, tl.cumsum(passed, 0, reverse=True), mask=live)
    tl.store(output + i[:, None] * (H * N) + columns[None, :], result.to(output.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["T", "WALKS", "BEFORE"])
def _forward(
    q,
    k,
    v,
    gate,
    weights,
    starts,
    output,
    T,
    WALKS,
    BEFORE,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    own = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1)
    token, left = chunk_place(own, T, None, None, None, CHUNK)
    c = own % tl.cdiv(T, CHUNK)
    by_group, by_head = (token * G + h // (H // G)) * K, token * H + h
    _read(
        q + by_group, k + by_group, starts + (own * H + h) * WALKS * K * V, v + by_head * V,
        gate + by_head, weights + by_head * L, output + by_head * V, None, None, None,
        left, BEFORE + c, tl.program_id(0) % tiles * BLOCK_V, WALKS,
        H, L, NEAR, FAR, G * K, K, H * V, V, V, 1, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit
def _written(
    left_rows,
    right_rows,
    states,
    low_states,
    others,
    gate,
    weights,
    output,
    mine,
    d_gate,
    left,
    number,
    start,
    WALKS,
    H: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    STRIDE: tl.constexpr,
    M: tl.constexpr,
    OTHER: tl.constexpr,
    N: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(D_C − D) left Σ_t D_t + (left rightᵀ ∘ decaysᵀ ∘ λᵀ) others: a tile of one chunk's dk or dv.

    Sizes and steps as in `_read`. The last chunk's tokens have a state of their own in each of the low levels. For dk,
    where `mine` are the keys, what writers add to the gradient of the decays as well.
    """
    i, m, columns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    live = i < left
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    result = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for low in range(0, M, BLOCK_M):
        at = i[:, None] * STRIDE + (low + m)[None, :]
        own = live[:, None] & (low + m < M)[None, :]
        row, other = (
            tl.load(left_rows + at, mask=own, other=0.0),
            tl.load(right_rows + at, mask=own, other=0.0),
        )
        pairs += tl.dot(row, tl.trans(other), input_precision=PRECISION)
        at = (low + m)[:, None] * ACROSS + columns[None, :] * ALONG
        inside = (low + m < M)[:, None] & (columns < N)[None, :]
        D = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for walk in range(0, WALKS):
            if (number >> walk) & 1 == 0:
                D += tl.load(states + walk * M * N + at, mask=inside, other=0.0).to(tl.float32)
        result += tl.dot(row, D.to(row.dtype), input_precision=PRECISION)
        if low_states is not None:
            if left <= CHUNK:
                for level in range(0, NEAR):
                    own_level = tl.load(low_states + level * M * N + at, mask=inside, other=0.0)
                    there = meet(i, left - 1, level, NEAR)
                    held = tl.where(there[:, None], row, tl.zeros_like(row))
                    result += tl.dot(held, own_level.to(row.dtype), input_precision=PRECISION)
    fades = tl.load(gate + i * H, mask=live, other=0.0)
    whole, rest, _since, until, _fade = chunk_sums(fades)
    pairs = pairs * pair_decays(whole, rest, CHUNK, True)
    pairs = weighed(pairs, weights, live, H, L, NEAR, CHUNK, True)
    result = result * until[:, None]
    own = live[:, None] & (columns < N)[None, :]
    at = i[:, None] * OTHER + columns[None, :]
    if mine is not None:
        passed = tl.sum(result * tl.load(mine + at, mask=own, other=0.0).to(tl.float32), 1)
        d_fade = tl.sum(passed, 0) - tl.cumsum(passed, 0, reverse=True)
        tl.store(d_gate + i * H, d_fade, mask=live)
    other = tl.load(others + at, mask=own, other=0.0)
    result += tl.dot(pairs.to(other.dtype), other, input_precision=PRECISION)
    tl.store(output + i[:, None] * (H * N) + columns[None, :], result.to(output.dtype.element_ty), mask=own)


@triton.jit
def _to_numbers(
    q,
    k,
    v,
    d_output,
    gate,
    weights,
    starts,
    ends,
    d_gate,
    d_near,
    left,
    WALKS,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the pairs of one chunk, and the states that pass over it, add to the gradients of decays and weights."""
    i, keys, values = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    live = i < left
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    held = tl.zeros([BLOCK_K], tl.float32)
    for low in range(0, K, BLOCK_K):
        own = live[:, None] & (low + keys < K)[None, :]
        at = i[:, None] * (G * K) + (low + keys)[None, :]
        query, key = tl.load(q + at, mask=own, other=0.0), tl.load(k + at, mask=own, other=0.0)
        pairs += tl.dot(query, tl.trans(key), input_precision=PRECISION)
        for corner in range(0, V, BLOCK_V):
            inside = (low + keys < K)[:, None] & (corner + values < V)[None, :]
            for walk in range(0, WALKS):
                there = walk * K * V + (low + keys)[:, None] * V + (corner + values)[None, :]
                S = tl.load(starts + there, mask=inside, other=0.0).to(tl.float32)
                held += tl.sum(S * tl.load(ends + there, mask=inside, other=0.0).to(tl.float32), 1)
    for corner in range(0, V, BLOCK_V):
        own = live[:, None] & (corner + values < V)[None, :]
        at = i[:, None] * (H * V) + (corner + values)[None, :]
        d_out, value = tl.load(d_output + at, mask=own, other=0.0), tl.load(v + at, mask=own, other=0.0)
        d_pairs += tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
    fades = tl.load(gate + i * H, mask=live, other=0.0)
    whole, rest, _since, _until, fade = chunk_sums(fades)
    pairs = pairs * d_pairs * pair_decays(whole, rest, CHUNK, False)
    found = levels_of(i[:, None], i[None, :], NEAR)
    change = tl.zeros([CHUNK], tl.float32)
    for level in range(0, NEAR):
        at_level = tl.where(found == level, pairs, 0.0)
        tl.store(d_near + i * (H * NEAR) + level, tl.sum(at_level, 1), mask=live)
        weight = tl.load(weights + i * (H * L) + level, mask=live, other=0.0)
        # Pairs of a token with itself fade by nothing.
        at_level = tl.where(i[:, None] > i[None, :], at_level * weight[:, None], 0.0)
        change += tl.sum(at_level, 1) - tl.sum(at_level, 0)
    d_fade = tl.sum(held, 0) * fade + tl.cumsum(change, 0, reverse=True)
    tl.store(d_gate + i * H, d_fade, mask=live)


@triton.jit(do_not_specialize=["T", "TOTAL", "WALKS", "BEFORE"])
def _backward(
    q,
    k,
    v,
    gate,
    weights,
    starts,
    ends,
    d_output,
    d_low,
    d_q,
    d_k,
    d_v,
    d_gate,
    d_near,
    d_far,
    T,
    TOTAL,
    WALKS,
    BEFORE,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one chunk: a program has one of four duties, so that few products are held at a time."""
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    duties: tl.constexpr = 2 * tiles + 1 + (V + BLOCK_V - 1) // BLOCK_V
    duty = tl.program_id(0) % duties
    own = (tl.program_id(0) // duties).to(tl.int64)
    h = tl.program_id(1)
    token, left = chunk_place(own, T, None, None, None, CHUNK)
    c = own % tl.cdiv(T, CHUNK)
    by_group, by_head = (token * G + h // (H // G)) * K, token * H + h
    part = duty.to(tl.int64) * TOTAL * H + by_head
    q += by_group
    k += by_group
    v += by_head * V
    d_output += by_head * V
    gate += by_head
    weights += by_head * L
    starts += (own * H + h) * WALKS * K * V
    ends += (own * H + h) * WALKS * K * V
    d_gate += part
    if d_low is not None:
        d_low += (own // tl.cdiv(T, CHUNK) * H + h) * NEAR * K * V
    if duty < tiles:
        _read(
            d_output, v, starts, k, gate, weights, d_q + by_head * K, q, d_gate, d_far + part * WALKS,
            left, BEFORE + c, duty * BLOCK_K, WALKS,
            H, L, NEAR, FAR, H * V, V, G * K, K, 1, V, BLOCK_V, BLOCK_K, CHUNK, PRECISION,
        )  # fmt: skip
    elif duty < 2 * tiles:
        _written(
            v, d_output, ends, d_low, q, gate, weights, d_k + by_head * K, k, d_gate,
            left, BEFORE + c, (duty - tiles) * BLOCK_K, WALKS,
            H, L, NEAR, H * V, V, G * K, K, 1, V, BLOCK_V, BLOCK_K, CHUNK, PRECISION,
        )  # fmt: skip
    elif duty > 2 * tiles:
        _written(
            k, q, ends, d_low, d_output, gate, weights, d_v + by_head * V, None, None,
            left, BEFORE + c, (duty - 2 * tiles - 1) * BLOCK_V, WALKS,
            H, L, NEAR, G * K, K, H * V, V, V, 1, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip
    else:
        _to_numbers(
            q, k, v, d_output, gate, weights, starts, ends, d_gate, d_near + by_head * NEAR, left, WALKS,
            H, G, K, V, L, NEAR, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["LENGTH"])
def _step(
    q,
    k,
    v,
    gate,
    weights,
    beta,
    levels,
    output,
    LENGTH,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token in place, by the levels that hold something alone."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    n = (tl.program_id(0) // (H * tiles)).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    keys, values = tl.arange(0, BLOCK_K), tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = (n * G + h // (H // G)) * K + keys
    query = tl.load(q + at_k, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + at_k, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + (n * H + h) * V + values, mask=values < V, other=0.0).to(tl.float32)
    fade = tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    levels += (n * H + h) * L * K * V + keys[:, None] * V + values[None, :]
    weights += (n * H + h) * L
    strength = 1.0
    if beta is not None:
        strength = tl.load(beta + n * H + h).to(tl.float32)
    written = key[:, None] * (value * strength)[None, :]
    out = tl.load(weights).to(tl.float32) * tl.sum(written * query[:, None], 0)
    # The full levels below the first free one move into it; where no token came before there is nothing to move.
    free = 1
    while free < L - 1 and (LENGTH >> (free - 1)) & 1 == 0:
        free += 1
    moved = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if LENGTH > 0:
        for level in range(0, free + 1):
            moved += tl.load(levels + level * K * V, mask=inside, other=0.0)
        # All is read before any of it is written.
        tl.debug_barrier()
        for level in range(1, free):
            tl.store(levels + level * K * V, tl.zeros([BLOCK_K, BLOCK_V], tl.float32), mask=inside)
        for level in range(free, L):
            held = (LENGTH >> (level - 1)) & 1 == 1
            if level == L - 1:
                held = (LENGTH >> (level - 1)) > 0
            if held:
                S = moved
                if level > free:
                    S = tl.load(levels + level * K * V, mask=inside, other=0.0)
                S = S * fade
                if beta is not None:
                    S -= (key * strength)[:, None] * tl.sum(S * key[:, None], 0)[None, :]
                tl.debug_barrier()
                tl.store(levels + level * K * V, S, mask=inside)
                out += tl.load(weights + level).to(tl.float32) * tl.sum(S * query[:, None], 0)
    tl.store(levels, written, mask=inside)
    tl.store(output + (n * H + h) * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        weights: Tensor,
        first: Tensor | None,
        before: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, the levels that the last chunk holds alone, and those that walks hold; `before` counts chunks."""
        ctx.set_materialize_grads(False)
        batch, time, heads, value = v.shape
        key = k.shape[-1]
        row = configure(OPERATOR, "forward", (key, value), v)
        size = row.blocks["CHUNK"]
        chunks = batch * triton.cdiv(time, size)
        ctx.before, ctx.walks = before, (before + triton.cdiv(time, size) - 1).bit_length()
        starts = v.new_empty(chunks, heads, ctx.walks, key, value)
        last = torch.empty(batch, heads, ctx.walks, key, value, dtype=torch.float32, device=v.device)
        _launch_walk(ctx, k, v, gate, weights, first, starts, last, back=False)
        sizes = _sizes(q, v, weights, size)
        output = torch.empty_like(v)
        launch(
            OPERATOR,
            _forward,
            (chunks * triton.cdiv(value, row.blocks["BLOCK_V"]), heads),
            (q, k, v, gate, weights, starts, output, time, ctx.walks, before),
            sizes,
            row,
            like=v,
        )
        row = configure(OPERATOR, "walk", (key, value), v)
        low = torch.empty(batch, heads, sizes["NEAR"], key, value, dtype=torch.float32, device=v.device)
        tiles = triton.cdiv(key, row.blocks["BLOCK_K"]) * triton.cdiv(value, row.blocks["BLOCK_V"])
        launch(
            OPERATOR,
            _low,
            (batch * heads * tiles, sizes["NEAR"]),
            (k, v, gate, low, time),
            {name: size for name, size in sizes.items() if name not in ("L", "FAR")},
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, gate, weights, starts)
        ctx.has_first = first is not None
        return output, low, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, weights, starts = ctx.saved_tensors
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
        d_output, d_low, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.to(v.dtype).contiguous()
        d_low, d_last = (None if x is None else x.contiguous() for x in (d_low, d_last))
        ends, d_first = torch.empty_like(starts), None
        if ctx.has_first:
            shape = batch, heads, ctx.walks, key, value
            d_first = torch.empty(shape, dtype=torch.float32, device=v.device)
        _launch_walk(ctx, q, d_output, gate, weights, d_last, ends, d_first, back=True)
        row = configure(OPERATOR, "backward", (key, value), v)
        sizes = _sizes(q, v, weights, row.blocks["CHUNK"])
        tiles = triton.cdiv(key, row.blocks["BLOCK_K"])
        # Heads that share q and k, and what tiles add to the numbers of a token, are summed afterwards.
        shared = groups < heads
        dtype = torch.float32 if shared else v.dtype
        d_q, d_k = (torch.empty(*v.shape[:3], key, dtype=dtype, device=v.device) for _ in range(2))
        d_v, d_gate = torch.empty_like(v), gate.new_empty(2 * tiles + 1, *gate.shape)
        d_near, d_far = (
            gate.new_empty(*gate.shape, sizes["NEAR"]),
            gate.new_empty(tiles, *gate.shape, ctx.walks),
        )
        launch(
            OPERATOR,
            _backward,
            (len(starts) * (2 * tiles + 1 + triton.cdiv(value, row.blocks["BLOCK_V"])), heads),
            (
                *(q, k, v, gate, weights, starts, ends, d_output, d_low),
                *(d_q, d_k, d_v, d_gate, d_near, d_far),
                *(time, batch * time, ctx.walks, ctx.before),
            ),
            sizes,
            row,
            like=v,
        )
        if shared:
            d_q, d_k = (x.unflatten(2, (groups, -1)).sum(3).to(v.dtype) for x in (d_q, d_k))
        d_weights = by_level(d_near, d_far.sum(0), weights.shape[-1], 3)
        return d_q, d_k, d_v, d_gate.sum(0), d_weights, d_first, None


def _launch_walk(
    ctx: Any,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    weights: Tensor,
    first: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    *,
    back: bool,
) -> None:
    batch, time, heads, value = values.shape
    key = keys.shape[-1]
    row = configure(OPERATOR, "walk", (key, value), values)
    tiles = triton.cdiv(key, row.blocks["BLOCK_K"]) * triton.cdiv(value, row.blocks["BLOCK_V"])
    sizes = _sizes(keys, values, weights, row.blocks["CHUNK"])
    if ctx.walks:
        launch(
            OPERATOR,
            _walk,
            (batch * heads * tiles, ctx.walks),
            (keys, values, gate, weights, first, states, last, time, ctx.walks, ctx.before),
            {**{name: size for name, size in sizes.items() if name != "NEAR"}, "BACK": back},
            row,
            like=values,
        )


def _sizes(q: Tensor, v: Tensor, weights: Tensor, chunk: int) -> dict[str, Any]:
    """What the kernels of whole sequences are compiled for; NEAR levels lie in one chunk, and FAR is the next one."""
    levels = weights.shape[-1]
    return {
        "H": v.shape[2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
        "L": levels,
        "NEAR": min(chunk.bit_length(), levels),
        "FAR": chunk.bit_length(),
        "PRECISION": dot_precision(v.dtype),
    }


def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """All chunks at once; shapes as in `ops.log_linear`. Products are taken in v's type, sums in float32.

    A text that goes on in the middle of a chunk gets the rest of that chunk from the chunk form.
    """
    time = v.shape[1]
    kernel = "forward" if beta is None else "prepare_delta"
    size = configure(OPERATOR, kernel, (k.shape[-1], v.shape[-1]), v).blocks["CHUNK"]
    rest = min(-length % size, time)
    if rest:

        def part(span: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
            strength = None if beta is None else beta[:, span]
            return q[:, span], k[:, span], v[:, span], log_decay[:, span], weights[:, span], strength

        output, levels = chunked.log_linear(*part(slice(rest)), levels, length, size)
        if rest == time:
            return output, levels
        others, levels = log_linear(*part(slice(rest, None)), levels, length + rest)
        return torch.cat([output, others], 1), levels
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous()
        log_decay, weights = log_decay.float().contiguous(), weights.float().contiguous()
        before = length // size
        walks = (before + triton.cdiv(time, size) - 1).bit_length()
        first = None if levels is None or not length else first_states(levels.float(), length, size, walks)
        if beta is None:
            output, low, last = _Levels.apply(q, k, v, log_decay, weights, first, before)
        else:
            strength = beta.float().contiguous()
            output, low, last = triton_delta.log_linear(
                q, k, v, log_decay, weights, strength, first, Walks(count=walks, before=before)
            )
        return output, by_level(low, last, weights.shape[-1], 2)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """One token in one launch, in place where `levels` are float32 and contiguous; shapes as in `ops.log_linear_step`."""
    heads, value = v.shape[1:]
    key = k.shape[-1]
    row = configure(OPERATOR, "step", (key, value), v)
    levels = levels.float().contiguous()
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    inputs = (None if x is None else x.contiguous() for x in (q, k, v, log_decay, weights, beta))
    launch(
        OPERATOR,
        _step,
        (v.shape[0] * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
        (*inputs, levels, output, length),
        {"H": heads, "G": k.shape[1], "K": key, "V": value, "L": levels.shape[2], "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, levels

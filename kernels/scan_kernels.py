"""Triton kernels of linear recurrences with one decay a head, for the operators that have such a state.

Letters: B batch, N documents (or B), T time, R rows that a token writes and reads, H heads, G groups that share q and
k, K key, V value, C rows of a chunk, n chunks of all documents.  After Mamba-2's state space duality,
arXiv:2405.21060, and Mamba-3's trapezoidal rule, arXiv:2603.15569.

One launch walks the chunks of every document and leaves the state before each of them; in the next every chunk of
every head is a program of its own. The backward pass does the same from the end: with q for k and d_output for v the
walk leaves the gradient of the state behind each chunk, and with D the running sum of the log-decays and w what a
token's write weighs,
    o  = exp(D) q S   + (q kᵀ ∘ mix) v        dv = w exp(D_C − D) k D   + (k qᵀ ∘ mixᵀ) do
    dq = exp(D) do Sᵀ + (do vᵀ ∘ mix) k       dk = w exp(D_C − D) v Dᵀ  + (v doᵀ ∘ mixᵀ) q
where mix_ij is exp(D_i − D_j) w_j for a token j before i. No accumulator is transposed on its way into another
product (see the traps of Hopper). By the trapezoidal rule w_j = fresh_j + late_{j+1}, but fresh_j alone for the token
itself, whose rows all see one another; else w is 1.
"""

import triton
import triton.language as tl

from kernels.fused import chunk_place, chunk_products, document_bounds, pair_decays
from kernels.scan_rows import live_rows, mixed, row_decays, row_weights, store_sums


@triton.jit(do_not_specialize=["T"])
def walk(
    keys,
    values,
    gate,
    late,
    fresh,
    first,
    states,
    last,
    cu_seqlens,
    offsets,
    T,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BACK: tl.constexpr,
):
    """The state before each chunk and the last one, from `first`; with BACK the same from the end to the beginning."""
    tokens: tl.constexpr = CHUNK // R
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % (tiles_k * tiles_v)
    n = (tl.program_id(0) // (H * tiles_k * tiles_v)).to(tl.int64)
    h = tl.program_id(0) // (tiles_k * tiles_v) % H
    begin, length, chunk = document_bounds(n, T, cu_seqlens, offsets, tokens)
    i = tl.arange(0, CHUNK)
    rows = tile // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first is not None:
        S += tl.load(first + (n * H + h) * K * V + at, mask=inside, other=0.0)
    count = tl.cdiv(length, tokens)
    for turn in range(0, count):
        c = count - 1 - turn if BACK else turn
        tl.store(states + ((chunk + c) * H + h) * K * V + at, S.to(states.dtype.element_ty), mask=inside)
        left = length - c * tokens
        live = live_rows(left, R, CHUNK)
        token = begin + (c * tokens).to(tl.int64)
        at_k = (token * R * G + h // (H // G)) * K + i[:, None] * (G * K) + rows[None, :]
        at_v = (token * R * H + h) * V + i[:, None] * (H * V) + columns[None, :]
        key = tl.load(keys + at_k, mask=live[:, None] & (rows < K)[None, :], other=0.0)
        value = tl.load(values + at_v, mask=live[:, None] & (columns < V)[None, :], other=0.0)
        if gate is not None:
            _whole, _rest, since, until, fade = row_decays(gate + token * H + h, left, H, R, CHUNK)
            edge = since if BACK else until
            if late is not None:
                weight, _now = row_weights(late + token * H + h, fresh + token * H + h, left, H, R, CHUNK)
                edge = edge * weight
            value = (value.to(tl.float32) * edge[:, None]).to(value.dtype)
            S = S * fade
        S += tl.dot(tl.trans(key), value, input_precision=PRECISION)
    if last is not None:
        tl.store(last + (n * H + h) * K * V + at, S, mask=inside)


@triton.jit
def _to_values(
    left_rows,
    right_rows,
    states,
    values,
    gate,
    late,
    fresh,
    output,
    left,
    low,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BACK: tl.constexpr,
):
    """A tile of the output of one chunk; with BACK one of the gradient of its values."""
    live = live_rows(left, R, CHUNK)
    pairs, through = chunk_products(
        left_rows, right_rows, states, live, low, G * K, K, V, V, 1, CHUNK, BLOCK_K, BLOCK_V, PRECISION
    )
    whole, rest, since, until, _fade = row_decays(gate, left, H, R, CHUNK)
    weight, now = row_weights(late, fresh, left, H, R, CHUNK)
    pairs = mixed(pairs, whole, rest, weight, now, R, CHUNK, BACK)
    through = through * (until * weight if BACK else since)[:, None]
    i, columns = tl.arange(0, CHUNK), low + tl.arange(0, BLOCK_V)
    at = i[:, None] * (H * V) + columns[None, :]
    own = live[:, None] & (columns < V)[None, :]
    value = tl.load(values + at, mask=own, other=0.0)
    through += tl.dot(pairs.to(value.dtype), value, input_precision=PRECISION)
    tl.store(output + at, through.to(output.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["T"])
def outputs(
    q,
    k,
    v,
    gate,
    late,
    fresh,
    starts,
    output,
    cu_seqlens,
    offsets,
    owners,
    T,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    own = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1)
    token, left = chunk_place(own, T, cu_seqlens, offsets, owners, CHUNK // R)
    by_group, by_head = (token * R * G + h // (H // G)) * K, (token * R * H + h) * V
    if gate is not None:
        gate += token * H + h
    if late is not None:
        late += token * H + h
        fresh += token * H + h
    _to_values(
        q + by_group, k + by_group, starts + (own * H + h) * K * V, v + by_head, gate, late, fresh,
        output + by_head, left, tl.program_id(0) % tiles * BLOCK_V,
        R, H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, False,
    )  # fmt: skip


@triton.jit
def _to_keys(
    left_rows,
    right_rows,
    states,
    mine,
    others,
    gate,
    late,
    fresh,
    output,
    d_gate,
    d_late,
    d_fresh,
    left,
    low,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BACK: tl.constexpr,
):
    """A tile of the gradient of one chunk's queries, or with BACK keys, and of its numbers by what passes its edge."""
    live = live_rows(left, R, CHUNK)
    pairs, through = chunk_products(
        left_rows, right_rows, states, live, low, H * V, V, K, 1, V, CHUNK, BLOCK_V, BLOCK_K, PRECISION
    )
    whole, rest, since, until, _fade = row_decays(gate, left, H, R, CHUNK)
    weight, now = row_weights(late, fresh, left, H, R, CHUNK)
    pairs = mixed(pairs, whole, rest, weight, now, R, CHUNK, BACK)
    i, columns = tl.arange(0, CHUNK), low + tl.arange(0, BLOCK_K)
    at = i[:, None] * (G * K) + columns[None, :]
    own = live[:, None] & (columns < K)[None, :]
    through = through * (until if BACK else since)[:, None]
    if gate is not None:
        passed = tl.sum(through * tl.load(mine + at, mask=own, other=0.0).to(tl.float32), 1)
        if late is not None:
            # Readers have no weight of their own: nothing is added, but the place is to be filled.
            d_weight = passed if BACK else tl.zeros([CHUNK], tl.float32)
            store_sums(d_fresh, d_weight, left, H, R, CHUNK)
            store_sums(d_late + H, d_weight, left - 1, H, R, CHUNK)
        if BACK:
            passed = passed * weight
            d_fade = tl.sum(passed, 0) - tl.cumsum(passed, 0, reverse=True)
        else:
            d_fade = tl.cumsum(passed, 0, reverse=True)
        store_sums(d_gate, tl.where(i % R == 0, d_fade, 0.0), left, H, R, CHUNK)
    if BACK:
        through = through * weight[:, None]
    other = tl.load(others + at, mask=own, other=0.0)
    through += tl.dot(pairs.to(other.dtype), other, input_precision=PRECISION)
    at = i[:, None] * (H * K) + columns[None, :]
    tl.store(output + at, through.to(output.dtype.element_ty), mask=own)


@triton.jit
def _to_numbers(
    q,
    k,
    v,
    d_output,
    gate,
    late,
    fresh,
    starts,
    ends,
    d_gate,
    d_late,
    d_fresh,
    left,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the pairs of one chunk, and the state that passes over it, add to the gradients of its numbers."""
    live = live_rows(left, R, CHUNK)
    i, keys, values = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    held = tl.zeros([BLOCK_K], tl.float32)
    for low in range(0, K, BLOCK_K):
        own = live[:, None] & (low + keys < K)[None, :]
        at = i[:, None] * (G * K) + (low + keys)[None, :]
        query, key = tl.load(q + at, mask=own, other=0.0), tl.load(k + at, mask=own, other=0.0)
        scores += tl.dot(query, tl.trans(key), input_precision=PRECISION)
        for corner in range(0, V, BLOCK_V):
            there = (low + keys)[:, None] * V + (corner + values)[None, :]
            inside = (low + keys < K)[:, None] & (corner + values < V)[None, :]
            S = tl.load(starts + there, mask=inside, other=0.0).to(tl.float32)
            held += tl.sum(S * tl.load(ends + there, mask=inside, other=0.0).to(tl.float32), 1)
    for corner in range(0, V, BLOCK_V):
        own = live[:, None] & (corner + values < V)[None, :]
        at = i[:, None] * (H * V) + (corner + values)[None, :]
        d_out, value = tl.load(d_output + at, mask=own, other=0.0), tl.load(v + at, mask=own, other=0.0)
        d_scores += tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
    token, pairs = i // R, scores * d_scores
    whole, rest, _since, _until, fade = row_decays(gate, left, H, R, CHUNK)
    if late is not None:
        weight, _now = row_weights(late, fresh, left, H, R, CHUNK)
        itself = tl.sum(tl.where(token[:, None] == token[None, :], pairs, 0.0), 0)
    # Rows of one token fade by nothing.
    pairs = tl.where(token[:, None] > token[None, :], pairs * pair_decays(whole, rest, CHUNK, False, R), 0.0)
    if late is not None:
        d_weight = tl.sum(pairs, 0)
        store_sums(d_fresh, d_weight + itself, left, H, R, CHUNK)
        store_sums(d_late + H, d_weight, left - 1, H, R, CHUNK)
        pairs = pairs * weight[None, :]
    change = tl.sum(pairs, 1) - tl.sum(pairs, 0)
    d_fade = tl.sum(held, 0) * fade + tl.cumsum(change, 0, reverse=True)
    store_sums(d_gate, tl.where(i % R == 0, d_fade, 0.0), left, H, R, CHUNK)


@triton.jit(do_not_specialize=["T", "TOTAL"])
def gradients(
    q,
    k,
    v,
    gate,
    late,
    fresh,
    starts,
    ends,
    d_output,
    d_q,
    d_k,
    d_v,
    d_gate,
    d_late,
    d_fresh,
    cu_seqlens,
    offsets,
    owners,
    T,
    TOTAL,
    R: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
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
    token, left = chunk_place(own, T, cu_seqlens, offsets, owners, CHUNK // R)
    by_group, by_head = (token * R * G + h // (H // G)) * K, token * R * H + h
    part = (duty.to(tl.int64) * TOTAL + token) * H + h
    q += by_group
    k += by_group
    v += by_head * V
    d_output += by_head * V
    starts += (own * H + h) * K * V
    ends += (own * H + h) * K * V
    if gate is not None:
        gate += token * H + h
        d_gate += part
    if late is not None:
        late += token * H + h
        fresh += token * H + h
        d_late += part
        d_fresh += part
    if duty < tiles:
        _to_keys(
            d_output, v, starts, q, k, gate, late, fresh, d_q + by_head * K, d_gate, d_late, d_fresh,
            left, duty * BLOCK_K, R, H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, False,
        )  # fmt: skip
    elif duty < 2 * tiles:
        _to_keys(
            v, d_output, ends, k, q, gate, late, fresh, d_k + by_head * K, d_gate, d_late, d_fresh,
            left, (duty - tiles) * BLOCK_K, R, H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, True,
        )  # fmt: skip
    elif duty > 2 * tiles:
        _to_values(
            k, q, ends, d_output, gate, late, fresh, d_v + by_head * V,
            left, (duty - 2 * tiles - 1) * BLOCK_V, R, H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, True,
        )  # fmt: skip
    elif gate is not None:
        _to_numbers(
            q, k, v, d_output, gate, late, fresh, starts, ends, d_gate, d_late, d_fresh,
            left, R, H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip

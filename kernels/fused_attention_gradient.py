"""The gradients of softmax attention in tiles: one Triton kernel over queries, and one over keys.

Letters as in `kernels.fused_attention`.  After FlashAttention-2, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from kernels.fused_attention import LOG2E, edge, keys_seen, located, queries_seeing, scored, sloped


@triton.jit(do_not_specialize=["T", "S", "documents", "tiles", "window", "sinks", "skipped", "logit_entry"])
def attend_queries(
    q, k, v, slopes, logits, spans, output, sums, mass, largest, d_output, d_sums, d_mass,
    delta, d_q, d_slopes, d_logits, cu_seqlens,
    T, S, documents, tiles, window, sinks, skipped, scale, soft_cap,
    q_entry, q_row, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head, logit_entry,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q; delta [B, H, T] for the kernel over keys; parts [B, H, tiles] of the gradients of the logits."""
    first, length, tile = located(tiles - 1 - tl.program_id(0) % tiles, cu_seqlens, T, documents, QUERIES)
    n = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    g = h // (H // G)
    past = S - T
    live = tile * QUERIES + tl.arange(0, QUERIES) < length
    here = past + tile * QUERIES + tl.arange(0, QUERIES)
    begin = tl.where(tile * QUERIES < length, past + tile * QUERIES, 0)
    end = tl.where(tile * QUERIES < length, tl.minimum(begin + QUERIES, past + length), 0)
    top = (first + tile * QUERIES).to(tl.int64)
    q += n * q_entry + top * q_row + h * q_head
    k += n * k_entry + first.to(tl.int64) * k_row + g * k_head
    v += n * v_entry + first.to(tl.int64) * v_row + g * v_head
    i, j, keys, values = (
        tl.arange(0, QUERIES),
        tl.arange(0, KEYS),
        tl.arange(0, BLOCK_K),
        tl.arange(0, BLOCK_V),
    )
    own_k, own_v = (keys < MAIN)[None, :], (values < V)[None, :]
    query = tl.load(q + i[:, None] * q_row + keys[None, :], mask=live[:, None] & own_k, other=0.0)
    d_query = tl.zeros([QUERIES, BLOCK_K], tl.float32)
    if BLOCK_TAIL:
        tail = MAIN + tl.arange(0, BLOCK_TAIL)
        own_tail = (tail < K)[None, :]
        query_tail = tl.load(q + i[:, None] * q_row + tail[None, :], mask=live[:, None] & own_tail, other=0.0)
        d_tail = tl.zeros([QUERIES, BLOCK_TAIL], tl.float32)
    above = (n * T + top) * H + h
    at = i[:, None] * (H * V) + values[None, :]
    d_out = tl.load(d_output + above * V + at, mask=live[:, None] & own_v, other=0.0).to(query.dtype)
    out = tl.load(output + above * V + at, mask=live[:, None] & own_v, other=0.0)
    lost = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    rows = (n * H + h) * T + top + i
    # What is no query has a denominator without bound, and so no weights.
    total = tl.load(sums + rows, mask=live, other=float("inf")) * LOG2E
    if d_sums is not None:
        lost -= tl.load(d_sums + rows, mask=live, other=0.0)
    peak, place = None, None
    if d_mass is not None:
        peak = tl.load(d_mass + rows, mask=live, other=0.0) * tl.load(mass + rows, mask=live, other=0.0)
        lost -= peak
        peak = peak[:, None]
        place = tl.load(largest + rows, mask=live, other=-1)[:, None]
    tl.store(delta + rows, lost, mask=live)
    reach, slope = window, None
    if spans is not None:
        reach = tl.load(spans + h)
    if slopes is not None:
        slope = tl.load(slopes + h)
    at_k, at_v = j[:, None] * k_row + keys[None, :], j[:, None] * v_row + values[None, :]
    if BLOCK_TAIL:
        at_tail = j[:, None] * k_row + tail[None, :]
    steepness = tl.zeros([QUERIES], tl.float32)
    sunk, low, whole, broken, high = keys_seen(begin, end, reach, sinks, KEYS)
    for phase in tl.static_range(2):
        count = broken - whole
        if phase == 1:
            count = sunk + whole - low + high - broken
        for number in range(0, count):
            start = (whole + number) * KEYS
            there = tl.full([KEYS, 1], True, tl.int1)
            if phase == 1:
                start = edge(number, sunk, low, whole, broken) * KEYS
                there = (start + j < past + length)[:, None]
            key_at = start + j
            row = start.to(tl.int64)
            key = tl.load(k + row * k_row + at_k, mask=there & own_k, other=0.0)
            value = tl.load(v + row * v_row + at_v, mask=there & own_v, other=0.0)
            products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            if BLOCK_TAIL:
                key_tail = tl.load(k + row * k_row + at_tail, mask=there & own_tail, other=0.0)
                products = tl.dot(query_tail, tl.trans(key_tail), products, input_precision=PRECISION)
            d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
            distance = here[:, None] - key_at[None, :]
            scores = scored(
                products, distance, key_at[None, :], scale, soft_cap, slope, reach, sinks, skipped, phase == 1
            )
            weights = tl.exp2(scores - total[:, None])
            d_scores, d_products = sloped(
                products, weights, d_weights, lost[:, None], peak, place, key_at[None, :], scale, soft_cap
            )
            if d_slopes is not None:
                if skipped is not None:
                    distance += tl.where(key_at < sinks, skipped, 0)[None, :]
                steepness += tl.sum(d_scores * distance.to(tl.float32), 1)
            inward = d_products.to(key.dtype)
            d_query = tl.dot(inward, key, d_query, input_precision=PRECISION)
            if BLOCK_TAIL:
                d_tail = tl.dot(inward, key_tail, d_tail, input_precision=PRECISION)
    d_q += above * K
    at = i[:, None] * (H * K) + keys[None, :]
    tl.store(d_q + at, (d_query * scale).to(d_q.dtype.element_ty), mask=live[:, None] & own_k)
    if BLOCK_TAIL:
        at = i[:, None] * (H * K) + tail[None, :]
        tl.store(d_q + at, (d_tail * scale).to(d_q.dtype.element_ty), mask=live[:, None] & own_tail)
    if d_slopes is not None:
        tl.store(d_slopes + tl.program_id(0), -tl.sum(tl.where(live, steepness, 0.0), 0))
    if d_logits is not None:
        share = tl.where(live, tl.exp2(tl.load(logits + n * logit_entry + h) * LOG2E - total) * lost, 0.0)
        tl.store(d_logits + tl.program_id(0), -tl.sum(share, 0))


@triton.jit(do_not_specialize=["T", "S", "documents", "tiles", "window", "sinks", "skipped"])
def attend_keys(
    q, k, v, slopes, spans, sums, mass, largest, d_output, d_mass, delta, d_k, d_v, cu_seqlens,
    T, S, documents, tiles, window, sinks, skipped, scale, soft_cap,
    q_entry, q_row, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, summed over the heads of a group; tiles stand with keys for rows."""
    first, length, tile = located(tl.program_id(0) % tiles, cu_seqlens, T, documents, KEYS)
    n = (tl.program_id(0) // tiles // G).to(tl.int64)
    g = tl.program_id(0) // tiles % G
    past = S - T
    i, j, keys, values = (
        tl.arange(0, QUERIES),
        tl.arange(0, KEYS),
        tl.arange(0, BLOCK_K),
        tl.arange(0, BLOCK_V),
    )
    own_k, own_v = (keys < MAIN)[None, :], (values < V)[None, :]
    begin = tile * KEYS
    end = tl.minimum(begin + KEYS, past + length)
    key_at = (begin + j)[:, None]
    there = key_at < past + length
    top = (first + begin).to(tl.int64)
    k += n * k_entry + top * k_row + g * k_head
    v += n * v_entry + top * v_row + g * v_head
    key = tl.load(k + j[:, None] * k_row + keys[None, :], mask=there & own_k, other=0.0)
    value = tl.load(v + j[:, None] * v_row + values[None, :], mask=there & own_v, other=0.0)
    d_key = tl.zeros([KEYS, BLOCK_K], tl.float32)
    d_value = tl.zeros([KEYS, BLOCK_V], tl.float32)
    if BLOCK_TAIL:
        tail = MAIN + tl.arange(0, BLOCK_TAIL)
        own_tail = (tail < K)[None, :]
        key_tail = tl.load(k + j[:, None] * k_row + tail[None, :], mask=there & own_tail, other=0.0)
        d_tail = tl.zeros([KEYS, BLOCK_TAIL], tl.float32)
    q += n * q_entry + first.to(tl.int64) * q_row
    at_q, at_d = i[:, None] * q_row + keys[None, :], i[:, None] * (H * V) + values[None, :]
    if BLOCK_TAIL:
        at_tail = i[:, None] * q_row + tail[None, :]
    # Heads of different reach are walked one after another, others as one row of tiles.
    TURNS: tl.constexpr = 1 if spans is None else H // G
    for turn in range(0, TURNS):
        reach = window
        if spans is not None:
            reach = tl.load(spans + g * (H // G) + turn)
        low, whole, broken, high = queries_seeing(begin, end, past, length, reach, sinks, QUERIES)
        for phase in tl.static_range(2):
            count = broken - whole
            if phase == 1:
                count = tl.where(begin < past + length, whole - low + high - broken, 0)
            for number in range(0, count * (H // G // TURNS)):
                h = g * (H // G) + turn
                if TURNS < H // G:
                    h += number // count
                    number = number % count
                start = (whole + number) * QUERIES
                live = tl.full([QUERIES], True, tl.int1)
                if phase == 1:
                    start = edge(number, 0, low, whole, broken) * QUERIES
                    live = start + i < length
                t = start + i
                own_q = q + start.to(tl.int64) * q_row + h * q_head
                query = tl.load(own_q + at_q, mask=live[:, None] & own_k, other=0.0)
                own_d = d_output + ((n * T + first + start) * H + h) * V
                d_out = tl.load(own_d + at_d, mask=live[:, None] & own_v, other=0.0).to(query.dtype)
                rows = (n * H + h) * T + first + start + i
                total = tl.load(sums + rows, mask=live, other=float("inf")) * LOG2E
                lost = tl.load(delta + rows, mask=live, other=0.0)
                slope, peak, place = None, None, None
                if slopes is not None:
                    slope = tl.load(slopes + h)
                if d_mass is not None:
                    peak = tl.load(d_mass + rows, mask=live, other=0.0)
                    peak = (peak * tl.load(mass + rows, mask=live, other=0.0))[None, :]
                    place = tl.load(largest + rows, mask=live, other=-1)[None, :]
                products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                if BLOCK_TAIL:
                    query_tail = tl.load(own_q + at_tail, mask=live[:, None] & own_tail, other=0.0)
                    products = tl.dot(key_tail, tl.trans(query_tail), products, input_precision=PRECISION)
                d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
                scores = scored(
                    products, (past + t)[None, :] - key_at, key_at, scale, soft_cap, slope, reach, sinks,
                    skipped, phase == 1,
                )  # fmt: skip
                weights = tl.exp2(scores - total[None, :])
                _, d_products = sloped(
                    products, weights, d_weights, lost[None, :], peak, place, key_at, scale, soft_cap
                )
                d_value = tl.dot(weights.to(d_out.dtype), d_out, d_value, input_precision=PRECISION)
                inward = d_products.to(query.dtype)
                d_key = tl.dot(inward, query, d_key, input_precision=PRECISION)
                if BLOCK_TAIL:
                    d_tail = tl.dot(inward, query_tail, d_tail, input_precision=PRECISION)
    d_k += ((n * S + top) * G + g) * K
    d_v += ((n * S + top) * G + g) * V
    at_k, at_v = j[:, None] * (G * K) + keys[None, :], j[:, None] * (G * V) + values[None, :]
    tl.store(d_k + at_k, (d_key * scale).to(d_k.dtype.element_ty), mask=there & own_k)
    if BLOCK_TAIL:
        at_tail = j[:, None] * (G * K) + tail[None, :]
        tl.store(d_k + at_tail, (d_tail * scale).to(d_k.dtype.element_ty), mask=there & own_tail)
    tl.store(d_v + at_v, d_value.to(d_v.dtype.element_ty), mask=there & own_v)

"""Softmax attention in tiles of queries by tiles of keys: the Triton kernels of both of its directions.

Letters: B batch, N documents (or B), T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key,
V value.  After FlashAttention-2, arXiv:2307.08691, with the options of `softmax_attention`.

Scores are in units of ln 2. A program visits the tiles that its rows see: first those that they see whole, with no
mask at all, then the edges of what they see. Its row of keys may be cut in two, `MAIN` columns and a tail, because
padding 192 to 256 would cost a third more. In the pass over keys all products stand with keys for rows, so that no
accumulator is transposed on its way into another product. The heads of a group are walked by one program: nothing
is added up across programs but the gradients of slopes and of sinks, whose parts are written apart.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def bent(x):
    """tanh, which Triton's own language has not; by powers that never overflow."""
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def scored(
    products, distance, key_at, scale, soft_cap, slope, reach, sinks, skipped, MASKED: tl.constexpr
):  # fmt: skip
    """Products of queries and keys → scores: scaled, capped, lowered by what the slope takes, -inf where not seen."""
    if soft_cap is not None:
        scores = bent(products * (scale / soft_cap)) * (soft_cap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
    if slope is not None:
        back = distance
        if skipped is not None:
            back += tl.where(key_at < sinks, skipped, 0)
        scores -= slope * LOG2E * back.to(tl.float32)
    if MASKED:
        visible = distance >= 0
        if reach is not None:
            if sinks is not None:
                visible &= (distance < reach) | (key_at < sinks)
            else:
                visible &= distance < reach
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def sloped(products, weights, d_weights, delta, peak, place, key_at, scale, soft_cap):
    """The gradients of the scores and, but for the scale, of the products."""
    d_scores = weights * (d_weights - delta)
    if place is not None:
        d_scores -= tl.where(key_at == place, peak, 0.0)
    d_products = d_scores
    if soft_cap is not None:
        curve = bent(products * (scale / soft_cap))
        d_products = d_scores * (1.0 - curve * curve)
    return d_scores, d_products


@triton.jit
def located(tile, cu_seqlens, T, documents, BLOCK: tl.constexpr):
    """Where a tile lies: the first row and the length of its text, and which tile of it.

    The tiles of document n are numbered from cu_seqlens[n] // BLOCK + n on, which leaves room for all of them; where it
    leaves more, a tile lies behind the end of its document.
    """
    if cu_seqlens is not None:
        low = tile * 0
        high = low + documents
        while high - low > 1:
            middle = (low + high) // 2
            before = (tl.load(cu_seqlens + middle) // BLOCK + middle).to(tl.int32) <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        first = tl.load(cu_seqlens + low).to(tl.int32)
        length = tl.load(cu_seqlens + low + 1).to(tl.int32) - first
        tile = tile - first // BLOCK - low
    else:
        first = tile * 0
        length = T
    return first, length, tile


@triton.jit
def keys_seen(begin, end, reach, sinks, BLOCK: tl.constexpr):
    """Tiles of keys that the queries begin … end - 1 see.

    Those before `sunk` hold sinks; from `low` on they are in reach, from `whole` to `broken` of all these queries, and
    up to `high` of some.
    """
    high = tl.cdiv(end, BLOCK)
    broken = (begin + 1) // BLOCK
    sunk, low, whole = high * 0, high * 0, high * 0
    if reach is not None:
        low = tl.maximum(begin - reach + 1, 0) // BLOCK
        whole = tl.minimum(tl.cdiv(tl.maximum(end - reach, 0), BLOCK), high)
        if sinks is not None:
            sunk = tl.minimum(tl.cdiv(sinks, BLOCK), low)
    return sunk, low, whole, tl.maximum(broken, whole), high


@triton.jit
def queries_seeing(begin, end, past, length, reach, sinks, BLOCK: tl.constexpr):
    """Tiles of queries that see the keys begin … end - 1: low, whole, broken, high as in `keys_seen`."""
    count = tl.cdiv(length, BLOCK)
    low = tl.minimum(tl.maximum(begin - past, 0) // BLOCK, count)
    whole = tl.minimum(tl.cdiv(tl.maximum(end - 1 - past, 0), BLOCK), count)
    broken, high = length // BLOCK, count
    if reach is not None:
        last = tl.maximum(end - 1 + reach - past, 0)
        until = tl.maximum(begin + reach - past, 0)
        if sinks is not None:
            last = tl.where(begin < sinks, length, last)
            until = tl.where(end <= sinks, length, until)
        high = tl.maximum(tl.minimum(tl.cdiv(last, BLOCK), count), low)
        whole = tl.minimum(whole, high)
        broken = tl.minimum(until // BLOCK, broken)
    return low, whole, tl.maximum(broken, whole), high


@triton.jit
def edge(number, sunk, low, whole, broken):
    """Of the tiles that are seen in part, the one of this number."""
    left = number - sunk
    right = left - (whole - low)
    return tl.where(left < 0, number, tl.where(right < 0, low + left, broken + right))


@triton.jit(do_not_specialize=["T", "S", "documents", "tiles", "window", "sinks", "skipped", "logit_entry"])
def attend(
    q, k, v, slopes, logits, spans, output, sums, mass, largest, cu_seqlens,
    T, S, documents, tiles, window, sinks, skipped, scale, soft_cap,
    q_entry, q_row, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head, logit_entry,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and where asked for log-sum-exps [B, H, T], masses and the places of the largest scores."""
    # The last queries see most, and begin.
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
    if BLOCK_TAIL:
        tail = MAIN + tl.arange(0, BLOCK_TAIL)
        own_tail = (tail < K)[None, :]
        query_tail = tl.load(q + i[:, None] * q_row + tail[None, :], mask=live[:, None] & own_tail, other=0.0)
    at_k, at_v = j[:, None] * k_row + keys[None, :], j[:, None] * v_row + values[None, :]
    if BLOCK_TAIL:
        at_tail = j[:, None] * k_row + tail[None, :]
    reach, slope = window, None
    if spans is not None:
        reach = tl.load(spans + h)
    if slopes is not None:
        slope = tl.load(slopes + h)
    high = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if logits is not None:
        high = tl.zeros([QUERIES], tl.float32) + tl.load(logits + n * logit_entry + h) * LOG2E
        total += 1.0
    place = tl.zeros([QUERIES], tl.int32)
    mixed = tl.zeros([QUERIES, BLOCK_V], tl.float32)
    sunk, low, whole, broken, last = keys_seen(begin, end, reach, sinks, KEYS)
    for phase in tl.static_range(2):
        count = broken - whole
        if phase == 1:
            count = sunk + whole - low + last - broken
        for number in range(0, count):
            start = (whole + number) * KEYS
            there = tl.full([KEYS, 1], True, tl.int1)
            if phase == 1:
                start = edge(number, sunk, low, whole, broken) * KEYS
                there = (start + j < past + length)[:, None]
            key_at = start + j
            row = start.to(tl.int64)
            key = tl.load(k + row * k_row + at_k, mask=there & own_k, other=0.0)
            products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            if BLOCK_TAIL:
                key_tail = tl.load(k + row * k_row + at_tail, mask=there & own_tail, other=0.0)
                products = tl.dot(query_tail, tl.trans(key_tail), products, input_precision=PRECISION)
            distance = here[:, None] - key_at[None, :]
            scores = scored(
                products, distance, key_at[None, :], scale, soft_cap, slope, reach, sinks, skipped, phase == 1
            )
            if largest is not None:
                best, where = tl.max(scores, 1, return_indices=True)
                place = tl.where(best > high, start + where, place)
            else:
                best = tl.max(scores, 1)
            best = tl.maximum(high, best)
            shift = best
            if phase == 1:
                shift = tl.where(best == float("-inf"), 0.0, best)
            fade = tl.exp2(high - shift)
            weights = tl.exp2(scores - shift[:, None])
            total = total * fade + tl.sum(weights, 1)
            value = tl.load(v + row * v_row + at_v, mask=there & own_v, other=0.0)
            mixed = mixed * fade[:, None]
            mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision=PRECISION)
            high = best
    total = tl.where(live, total, 1.0)
    out = mixed / total[:, None]
    at = i[:, None] * (H * V) + values[None, :]
    tl.store(
        output + ((n * T + top) * H + h) * V + at, out.to(output.dtype.element_ty), mask=live[:, None] & own_v
    )
    rows = (n * H + h) * T + top + i
    if sums is not None:
        tl.store(sums + rows, (high + tl.log2(total)) * LN2, mask=live)
    if mass is not None:
        tl.store(mass + rows, total, mask=live)
    if largest is not None:
        tl.store(largest + rows, place, mask=live)

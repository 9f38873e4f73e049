"""One query a head over a cache of keys and values, the cache cut in parts: a Triton kernel, and one that joins the parts.

Letters: B batch, S slots, P parts of the cache, H heads, G groups that share k and v, R = H/G, K key, V value.
After Flash-Decoding and, where values are the keys' first columns, the absorbed form of DeepSeek-V2, arXiv:2405.04434.

A program reads its part of the cache once for all heads of a group, or for as many as its registers hold.
"""

import triton
import triton.language as tl

from kernels.fused_attention import LOG2E, scored


@triton.jit(do_not_specialize=["visible", "share", "parts", "sinks", "logit_entry"])
def read_cache(
    q, k, v, slopes, logits, spans, distances, output, mass, mixes, highs, totals,
    visible, share, parts, sinks, scale, soft_cap,
    q_entry, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head, logit_entry,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr, ALIASED: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The slots of one part: to the output where there is but one, else unnormalised to mixes [P, B, H, V].

    With it go the largest scores and the sums of the exponentials less these, highs and totals [P, B, H].
    """
    BLOCKS: tl.constexpr = (H // G + HEADS - 1) // HEADS
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % parts
    g = tl.program_id(0) // BLOCKS // parts % G
    n = (tl.program_id(0) // BLOCKS // parts // G).to(tl.int64)
    member = block * HEADS + tl.arange(0, HEADS)
    real = member < H // G
    h = g * (H // G) + member
    q += n * q_entry + (g * (H // G) + block * HEADS).to(tl.int64) * q_head
    k += n * k_entry + g * k_head
    v += n * v_entry + g * v_head
    i, j, keys, values = (
        tl.arange(0, HEADS),
        tl.arange(0, SLOTS),
        tl.arange(0, BLOCK_K),
        tl.arange(0, BLOCK_V),
    )
    own_k, own_v = (keys < MAIN)[None, :], (values < V)[None, :]
    query = tl.load(q + i[:, None] * q_head + keys[None, :], mask=real[:, None] & own_k, other=0.0)
    if BLOCK_TAIL:
        tail = MAIN + tl.arange(0, BLOCK_TAIL)
        own_tail = (tail < K)[None, :]
        query_tail = tl.load(
            q + i[:, None] * q_head + tail[None, :], mask=real[:, None] & own_tail, other=0.0
        )
    at_k, at_v = j[:, None] * k_row + keys[None, :], j[:, None] * v_row + values[None, :]
    if BLOCK_TAIL:
        at_tail = j[:, None] * k_row + tail[None, :]
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=real, other=0.0)[:, None]
    if spans is not None:
        reach = tl.load(spans + h, mask=real, other=1)
    high = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if logits is not None:
        # They join the first part's sum.
        logit = tl.load(logits + n * logit_entry + h, mask=real, other=0.0).to(tl.float32) * LOG2E
        high = tl.where(part == 0, logit, high)
        total = tl.where(part == 0, 1.0, total)
    mixed = tl.zeros([HEADS, BLOCK_V], tl.float32)
    begin = part * share
    end = tl.minimum(begin + share, visible)
    for number in range(0, tl.cdiv(end - begin, SLOTS)):
        start = begin + number * SLOTS
        slot = start + j
        there = slot < end
        row = start.to(tl.int64)
        key = tl.load(k + row * k_row + at_k, mask=there[:, None] & own_k, other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if BLOCK_TAIL:
            key_tail = tl.load(k + row * k_row + at_tail, mask=there[:, None] & own_tail, other=0.0)
            products = tl.dot(query_tail, tl.trans(key_tail), products, input_precision=PRECISION)
        back = slot[None, :]
        if distances is not None:
            back = tl.load(distances + slot, mask=there, other=0).to(tl.int32)[None, :]
        scores = scored(products, back, slot[None, :], scale, soft_cap, slope, None, None, None, False)
        visible_here = there[None, :]
        if spans is not None:
            visible_here &= (back < reach[:, None]) | (slot < sinks)[None, :]
        scores = tl.where(visible_here, scores, float("-inf"))
        best = tl.maximum(high, tl.max(scores, 1))
        shift = tl.where(best == float("-inf"), 0.0, best)
        fade = tl.exp2(high - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        if ALIASED:
            value = key
        else:
            value = tl.load(v + row * v_row + at_v, mask=there[:, None] & own_v, other=0.0)
        mixed = mixed * fade[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision=PRECISION)
        high = best
    own = real[:, None] & own_v
    if mixes is not None:
        rows = (part * (tl.num_programs(0) // BLOCKS // parts // G) + n) * H + h
        tl.store(mixes + rows[:, None] * V + values[None, :], mixed, mask=own)
        tl.store(highs + rows, high, mask=real)
        tl.store(totals + rows, total, mask=real)
    else:
        rows = n * H + h
        out = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(output + rows[:, None] * V + values[None, :], out.to(output.dtype.element_ty), mask=own)
        if mass is not None:
            tl.store(mass + rows, total, mask=real)


@triton.jit(do_not_specialize=["parts", "count"])
def join(
    mixes, highs, totals, output, mass, parts, count, V: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """What `read_cache` left of P parts, `count` = B·H heads in each, to output and mass."""
    TILES: tl.constexpr = (V + VALUES - 1) // VALUES
    row = (tl.program_id(0) // TILES).to(tl.int64)
    values = tl.program_id(0) % TILES * VALUES + tl.arange(0, VALUES)
    high = tl.zeros([1], tl.float32) + float("-inf")
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([VALUES], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        rows = part.to(tl.int64) * count + row
        own_high = tl.load(highs + rows, mask=part < parts, other=float("-inf"))
        best = tl.maximum(high, tl.max(own_high, 0))
        shift = tl.where(best == float("-inf"), 0.0, best)
        fade = tl.exp2(high - shift)
        shares = tl.exp2(own_high - shift)
        total = total * fade + tl.sum(shares * tl.load(totals + rows, mask=part < parts, other=0.0), 0)
        inside = (part < parts)[:, None] & (values < V)[None, :]
        mix = tl.load(mixes + rows[:, None] * V + values[None, :], mask=inside, other=0.0)
        mixed = mixed * fade + tl.sum(shares[:, None] * mix, 0)
        high = best
    out = mixed / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * V + values, out.to(output.dtype.element_ty), mask=values < V)
    if mass is not None:
        if tl.program_id(0) % TILES == 0:
            tl.store(mass + row + tl.arange(0, 1), total)

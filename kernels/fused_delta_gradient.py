"""The gradients of one chunk of the delta rule, from the states on both of its sides; see `kernels.fused_delta`.

Letters: T time, H heads, G groups that share q and k, K key, V value, C tokens of a chunk, W walks.
"""

import triton
import triton.language as tl

from kernels.fused import chunk_bounds, chunk_decays
from kernels.fused_delta import writes


@triton.jit(do_not_specialize=["T", "DOCUMENTS", "TOTAL", "APART", "BEFORE"])
def gradients(
    q,
    k,
    v,
    gate,
    beta,
    scores,
    starts,
    ends,
    written,
    solved,
    d_output,
    d_q,
    d_k,
    d_v,
    d_gate,
    d_beta,
    cu_seqlens,
    offsets,
    T,
    DOCUMENTS,
    TOTAL,
    APART,
    BEFORE,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    at = chunk.to(tl.int64) * H + h
    walk = tl.program_id(2)
    states = at * tl.num_programs(2) + walk
    if BEFORE is not None:
        apart = walk.to(tl.int64) * TOTAL * H
        v += walk.to(tl.int64) * APART * (H * V)
        written += apart * V
        solved += apart * V
        d_output += apart * V
        d_q += apart * K
        d_k += apart * K
        d_v += apart * V
        d_gate += apart
        d_beta += apart
    shared, token = first * G + h // (H // G), first * H + h
    kind = v.dtype.element_ty
    i = tl.arange(0, CHUNK)
    live = i < left
    strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
    # Pairs of tokens: of a read and a write, of two writes, and both with their rows and columns changed about.
    d_scores = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    d_turned = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    d_lower = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    d_upper = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    d_strength = tl.full([CHUNK], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        at_v = i[:, None] * (H * V) + values[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        write = tl.load(written + token * V + at_v, mask=own_v, other=0.0)
        d_solved = tl.load(solved + token * V + at_v, mask=own_v, other=0.0)
        d_scores += tl.dot(d_out, tl.trans(write), input_precision=PRECISION)
        d_turned += tl.dot(write, tl.trans(d_out), input_precision=PRECISION)
        d_lower -= tl.dot(d_solved, tl.trans(write), input_precision=PRECISION)
        d_upper -= tl.dot(write, tl.trans(d_solved), input_precision=PRECISION)
        taken = own_v
        if BEFORE is not None:
            taken = own_v & writes(BEFORE + chunk % tl.cdiv(T, CHUNK), walk)
        value = tl.load(v + token * V + at_v, mask=taken, other=0.0).to(tl.float32)
        d_value = d_solved.to(tl.float32)
        d_strength += tl.sum(d_value * value, 1)
        d_value = d_value * strength[:, None]
        if BEFORE is not None:
            d_value = tl.where(taken, d_value, 0.0)
        tl.store(d_v + token * V + at_v, d_value.to(kind), mask=own_v)
    earlier, later = i[:, None] > i[None, :], i[:, None] < i[None, :]
    if gate is not None:
        fade = tl.load(gate + token + i * H, mask=live, other=0.0).to(tl.float32)
        within, since, until, whole = chunk_decays(fade, CHUNK)
        # A pair of a token with itself fades by nothing.
        reads = tl.load(scores + at * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]).to(tl.float32)
        pairs = tl.where(earlier, d_scores * reads, 0.0)
        d_scores = d_scores * within
        d_turned = d_turned * tl.trans(within)
        d_lower = tl.where(earlier, d_lower * within, 0.0)
        d_upper = tl.where(later, d_upper * tl.trans(within), 0.0)
    else:
        d_scores = tl.where(later, 0.0, d_scores)
        d_turned = tl.where(earlier, 0.0, d_turned)
        d_lower = tl.where(earlier, d_lower, 0.0)
        d_upper = tl.where(later, d_upper, 0.0)
    d_scores = d_scores.to(kind)
    d_turned = d_turned.to(kind)
    d_both = (d_lower * strength[:, None] + d_upper * strength[None, :]).to(kind)
    alike = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    change = tl.full([CHUNK], 0.0, tl.float32)
    kept = tl.full([CHUNK], 0.0, tl.float32)
    carried = tl.full([BLOCK_K], 0.0, tl.float32)
    for begin in range(0, K, BLOCK_K):
        keys = begin + tl.arange(0, BLOCK_K)
        at_k = i[:, None] * (G * K) + keys[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        d_reads = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        d_held = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        d_kept = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        for start in range(0, V, BLOCK_V):
            values = start + tl.arange(0, BLOCK_V)
            at_v = i[:, None] * (H * V) + values[None, :]
            own_v = live[:, None] & (values < V)[None, :]
            tile = keys[:, None] * V + values[None, :]
            inside = (keys < K)[:, None] & (values < V)[None, :]
            before = tl.load(starts + states * K * V + tile, mask=inside, other=0.0)
            after = tl.load(ends + states * K * V + tile, mask=inside, other=0.0)
            d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
            write = tl.load(written + token * V + at_v, mask=own_v, other=0.0)
            d_solved = tl.load(solved + token * V + at_v, mask=own_v, other=0.0)
            d_reads += tl.dot(d_out, tl.trans(before), input_precision=PRECISION)
            d_held -= tl.dot(d_solved, tl.trans(before), input_precision=PRECISION)
            d_kept += tl.dot(write, tl.trans(after), input_precision=PRECISION)
            if gate is not None:
                carried += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        query = tl.load(q + shared * K + at_k, mask=own_k, other=0.0)
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        alike += tl.dot(key, tl.trans(key), input_precision=PRECISION)
        if gate is not None:
            d_reads = d_reads * since[:, None]
            d_held = d_held * since[:, None]
            d_kept = d_kept * until[:, None]
            change += tl.sum(d_reads * query.to(tl.float32), 1)
            kept += tl.sum(d_kept * key.to(tl.float32), 1)
        held = tl.sum(d_held * key.to(tl.float32), 1)
        d_strength += held
        change += held * strength
        d_reads += tl.dot(d_scores, key, input_precision=PRECISION)
        d_kept += d_held * strength[:, None]
        d_kept += tl.dot(d_turned, query, input_precision=PRECISION)
        d_kept += tl.dot(d_both, key, input_precision=PRECISION)
        at_head = i[:, None] * (H * K) + keys[None, :]
        tl.store(d_q + token * K + at_head, d_reads.to(d_q.dtype.element_ty), mask=own_k)
        tl.store(d_k + token * K + at_head, d_kept.to(d_k.dtype.element_ty), mask=own_k)
    d_lower = d_lower * alike
    d_strength += tl.sum(d_lower, 1)
    tl.store(d_beta + token + i * H, d_strength, mask=live)
    if gate is not None:
        # What a pair adds for its later token it takes away for its earlier one.
        pairs += d_lower * strength[:, None]
        change += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        d_fade = tl.cumsum(change, 0, reverse=True) + (tl.cumsum(kept, 0) - kept)
        tl.store(d_gate + token + i * H, d_fade + whole * tl.sum(carried, 0), mask=live)

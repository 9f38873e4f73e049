"""Linear recurrence with a decay a key channel in Triton: two launches forward, two backward, and a step.

Letters: B batch, N documents (or B), T time, H heads, K key, V value, C tokens of a chunk; n chunks of all documents.
After gated linear attention, arXiv:2312.06635; the bonus after RWKV-6, arXiv:2404.05892.

What tokens of one chunk do to each other does not depend on the state. So a program for every chunk and head first
writes, for all chunks at once,
    reads [C, K]   queries times all decays since the chunk's start,
    writes [C, K]  keys times all decays until its end,
    scores [C, C]  Σ_d q[i, d] k[j, d] times the decays between j and i,
and then a program for every document, head and tile of values walks the chunks: o = scores v + reads S,
S ← fade S + writesᵀ v. For the gradients one kernel walks back and leaves the gradient of the state behind every
chunk, and another takes those of a chunk's queries, keys and decays, again for all chunks at once.

A chunk is halved again and again, as in the chunk form: of two neighbouring blocks the earlier one holds the keys and
the later one the queries, so that decays are factors of at most one and scores are matrix products. The exponents
are matrix products too, of zeros and ones with the log-decays, and so are the gradients of the log-decays: each
sums what it parts, and nothing cancels.
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

OPERATOR = "channel_decay"


@triton.jit
def _member(chunk, h, T, H: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr):
    """The row of the bonus that a chunk's head has: that of its batch entry where each has one of its own."""
    return chunk // tl.cdiv(T, CHUNK) * H + h if OWN else h


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _pairs(
    q,
    k,
    gate,
    bonus,
    scores,
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
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    kind = scores.dtype.element_ty
    i = tl.arange(0, CHUNK)
    token = first * H + h
    live = i < left
    # The last token whose decay a read has passed: with a bonus it comes before its own update.
    last = i if bonus is None else i - 1
    score = tl.zeros([CHUNK, CHUNK], tl.float32)
    itself = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        place = i[:, None] * (H * K) + keys[None, :]
        own = live[:, None] & (keys < K)[None, :]
        query = tl.load(q + token * K + place, mask=own, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + place, mask=own, other=0.0).to(tl.float32)
        high, low = load_decays(gate + token * K, place, own)
        # Keys and decays once more, as columns: [K, C].
        beside = i[None, :] * (H * K) + keys[:, None]
        inside = live[None, :] & (keys < K)[:, None]
        column = tl.load(k + token * K + beside, mask=inside, other=0.0).to(tl.float32)
        upper, lower = load_decays(gate + token * K, beside, inside)
        for level in range(0, LEVELS):
            half = 1 << level
            since = split_decays(i[:, None], last[:, None], i[None, :], half)
            until = split_decays(i[None, :], last[None, :], i[:, None], half)
            faded = query * tl.exp(tl.dot(since, high) + tl.dot(since, low))
            kept = column * tl.exp(tl.dot(upper, until) + tl.dot(lower, until))
            pairs = tl.dot(faded.to(kind), kept.to(kind), input_precision=PRECISION)
            score += tl.where(split_pairs(i[:, None], i[None, :], half), pairs, 0.0)
        since = (i[None, :] <= last[:, None]).to(tl.float16)
        until = (i[None, :] > i[:, None]).to(tl.float16)
        read = query * tl.exp(tl.dot(since, high) + tl.dot(since, low))
        write = key * tl.exp(tl.dot(until, high) + tl.dot(until, low))
        tl.store(reads + token * K + place, read.to(kind), mask=own)
        tl.store(writes + token * K + place, write.to(kind), mask=own)
        fade = tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0))
        tl.store(fades + (chunk.to(tl.int64) * H + h) * K + keys, fade, mask=keys < K)
        own_pair = query * key
        if bonus is not None:
            strength = tl.load(
                bonus + _member(chunk, h, T, H, CHUNK, OWN) * K + keys, mask=keys < K, other=0.0
            )
            own_pair = own_pair * strength[None, :]
        itself += tl.sum(own_pair, 1)
    score = tl.where(i[:, None] == i[None, :], itself[:, None], score)
    square = i[:, None] * (H * CHUNK) + i[None, :]
    tl.store(scores + token * CHUNK + square, score.to(kind), mask=live[:, None])


@triton.jit(do_not_specialize=["T"])
def _forward(
    v,
    scores,
    reads,
    writes,
    fades,
    state,
    output,
    last,
    starts,
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
    at_k = i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * (H * CHUNK) + i[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state is not None:
        S += tl.load(state + (n * H + h) * K * V + tile, mask=inside, other=0.0)
    for c in range(0, tl.cdiv(length, CHUNK)):
        t = c * CHUNK + i
        live = t < length
        token = (first + c * CHUNK) * H + h
        before = (chunk + c) * H + h
        if starts is not None:
            tl.store(starts + before * K * V + tile, S.to(starts.dtype.element_ty), mask=inside)
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0)
        score = tl.load(scores + token * CHUNK + square, mask=live[:, None], other=0.0)
        read = tl.load(reads + token * K + at_k, mask=own_k, other=0.0)
        write = tl.load(writes + token * K + at_k, mask=own_k, other=0.0)
        fade = tl.load(fades + before * K + keys, mask=keys < K, other=0.0)
        out = tl.dot(score, value, input_precision=PRECISION)
        out += tl.dot(read, S.to(read.dtype), input_precision=PRECISION)
        tl.store(output + token * V + at_v, out.to(output.dtype.element_ty), mask=own_v)
        S = S * fade[:, None] + tl.dot(tl.trans(write), value, input_precision=PRECISION)
    tl.store(last + (n * H + h) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward(
    scores,
    reads,
    writes,
    fades,
    d_output,
    d_last,
    d_v,
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
    at_k = i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    # Rows for keys and columns for queries.
    square = i[None, :] * (H * CHUNK) + i[:, None]
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
        tl.store(ends + after * K * V + tile, D.to(ends.dtype.element_ty), mask=inside)
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        score = tl.load(scores + token * CHUNK + square, mask=live[None, :], other=0.0)
        read = tl.load(reads + token * K + at_k, mask=own_k, other=0.0)
        write = tl.load(writes + token * K + at_k, mask=own_k, other=0.0)
        fade = tl.load(fades + after * K + keys, mask=keys < K, other=0.0)
        d_value = tl.dot(score, d_out, input_precision=PRECISION)
        d_value += tl.dot(write, D.to(write.dtype), input_precision=PRECISION)
        tl.store(d_v + token * V + at_v, d_value.to(d_v.dtype.element_ty), mask=own_v)
        D = D * fade[:, None] + tl.dot(tl.trans(read), d_out, input_precision=PRECISION)
    if d_state is not None:
        tl.store(d_state + (n * H + h) * K * V + tile, D, mask=inside)


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _pairs_backward(
    q,
    k,
    v,
    gate,
    bonus,
    starts,
    ends,
    d_output,
    d_q,
    d_k,
    d_gate,
    d_bonus,
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
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    kind = d_q.dtype.element_ty
    i, keys = tl.arange(0, CHUNK), tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    across = (chunk.to(tl.int64) * H + h) * K
    token = first * H + h
    live = i < left
    last = i if bonus is None else i - 1

    # Products with the gradients of outputs and states, summed over tiles of values.
    d_score = tl.zeros([CHUNK, CHUNK], tl.float32)
    # The same with rows for keys and columns for queries, made anew.
    d_turned = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_query = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    d_key = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    held = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        at_v = i[:, None] * (H * V) + values[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0)
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        # The state before the chunk and the gradient of the one after it, transposed: [V, K].
        turned = keys[None, :] * V + values[:, None]
        inside = (keys < K)[None, :] & (values < V)[:, None]
        S = tl.load(starts + across * V + turned, mask=inside, other=0.0)
        D = tl.load(ends + across * V + turned, mask=inside, other=0.0)
        d_score += tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        d_turned += tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        d_query += tl.dot(d_out, S, input_precision=PRECISION)
        d_key += tl.dot(value, D, input_precision=PRECISION)
        held += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)

    place = i[:, None] * (H * K) + keys[None, :]
    own = live[:, None] & (keys < K)[None, :]
    query = tl.load(q + token * K + place, mask=own, other=0.0).to(tl.float32)
    key = tl.load(k + token * K + place, mask=own, other=0.0).to(tl.float32)
    high, low = load_decays(gate + token * K, place, own)
    since = (i[None, :] <= last[:, None]).to(tl.float16)
    until = (i[None, :] > i[:, None]).to(tl.float16)
    d_query = d_query * tl.exp(tl.dot(since, high) + tl.dot(since, low))
    d_key = d_key * tl.exp(tl.dot(until, high) + tl.dot(until, low))
    # The same ones with rows for decays.
    passed = (i[:, None] <= last[None, :]).to(tl.float32)
    ahead = (i[:, None] > i[None, :]).to(tl.float32)
    change = tl.dot(passed, d_query * query, input_precision=SUMS)
    change += tl.dot(ahead, d_key * key, input_precision=SUMS)
    change += (held * tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0)))[None, :]
    for level in range(0, LEVELS):
        half = 1 << level
        between = split_decays(i[:, None], last[:, None], i[None, :], half)
        factor = tl.exp(tl.dot(between, high) + tl.dot(between, low))
        above = tl.where(split_pairs(i[:, None], i[None, :], half), d_score, 0.0).to(kind)
        below = tl.where(split_pairs(i[None, :], i[:, None], half), d_turned, 0.0).to(kind)
        later = tl.dot(above, (key * factor).to(kind), input_precision=PRECISION) * factor
        earlier = tl.dot(below, (query * factor).to(kind), input_precision=PRECISION) * factor
        d_query += later
        d_key += earlier
        between = split_decays(i[None, :], last[None, :], i[:, None], half)
        change += tl.dot(between.to(tl.float32), later * query + earlier * key, input_precision=SUMS)
    tl.store(d_gate + token * K + place, change, mask=own)
    alone = tl.sum(tl.where(i[:, None] == i[None, :], d_score, 0.0), 1)[:, None]
    if bonus is not None:
        tl.store(d_bonus + across + keys, tl.sum(alone * query * key, 0), mask=keys < K)
        strength = tl.load(bonus + _member(chunk, h, T, H, CHUNK, OWN) * K + keys, mask=keys < K, other=0.0)
        alone = alone * strength[None, :]
    tl.store(d_q + token * K + place, (d_query + alone * key).to(kind), mask=own)
    tl.store(d_k + token * K + place, (d_key + alone * query).to(kind), mask=own)


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    bonus,
    state,
    output,
    last,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = (tl.program_id(0) // TILES).to(tl.int64)
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at = row * K * V + keys[:, None] * V + values[None, :]
    query = tl.load(q + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(gate + row * K + keys, mask=keys < K, other=0.0).to(tl.float32))
    value = tl.load(v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    after = S * decay[:, None] + key[:, None] * value[None, :]
    tl.store(last + at, after, mask=inside)
    if bonus is not None:
        member = row if OWN else row % H
        strength = tl.load(bonus + member * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        seen = S + (key * strength)[:, None] * value[None, :]
    else:
        seen = after
    out = tl.sum(seen * query[:, None], 0)
    tl.store(output + row * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _ChannelDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        bonus: Tensor | None,
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

        scores = v.new_empty(batch, time, heads, chunk)
        reads, writes, fades = torch.empty_like(q), torch.empty_like(k), wide(chunks, heads, key)
        launch(
            OPERATOR,
            _pairs,
            (chunks, heads),
            (q, k, gate, bonus, scores, reads, writes, fades, cu_seqlens, offsets, time, documents),
            {
                "H": heads,
                "K": key,
                "LEVELS": chunk.bit_length() - 1,
                "OWN": _has_own(bonus),
                "PRECISION": dot_precision(v.dtype),
            },
            row,
            like=v,
        )
        row = configure(OPERATOR, "forward", (key, value), v)
        output, last = torch.empty_like(v), wide(documents, heads, key, value)
        starts = v.new_empty(chunks, heads, key, value) if keep else None
        launch(
            OPERATOR,
            _forward,
            (documents * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
            (v, scores, reads, writes, fades, state, output, last, starts, cu_seqlens, offsets, time),
            _sizes(k, v, chunk),
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, gate, bonus, scores, reads, writes, fades, starts, cu_seqlens, offsets)
        ctx.has_state, ctx.chunk = state is not None, chunk
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, bonus, scores, reads, writes, fades, starts, cu_seqlens, offsets = ctx.saved_tensors
        batch, time, heads, key = k.shape
        value = v.shape[-1]
        chunk, chunks = ctx.chunk, fades.shape[0]
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.contiguous()
        d_last = None if d_last is None else d_last.contiguous()

        def wide(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=v.device)

        row = configure(OPERATOR, "backward", (key, value), v)
        d_v, ends = torch.empty_like(v), torch.empty_like(starts)
        d_state = wide(documents, heads, key, value) if ctx.has_state else None
        launch(
            OPERATOR,
            _backward,
            (documents * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
            (
                scores,
                reads,
                writes,
                fades,
                d_output,
                d_last,
                d_v,
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
        d_q, d_k, d_gate = torch.empty_like(q), torch.empty_like(k), torch.empty_like(gate)
        d_bonus = None if bonus is None else wide(chunks, heads, key)
        launch(
            OPERATOR,
            _pairs_backward,
            (chunks, heads, triton.cdiv(key, row.blocks["BLOCK_K"])),
            (
                q,
                k,
                v,
                gate,
                bonus,
                starts,
                ends,
                d_output,
                d_q,
                d_k,
                d_gate,
                d_bonus,
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
                "OWN": _has_own(bonus),
                "PRECISION": dot_precision(v.dtype),
                # The gradients of log-decays: sums in float32 of what is no more precise than v's type.
                "SUMS": dot_precision(v.dtype) if v.dtype == torch.float32 else "tf32",
            },
            row,
            like=v,
        )
        if d_bonus is not None:
            d_bonus = d_bonus.unflatten(0, (bonus.shape[0], -1)).sum(1)
        return d_q, d_k, d_v, d_gate, d_bonus, d_state, None, None


def _has_own(bonus: Tensor | None) -> bool:
    """Whether each batch entry has a bonus of its own."""
    return bonus is not None and bonus.shape[0] > 1


def _by_entry(bonus: Tensor) -> Tensor:
    """A bonus for all [H, K] or one for each batch entry → [1, H, K] or [B, H, K]."""
    return bonus if bonus.dim() == 3 else bonus.unsqueeze(0)


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


def channel_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ops.channel_decay`. Products are taken in v's type, sums and decays in float32."""
    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ChannelDecay.apply(
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            log_decay.float().contiguous(),
            None if bonus is None else _by_entry(bonus.float()).contiguous(),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
            wants_gradient(q, k, v, log_decay, bonus, state),
        )
    return result


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.channel_decay_step`. Carries no gradient."""
    batch, heads, key = k.shape
    value = v.shape[-1]
    row = configure(OPERATOR, "step", (key, value), v)
    bonus = None if bonus is None else _by_entry(bonus).contiguous()
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(batch, heads, key, value, dtype=torch.float32, device=v.device)
    launch(
        OPERATOR,
        _step,
        (batch * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
        (
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            log_decay.contiguous(),
            bonus,
            state.contiguous(),
            output,
            last,
        ),
        {"H": heads, "K": key, "V": value, "OWN": _has_own(bonus), "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

"""The delta rule with a decay a key channel (Kimi delta attention) in Triton: two kernels forwards, two backwards, a step.

Letters: B batch, N documents (or B), T time, H heads, K key, V value, C tokens of a chunk, G the running sum of the
log-decays in a chunk.  After arXiv:2510.26692; the chunk's formulas and its splits are in `chunked`.

What chunks need of themselves alone is made for all of them at once: `prepare` leaves the inverse X and the scores
A_q of each, and queries and keys faded from the chunk's start and to its end; `gradients` makes all that follows from
the states on both of a chunk's sides. Between them `forward` and `backward` walk a document's chunks with one head's
state, all keys and a tile of the values, by products alone. No two programs write in one place, so two runs agree to
the bit. No accumulator is transposed on its way into another product (see the traps of Hopper): where both a product
and its transpose are needed, both are made of what lies in memory. Another trap, of chunks of 64 tokens with four
warps, is why the table has shorter ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.configurations import Configuration
from kernels.fused import (
    chunk_bounds,
    document_bounds,
    load_decays,
    split_decays,
    split_pairs,
    unit_lower_inverse,
)
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets

OPERATOR = "channel_delta"


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _prepare(
    q,
    k,
    gate,
    beta,
    inverse,
    scores,
    seen,
    held,
    kept,
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
    SOLVE: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    at = chunk.to(tl.int64) * H + h
    token = first * H + h
    kind = seen.dtype.element_ty
    i = tl.arange(0, CHUNK)
    live = i < left
    alike = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    reads = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        at_k = i[:, None] * (H * K) + keys[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        query = tl.load(q + token * K + at_k, mask=own_k, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + at_k, mask=own_k, other=0.0).to(tl.float32)
        high, low = load_decays(gate + token * K, at_k, own_k)
        # Keys and decays once more, as columns: [K, C].
        at_turned = i[None, :] * (H * K) + keys[:, None]
        own_turned = live[None, :] & (keys < K)[:, None]
        turned = tl.load(k + token * K + at_turned, mask=own_turned, other=0.0).to(tl.float32)
        upper, lower = load_decays(gate + token * K, at_turned, own_turned)
        for level in range(0, LEVELS):
            half = 1 << level
            between = split_decays(i[:, None], i[:, None], i[None, :], half)
            fade = tl.exp(tl.dot(between, high) + tl.dot(between, low))
            between = split_decays(i[None, :], i[None, :], i[:, None], half)
            column = (turned * tl.exp(tl.dot(upper, between) + tl.dot(lower, between))).to(kind)
            pairs = split_pairs(i[:, None], i[None, :], half)
            alike += tl.where(pairs, tl.dot((key * fade).to(kind), column, input_precision=PRECISION), 0.0)
            reads += tl.where(pairs, tl.dot((query * fade).to(kind), column, input_precision=PRECISION), 0.0)
        passed, ahead = (i[None, :] <= i[:, None]).to(tl.float16), (i[None, :] > i[:, None]).to(tl.float16)
        fade = tl.exp(tl.dot(passed, high) + tl.dot(passed, low))
        tl.store(seen + token * K + at_k, (query * fade).to(kind), mask=own_k)
        tl.store(held + token * K + at_k, (key * fade).to(kind), mask=own_k)
        fade = tl.exp(tl.dot(ahead, high) + tl.dot(ahead, low))
        tl.store(kept + token * K + at_k, (key * fade).to(kind), mask=own_k)
        whole = tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0))
        tl.store(fades + at * K + keys, whole, mask=keys < K)
        # A token read with its own write fades by nothing.
        reads += tl.where(i[:, None] == i[None, :], tl.sum(query * key, 1)[:, None], 0.0)
    strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
    solved = unit_lower_inverse(alike * strength[:, None], CHUNK, SOLVE)
    square = i[:, None] * CHUNK + i[None, :]
    tl.store(inverse + at * CHUNK * CHUNK + square, solved.to(kind))
    tl.store(scores + at * CHUNK * CHUNK + square, reads.to(kind))


@triton.jit(do_not_specialize=["T"])
def _forward(
    seen,
    held,
    kept,
    fades,
    v,
    beta,
    inverse,
    scores,
    state,
    output,
    last,
    starts,
    written,
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
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    if state is not None:
        S = tl.load(state + (n * H + h) * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.full([BLOCK_K, BLOCK_V], 0.0, tl.float32)
    for c in range(0, tl.cdiv(length, CHUNK)):
        live = i < length - c * CHUNK
        token = (first + c * CHUNK) * H + h
        at = (chunk + c) * H + h
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        key = tl.load(held + token * K + at_k, mask=own_k, other=0.0)
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0)
        strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        before = S.to(value.dtype)
        if starts is not None:
            tl.store(starts + at * K * V + tile, before, mask=inside)
        recalled = tl.dot(key, before, input_precision=PRECISION)
        error = (value.to(tl.float32) - recalled) * strength[:, None]
        write = tl.dot(solve, error.to(value.dtype), input_precision=PRECISION).to(value.dtype)
        if written is not None:
            tl.store(written + token * V + at_v, write, mask=own_v)
        key = tl.load(kept + token * K + at_k, mask=own_k, other=0.0)
        S = S * tl.load(fades + at * K + keys, mask=keys < K, other=0.0)[:, None]
        S += tl.dot(tl.trans(key), write, input_precision=PRECISION)
        query = tl.load(seen + token * K + at_k, mask=own_k, other=0.0)
        reads = tl.load(scores + at * CHUNK * CHUNK + square)
        out = tl.dot(query, before, input_precision=PRECISION)
        out += tl.dot(reads, write, input_precision=PRECISION)
        tl.store(output + token * V + at_v, out.to(output.dtype.element_ty), mask=own_v)
    tl.store(last + (n * H + h) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward(
    seen,
    held,
    kept,
    fades,
    beta,
    inverse,
    scores,
    d_output,
    d_last,
    ends,
    solved,
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
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (H * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    # The gradient of the state after the chunk.
    if d_last is not None:
        D = tl.load(d_last + (n * H + h) * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        D = tl.full([BLOCK_K, BLOCK_V], 0.0, tl.float32)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        live = i < length - c * CHUNK
        token = (first + c * CHUNK) * H + h
        at = (chunk + c) * H + h
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        key = tl.load(kept + token * K + at_k, mask=own_k, other=0.0)
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        reads = tl.load(scores + at * CHUNK * CHUNK + square)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
        after = D.to(key.dtype)
        tl.store(ends + at * K * V + tile, after, mask=inside)
        d_fresh = tl.dot(key, after, input_precision=PRECISION)
        d_fresh += tl.dot(tl.trans(reads), d_out, input_precision=PRECISION)
        d_solved = tl.dot(tl.trans(solve), d_fresh.to(key.dtype), input_precision=PRECISION)
        tl.store(solved + token * V + at_v, d_solved.to(solved.dtype.element_ty), mask=own_v)
        D = D * tl.load(fades + at * K + keys, mask=keys < K, other=0.0)[:, None]
        query = tl.load(seen + token * K + at_k, mask=own_k, other=0.0)
        D += tl.dot(tl.trans(query), d_out, input_precision=PRECISION)
        key = tl.load(held + token * K + at_k, mask=own_k, other=0.0)
        d_recalled = (d_solved * -strength[:, None]).to(key.dtype)
        D += tl.dot(tl.trans(key), d_recalled, input_precision=PRECISION)
    if d_state is not None:
        tl.store(d_state + (n * H + h) * K * V + tile, D, mask=inside)


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _gradients(
    q,
    k,
    v,
    gate,
    beta,
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
    across = (chunk.to(tl.int64) * H + h) * K * V
    token = first * H + h
    kind = d_q.dtype.element_ty
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
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0).to(tl.float32)
        d_value = d_solved.to(tl.float32)
        d_strength += tl.sum(d_value * value, 1)
        d_value = d_value * strength[:, None]
        tl.store(d_v + token * V + at_v, d_value.to(kind), mask=own_v)
    same = tl.sum(tl.where(i[:, None] == i[None, :], d_scores, 0.0), 1)
    # Rows stay without the strength, to which their sums belong too; columns take that of their later token.
    d_both = tl.where(i[:, None] > i[None, :], d_lower, d_upper * strength[None, :]).to(kind)
    d_scores = d_scores.to(kind)
    d_turned = d_turned.to(kind)
    for begin in range(0, K, BLOCK_K):
        keys = begin + tl.arange(0, BLOCK_K)
        d_query = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        d_held = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        d_key = tl.full([CHUNK, BLOCK_K], 0.0, tl.float32)
        carried = tl.full([BLOCK_K], 0.0, tl.float32)
        for start in range(0, V, BLOCK_V):
            values = start + tl.arange(0, BLOCK_V)
            at_v = i[:, None] * (H * V) + values[None, :]
            own_v = live[:, None] & (values < V)[None, :]
            tile = keys[:, None] * V + values[None, :]
            inside = (keys < K)[:, None] & (values < V)[None, :]
            before = tl.load(starts + across + tile, mask=inside, other=0.0)
            after = tl.load(ends + across + tile, mask=inside, other=0.0)
            d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
            write = tl.load(written + token * V + at_v, mask=own_v, other=0.0)
            d_solved = tl.load(solved + token * V + at_v, mask=own_v, other=0.0)
            d_query += tl.dot(d_out, tl.trans(before), input_precision=PRECISION)
            d_held -= tl.dot(d_solved, tl.trans(before), input_precision=PRECISION)
            d_key += tl.dot(write, tl.trans(after), input_precision=PRECISION)
            carried += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        at_k = i[:, None] * (H * K) + keys[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        query = tl.load(q + token * K + at_k, mask=own_k, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + at_k, mask=own_k, other=0.0).to(tl.float32)
        high, low = load_decays(gate + token * K, at_k, own_k)
        # What the states on both sides say. Decays gather what they stand before or behind, by products with ones.
        passed, ahead = (i[None, :] <= i[:, None]).to(tl.float16), (i[None, :] > i[:, None]).to(tl.float16)
        d_key = d_key * tl.exp(tl.dot(ahead, high) + tl.dot(ahead, low))
        ahead = (i[None, :] < i[:, None]).to(tl.float32)
        d_fade = tl.dot(ahead, d_key * key, input_precision=SUMS)
        fade = tl.exp(tl.dot(passed, high) + tl.dot(passed, low))
        d_query = d_query * fade
        d_held = d_held * fade
        d_strength += tl.sum(d_held * key, 1)
        d_held = d_held * strength[:, None]
        passed = (i[None, :] >= i[:, None]).to(tl.float32)
        d_fade += tl.dot(passed, d_query * query + d_held * key, input_precision=SUMS)
        whole = tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0))
        d_fade += (carried * whole)[None, :]
        # What pairs of tokens say; a token read with its own write fades by nothing.
        d_query += same[:, None] * key
        d_key += d_held + same[:, None] * query
        for level in range(0, LEVELS):
            half = 1 << level
            between = split_decays(i[:, None], i[:, None], i[None, :], half)
            fade = tl.exp(tl.dot(between, high) + tl.dot(between, low))
            row = (key * fade).to(kind)
            pairs = split_pairs(i[:, None], i[None, :], half)
            turned = split_pairs(i[None, :], i[:, None], half)
            d_read = tl.dot(tl.where(pairs, d_scores, 0.0), row, input_precision=PRECISION) * fade
            d_row = tl.dot(tl.where(pairs | turned, d_both, 0.0), row, input_precision=PRECISION)
            read = (query * fade).to(kind)
            d_row += tl.dot(tl.where(turned, d_turned, 0.0), read, input_precision=PRECISION)
            d_row = d_row * fade
            later = i // half % 2 == 1
            d_strength += tl.where(later, tl.sum(d_row * key, 1), 0.0)
            d_row = d_row * tl.where(later, strength, 1.0)[:, None]
            between = split_decays(i[None, :], i[None, :], i[:, None], half).to(tl.float32)
            d_fade += tl.dot(between, d_read * query + d_row * key, input_precision=SUMS)
            d_query += d_read
            d_key += d_row
        tl.store(d_q + token * K + at_k, d_query.to(kind), mask=own_k)
        tl.store(d_k + token * K + at_k, d_key.to(kind), mask=own_k)
        tl.store(d_gate + token * K + at_k, d_fade, mask=own_k)
    tl.store(d_beta + token + i * H, d_strength, mask=live)


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    beta,
    state,
    output,
    last,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    at = tl.program_id(1).to(tl.int64)
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    tile = at * K * V + keys[:, None] * V + values[None, :]
    query = tl.load(q + at * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + at * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    fade = tl.exp(tl.load(gate + at * K + keys, mask=keys < K, other=0.0).to(tl.float32))
    value = tl.load(v + at * V + values, mask=values < V, other=0.0).to(tl.float32)
    strength = tl.load(beta + at).to(tl.float32)
    S = tl.load(state + tile, mask=inside, other=0.0).to(tl.float32) * fade[:, None]
    error = (value - tl.sum(S * key[:, None], 0)) * strength
    S += key[:, None] * error[None, :]
    tl.store(last + tile, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + at * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _ChannelDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        beta: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = k.shape
        value = v.shape[3]
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        prepare = configure(OPERATOR, "prepare", (key, value), v)
        chunk = prepare.blocks["CHUNK"]
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, chunk)
        inverse = torch.empty(chunks, heads, chunk, chunk, dtype=v.dtype, device=v.device)
        scores = torch.empty_like(inverse)
        # Queries and keys faded from the chunk's start, keys faded to its end.
        seen, held, kept = (torch.empty_like(k) for _ in range(3))
        fades = torch.empty(chunks, heads, key, dtype=torch.float32, device=v.device)
        launch(
            OPERATOR,
            _prepare,
            (chunks, heads),
            (
                q,
                k,
                gate,
                beta,
                inverse,
                scores,
                seen,
                held,
                kept,
                fades,
                cu_seqlens,
                offsets,
                time,
                documents,
            ),
            {
                "H": heads,
                "K": key,
                "LEVELS": chunk.bit_length() - 1,
                "PRECISION": dot_precision(v.dtype),
                "SOLVE": dot_precision(torch.float32),
            },
            prepare,
            like=v,
        )
        row = configure(OPERATOR, "forward", (key, value), v)
        output = torch.empty_like(v)
        last = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        starts = written = None
        if keep:
            starts = torch.empty(chunks, heads, key, value, dtype=v.dtype, device=v.device)
            written = torch.empty_like(v)
        launch(
            OPERATOR,
            _forward,
            _walks(row, v, documents),
            (
                seen,
                held,
                kept,
                fades,
                v,
                beta,
                inverse,
                scores,
                state,
                output,
                last,
                starts,
                written,
                cu_seqlens,
                offsets,
                time,
            ),
            {**_sizes(k, v), "BLOCK_K": padded(key), "CHUNK": chunk},
            row,
            like=v,
        )
        ctx.save_for_backward(
            q,
            k,
            v,
            gate,
            beta,
            inverse,
            scores,
            seen,
            held,
            kept,
            fades,
            starts,
            written,
            cu_seqlens,
            offsets,
        )
        ctx.has_state = state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, beta, inverse, scores, seen, held, kept, fades, *rest = ctx.saved_tensors
        starts, written, cu_seqlens, offsets = rest
        batch, time, heads, key = k.shape
        value = v.shape[3]
        chunks, _, chunk, _ = inverse.shape
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        d_state = None
        if ctx.has_state:
            d_state = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        ends, solved = torch.empty_like(starts), torch.empty_like(v)
        row = configure(OPERATOR, "backward", (key, value), v)
        launch(
            OPERATOR,
            _backward,
            _walks(row, v, documents),
            (
                seen,
                held,
                kept,
                fades,
                beta,
                inverse,
                scores,
                d_output,
                d_last,
                ends,
                solved,
                d_state,
                cu_seqlens,
                offsets,
                time,
            ),
            {**_sizes(k, v), "BLOCK_K": padded(key), "CHUNK": chunk},
            row,
            like=v,
        )
        d_q, d_k, d_v, d_gate, d_beta = (torch.empty_like(x) for x in (q, k, v, gate, beta))
        launch(
            OPERATOR,
            _gradients,
            (chunks, heads),
            (
                q,
                k,
                v,
                gate,
                beta,
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
                time,
                documents,
            ),
            {
                **_sizes(k, v),
                "CHUNK": chunk,
                "LEVELS": chunk.bit_length() - 1,
                # Numbers that are to be rounded to half as many digits need no more of them.
                "SUMS": "tf32x3" if v.dtype == torch.float32 else "tf32",
            },
            configure(OPERATOR, "gradients", (key, value), v),
            like=v,
        )
        return d_q, d_k, d_v, d_gate, d_beta, d_state, None, None


def _walks(row: Configuration, v: Tensor, documents: int) -> tuple[int, int]:
    """A program for each tile of values, document and head."""
    return triton.cdiv(v.shape[3], row.blocks["BLOCK_V"]), documents * v.shape[2]


def _sizes(k: Tensor, v: Tensor) -> dict[str, Any]:
    """What all kernels but the first are compiled for."""
    return {"H": v.shape[2], "K": k.shape[3], "V": v.shape[3], "PRECISION": dot_precision(v.dtype)}


def channel_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks in two launches; shapes as in `ops.channel_delta`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ChannelDelta.apply(
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            log_decay.float().contiguous(),
            beta.float().contiguous(),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
            wants_gradient(q, k, v, log_decay, beta, state),
        )
    return result


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.channel_delta_step`. Carries no gradient."""
    batch, heads, key = q.shape
    value = v.shape[2]
    row = configure(OPERATOR, "step", (key, value), v)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(batch, heads, key, value, dtype=torch.float32, device=v.device)
    launch(
        OPERATOR,
        _step,
        (triton.cdiv(value, row.blocks["BLOCK_V"]), batch * heads),
        (
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            log_decay.contiguous(),
            beta.contiguous(),
            state.contiguous(),
            output,
            last,
        ),
        {"K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

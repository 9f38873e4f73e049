"""The delta rule with one decay a head or none, in Triton: two kernels forwards, two backwards, and a step.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value, C tokens of a
chunk.  After arXiv:2406.06484 (the form) and arXiv:2412.06464 (the decay); the chunk's formulas are in `chunked`.

What chunks need of themselves alone is made for all of them at once: `prepare` leaves the inverse X and the scores
A_q of each, `gradients` makes all that follows from the states on both of its sides. Between them `forward` and
`backward` walk a document's chunks with one head's state, all keys and a tile of the values, and do no more than the
state asks for. No two programs write in one place, so two runs agree to the bit. Walks and gradients read inverse,
scores, writes and states from memory where they need them transposed: no accumulator is transposed on its way into
another product (see the traps of Hopper). Another trap, of chunks of 64 tokens with four warps, is why the table has
chunks of 32 at most.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.configurations import Configuration
from kernels.fused import chunk_bounds, chunk_decays, document_bounds, unit_lower_inverse
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets

OPERATOR = "scalar_delta"


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _prepare(
    q,
    k,
    gate,
    beta,
    inverse,
    scores,
    fades,
    cu_seqlens,
    offsets,
    T,
    DOCUMENTS,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    first, left = chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, CHUNK)
    at = chunk.to(tl.int64) * H + h
    shared, token = first * G + h // (H // G), first * H + h
    kind = inverse.dtype.element_ty
    i = tl.arange(0, CHUNK)
    live = i < left
    alike = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    reads = tl.full([CHUNK, CHUNK], 0.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        at_k = i[:, None] * (G * K) + keys[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        query = tl.load(q + shared * K + at_k, mask=own_k, other=0.0)
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        alike += tl.dot(key, tl.trans(key), input_precision=PRECISION)
        reads += tl.dot(query, tl.trans(key), input_precision=PRECISION)
    strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
    if gate is not None:
        fade = tl.load(gate + token + i * H, mask=live, other=0.0).to(tl.float32)
        within, since, until, _ = chunk_decays(fade, CHUNK)
        alike = alike * within
        reads = reads * within
        tl.store(fades + at * 2 * CHUNK + i, since)
        tl.store(fades + at * 2 * CHUNK + CHUNK + i, until)
    lower = tl.where(i[:, None] > i[None, :], alike * strength[:, None], 0.0)
    reads = tl.where(i[:, None] >= i[None, :], reads, 0.0)
    solved = unit_lower_inverse(lower, CHUNK, SOLVE)
    square = i[:, None] * CHUNK + i[None, :]
    tl.store(inverse + at * CHUNK * CHUNK + square, solved.to(kind))
    tl.store(scores + at * CHUNK * CHUNK + square, reads.to(kind))


@triton.jit(do_not_specialize=["T"])
def _forward(
    q,
    k,
    v,
    beta,
    inverse,
    scores,
    fades,
    state,
    output,
    last,
    starts,
    written,
    cu_seqlens,
    offsets,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (G * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    if state is not None:
        S = tl.load(state + (n * H + h) * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.full([BLOCK_K, BLOCK_V], 0.0, tl.float32)
    for c in range(0, tl.cdiv(length, CHUNK)):
        live = i < length - c * CHUNK
        row = first + c * CHUNK
        shared, token = row * G + g, row * H + h
        at = (chunk + c) * H + h
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0)
        strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        before = S.to(value.dtype)
        if starts is not None:
            tl.store(starts + at * K * V + tile, before, mask=inside)
        held = tl.dot(key, before, input_precision=PRECISION)
        if fades is not None:
            since = tl.load(fades + at * 2 * CHUNK + i)
            held = held * since[:, None]
        error = (value.to(tl.float32) - held) * strength[:, None]
        fresh = tl.dot(solve, error.to(value.dtype), input_precision=PRECISION)
        write = fresh.to(value.dtype)
        if written is not None:
            tl.store(written + token * V + at_v, write, mask=own_v)
        kept = write
        if fades is not None:
            until = tl.load(fades + at * 2 * CHUNK + CHUNK + i)
            kept = (fresh * until[:, None]).to(value.dtype)
            S = S * tl.load(fades + at * 2 * CHUNK + CHUNK - 1)
        # Loaded anew, for it is in the cache, and registers are what there is least of.
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        S += tl.dot(tl.trans(key), kept, input_precision=PRECISION)
        query = tl.load(q + shared * K + at_k, mask=own_k, other=0.0)
        reads = tl.load(scores + at * CHUNK * CHUNK + square)
        out = tl.dot(query, before, input_precision=PRECISION)
        if fades is not None:
            out = out * since[:, None]
        out += tl.dot(reads, write, input_precision=PRECISION)
        tl.store(output + token * V + at_v, out.to(output.dtype.element_ty), mask=own_v)
    tl.store(last + (n * H + h) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward(
    q,
    k,
    beta,
    inverse,
    scores,
    fades,
    d_output,
    d_last,
    ends,
    solved,
    d_state,
    cu_seqlens,
    offsets,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (G * K) + keys[None, :]
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
        row = first + c * CHUNK
        shared, token = row * G + g, row * H + h
        at = (chunk + c) * H + h
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        d_out = tl.load(d_output + token * V + at_v, mask=own_v, other=0.0)
        reads = tl.load(scores + at * CHUNK * CHUNK + square)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
        query = tl.load(q + shared * K + at_k, mask=own_k, other=0.0)
        after = D.to(key.dtype)
        tl.store(ends + at * K * V + tile, after, mask=inside)
        d_fresh = tl.dot(key, after, input_precision=PRECISION)
        seen = d_out
        if fades is not None:
            since = tl.load(fades + at * 2 * CHUNK + i)
            until = tl.load(fades + at * 2 * CHUNK + CHUNK + i)
            d_fresh = d_fresh * until[:, None]
            seen = (d_out.to(tl.float32) * since[:, None]).to(d_out.dtype)
            strength = strength * since
            D = D * tl.load(fades + at * 2 * CHUNK + CHUNK - 1)
        d_fresh += tl.dot(tl.trans(reads), d_out, input_precision=PRECISION)
        d_solved = tl.dot(tl.trans(solve), d_fresh.to(key.dtype), input_precision=PRECISION)
        tl.store(solved + token * V + at_v, d_solved.to(solved.dtype.element_ty), mask=own_v)
        d_held = (d_solved * -strength[:, None]).to(key.dtype)
        D += tl.dot(tl.trans(query), seen, input_precision=PRECISION)
        D += tl.dot(tl.trans(key), d_held, input_precision=PRECISION)
    if d_state is not None:
        tl.store(d_state + (n * H + h) * K * V + tile, D, mask=inside)


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def _gradients(
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
        value = tl.load(v + token * V + at_v, mask=own_v, other=0.0).to(tl.float32)
        d_value = d_solved.to(tl.float32)
        d_strength += tl.sum(d_value * value, 1)
        d_value = d_value * strength[:, None]
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
            before = tl.load(starts + at * K * V + tile, mask=inside, other=0.0)
            after = tl.load(ends + at * K * V + tile, mask=inside, other=0.0)
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
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at = (n * H + h) * K * V + keys[:, None] * V + values[None, :]
    query = tl.load(q + (n * G + g) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + (n * G + g) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + (n * H + h) * V + values, mask=values < V, other=0.0).to(tl.float32)
    strength = tl.load(beta + n * H + h).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        S = S * tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    error = (value - tl.sum(S * key[:, None], 0)) * strength
    S += key[:, None] * error[None, :]
    tl.store(last + at, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + (n * H + h) * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _ScalarDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        beta: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, _groups, key = k.shape
        heads, value = v.shape[2:]
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        prepare = configure(OPERATOR, "prepare", (key, value), v)
        chunk = prepare.blocks["CHUNK"]
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, chunk)
        inverse = torch.empty(chunks, heads, chunk, chunk, dtype=v.dtype, device=v.device)
        scores = torch.empty_like(inverse)
        fades = None
        if gate is not None:
            fades = torch.empty(chunks, heads, 2, chunk, dtype=torch.float32, device=v.device)
        launch(
            OPERATOR,
            _prepare,
            (chunks, heads),
            (q, k, gate, beta, inverse, scores, fades, cu_seqlens, offsets, time, documents),
            {
                "H": heads,
                "G": q.shape[2],
                "K": key,
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
                q,
                k,
                v,
                beta,
                inverse,
                scores,
                fades,
                state,
                output,
                last,
                starts,
                written,
                cu_seqlens,
                offsets,
                time,
            ),
            {**_sizes(q, v), "BLOCK_K": padded(key), "CHUNK": chunk},
            row,
            like=v,
        )
        ctx.save_for_backward(
            q, k, v, gate, beta, inverse, scores, fades, starts, written, cu_seqlens, offsets
        )
        ctx.has_state = state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, beta, inverse, scores, fades, starts, written, cu_seqlens, offsets = ctx.saved_tensors
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
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
                q,
                k,
                beta,
                inverse,
                scores,
                fades,
                d_output,
                d_last,
                ends,
                solved,
                d_state,
                cu_seqlens,
                offsets,
                time,
            ),
            {**_sizes(q, v), "BLOCK_K": padded(key), "CHUNK": chunk},
            row,
            like=v,
        )
        # The heads of a group are summed in float32.
        own = v.dtype if groups == heads else torch.float32
        d_q = torch.empty(batch, time, heads, key, dtype=own, device=v.device)
        d_k, d_v, d_beta = torch.empty_like(d_q), torch.empty_like(v), torch.empty_like(beta)
        d_gate = None if gate is None else torch.empty_like(gate)
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
                time,
                documents,
            ),
            {**_sizes(q, v), "CHUNK": chunk},
            configure(OPERATOR, "gradients", (key, value), v),
            like=v,
        )
        if groups != heads:
            d_q, d_k = (x.unflatten(2, (groups, -1)).sum(3).to(q.dtype) for x in (d_q, d_k))
        return d_q, d_k, d_v, d_gate, d_beta, d_state, None, None


def _walks(row: Configuration, v: Tensor, documents: int) -> tuple[int, int]:
    """A program for each tile of values, document and head."""
    return triton.cdiv(v.shape[3], row.blocks["BLOCK_V"]), documents * v.shape[2]


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What all kernels but the first are compiled for."""
    return {
        "H": v.shape[2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
        "PRECISION": dot_precision(v.dtype),
    }


def scalar_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks in two launches; shapes as in `ops.scalar_delta`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ScalarDelta.apply(
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            None if log_decay is None else log_decay.float().contiguous(),
            beta.float().contiguous(),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
            wants_gradient(q, k, v, log_decay, beta, state),
        )
    return result


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.scalar_delta_step`. Carries no gradient."""
    batch, groups, key = q.shape
    heads, value = v.shape[1:]
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
            None if log_decay is None else log_decay.contiguous(),
            beta.contiguous(),
            state.contiguous(),
            output,
            last,
        ),
        {"H": heads, "G": groups, "K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

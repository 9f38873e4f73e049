"""Triton kernels of the delta rule with one decay a head or none, for the operators that have such a state.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value, C tokens of a
chunk, W walks.  After arXiv:2406.06484 (the form) and arXiv:2412.06464 (the decay); the chunk's formulas are in
`scalar_delta.chunked`.

What chunks need of themselves alone is made for all of them at once: `prepare` leaves the inverse X and the scores
A_q of each, `gradients` of `kernels.fused_delta_gradient` makes all that follows from the states on both of its sides.
Between them `forward` and `backward` walk a document's chunks with one head's state, all keys and a tile of the values,
and do no more than the state asks for. No two programs write in one place, so two runs agree to the bit. Walks and
gradients read inverse, scores, writes and states from memory where they need them transposed: no accumulator is
transposed on its way into another product (see the traps of Hopper). Another trap, of chunks of 64 tokens with four
warps, is why the tables have chunks of 32 at most.

Log-linear attention has several such states a head, each with a walk of its own over the same chunks: where BEFORE is
given it counts the chunks of the text before the first one, walk w starts anew where a block of 2^(w+1) chunks
begins, and takes values while bit w of the chunk's number is 0.
"""

import triton
import triton.language as tl

from kernels.fused import chunk_bounds, chunk_decays, document_bounds, unit_lower_inverse


@triton.jit
def _begins(number, walk):
    """Whether a block of a walk begins with this chunk."""
    return (number >> (walk + 1)) << (walk + 1) == number


@triton.jit
def writes(number, walk):
    """Whether a walk takes this chunk's values."""
    return (number >> walk) & 1 == 0


@triton.jit(do_not_specialize=["T", "DOCUMENTS"])
def prepare(
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


@triton.jit(do_not_specialize=["T", "TOTAL", "APART", "BEFORE"])
def forward(
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
    """With TOTAL tokens in all, walks' outputs and writes lie so far apart; their values APART, nought if they share."""
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    walk, walks = tl.program_id(2), tl.num_programs(2)
    if BEFORE is not None:
        v += walk.to(tl.int64) * APART * (H * V)
        output += walk.to(tl.int64) * TOTAL * (H * V)
        if written is not None:
            written += walk.to(tl.int64) * TOTAL * (H * V)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (G * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    if state is not None:
        S = tl.load(state + ((n * H + h) * walks + walk) * K * V + tile, mask=inside, other=0.0).to(
            tl.float32
        )
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
        taken = own_v
        if BEFORE is not None:
            S = tl.where(_begins(BEFORE + c, walk), 0.0, S)
            taken = own_v & writes(BEFORE + c, walk)
        value = tl.load(v + token * V + at_v, mask=taken, other=0.0)
        strength = tl.load(beta + token + i * H, mask=live, other=0.0).to(tl.float32)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        before = S.to(value.dtype)
        if starts is not None:
            tl.store(starts + (at * walks + walk) * K * V + tile, before, mask=inside)
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
        if written is None:
            # Without a write in between the compiler would keep the first.
            tl.debug_barrier()
        key = tl.load(k + shared * K + at_k, mask=own_k, other=0.0)
        S += tl.dot(tl.trans(key), kept, input_precision=PRECISION)
        query = tl.load(q + shared * K + at_k, mask=own_k, other=0.0)
        reads = tl.load(scores + at * CHUNK * CHUNK + square)
        out = tl.dot(query, before, input_precision=PRECISION)
        if fades is not None:
            out = out * since[:, None]
        out += tl.dot(reads, write, input_precision=PRECISION)
        tl.store(output + token * V + at_v, out.to(output.dtype.element_ty), mask=own_v)
    tl.store(last + ((n * H + h) * walks + walk) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T", "TOTAL", "BEFORE"])
def backward(
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
    TOTAL,
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
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    walk, walks = tl.program_id(2), tl.num_programs(2)
    if BEFORE is not None:
        d_output += walk.to(tl.int64) * TOTAL * (H * V)
        solved += walk.to(tl.int64) * TOTAL * (H * V)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at_k = i[:, None] * (G * K) + keys[None, :]
    at_v = i[:, None] * (H * V) + values[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    # The gradient of the state after the chunk.
    if d_last is not None:
        D = tl.load(d_last + ((n * H + h) * walks + walk) * K * V + tile, mask=inside, other=0.0).to(
            tl.float32
        )
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
        tl.store(ends + (at * walks + walk) * K * V + tile, after, mask=inside)
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
        if BEFORE is not None:
            D = tl.where(_begins(BEFORE + c, walk), 0.0, D)
    if d_state is not None:
        tl.store(d_state + ((n * H + h) * walks + walk) * K * V + tile, D, mask=inside)

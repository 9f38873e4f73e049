"""Linear recurrence with one decay a head in two Triton kernels, each walking its chunks in one launch, and a step.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value, C tokens of a
chunk.  After Mamba-2's state space duality, arXiv:2405.21060.

A program holds all keys and a tile of the values of one head's state, and walks the chunks forwards, or backwards
for the gradients, from the states that the forward pass left before each chunk. What tiles of values add to dq, dk
and the decays is written apart and summed afterwards, so that two runs agree to the bit. The gradient of the state
is carried transposed: no accumulator is transposed on its way into another product (see the traps of Hopper).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import chunk_decays, document_bounds
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets

OPERATOR = "scalar_decay"


@triton.jit(do_not_specialize=["T"])
def _forward(
    q,
    k,
    v,
    gate,
    state,
    output,
    last,
    starts,
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
    if state is not None:
        S = tl.load(state + (n * H + h) * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in range(0, tl.cdiv(length, CHUNK)):
        t = c * CHUNK + i
        live = t < length
        rows = first + t.to(tl.int64)
        if starts is not None:
            tl.store(starts + ((chunk + c) * H + h) * K * V + tile, S, mask=inside)
        at_k = (rows * G + g)[:, None] * K + keys[None, :]
        at_v = (rows * H + h)[:, None] * V + values[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        query = tl.load(q + at_k, mask=own_k, other=0.0)
        key = tl.load(k + at_k, mask=own_k, other=0.0)
        value = tl.load(v + at_v, mask=own_v, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        recalled = tl.dot(query, S.to(query.dtype), input_precision=PRECISION)
        if gate is not None:
            fade = tl.load(gate + rows * H + h, mask=live, other=0.0).to(tl.float32)
            within, since, until, whole = chunk_decays(fade, CHUNK)
            scores = scores * within
            recalled = recalled * since[:, None]
            kept = (value.to(tl.float32) * until[:, None]).to(value.dtype)
            S = S * whole
        else:
            scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
            kept = value
        out = recalled + tl.dot(scores.to(value.dtype), value, input_precision=PRECISION)
        tl.store(output + at_v, out.to(output.dtype.element_ty), mask=own_v)
        S += tl.dot(tl.trans(key), kept, input_precision=PRECISION)
    tl.store(last + (n * H + h) * K * V + tile, S, mask=inside)


@triton.jit(do_not_specialize=["T", "TOTAL"])
def _backward(
    q,
    k,
    v,
    gate,
    starts,
    d_output,
    d_last,
    d_q,
    d_k,
    d_v,
    d_gate,
    d_state,
    cu_seqlens,
    offsets,
    T,
    TOTAL,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i, keys = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    turned = keys[None, :] * V + values[:, None]
    inside = (keys < K)[None, :] & (values < V)[:, None]
    # The gradient of the state after the chunk, transposed: [V, K].
    D = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if d_last is not None:
        D += tl.load(d_last + (n * H + h) * K * V + turned, mask=inside, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        t = c * CHUNK + i
        live = t < length
        rows = first + t.to(tl.int64)
        at_k = (rows * G + g)[:, None] * K + keys[None, :]
        at_v = (rows * H + h)[:, None] * V + values[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        query = tl.load(q + at_k, mask=own_k, other=0.0)
        key = tl.load(k + at_k, mask=own_k, other=0.0)
        value = tl.load(v + at_v, mask=own_v, other=0.0)
        d_out = tl.load(d_output + at_v, mask=own_v, other=0.0).to(value.dtype)
        # S transposed, [V, K], as it stood before the chunk.
        S = tl.load(starts + ((chunk + c) * H + h) * K * V + turned, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        d_scores = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        # The same with rows for keys and columns for queries, made anew.
        d_turned = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        d_reads = tl.dot(d_out, S.to(value.dtype), input_precision=PRECISION)
        d_writes = tl.dot(value, D.to(value.dtype), input_precision=PRECISION)
        d_values = tl.dot(D.to(key.dtype), tl.trans(key), input_precision=PRECISION)
        if gate is not None:
            fade = tl.load(gate + rows * H + h, mask=live, other=0.0).to(tl.float32)
            within, since, until, whole = chunk_decays(fade, CHUNK)
            d_scores = d_scores * within
            d_turned = d_turned * tl.trans(within)
            d_reads = d_reads * since[:, None]
            d_writes = d_writes * until[:, None]
            d_values = d_values * until[None, :]
            # Pairs of a token with itself fade by nothing.
            pairs = tl.where(i[:, None] > i[None, :], d_scores * scores, 0.0)
            reads = tl.sum(d_reads * query.to(tl.float32), 1)
            writes = tl.sum(d_writes * key.to(tl.float32), 1)
            change = tl.sum(pairs, 1) - tl.sum(pairs, 0) + reads - writes
            held = tl.sum(tl.sum(D * S, 1), 0) * whole + tl.sum(writes, 0)
            d_fade = held + tl.cumsum(change, 0, reverse=True)
            tl.store(d_gate + part * TOTAL * H + rows * H + h, d_fade, mask=live)
            scores = scores * within
            D = D * whole
            seen = (d_out.to(tl.float32) * since[:, None]).to(d_out.dtype)
        else:
            d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
            d_turned = tl.where(i[:, None] <= i[None, :], d_turned, 0.0)
            scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
            seen = d_out
        d_reads += tl.dot(d_scores.to(key.dtype), key, input_precision=PRECISION)
        d_writes += tl.dot(d_turned.to(query.dtype), query, input_precision=PRECISION)
        d_values += tl.dot(tl.trans(d_out), scores.to(d_out.dtype), input_precision=PRECISION)
        at_head = (part * TOTAL * H + rows * H + h)[:, None] * K + keys[None, :]
        tl.store(d_q + at_head, d_reads, mask=own_k)
        tl.store(d_k + at_head, d_writes, mask=own_k)
        at_turned = (rows * H + h)[None, :] * V + values[:, None]
        own_turned = live[None, :] & (values < V)[:, None]
        tl.store(d_v + at_turned, d_values.to(d_v.dtype.element_ty), mask=own_turned)
        D += tl.dot(tl.trans(seen), query, input_precision=PRECISION)
    if d_state is not None:
        tl.store(d_state + (n * H + h) * K * V + turned, D, mask=inside)


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
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
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        S = S * tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    S += key[:, None] * value[None, :]
    tl.store(last + at, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + (n * H + h) * V + values, out.to(output.dtype.element_ty), mask=values < V)


class _ScalarDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, _groups, key = k.shape
        heads, value = v.shape[2:]
        row = configure(OPERATOR, "forward", (key, value), v)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, row.blocks["CHUNK"])
        output = torch.empty_like(v)
        last = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        starts = None
        if any(ctx.needs_input_grad):
            starts = torch.empty(chunks, heads, key, value, dtype=torch.float32, device=v.device)
        launch(
            OPERATOR,
            _forward,
            (triton.cdiv(value, row.blocks["BLOCK_V"]), documents * heads),
            (q, k, v, gate, state, output, last, starts, cu_seqlens, offsets, time),
            _sizes(q, v),
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, gate, starts, cu_seqlens)
        ctx.has_state = state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, starts, cu_seqlens = ctx.saved_tensors
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
        row = configure(OPERATOR, "backward", (key, value), v)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        # The states were left at the forward pass's chunks.
        offsets, _ = chunk_offsets(cu_seqlens, batch, time, row.blocks["CHUNK"])
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.contiguous()
        tiles = triton.cdiv(value, row.blocks["BLOCK_V"])

        def parts(*shape: int) -> Tensor:
            return torch.empty(tiles, batch, time, heads, *shape, dtype=torch.float32, device=v.device)

        d_q, d_k, d_v = parts(key), parts(key), torch.empty_like(v)
        d_gate = None if gate is None else parts()
        d_state = None
        if ctx.has_state:
            d_state = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        d_last = None if d_last is None else d_last.contiguous()
        launch(
            OPERATOR,
            _backward,
            (tiles, documents * heads),
            (
                q,
                k,
                v,
                gate,
                starts,
                d_output,
                d_last,
                d_q,
                d_k,
                d_v,
                d_gate,
                d_state,
                cu_seqlens,
                offsets,
                time,
                batch * time,
            ),
            _sizes(q, v),
            row,
            like=v,
        )

        def shared(part: Tensor) -> Tensor:
            """Summed over tiles of values and over the heads of a group."""
            whole: Tensor = part.sum(0).unflatten(2, (groups, -1)).sum(3)
            return whole.to(q.dtype)

        return shared(d_q), shared(d_k), d_v, None if d_gate is None else d_gate.sum(0), d_state, None


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What the forward and backward kernels are compiled for."""
    return {
        "H": v.shape[2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
        "BLOCK_K": padded(q.shape[3]),
        "PRECISION": dot_precision(v.dtype),
    }


def scalar_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks in one launch; shapes as in `ops.scalar_decay`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ScalarDecay.apply(
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            None if log_decay is None else log_decay.float().contiguous(),
            None if state is None else state.float().contiguous(),
            cu_seqlens,
        )
    return result


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.scalar_decay_step`. Carries no gradient."""
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
            state.contiguous(),
            output,
            last,
        ),
        {"H": heads, "G": groups, "K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

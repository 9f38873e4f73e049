"""Linear recurrence with one decay a head in Triton: two launches forward, two backward, and a step.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value, C tokens of a
chunk, n chunks of all documents.  After Mamba-2's state space duality, arXiv:2405.21060.

One launch walks the chunks of every document and leaves the state before each of them; in the next every chunk of
every head is a program of its own. The backward pass does the same from the end, since the recurrence reads the
same both ways: with q for k, d_output for v and decays counted from the other side it gives the gradient of the
state behind each chunk, and then
    o  = exp(D) q S   + (q kᵀ ∘ decays) v        dv = exp(D_C − D) k D   + (k qᵀ ∘ decaysᵀ) do
    dq = exp(D) do Sᵀ + (do vᵀ ∘ decays) k       dk = exp(D_C − D) v Dᵀ  + (v doᵀ ∘ decaysᵀ) q
No accumulator is transposed on its way into another product (see the traps of Hopper).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import chunk_place, chunk_products, chunk_sums, document_bounds, pair_decays
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets, chunk_owners

OPERATOR = "scalar_decay"


@triton.jit(do_not_specialize=["T"])
def _walk(
    keys,
    values,
    gate,
    first,
    states,
    last,
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
    BACK: tl.constexpr,
):
    """The state before each chunk and the last one, from `first`; with BACK the same from the end to the beginning."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % (tiles_k * tiles_v)
    n = (tl.program_id(0) // (H * tiles_k * tiles_v)).to(tl.int64)
    h = tl.program_id(0) // (tiles_k * tiles_v) % H
    begin, length, chunk = document_bounds(n, T, cu_seqlens, offsets, CHUNK)
    i = tl.arange(0, CHUNK)
    rows = tile // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first is not None:
        S += tl.load(first + (n * H + h) * K * V + at, mask=inside, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for turn in range(0, count):
        c = count - 1 - turn if BACK else turn
        tl.store(states + ((chunk + c) * H + h) * K * V + at, S.to(states.dtype.element_ty), mask=inside)
        live = i < length - c * CHUNK
        row = begin + (c * CHUNK).to(tl.int64)
        at_k = (row * G + h // (H // G)) * K + i[:, None] * (G * K) + rows[None, :]
        at_v = (row * H + h) * V + i[:, None] * (H * V) + columns[None, :]
        key = tl.load(keys + at_k, mask=live[:, None] & (rows < K)[None, :], other=0.0)
        value = tl.load(values + at_v, mask=live[:, None] & (columns < V)[None, :], other=0.0)
        if gate is not None:
            fades = tl.load(gate + row * H + h + i * H, mask=live, other=0.0)
            _whole, _rest, since, until, fade = chunk_sums(fades)
            kept = value.to(tl.float32) * (since if BACK else until)[:, None]
            value = kept.to(value.dtype)
            S = S * fade
        S += tl.dot(tl.trans(key), value, input_precision=PRECISION)
    if last is not None:
        tl.store(last + (n * H + h) * K * V + at, S, mask=inside)


@triton.jit
def _to_values(
    left,
    right,
    states,
    values,
    gate,
    output,
    live,
    low,
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
    pairs, through = chunk_products(
        left, right, states, live, low, G * K, K, V, V, 1, CHUNK, BLOCK_K, BLOCK_V, PRECISION
    )
    i, columns = tl.arange(0, CHUNK), low + tl.arange(0, BLOCK_V)
    if gate is not None:
        fades = tl.load(gate + i * H, mask=live, other=0.0)
        whole, rest, since, until, _fade = chunk_sums(fades)
        pairs = pairs * pair_decays(whole, rest, CHUNK, BACK)
        through = through * (until if BACK else since)[:, None]
    elif BACK:
        pairs = tl.where(i[:, None] <= i[None, :], pairs, 0.0)
    else:
        pairs = tl.where(i[:, None] >= i[None, :], pairs, 0.0)
    at = i[:, None] * (H * V) + columns[None, :]
    own = live[:, None] & (columns < V)[None, :]
    value = tl.load(values + at, mask=own, other=0.0)
    through += tl.dot(pairs.to(value.dtype), value, input_precision=PRECISION)
    tl.store(output + at, through.to(output.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["T"])
def _forward(
    q,
    k,
    v,
    gate,
    starts,
    output,
    cu_seqlens,
    offsets,
    owners,
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
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    own = (tl.program_id(0) // tiles).to(tl.int64)
    low = tl.program_id(0) % tiles * BLOCK_V
    h = tl.program_id(1)
    row, live = chunk_place(own, T, cu_seqlens, offsets, owners, CHUNK)
    by_group, by_head = (row * G + h // (H // G)) * K, row * H + h
    starts += (own * H + h) * K * V
    if gate is not None:
        gate += by_head
    _to_values(
        q + by_group, k + by_group, starts, v + by_head * V, gate, output + by_head * V, live, low,
        H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, False,
    )  # fmt: skip


@triton.jit
def _to_queries(
    q,
    k,
    v,
    d_output,
    gate,
    starts,
    ends,
    d_q,
    d_gate,
    live,
    low,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the gradient of one chunk's queries, and what readers add to that of its decays."""
    d_scores, d_query = chunk_products(
        d_output, v, starts, live, low, H * V, V, K, 1, V, CHUNK, BLOCK_V, BLOCK_K, PRECISION
    )
    i, columns = tl.arange(0, CHUNK), low + tl.arange(0, BLOCK_K)
    own = live[:, None] & (columns < K)[None, :]
    key = tl.load(k + i[:, None] * (G * K) + columns[None, :], mask=own, other=0.0)
    if gate is not None:
        held = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, V, BLOCK_V):
            values = start + tl.arange(0, BLOCK_V)
            at = columns[:, None] * V + values[None, :]
            inside = (columns < K)[:, None] & (values < V)[None, :]
            S = tl.load(starts + at, mask=inside, other=0.0).to(tl.float32)
            held += tl.sum(S * tl.load(ends + at, mask=inside, other=0.0).to(tl.float32), 1)
        fades = tl.load(gate + i * H, mask=live, other=0.0)
        whole, rest, since, _until, fade = chunk_sums(fades)
        query = tl.load(q + i[:, None] * (G * K) + columns[None, :], mask=own, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        d_scores = d_scores * pair_decays(whole, rest, CHUNK, False)
        # Pairs of a token with itself fade by nothing.
        pairs = tl.where(i[:, None] > i[None, :], d_scores * scores, 0.0)
        d_query = d_query * since[:, None]
        change = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(d_query * query.to(tl.float32), 1)
        d_fade = tl.sum(held, 0) * fade + tl.cumsum(change, 0, reverse=True)
        tl.store(d_gate + i * H, d_fade, mask=live)
    else:
        d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
    d_query += tl.dot(d_scores.to(key.dtype), key, input_precision=PRECISION)
    tl.store(d_q + i[:, None] * (H * K) + columns[None, :], d_query.to(d_q.dtype.element_ty), mask=own)


@triton.jit
def _to_keys(
    q,
    k,
    v,
    d_output,
    gate,
    ends,
    d_k,
    d_gate,
    live,
    low,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the gradient of one chunk's keys, and what writers add to that of its decays."""
    # Rows for writers, columns for readers.
    d_scores, d_key = chunk_products(
        v, d_output, ends, live, low, H * V, V, K, 1, V, CHUNK, BLOCK_V, BLOCK_K, PRECISION
    )
    i, columns = tl.arange(0, CHUNK), low + tl.arange(0, BLOCK_K)
    own = live[:, None] & (columns < K)[None, :]
    if gate is not None:
        fades = tl.load(gate + i * H, mask=live, other=0.0)
        whole, rest, _since, until, _fade = chunk_sums(fades)
        key = tl.load(k + i[:, None] * (G * K) + columns[None, :], mask=own, other=0.0)
        d_scores = d_scores * pair_decays(whole, rest, CHUNK, True)
        d_key = d_key * until[:, None]
        writes = tl.sum(d_key * key.to(tl.float32), 1)
        tl.store(d_gate + i * H, tl.sum(writes, 0) - tl.cumsum(writes, 0, reverse=True), mask=live)
    else:
        d_scores = tl.where(i[:, None] <= i[None, :], d_scores, 0.0)
    query = tl.load(q + i[:, None] * (G * K) + columns[None, :], mask=own, other=0.0)
    d_key += tl.dot(d_scores.to(query.dtype), query, input_precision=PRECISION)
    tl.store(d_k + i[:, None] * (H * K) + columns[None, :], d_key.to(d_k.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["T", "TOTAL"])
def _backward(
    q,
    k,
    v,
    gate,
    starts,
    ends,
    d_output,
    d_q,
    d_k,
    d_v,
    d_gate,
    cu_seqlens,
    offsets,
    owners,
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
    # A program has one of three duties, so that few products are held at a time.
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    duties: tl.constexpr = 2 * tiles + (V + BLOCK_V - 1) // BLOCK_V
    duty = tl.program_id(0) % duties
    own = (tl.program_id(0) // duties).to(tl.int64)
    h = tl.program_id(1)
    row, live = chunk_place(own, T, cu_seqlens, offsets, owners, CHUNK)
    by_group, by_head = (row * G + h // (H // G)) * K, row * H + h
    q += by_group
    k += by_group
    v += by_head * V
    d_output += by_head * V
    starts += (own * H + h) * K * V
    ends += (own * H + h) * K * V
    if gate is not None:
        gate += by_head
        d_gate += duty.to(tl.int64) * TOTAL * H + by_head
    if duty < tiles:
        _to_queries(
            q, k, v, d_output, gate, starts, ends, d_q + by_head * K, d_gate, live, duty * BLOCK_K,
            H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip
    elif duty < 2 * tiles:
        _to_keys(
            q, k, v, d_output, gate, ends, d_k + by_head * K, d_gate, live, (duty - tiles) * BLOCK_K,
            H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip
    else:
        _to_values(
            k, q, ends, d_output, gate, d_v + by_head * V, live, (duty - 2 * tiles) * BLOCK_V,
            H, G, K, V, BLOCK_K, BLOCK_V, CHUNK, PRECISION, True,
        )  # fmt: skip


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
        batch, time, heads, value = v.shape
        key = k.shape[-1]
        row = configure(OPERATOR, "forward", (key, value), v)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, row.blocks["CHUNK"])
        owners = chunk_owners(offsets, chunks)
        starts = v.new_empty(chunks, heads, key, value)
        last = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        _launch_walk(k, v, gate, state, starts, last, cu_seqlens, offsets, back=False)
        output = torch.empty_like(v)
        launch(
            OPERATOR,
            _forward,
            (chunks * triton.cdiv(value, row.blocks["BLOCK_V"]), heads),
            (q, k, v, gate, starts, output, cu_seqlens, offsets, owners, time),
            _sizes(q, v),
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, gate, starts, cu_seqlens, offsets, owners)
        ctx.has_state = state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, starts, cu_seqlens, offsets, owners = ctx.saved_tensors
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.to(v.dtype).contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        ends, d_state = torch.empty_like(starts), None
        if ctx.has_state:
            documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
            d_state = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        _launch_walk(q, d_output, gate, d_last, ends, d_state, cu_seqlens, offsets, back=True)
        row = configure(OPERATOR, "backward", (key, value), v)
        tiles, chunks = triton.cdiv(key, row.blocks["BLOCK_K"]), len(starts)
        # Heads that share q and k are summed afterwards.
        shared = groups < heads
        dtype = torch.float32 if shared else v.dtype
        d_q, d_k = (torch.empty(batch, time, heads, key, dtype=dtype, device=v.device) for _ in range(2))
        d_v, d_gate = torch.empty_like(v), None if gate is None else gate.new_empty(2 * tiles, *gate.shape)
        launch(
            OPERATOR,
            _backward,
            (chunks * (2 * tiles + triton.cdiv(value, row.blocks["BLOCK_V"])), heads),
            (
                q,
                k,
                v,
                gate,
                starts,
                ends,
                d_output,
                d_q,
                d_k,
                d_v,
                d_gate,
                cu_seqlens,
                offsets,
                owners,
                time,
                batch * time,
            ),
            _sizes(q, v),
            row,
            like=v,
        )
        if shared:
            d_q, d_k = (x.unflatten(2, (groups, -1)).sum(3).to(v.dtype) for x in (d_q, d_k))
        return d_q, d_k, d_v, None if d_gate is None else d_gate.sum(0), d_state, None


def _launch_walk(
    keys: Tensor,
    values: Tensor,
    gate: Tensor | None,
    first: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    *,
    back: bool,
) -> None:
    batch, time, heads, value = values.shape
    key = keys.shape[-1]
    row = configure(OPERATOR, "walk", (key, value), values)
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    tiles = triton.cdiv(key, row.blocks["BLOCK_K"]) * triton.cdiv(value, row.blocks["BLOCK_V"])
    launch(
        OPERATOR,
        _walk,
        (documents * heads * tiles,),
        (keys, values, gate, first, states, last, cu_seqlens, offsets, time),
        {**_sizes(keys, values), "BACK": back},
        row,
        like=values,
    )


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernels of whole sequences are compiled for."""
    return {
        "H": v.shape[2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
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
    """All chunks at once; shapes as in `ops.scalar_decay`. Products are taken in v's type, sums in float32."""
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

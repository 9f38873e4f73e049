"""Attention over listed blocks of keys in Triton: a tile of queries walks its list, a block of keys the queries that list it.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value, N query blocks, M key
blocks listed for each, I lists, P sets of heads that read the same keys by the same list (G, or H where every head has
a list), R = H/P.  After FlashAttention-2, arXiv:2307.08691.

Rows of a tile are the queries of one block by the heads of one set, so that short blocks still fill it; columns are
the listed keys one behind another, so that short key blocks do. Only the lists decide what is visited.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import fused_blocks
from kernels.fused_blocks import (
    LOG2_E,
    by_bucket,
    collect_runs,
    cut_runs,
    known,
    listed_slots,
    narrowed,
    rows_of,
    settle,
    slopes,
    soften,
    turned_slopes,
    used_length,
)
from kernels.launch import configure, dot_precision, launch, padded

OPERATOR = "block_attention"
FOREVER = 2**30
"""A window that bounds nothing; differences of two positions fit 32 bits."""


@triton.jit
def _place(N, first, block, T, H: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of this program: text, set and query block, and of its rows the query, the head, the position, and which there are."""
    R: tl.constexpr = H // P
    tiles = tl.cdiv(block * R, BLOCK_T)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    n, p, b = rest % N, rest // N % P, (rest // (N * P)).to(tl.int64)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    position = (first // block + n) * block + row // R
    t = position - first
    return b, p, n, t, p * R + row % R, position, (row < block * R) & (t >= 0) & (t < T)


@triton.jit
def _columns(lists, positions, start, M, key_block, S, BLOCK_S: tl.constexpr):
    """The slots of BLOCK_S columns of a list, their positions, and which of them there are."""
    slot, there = listed_slots(lists, start + tl.arange(0, BLOCK_S), M, key_block, S)
    where = slot
    if positions is not None:
        where = tl.load(positions + slot, mask=there, other=0).to(tl.int32)
    return slot, where, there


@triton.jit(do_not_specialize=["T", "S", "N", "M", "first", "block", "key_block", "window"])
def _forward(
    q,
    k,
    v,
    index,
    positions,
    output,
    sums,
    T,
    S,
    N,
    M,
    first,
    block,
    key_block,
    window,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    LISTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, p, n, t, h, position, live = _place(N, first, block, T, H, P, BLOCK_T)
    g, lists = p // (P // G), index + ((p * LISTS // P).to(tl.int64) * N + n) * M
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    own = live[:, None] & (keys < K)[None, :]
    row = t.to(tl.int64)
    query = tl.load(q + b * q_b + (row * q_t + h * q_h)[:, None] + keys[None, :], mask=own, other=0.0)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, used_length(lists, M) * key_block, BLOCK_S):
        slot, where, there = _columns(lists, positions, start, M, key_block, S, BLOCK_S)
        at = slot.to(tl.int64)[:, None]
        own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
        key = tl.load(k + b * k_b + at * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
        value = tl.load(v + b * v_b + at * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
        distance = position[:, None] - where[None, :]
        seen = there[None, :] & (distance >= 0) & (distance < window)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        weights, left, top, total = soften(scores, seen, top, total)
        out = out * left[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    share, total = settle(top, total)
    row = (b * T + row) * H + h
    own_v = live[:, None] & (values < V)[None, :]
    out = (out * share[:, None]).to(output.dtype.element_ty)
    tl.store(output + row[:, None] * V + values[None, :], out, mask=own_v)
    tl.store(sums + row, total, mask=live)


@triton.jit(do_not_specialize=["T", "S", "N", "M", "first", "block", "key_block", "window"])
def _backward_queries(
    q,
    k,
    v,
    index,
    positions,
    output,
    sums,
    d_output,
    d_sums,
    d_q,
    lost,
    T,
    S,
    N,
    M,
    first,
    block,
    key_block,
    window,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    LISTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, p, n, t, h, position, live = _place(N, first, block, T, H, P, BLOCK_T)
    g, lists = p // (P // G), index + ((p * LISTS // P).to(tl.int64) * N + n) * M
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    own = live[:, None] & (keys < K)[None, :]
    own_v = live[:, None] & (values < V)[None, :]
    row = t.to(tl.int64)
    query = tl.load(q + b * q_b + (row * q_t + h * q_h)[:, None] + keys[None, :], mask=own, other=0.0)
    row = (b * T + row) * H + h
    at_v = row[:, None] * V + values[None, :]
    d_out = tl.load(d_output + at_v, mask=own_v, other=0.0)
    out = tl.load(output + at_v, mask=own_v, other=0.0)
    gone = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    total = known(sums, row, live)
    if d_sums is not None:
        # A sum of nothing may be handed any gradient.
        some = tl.load(sums + row, mask=live, other=float("-inf")) > float("-inf")
        gone -= tl.load(d_sums + row, mask=some, other=0.0)
    tl.store(lost + row, gone, mask=live)
    d_query = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for start in range(0, used_length(lists, M) * key_block, BLOCK_S):
        slot, where, there = _columns(lists, positions, start, M, key_block, S, BLOCK_S)
        at = slot.to(tl.int64)[:, None]
        mask_k, mask_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
        key = tl.load(k + b * k_b + at * k_s + g * k_g + keys[None, :], mask=mask_k, other=0.0)
        value = tl.load(v + b * v_b + at * v_s + g * v_g + values[None, :], mask=mask_v, other=0.0)
        distance = position[:, None] - where[None, :]
        seen = there[None, :] & (distance >= 0) & (distance < window)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        _, slope = slopes(scores, seen, total, d_weights, gone)
        d_query += tl.dot(slope.to(key.dtype), key, input_precision=PRECISION)
    d_query = (d_query * scale).to(d_q.dtype.element_ty)
    tl.store(d_q + row[:, None] * K + keys[None, :], d_query, mask=own)


@triton.jit(do_not_specialize=["T", "S", "N", "M", "first", "block", "key_block", "window", "pairs"])
def _backward_keys(
    q,
    k,
    v,
    positions,
    sums,
    d_output,
    lost,
    part_k,
    part_v,
    order,
    offsets,
    owners,
    starts,
    T,
    S,
    N,
    M,
    first,
    block,
    key_block,
    window,
    pairs,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    LISTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // P
    SHARERS: tl.constexpr = P // LISTS
    tiles, blocks, width = tl.cdiv(key_block, BLOCK_S), tl.cdiv(S, key_block), block * R
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    pair, run = rest % pairs, (rest // pairs).to(tl.int64)
    bucket = tl.load(owners + run).to(tl.int32)
    if bucket == LISTS * blocks:
        return
    b, p = (pair // SHARERS).to(tl.int64), bucket // blocks * SHARERS + pair % SHARERS
    g = p // (P // G)
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    own = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    slot = bucket % blocks * key_block + own
    there = (own < key_block) & (slot < S)
    where = slot
    if positions is not None:
        where = tl.load(positions + slot, mask=there, other=0).to(tl.int32)
    own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
    far = slot.to(tl.int64)[:, None]
    key = tl.load(k + b * k_b + far * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
    value = tl.load(v + b * v_b + far * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
    d_key = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    d_value = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    entries = tl.load(offsets + bucket)
    begin = ((run - tl.load(starts + bucket)) * RUN).to(tl.int32)
    end = tl.minimum(begin + RUN, (tl.load(offsets + bucket + 1) - entries).to(tl.int32) * width)
    for start in range(begin, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        n = tl.load(order + entries + row // width, mask=row < end, other=0).to(tl.int32) // M % N
        position = (first // block + n) * block + row % width // R
        t, h = position - first, p * R + row % R
        live = (row < end) & (t >= 0) & (t < T)
        ask = b * q_b + (t.to(tl.int64) * q_t + h * q_h)[:, None] + keys[None, :]
        query = tl.load(q + ask, mask=live[:, None] & (keys < K)[None, :], other=0.0)
        at = (b * T + t) * H + h
        mask = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + at[:, None] * V + values[None, :], mask=mask, other=0.0)
        distance = position[None, :] - where[:, None]
        seen = there[:, None] & live[None, :] & (distance >= 0) & (distance < window)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2_E)
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        gone = tl.load(lost + at, mask=live, other=0.0)
        weights, slope = turned_slopes(scores, seen, known(sums, at, live), d_weights, gone)
        d_value += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_key += tl.dot(slope.to(query.dtype), query, input_precision=PRECISION)
    row = ((run * pairs + pair) * key_block + own)[:, None]
    tl.store(part_k + row * K + keys[None, :], d_key * scale, mask=own_k)
    tl.store(part_v + row * V + values[None, :], d_value, mask=own_v)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        positions: Tensor | None,
        sizes: tuple[int, int, int, int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, _ = q.shape
        output = torch.empty(batch, time, heads, v.shape[3], dtype=v.dtype, device=v.device)
        sums = torch.empty(batch, time, heads, dtype=torch.float32, device=v.device)
        _walk("forward", _forward, (q, k, v, index, positions, output, sums), sizes, scale)
        ctx.save_for_backward(q, k, v, index, positions, output, sums)
        ctx.sizes, ctx.scale = sizes, scale
        return output, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, index, positions, output, sums = ctx.saved_tensors
        d_output, d_sums = grads
        d_output = torch.zeros_like(output) if d_output is None else d_output.contiguous()
        d_sums = None if d_sums is None else d_sums.contiguous()
        d_q, lost = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(sums)
        tensors = (q, k, v, index, positions, output, sums, d_output, d_sums, d_q, lost)
        _walk("backward_queries", _backward_queries, tensors, ctx.sizes, ctx.scale)
        d_k, d_v = _turned(q, k, v, index, positions, sums, d_output, lost, ctx.sizes, ctx.scale)
        return d_q, d_k, d_v, None, None, None, None


def _walk(
    kernel: str,
    function: Any,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, int, int, int],
    scale: float,
) -> None:
    """A kernel whose programs are tiles of queries that walk their lists."""
    q, k, v, index = (x for x in tensors[:4] if x is not None)
    batch, time, heads, key = q.shape
    sets, block = _sets(q, k, index), sizes[1]
    row = configure(OPERATOR, kernel, (key, v.shape[3]), v)
    row = narrowed(row, BLOCK_T=padded(block * (heads // sets)))
    tiles = triton.cdiv(block * (heads // sets), row.blocks["BLOCK_T"])
    launch(
        OPERATOR,
        function,
        (tiles * index.shape[1] * sets * batch,),
        (*tensors, time, k.shape[1], *index.shape[1:], *sizes, scale, *_strides(q, k, v)),
        _constants(q, k, v, index),
        row,
        like=v,
    )


def _turned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    positions: Tensor | None,
    sums: Tensor,
    d_output: Tensor,
    lost: Tensor,
    sizes: tuple[int, int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values: each block of keys walks the blocks of queries that list it."""
    batch, time, heads, key = q.shape
    keys, groups, value = v.shape[1:]
    lists, sets, (_, block, key_block, _) = index.shape[0], _sets(q, k, index), sizes
    row = configure(OPERATOR, "backward_keys", (key, value), v)
    row = narrowed(row, BLOCK_S=padded(key_block))
    blocks, pairs = triton.cdiv(keys, key_block), batch * (sets // lists)
    bucket = torch.arange(lists, device=index.device).view(-1, 1, 1) * blocks + index
    order, offsets = by_bucket(bucket.masked_fill(index < 0, lists * blocks).flatten(), lists * blocks)
    owners, starts = cut_runs(offsets, block * (heads // sets), row.blocks["RUN"], index.numel())
    part_k, part_v = (
        torch.empty(len(owners), pairs, key_block, width, dtype=torch.float32, device=v.device)
        for width in (key, value)
    )
    launch(
        OPERATOR,
        _backward_keys,
        (triton.cdiv(key_block, row.blocks["BLOCK_S"]) * pairs * len(owners),),
        (
            *(q, k, v, positions, sums, d_output, lost, part_k, part_v, order, offsets, owners, starts),
            *(time, keys, *index.shape[1:], *sizes, pairs, scale, *_strides(q, k, v)),
        ),
        _constants(q, k, v, index),
        row,
        like=v,
    )
    # Of the heads of a group some share a list, or each has its own: then it has several buckets.
    own = 1 if lists == 1 else lists // groups
    strides = (
        *(0, 0 if lists == 1 else own * blocks, blocks, 1),
        *((groups, 1) if lists == 1 else (1, 0)),
        pairs,
    )
    return collect_runs(OPERATOR, (part_k, part_v), starts, (k, v), key_block, strides, own)


def _sets(q: Tensor, k: Tensor, index: Tensor) -> int:
    """P."""
    return k.shape[2] if index.shape[0] in (1, k.shape[2]) else q.shape[2]


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])


def _constants(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "H": q.shape[2],
        "G": k.shape[2],
        "P": _sets(q, k, index),
        "LISTS": index.shape[0],
        "K": k.shape[3],
        "V": v.shape[3],
        "BLOCK_K": padded(k.shape[3]),
        "BLOCK_V": padded(v.shape[3]),
        "PRECISION": dot_precision(v.dtype),
    }


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    positions: Tensor | None,
    block: int,
    key_block: int,
    first: int,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All queries; index [I, N, M], positions [S] or None for 0, 1, …; else as in `ops.block_attention`.

    Products are taken in v's type, sums in float32.
    """
    sizes = (first, block, key_block, FOREVER if window is None else min(window, FOREVER))
    # What is absent goes to the end of a list, where nobody walks.
    index = index.sort(-1, descending=True).values
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = (rows_of(x.to(v.dtype)) for x in (q, k, v))
        positions = None if positions is None else positions.contiguous()
        result: tuple[Tensor, Tensor] = _Attend.apply(q, k, v, index, positions, sizes, float(scale))
    return result


def step(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query over the listed slots [I, L]; as in `ops.block_attention_step`. Carries no gradient."""
    sets = _sets(q[:, None], k, slots)
    lists = slots.expand(q.shape[0], sets, -1)
    return fused_blocks.step(OPERATOR, q, k, v, lists, 1, k.shape[1], scale)

"""Attention over blocks that each query names, in Triton: queries that named the same block stand together.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, C groups of heads that choose together,
R = H/C, M blocks that a query names, K key, V value, P = B·T·C·M pairs of a chooser and a block.
After arXiv:2502.13189; the runs of rows are ours.

A bucket is a block of keys of one text and group, and holds the pairs that name it, R rows each. The rows of a bucket
are cut into tiles, so that a tile is full however few heads choose together; what a row reads of one block is written
apart with its log-sum-exp, and what it read of all of them is merged.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import fused_blocks
from kernels.configurations import Configuration
from kernels.fused_blocks import (
    LOG2_E,
    by_bucket,
    collect_runs,
    cut_runs,
    known,
    merge_parts,
    narrowed,
    rows_of,
    settle,
    slopes,
    soften,
    turned_slopes,
)
from kernels.launch import configure, dot_precision, launch, padded

OPERATOR = "routed_attention"


@triton.jit(do_not_specialize=["T", "M", "first", "block", "texts", "buckets", "pairs"])
def _bucket(
    blocks,
    bucket,
    T,
    M,
    first,
    block,
    texts,
    buckets,
    pairs,
    C: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = pair < pairs
    number = tl.load(blocks + pair, mask=live, other=-1).to(tl.int32)
    x = pair // M
    here = (first + x // C % T) // block
    own = (number * texts + x // (C * T)) * G + x % C // (C // G)
    own = tl.where((number >= 0) & (number <= here), own, buckets)
    tl.store(bucket + pair, own, mask=live)


@triton.jit
def _run(order, offsets, owners, starts, run, buckets, R: tl.constexpr, RUN: tl.constexpr):
    """The bucket of a run, its pairs, and its rows from and up to; no rows where there is no such run."""
    bucket = tl.load(owners + run)
    some = bucket < buckets
    entries = tl.load(offsets + bucket, mask=some, other=0)
    count = tl.load(offsets + bucket + 1, mask=some, other=0) - entries
    begin = ((run - tl.load(starts + bucket, mask=some, other=0)) * RUN).to(tl.int32)
    end = tl.minimum(begin + RUN, (count * R).to(tl.int32))
    return bucket.to(tl.int32), order + entries, begin, tl.where(some, end, begin)


@triton.jit
def _place(pairs, row, end, T, M, C: tl.constexpr, R: tl.constexpr):
    """Of the rows of a bucket: where their part belongs, the query, the head, and which rows there are."""
    live = row < end
    pair = tl.load(pairs + row // R, mask=live, other=0).to(tl.int32)
    x = pair // M
    return pair.to(tl.int64) * R + row % R, (x // C % T).to(tl.int64), x % C * R + row % R, live


@triton.jit(do_not_specialize=["T", "S", "M", "first", "block", "texts", "buckets"])
def _forward(
    q,
    k,
    v,
    output,
    sums,
    order,
    offsets,
    owners,
    starts,
    T,
    S,
    M,
    first,
    block,
    texts,
    buckets,
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
    C: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    bucket, pairs, begin, end = _run(order, offsets, owners, starts, run, buckets, R, RUN)
    g, b, token = bucket % G, (bucket // G % texts).to(tl.int64), bucket // (G * texts) * block
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    for row in range(begin, end, BLOCK_T):
        part, t, h, live = _place(pairs, row + tl.arange(0, BLOCK_T), end, T, M, C, R)
        ask = b * q_b + (t * q_t + h * q_h)[:, None] + keys[None, :]
        query = tl.load(q + ask, mask=live[:, None] & (keys < K)[None, :], other=0.0)
        position = (first + t).to(tl.int32)
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        out = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for start in range(0, block, BLOCK_S):
            own = start + tl.arange(0, BLOCK_S)
            slot = token + own
            there = (own < block) & (slot < S)
            far = slot.to(tl.int64)[:, None]
            own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
            key = tl.load(k + b * k_b + far * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
            value = tl.load(v + b * v_b + far * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
            seen = there[None, :] & (slot[None, :] <= position[:, None])
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
            weights, left, top, total = soften(scores, seen, top, total)
            out = out * left[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        share, total = settle(top, total)
        out = (out * share[:, None]).to(output.dtype.element_ty)
        at = part[:, None] * V + values[None, :]
        tl.store(output + at, out, mask=live[:, None] & (values < V)[None, :])
        tl.store(sums + part, total, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _lost(
    output, sums, d_output, d_sums, lost, rows, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr
):
    row, values = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_V)
    live = row < rows
    at, mask = row[:, None] * V + values[None, :], live[:, None] & (values < V)[None, :]
    out = tl.load(output + at, mask=mask, other=0.0).to(tl.float32)
    gone = tl.sum(out * tl.load(d_output + at, mask=mask, other=0.0).to(tl.float32), 1)
    if d_sums is not None:
        # A sum of nothing may be handed any gradient.
        some = tl.load(sums + row, mask=live, other=float("-inf")) > float("-inf")
        gone -= tl.load(d_sums + row, mask=some, other=0.0)
    tl.store(lost + row, gone, mask=live)


@triton.jit(do_not_specialize=["T", "S", "M", "first", "block", "texts", "buckets"])
def _backward_queries(
    q,
    k,
    v,
    sums,
    d_output,
    lost,
    part_q,
    order,
    offsets,
    owners,
    starts,
    T,
    S,
    M,
    first,
    block,
    texts,
    buckets,
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
    C: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    bucket, pairs, begin, end = _run(order, offsets, owners, starts, run, buckets, R, RUN)
    g, b, token = bucket % G, (bucket // G % texts).to(tl.int64), bucket // (G * texts) * block
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    for row in range(begin, end, BLOCK_T):
        part, t, h, live = _place(pairs, row + tl.arange(0, BLOCK_T), end, T, M, C, R)
        own_q = live[:, None] & (keys < K)[None, :]
        query = tl.load(q + b * q_b + (t * q_t + h * q_h)[:, None] + keys[None, :], mask=own_q, other=0.0)
        position = (first + t).to(tl.int32)
        at = (b * T + t) * (C * R) + h
        own_out = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + at[:, None] * V + values[None, :], mask=own_out, other=0.0)
        total, gone = known(sums, at, live), tl.load(lost + at, mask=live, other=0.0)
        d_query = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for start in range(0, block, BLOCK_S):
            own = start + tl.arange(0, BLOCK_S)
            slot = token + own
            there = (own < block) & (slot < S)
            far = slot.to(tl.int64)[:, None]
            own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
            key = tl.load(k + b * k_b + far * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
            value = tl.load(v + b * v_b + far * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
            seen = there[None, :] & (slot[None, :] <= position[:, None])
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
            d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
            _, slope = slopes(scores, seen, total, d_weights, gone)
            d_query += tl.dot(slope.to(key.dtype), key, input_precision=PRECISION)
        tl.store(part_q + part[:, None] * K + keys[None, :], d_query, mask=own_q)


@triton.jit(do_not_specialize=["rows", "inner", "parts"])
def _add(
    part_q,
    part_sums,
    d_q,
    rows,
    inner,
    parts,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, keys = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    live = row < rows
    first = (row // inner).to(tl.int64) * inner * parts + row % inner
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for part in range(0, parts):
        at = first + part * inner
        # Of a block that nobody was sent to there is no part.
        some = tl.load(part_sums + at, mask=live, other=float("-inf")) > float("-inf")
        mask = some[:, None] & (keys < K)[None, :]
        total += tl.load(part_q + at[:, None] * K + keys[None, :], mask=mask, other=0.0)
    mask = live[:, None] & (keys < K)[None, :]
    at_q = row.to(tl.int64)[:, None] * K + keys[None, :]
    tl.store(d_q + at_q, (total * scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "M", "first", "block", "texts", "buckets"])
def _backward_keys(
    q,
    k,
    v,
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
    M,
    first,
    block,
    texts,
    buckets,
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
    C: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(block, BLOCK_S)
    tile, run = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    bucket, pairs, begin, end = _run(order, offsets, owners, starts, run, buckets, R, RUN)
    if bucket == buckets:
        return
    g, b, token = bucket % G, (bucket // G % texts).to(tl.int64), bucket // (G * texts) * block
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    own = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    slot = token + own
    there = (own < block) & (slot < S)
    far = slot.to(tl.int64)[:, None]
    own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
    key = tl.load(k + b * k_b + far * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
    value = tl.load(v + b * v_b + far * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
    d_key = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    d_value = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    for row in range(begin, end, BLOCK_T):
        _, t, h, live = _place(pairs, row + tl.arange(0, BLOCK_T), end, T, M, C, R)
        ask = b * q_b + (t * q_t + h * q_h)[:, None] + keys[None, :]
        query = tl.load(q + ask, mask=live[:, None] & (keys < K)[None, :], other=0.0)
        position = (first + t).to(tl.int32)
        at = (b * T + t) * (C * R) + h
        mask = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + at[:, None] * V + values[None, :], mask=mask, other=0.0)
        total, gone = known(sums, at, live), tl.load(lost + at, mask=live, other=0.0)
        seen = there[:, None] & live[None, :] & (slot[:, None] <= position[None, :])
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2_E)
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        weights, slope = turned_slopes(scores, seen, total, d_weights, gone)
        d_value += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_key += tl.dot(slope.to(query.dtype), query, input_precision=PRECISION)
    row = (run * block + own)[:, None]
    tl.store(part_k + row * K + keys[None, :], d_key * scale, mask=own_k)
    tl.store(part_v + row * V + values[None, :], d_value, mask=own_v)


class _Lists(NamedTuple):
    """The pairs by bucket, and the runs of their rows."""

    order: Tensor
    offsets: Tensor
    owners: Tensor
    starts: Tensor


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = q.shape
        value, (choosers, named) = v.shape[3], blocks.shape[2:]
        shared = heads // choosers
        row = configure(OPERATOR, "forward", (key, value), v)
        lists = _lists(k, blocks, block, shared, row.blocks["RUN"])
        parts = torch.empty(blocks.numel() * shared, value, dtype=v.dtype, device=v.device)
        part_sums = torch.full((len(parts),), -torch.inf, device=v.device)
        row = narrowed(row, BLOCK_S=padded(block))
        _walk(_forward, (q, k, v, parts, part_sums), lists, blocks, block, scale, row)
        output, sums = merge_parts(OPERATOR, parts, part_sums, v, (batch, time, heads), shared, named)
        ctx.save_for_backward(q, k, v, blocks, output, sums, part_sums, *lists)
        ctx.block, ctx.scale, ctx.run = block, scale, row.blocks["RUN"]
        return output, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, blocks, output, sums, part_sums, *turned = ctx.saved_tensors
        lists = _Lists(*turned)
        block, scale, run = ctx.block, ctx.scale, ctx.run
        d_output, d_sums = grads
        d_output = torch.zeros_like(output) if d_output is None else d_output.contiguous()
        d_sums = None if d_sums is None else d_sums.contiguous()
        lost = _weigh(output, sums, d_output, d_sums)
        widths = (k.shape[3], v.shape[3])
        shared = (sums, d_output, lost)

        row = configure(OPERATOR, "backward_queries", widths, v)
        row = narrowed(row, BLOCK_S=padded(block))
        part_q = torch.empty(len(part_sums), widths[0], dtype=torch.float32, device=v.device)
        _walk(_backward_queries, (q, k, v, *shared, part_q), lists, blocks, block, scale, row, run)
        d_q = _sum(part_q, part_sums, q, blocks, scale)

        row = configure(OPERATOR, "backward_keys", widths, v)
        row = narrowed(row, BLOCK_S=padded(block))
        part_k, part_v = (
            torch.empty(len(lists.owners), block, width, dtype=torch.float32, device=v.device)
            for width in widths
        )
        tiles = triton.cdiv(block, row.blocks["BLOCK_S"])
        arguments = (q, k, v, *shared, part_k, part_v)
        _walk(_backward_keys, arguments, lists, blocks, block, scale, row, run, tiles)
        batch, groups = len(k), k.shape[2]
        strides = (groups, 1, 0, batch * groups, 0, 0, 1)
        d_k, d_v = collect_runs(OPERATOR, (part_k, part_v), lists.starts, (k, v), block, strides, 1)
        return d_q, d_k, d_v, None, None, None


def _buckets(k: Tensor, block: int) -> int:
    """How many blocks of keys there are in all texts and groups."""
    return int(triton.cdiv(k.shape[1], block)) * k.shape[0] * k.shape[2]


def _lists(k: Tensor, blocks: Tensor, block: int, shared: int, run: int) -> _Lists:
    """The pairs of a chooser and a block by block; those without a block, or with one ahead, come last."""
    batch, time, choosers, named = blocks.shape
    buckets = _buckets(k, block)
    row = configure(OPERATOR, "bucket", (1, 1), k)
    bucket = torch.empty(blocks.numel(), dtype=torch.int32, device=k.device)
    first = k.shape[1] - time
    launch(
        OPERATOR,
        _bucket,
        (triton.cdiv(blocks.numel(), row.blocks["ROWS"]),),
        (blocks, bucket, time, named, first, block, batch, buckets, blocks.numel()),
        {"C": choosers, "G": k.shape[2]},
        row,
        like=k,
    )
    order, offsets = by_bucket(bucket, buckets)
    return _Lists(order, offsets, *cut_runs(offsets, shared, run, blocks.numel()))


def _walk(
    function: Any,
    tensors: tuple[Tensor, ...],
    lists: _Lists,
    blocks: Tensor,
    block: int,
    scale: float,
    row: Configuration,
    run: int | None = None,
    tiles: int = 1,
) -> None:
    """A kernel whose programs each take a run of rows, or one for each tile of the run's block of keys."""
    q, k, v = tensors[:3]
    batch, time, heads, key = q.shape
    keys, groups, value = v.shape[1:]
    choosers, named = blocks.shape[2:]
    constants = {
        "C": choosers,
        "G": groups,
        "R": heads // choosers,
        "K": key,
        "V": value,
        "BLOCK_K": padded(key),
        "BLOCK_V": padded(value),
        "PRECISION": dot_precision(v.dtype),
    }
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (time, keys, named, keys - time, block, batch, _buckets(k, block))
    launch(
        OPERATOR,
        function,
        (len(lists.owners) * tiles,),
        (*tensors, *lists, *sizes, scale, *strides),
        constants if run is None else {**constants, "RUN": run},
        row,
        like=v,
    )


def _weigh(output: Tensor, sums: Tensor, d_output: Tensor, d_sums: Tensor | None) -> Tensor:
    """What the gradients of all weights of a row have in common, in the shape of `sums`."""
    value, lost = output.shape[3], torch.empty_like(sums)
    row = configure(OPERATOR, "lost", (value, value), output)
    launch(
        OPERATOR,
        _lost,
        (triton.cdiv(sums.numel(), row.blocks["ROWS"]),),
        (output, sums, d_output, d_sums, lost, sums.numel()),
        {"V": value, "BLOCK_V": padded(value)},
        row,
        like=output,
    )
    return lost


def _sum(part_q: Tensor, part_sums: Tensor, q: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """The gradient of the queries from those by the blocks that they named."""
    batch, time, heads, key = q.shape
    rows, (choosers, named) = batch * time * heads, blocks.shape[2:]
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    row = configure(OPERATOR, "add", (key, key), q)
    launch(
        OPERATOR,
        _add,
        (triton.cdiv(rows, row.blocks["ROWS"]),),
        (part_q, part_sums, d_q, rows, heads // choosers, named, scale),
        {"K": key, "BLOCK_K": padded(key)},
        row,
        like=q,
    )
    return d_q


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """All queries; shapes as in `ops.routed_attention`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = (rows_of(x.to(v.dtype)) for x in (q, k, v))
        result: tuple[Tensor, Tensor] = _Attend.apply(q, k, v, blocks.contiguous(), block, float(scale))
    return result


def step(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One query over the tokens before `length` in its blocks; as in `ops.routed_attention_step`. Carries no gradient."""
    return fused_blocks.step(OPERATOR, q, k, v, blocks, block, length, scale)

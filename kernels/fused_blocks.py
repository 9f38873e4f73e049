"""What Triton kernels for attention over chosen keys share: softmax by tiles, its slopes, lists turned round, a step.

Letters: B batch, S keys, H heads, G groups that share k and v, C lists, each for R = H/C heads, M numbers in a list,
K key, V value, E entries of all lists, N buckets: the blocks of keys of every text and group.  The softmax by tiles
after FlashAttention-2, arXiv:2307.08691; the decode step split over keys after Flash-Decoding.

What the queries that read a block of keys add to its gradients is cut into runs of rows, summed run by run and
written apart, and the runs of a block are added up in their order: nothing is added where another program may write.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kernels.configurations import Configuration
from kernels.launch import configure, dot_precision, launch, padded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soften(scores, seen, top, total):
    """Scores [T, S] to the base of 2 behind rows with this maximum and sum: weights, what is left of the old, new both."""
    scores = tl.where(seen, scores, float("-inf"))
    high = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(scores - base[:, None])
    left = tl.exp2(top - base)
    return weights, left, high, total * left + tl.sum(weights, 1)


@triton.jit
def settle(top, total):
    """What the sum of values is to be multiplied by, and the log-sum-exp: 0 and -inf for rows that saw nothing."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return tl.where(some, 1.0 / total, 0.0), tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf"))


@triton.jit
def known(sums, at, mask):
    """Log-sum-exps to the base of 2; 0 for rows that saw nothing."""
    total = tl.load(sums + at, mask=mask, other=0.0)
    return tl.where(total == float("-inf"), 0.0, total * LOG2_E)


@triton.jit
def slopes(scores, seen, total, d_weights, lost):
    """Weights again from scores [T, S] and sums to the base of 2, and the gradient of the scores before their scale."""
    weights = tl.exp2(tl.where(seen, scores - total[:, None], float("-inf")))
    return weights, weights * (d_weights - lost[:, None])


@triton.jit
def turned_slopes(scores, seen, total, d_weights, lost):
    """The same with rows for keys and columns for queries, [S, T]."""
    weights = tl.exp2(tl.where(seen, scores - total[None, :], float("-inf")))
    return weights, weights * (d_weights - lost[None, :])


@triton.jit
def used_length(lists, M):
    """How long a list [M] is without the -1 at its end."""
    used = 0
    for start in range(0, M, 64):
        entry = start + tl.arange(0, 64)
        number = tl.load(lists + entry, mask=entry < M, other=-1)
        used = tl.maximum(used, tl.max(tl.where(number >= 0, entry + 1, 0), 0))
    return used


@triton.jit
def listed_slots(lists, column, M, block, bound):
    """The slots of the columns of a list [M] that names blocks, and which of them there are."""
    entry = column // block
    number = tl.load(lists + entry, mask=entry < M, other=-1).to(tl.int32)
    slot = number * block + column % block
    return slot, (number >= 0) & (slot < bound)


@triton.jit(do_not_specialize=["M", "length", "block", "splits", "rows"])
def _step(
    q,
    k,
    v,
    lists,
    output,
    sums,
    M,
    length,
    block,
    splits,
    rows,
    scale,
    q_b,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    list_b,
    list_c,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // C
    TILES: tl.constexpr = (R + BLOCK_T - 1) // BLOCK_T
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, c = rest % TILES, rest // TILES % C
    b, g = (rest // (TILES * C)).to(tl.int64), c // (C // G)
    own = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live, h = own < R, c * R + own
    keys, values, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    at_q = b * q_b + h[:, None] * q_h + keys[None, :]
    query = tl.load(q + at_q, mask=live[:, None] & (keys < K)[None, :], other=0.0).to(k.dtype.element_ty)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, M * block), BLOCK_S):
        slot, there = listed_slots(lists + b * list_b + c * list_c, start + columns, M, block, length)
        at = slot.to(tl.int64)[:, None]
        own_k, own_v = there[:, None] & (keys < K)[None, :], there[:, None] & (values < V)[None, :]
        key = tl.load(k + b * k_b + at * k_s + g * k_g + keys[None, :], mask=own_k, other=0.0)
        value = tl.load(v + b * v_b + at * v_s + g * v_g + values[None, :], mask=own_v, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        weights, left, top, total = soften(scores, there[None, :], top, total)
        out = out * left[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    share, total = settle(top, total)
    row = split.to(tl.int64) * rows + b * H + h
    at_v = row[:, None] * V + values[None, :]
    out = (out * share[:, None]).to(output.dtype.element_ty)
    tl.store(output + at_v, out, mask=live[:, None] & (values < V)[None, :])
    tl.store(sums + row, total, mask=live)


@triton.jit(do_not_specialize=["rows", "inner", "parts"])
def _merge(
    part_outputs,
    part_sums,
    output,
    sums,
    rows,
    inner,
    parts,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, values = row < rows, tl.arange(0, BLOCK_V)
    first = (row // inner).to(tl.int64) * inner * parts + row % inner
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for part in range(0, parts):
        at = first + part * inner
        own = tl.load(part_sums + at, mask=live, other=float("-inf")) * LOG2_E
        some = own > float("-inf")
        high = tl.maximum(top, own)
        base = tl.where(high == float("-inf"), 0.0, high)
        left, weight = tl.exp2(top - base), tl.exp2(own - base)
        mask = some[:, None] & (values < V)[None, :]
        piece = tl.load(part_outputs + at[:, None] * V + values[None, :], mask=mask, other=0.0).to(tl.float32)
        out = out * left[:, None] + piece * weight[:, None]
        top, total = high, total * left + weight
    share, total = settle(top, total)
    at_v = row.to(tl.int64)[:, None] * V + values[None, :]
    out = (out * share[:, None]).to(output.dtype.element_ty)
    tl.store(output + at_v, out, mask=live[:, None] & (values < V)[None, :])
    tl.store(sums + row, total, mask=live)


@triton.jit(do_not_specialize=["S", "block", "by_b", "by_g", "by_i", "by_j", "run_b", "run_g", "runs"])
def _collect(
    part_k,
    part_v,
    starts,
    d_k,
    d_v,
    S,
    block,
    by_b,
    by_g,
    by_i,
    by_j,
    run_b,
    run_g,
    runs,
    LISTS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(block, ROWS)
    blocks = tl.cdiv(S, block)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    j, g, b = rest % blocks, rest // blocks % G, rest // (blocks * G)
    own = tile * ROWS + tl.arange(0, ROWS)
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    live = (own < block) & (j * block + own < S)
    own_k, own_v = live[:, None] & (keys < K)[None, :], live[:, None] & (values < V)[None, :]
    sum_k = tl.zeros([ROWS, BLOCK_K], tl.float32)
    sum_v = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for i in range(0, LISTS):
        bucket = b * by_b + g * by_g + i * by_i + j * by_j
        begin = tl.load(starts + bucket)
        for run in range(0, (tl.load(starts + bucket + 1) - begin).to(tl.int32)):
            row = (((begin + run) * runs + b * run_b + g * run_g) * block + own)[:, None]
            sum_k += tl.load(part_k + row * K + keys[None, :], mask=own_k, other=0.0)
            sum_v += tl.load(part_v + row * V + values[None, :], mask=own_v, other=0.0)
    row = ((b.to(tl.int64) * S + j * block + own) * G + g)[:, None]
    tl.store(d_k + row * K + keys[None, :], sum_k.to(d_k.dtype.element_ty), mask=own_k)
    tl.store(d_v + row * V + values[None, :], sum_v.to(d_v.dtype.element_ty), mask=own_v)


def narrowed(row: Configuration, **most: int) -> Configuration:
    """The row with blocks no larger than what they have to hold, and no more warps than a block so cut keeps busy."""
    blocks = {name: min(size, most.get(name, size)) for name, size in row.blocks.items()}
    cut = blocks != row.blocks
    return replace(row, blocks=blocks, num_warps=min(row.num_warps, 4) if cut else row.num_warps)


def rows_of(x: Tensor) -> Tensor:
    """x whose last axis lies in one piece; the others may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_bucket(bucket: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Entries [E] in the order of their buckets, stably, and where each bucket's begin [N + 1]; asks the device nothing.

    Entries in bucket number `buckets` belong nowhere, and stand behind the last.
    """
    ordered = bucket.sort(stable=True)
    every = torch.arange(buckets + 1, dtype=bucket.dtype, device=bucket.device)
    return ordered.indices, torch.searchsorted(ordered.values, every)


def cut_runs(offsets: Tensor, width: int, size: int, entries: int) -> tuple[Tensor, Tensor]:
    """Buckets of entries with `width` rows each in runs of `size` rows: each run's bucket, each bucket's first run [N + 1].

    There are as many runs as there may be at most; those that are too many have the bucket number N.
    """
    counts = (offsets.diff() * width + (size - 1)) // size
    starts = pad(counts.cumsum(0), (1, 0))
    most = torch.arange(entries * width // size + len(offsets) - 1, device=offsets.device)
    return torch.searchsorted(starts[1:], most, right=True), starts


def collect_runs(
    operator: str,
    parts: tuple[Tensor, Tensor],
    starts: Tensor,
    like: tuple[Tensor, Tensor],
    block: int,
    strides: Sequence[int],
    lists: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, in the shapes and types of `like`, summed over the runs of their blocks.

    parts [runs, *, block, K or V] in float32. `strides` tell how the number of a bucket grows with text, group, list
    and block, how the place in * grows with text and group, and how large * is; `lists` are those of one group.
    """
    k, v = like
    batch, keys, groups, key = k.shape
    value = v.shape[3]
    row = configure(operator, "collect", (key, value), v)
    row = narrowed(row, ROWS=padded(block))
    d_k, d_v = (
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty_like(v, memory_format=torch.contiguous_format),
    )
    launch(
        operator,
        _collect,
        (triton.cdiv(block, row.blocks["ROWS"]) * triton.cdiv(keys, block) * groups * batch,),
        (*parts, starts, d_k, d_v, keys, block, *strides),
        {"LISTS": lists, "G": groups, "K": key, "V": value, "BLOCK_K": padded(key), "BLOCK_V": padded(value)},
        row,
        like=v,
    )
    return d_k, d_v


def merge_parts(
    operator: str, outputs: Tensor, sums: Tensor, like: Tensor, shape: Sequence[int], inner: int, parts: int
) -> tuple[Tensor, Tensor]:
    """What parts that saw disjoint keys saw together: outputs [*shape, V] in the type of `like`, log-sum-exps [*shape].

    Part p of row r stands at (r // inner · parts + p) · inner + r % inner; one that saw nothing has the sum -inf, and
    its output is not read.
    """
    value, rows = like.shape[-1], math.prod(shape)
    row = configure(operator, "merge", (value, value), like)
    output = torch.empty(*shape, value, dtype=like.dtype, device=like.device)
    total = torch.empty(shape, dtype=torch.float32, device=like.device)
    launch(
        operator,
        _merge,
        (triton.cdiv(rows, row.blocks["ROWS"]),),
        (outputs, sums, output, total, rows, inner, parts),
        {"V": value, "BLOCK_V": padded(value)},
        row,
        like=like,
    )
    return output, total


def step(
    operator: str, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, block: int, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One query [B, H, K] over the slots before `length` in the blocks that its list names, [B, C, M]; -1 for none.

    k and v may be strided and of types of their own: a cache is not copied.
    """
    batch, heads, key = q.shape
    groups, value = v.shape[2:]
    choosers, named = lists.shape[1:]
    q, k, v, lists = (rows_of(x) for x in (q, k, v, lists))
    row = configure(operator, "step", (key, value), v)
    row = narrowed(row, BLOCK_T=padded(heads // choosers))
    splits = triton.cdiv(named * block, row.blocks["SPLIT"])
    kept = torch.float32 if splits > 1 else v.dtype
    output = torch.empty(splits, batch, heads, value, dtype=kept, device=v.device)
    sums = torch.empty(splits, batch, heads, dtype=torch.float32, device=v.device)
    tiles = triton.cdiv(heads // choosers, row.blocks["BLOCK_T"])
    strides = (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *lists.stride()[:2])
    sizes = (named, length, block, splits, batch * heads)
    launch(
        operator,
        _step,
        (splits * tiles * choosers * batch,),
        (q, k, v, lists, output, sums, *sizes, scale, *strides),
        {
            "H": heads,
            "G": groups,
            "C": choosers,
            "K": key,
            "V": value,
            "BLOCK_K": padded(key),
            "BLOCK_V": padded(value),
            "PRECISION": dot_precision(torch.float32 if torch.float32 in (k.dtype, v.dtype) else v.dtype),
        },
        row,
        like=v,
    )
    if splits == 1:
        return output[0], sums[0]
    return merge_parts(operator, output, sums, v, (batch, heads), batch * heads, splits)

"""Attention over keys by name in blocks of queries, or among all keys where these are few.

No tensor holds more than a few numbers for each name of a query, or a block of queries with all keys.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, R = H/G, N named keys, K key, V value,
c queries of a block, P = B·c·H heads' queries of a block.  After Memorizing Transformers, arXiv:2203.08913.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.backend import working_dtype

BLOCK_ELEMENTS = 2**19
"""Elements of a block's largest tensor: it must stay in a core's cache."""

MOST_QUERIES = 128
"""Queries that are compared at once: with more, too many would meet keys that are to come."""

LEAST_FOLD = 4
"""Rows of scores that are not this many times as long as their columns would be are not folded."""

MANY_QUERIES, FEW_KEYS = 16, 8
"""For so many queries all keys are compared if they are at most so many times those that are named: that is faster."""

WIDTH_STEP = 16
"""Rows of scores are a multiple of this, so that they can be folded; what is added is hidden."""


def _blocks(time: int, elements: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of blocks of queries, each of which needs so many elements."""
    size = max(1, min(time, BLOCK_ELEMENTS // elements))
    for start in range(0, time, size):
        yield start, min(time, start + size)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and places of the `count` largest of each row of scores [*, S], the largest first.

    Long rows are folded: the largest lie in the columns with the largest maxima, so that few numbers are put in order.
    """
    width = scores.shape[-1]
    fold = 2 ** int(math.log2(math.sqrt(width / count)))
    if fold < LEAST_FOLD or width % fold:
        best = scores.topk(count, dim=-1)
        return best.values, best.indices
    columns = width // fold
    nearest = scores.unflatten(-1, (fold, columns)).amax(-2).topk(count, dim=-1).indices
    steps = torch.arange(0, width, columns, device=scores.device)
    candidates = (nearest.unsqueeze(-2) + steps[:, None]).flatten(-2)
    best = scores.gather(-1, candidates).topk(count, dim=-1)
    return best.values, candidates.gather(-1, best.indices)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places and scores of the `count` largest of each row of scores [*, S], the largest and the later of equal ones first."""
    values, places = _largest(scores, min(count + 1, scores.shape[-1]))
    # No top-k promises which of equal scores it takes, nor in which order.
    tied = ((values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)).any(-1)
    if bool(tied.any()):
        ordered = scores[tied].flip(-1).sort(dim=-1, descending=True, stable=True)
        places[tied] = scores.shape[-1] - 1 - ordered.indices[:, : places.shape[-1]]
        values[tied] = ordered.values[:, : places.shape[-1]]
    return places[..., :count], values[..., :count]


@torch.no_grad()
def nearest_keys(q: Tensor, k: Tensor, visible: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """All queries, block by block; shapes as in `ops.nearest_keys`."""
    dtype = working_dtype(q, k)
    batch, time, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    count = min(keep, keys)
    places = torch.full((batch, time, heads, count), -1, dtype=torch.int64, device=q.device)
    found = torch.full((batch, time, heads, count), -torch.inf, dtype=dtype, device=q.device)
    ends = visible.tolist()
    with torch.autocast(q.device.type, enabled=False):
        # Laid out by group once, or every block's product would do it again.
        table = k[:, : max(ends)].to(dtype).transpose(1, 2)
        table = pad(table, (0, 0, 0, -table.shape[2] % WIDTH_STEP)).contiguous()
        shared = heads // groups
        # Few groups at a time, so that many queries share a product.
        for start, end in _blocks(time, max(batch * shared * keys, BLOCK_ELEMENTS // MOST_QUERIES)):
            least, most = min(ends[start:end]), -(-max(ends[start:end]) // WIDTH_STEP) * WIDTH_STEP
            if most == 0:
                continue
            behind = visible[start:end, None]
            hidden = torch.arange(least, most, device=q.device) >= behind
            together = max(1, BLOCK_ELEMENTS // (batch * shared * keys * (end - start)))
            for group in range(0, groups, together):
                heads_of = slice(group * shared, (group + together) * shared)
                rows = q[:, start:end, heads_of].to(dtype).unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4)
                near = table[:, group : group + together, :most]
                scores = (rows.flatten(2, 3) @ near.mT).unflatten(2, rows.shape[2:4])
                scores[..., least:].masked_fill_(hidden, -torch.inf)
                own, values = (x.flatten(1, 2).transpose(1, 2) for x in _best(scores, min(count, most)))
                # Of a row that sees fewer keys than are kept the rest is hidden.
                unseen = own >= behind.unsqueeze(-1)
                at = (slice(None), slice(start, end), heads_of, slice(0, own.shape[-1]))
                places[at] = own.masked_fill(unseen, -1)
                found[at] = values.masked_fill(unseen, -torch.inf)
    return places, found


def _rows(table: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of [S', D] at places [P, N]: [P, N, D]; they are widened once they are few."""
    return table.index_select(0, places.flatten()).to(dtype).view(*places.shape, -1)


class _Attend(torch.autograd.Function):
    """The rows that were gathered are not kept for the way back: there are N of them for every head of every query."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K] in the working type; k [S', K] and v [S', V]; places, hidden and bias [B, T, H, N]."""
        output, sums = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
        for own in _parts(q, k, v, places):
            rows = _rows(k, places[own].flatten(0, 2), q.dtype)
            weights, scores = _weigh(q[own], rows, hidden[own], None if bias is None else bias[own], scale)
            read = weights @ _rows(v, places[own].flatten(0, 2), q.dtype)
            output[own], sums[own] = read.view_as(output[own]), scores.logsumexp(-1).view_as(sums[own])
        ctx.save_for_backward(q, k, v, places, hidden, output, sums, *([] if bias is None else [bias]))
        ctx.scale = scale
        return output, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, places, hidden, output, sums, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(table, dtype=q.dtype) for table in (k, v))
        lost = (to_output * output).sum(-1).sub_(to_sums.masked_fill(sums == -torch.inf, 0.0))
        for own in _parts(q, k, v, places):
            named = places[own].flatten(0, 2)
            rows = _rows(k, named, q.dtype)
            weights, _ = _weigh(q[own], rows, hidden[own], None if bias is None else bias[own], ctx.scale)
            above = to_output[own].flatten(0, 2).unsqueeze(1)
            slope = above @ _rows(v, named, q.dtype).mT
            slope = slope.sub_(lost[own].flatten()[:, None, None]).mul_(weights).mul_(ctx.scale)
            grad_q[own] = (slope @ rows).view_as(grad_q[own])
            query = q[own].flatten(0, 2).unsqueeze(1)
            grad_k.index_add_(0, named.flatten(), (slope.mT * query).flatten(0, 1))
            grad_v.index_add_(0, named.flatten(), (weights.mT * above).flatten(0, 1))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _parts(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, of which the gathered rows fit."""
    row = max(k.shape[-1], v.shape[-1])
    for start, end in _blocks(q.shape[1], q.shape[0] * q.shape[2] * places.shape[-1] * row):
        yield slice(None), slice(start, end)


def _weigh(
    q: Tensor, rows: Tensor, hidden: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights and scores [P, 1, N] of queries [B, c, H, K] over rows [P, N, K]; 0 for what is hidden, also where all is."""
    scores = torch.bmm((q * scale).flatten(0, 2).unsqueeze(1), rows.mT)
    if bias is not None:
        scores += bias.to(scores.dtype).flatten(0, 2).unsqueeze(1)
    unseen = hidden.flatten(0, 2).unsqueeze(1)
    scores = scores.masked_fill_(unseen, -torch.inf)
    return scores.softmax(-1).masked_fill_(unseen, 0.0), scores


def _among_all(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries over all keys, with what they do not name hidden; all in one type."""
    batch, time, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    # A column more than there are keys, for names that are none.
    added = q.new_full((batch, time, heads, keys + 1), -torch.inf)
    named = places.masked_fill(places < 0, keys)
    added.scatter_(-1, named, 0.0 if bias is None else bias.to(q.dtype))

    def by_group(x: Tensor) -> Tensor:
        """[B, T, H, *] to [B, G, R·T, *]."""
        grouped: Tensor = x.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)
        return grouped

    def by_head(x: Tensor) -> Tensor:
        """[B, G, R·T, *] to [B, T, H, *]."""
        heads_apart: Tensor = x.unflatten(2, (-1, time)).flatten(1, 2).transpose(1, 2)
        return heads_apart

    scores = by_group(q * scale) @ k.permute(0, 2, 3, 1) + by_group(added[..., :-1])
    # The shift cancels, so that no gradient need pass through it.
    high = scores.detach().amax(-1, keepdim=True)
    high = high.masked_fill(high == -torch.inf, 0.0)
    weights = (scores - high).exp()
    summed = weights.sum(-1, keepdim=True)
    none = summed == 0
    # One stands for a denominator of nought, so that neither the quotient nor its gradient is NaN.
    safe = summed.masked_fill(none, 1.0)
    total = (high + safe.log()).masked_fill(none, -torch.inf)
    return by_head(weights @ v.transpose(1, 2) / safe), by_head(total).squeeze(-1)


def retrieved_attention(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """All queries, block by block; shapes as in `ops.retrieved_attention`."""
    dtype, device = working_dtype(q, k, v), q.device
    batch, keys, groups = k.shape[:3]
    heads = q.shape[2]
    with torch.autocast(device.type, enabled=False):
        if q.shape[1] >= MANY_QUERIES and keys <= FEW_KEYS * places.shape[-1]:
            read, sums = _among_all(q.to(dtype), k.to(dtype), v.to(dtype), places, bias, scale)
            return read.to(v.dtype), sums
        hidden, last = places < 0, places.amax(-1, keepdim=True)
        # What is not there is read from a key that is, and its weight is nought.
        spare = last.clamp(min=0)
        group = torch.arange(heads, device=device) * groups // heads
        first = torch.arange(batch, device=device)[:, None, None, None] * keys
        rows = (torch.where(hidden, spare, places) + first) * groups + group[:, None]
        output, sums = _Attend.apply(  # type: ignore[no-untyped-call]
            q.to(dtype), k.flatten(0, 2), v.flatten(0, 2), rows, hidden, bias, scale
        )
        return output.masked_fill(last < 0, 0.0).to(v.dtype), sums

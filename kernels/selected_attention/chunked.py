"""Attention over chosen keys in blocks of queries; no tensor has a row for every pair of query and key.

Letters: B batch, T queries, S keys (S ≥ T), J index heads, I index width, N chosen keys, H heads, K key, V value (V ≤ K),
c queries of a block.  After DeepSeek-V3.2, arXiv:2512.02556.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels.backend import working_dtype

BLOCK_ELEMENTS = 2**19
"""Elements of a block's largest tensor: it must stay in a core's cache."""
DENSE_BLOCK = 64
"""Queries whose scores with all keys a divergence holds at once."""


def _blocks(time: int, elements: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of blocks of queries, each of which needs so many elements."""
    size = max(1, min(time, BLOCK_ELEMENTS // elements))
    for start in range(0, time, size):
        yield start, min(time, start + size)


def _score(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """q [B, c, J, I], k [B, S, I], weights [B, c, J] → [B, c, S]."""
    products = (q.flatten(1, 2) @ k.mT).relu().unflatten(1, q.shape[1:3])
    return torch.matmul(weights.unsqueeze(2), products).squeeze(2)


def _hide(scores: Tensor, first: int) -> Tensor:
    """Scores [B, c, S] with the keys hidden that stand behind their query; the block's first query stands at `first`."""
    key = torch.arange(scores.shape[2], device=scores.device)
    query = torch.arange(first, first + scores.shape[1], device=scores.device)
    return scores.masked_fill(key > query.unsqueeze(1), -torch.inf)


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending places of the `count` largest of each row of scores [B, c, S], the later of equal ones."""
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = scores >= least
    if bool((chosen.sum(-1) > count).any()):
        above, equal = scores > least, scores == least
        recency = equal.flip(-1).cumsum(-1).flip(-1)
        chosen = above | (equal & (recency <= count - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, -1].view(*scores.shape[:2], count)


@torch.no_grad()
def select_keys(q: Tensor, k: Tensor, weights: Tensor, keep: int) -> Tensor:
    """All queries, block by block; shapes as in `ops.select_keys`."""
    dtype = working_dtype(q, k, weights)
    batch, time, heads, _ = q.shape
    keys = k.shape[1]
    count = min(keep, keys)
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        k = k.to(dtype)
        for start, end in _blocks(time, batch * heads * keys):
            first = keys - time + start
            # A block's rows need at least as many places as are kept.
            visible = max(count, keys - time + end)
            scores = _score(q[:, start:end].to(dtype), k[:, :visible], weights[:, start:end].to(dtype))
            # NaN counts as the largest, and whatever is seen stands above what is not.
            scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(dtype).min)
            chosen = _best(_hide(scores, first), count)
            query = torch.arange(first, first + end - start, device=q.device)
            unseen = chosen > query[:, None]
            # Those that are not seen are the last ones; they are put in front.
            parts.append(chosen.masked_fill(unseen, -1).sort(-1).values if bool(unseen.any()) else chosen)
    return torch.cat(parts, dim=1)


def _gather(k: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of k [B, S, K] at chosen [B, c, N], [B c, N, K], and their places in k [B S, K]."""
    offset = torch.arange(0, k.shape[0] * k.shape[1], k.shape[1], device=k.device)
    places = (chosen.clamp(min=0) + offset[:, None, None]).flatten()
    return k.flatten(0, 1).index_select(0, places).view(-1, chosen.shape[2], k.shape[2]), places


def _scores_at(q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    rows, _ = _gather(k, chosen)
    products = (q.flatten(0, 1) @ rows.mT).relu()
    scores = (weights.flatten(0, 1).unsqueeze(1) @ products).view(chosen.shape)
    return scores.masked_fill(chosen < 0, -torch.inf)


def index_scores(q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor:
    """All queries, block by block, made again on the way back; shapes as in `ops.index_scores`."""
    dtype = working_dtype(q, k, weights)
    with torch.autocast(q.device.type, enabled=False):
        q, k, weights = q.to(dtype), k.to(dtype), weights.to(dtype)
        if chosen is None:
            return _hide(_score(q, k, weights), k.shape[1] - q.shape[1])
        parts = []
        for start, end in _blocks(q.shape[1], q.shape[0] * chosen.shape[2] * k.shape[2]):
            own = (q[:, start:end], k, weights[:, start:end], chosen[:, start:end])
            parts.append(checkpoint(_scores_at, *own, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(parts, dim=1)


def index_divergence(
    q: Tensor, k: Tensor, weights: Tensor, queries: Tensor, keys: Tensor, scale: float
) -> Tensor:
    """Block by block, made again on the way back, a mean for each batch entry; shapes as in `ops.index_divergence`."""
    time, parts = q.shape[1], []
    for start in range(0, time, DENSE_BLOCK):
        end = min(time, start + DENSE_BLOCK)
        visible = k.shape[1] - time + end
        own = (q[:, start:end], k[:, :visible], weights[:, start:end])
        attention = (queries[:, start:end].detach(), keys[:, :visible].detach(), scale)
        parts.append(checkpoint(_divergence, *own, *attention, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(parts).sum(0) / time


def _divergence(q: Tensor, k: Tensor, weights: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Σ_t KL(p_t ‖ softmax(I_t)) of a block of queries, the last of which stands at the last key; one for each batch entry."""
    dtype = working_dtype(q, k, weights, queries, keys)
    with torch.autocast(q.device.type, enabled=False):
        scores = index_scores(q.to(dtype), k, weights, None)
        with torch.no_grad():
            shares = torch.einsum("bthk,bshk->bhts", queries.to(dtype), keys.to(dtype)) * scale
            shares = shares.masked_fill(scores.isinf().unsqueeze(1), -torch.inf).softmax(-1).mean(1)
        logs = scores.log_softmax(-1).masked_fill(scores.isinf(), 0)
        return F.kl_div(logs, shares, reduction="none").sum((1, 2))


class _Attend(torch.autograd.Function):
    """The rows that were gathered are not kept for the way back: there are N of them for every query."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, chosen)
        ctx.value, ctx.scale = value, scale
        output, shares = q.new_empty(*q.shape[:3], value), q.new_empty(chosen.shape)
        for start, end in _blocks(q.shape[1], q.shape[0] * chosen.shape[2] * k.shape[2]):
            own = chosen[:, start:end]
            rows, _ = _gather(k, own)
            weights = _weights(q[:, start:end].flatten(0, 1), rows, own, scale)
            output[:, start:end] = (weights @ rows[..., :value]).view(*own.shape[:2], -1, value)
            shares[:, start:end] = weights.mean(1).view(own.shape)
        ctx.mark_non_differentiable(shares)
        return output, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, k, chosen = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k).flatten(0, 1)
        for start, end in _blocks(q.shape[1], q.shape[0] * chosen.shape[2] * k.shape[2]):
            own = chosen[:, start:end]
            rows, places = _gather(k, own)
            query, above = q[:, start:end].flatten(0, 1), grad[:, start:end].flatten(0, 1)
            weights = _weights(query, rows, own, ctx.scale)
            slope = above @ rows[..., : ctx.value].mT
            slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * ctx.scale
            grad_q[:, start:end] = (slope @ rows).view_as(grad_q[:, start:end])
            back = slope.mT @ query
            back[..., : ctx.value] += weights.mT @ above
            grad_k.index_add_(0, places, back.flatten(0, 1))
        return grad_q, grad_k.view_as(k), None, None, None


def _weights(q: Tensor, rows: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """q [B c, H, K] over rows [B c, N, K] → [B c, H, N]; 0 for what is not seen, also where nothing is."""
    hidden = (chosen < 0).flatten(0, 1).unsqueeze(1)
    scores = ((q @ rows.mT) * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).masked_fill(hidden, 0)


def selected_attention(
    q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float
) -> tuple[Tensor, Tensor]:
    """All queries, block by block; shapes as in `ops.selected_attention`."""
    dtype = working_dtype(q, k)
    kept = k.dtype
    if q.shape[1] == 1:
        # Of a cache no more is read, nor turned into another type, than these rows.
        k = k.gather(1, chosen[:, 0, :, None].clamp(min=0).expand(-1, -1, k.shape[2]))
        chosen = torch.arange(chosen.shape[2], device=k.device).where(chosen >= 0, -1)
    with torch.autocast(q.device.type, enabled=False):
        output, shares = _Attend.apply(  # type: ignore[no-untyped-call]
            q.to(dtype).contiguous(), k.to(dtype).contiguous(), chosen, value, scale
        )
        return output.to(kept), shares

"""Attention over keys by name, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, N named keys, K key, V value.
After Memorizing Transformers, arXiv:2203.08913.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def nearest_keys(q: Tensor, k: Tensor, visible: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Sort by score, then by recency, and keep the first; shapes as in `ops.nearest_keys`."""
    dtype = working_dtype(q, k)
    batch, time, heads, _ = q.shape
    count = min(keep, k.shape[1])
    places = torch.full((batch, time, heads, count), -1, dtype=torch.int64, device=q.device)
    scores = torch.full((batch, time, heads, count), -torch.inf, dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(dtype).repeat_interleave(heads // k.shape[2], dim=2)
        for t in range(time):
            end = int(visible[t])
            products = torch.einsum("bhk,bshk->bhs", q[:, t].to(dtype), keys[:, :end])
            # A stable sort of the reversed row leaves later keys in front of earlier ones of the same score.
            best = products.flip(2).sort(dim=2, descending=True, stable=True)
            found = min(count, end)
            places[:, t, :, :found] = end - 1 - best.indices[..., :found]
            scores[:, t, :, :found] = best.values[..., :found]
    return places, scores


def retrieved_attention(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query over its named keys; shapes as in `ops.retrieved_attention`."""
    dtype = working_dtype(q, k, v)
    heads, groups = q.shape[2], k.shape[2]
    at = torch.arange(q.shape[0], device=q.device)[:, None, None]
    group = (torch.arange(heads, device=q.device) * groups // heads)[:, None]
    outputs, sums = [], []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            hidden = places[:, t] < 0
            # What is not there is read from a key that is, and its weight is nought.
            spare = places[:, t].amax(-1, keepdim=True).clamp(min=0)
            named = torch.where(hidden, spare, places[:, t])
            keys, values = k[at, named, group].to(dtype), v[at, named, group].to(dtype)
            scores = torch.einsum("bhk,bhnk->bhn", q[:, t].to(dtype), keys) * scale
            if bias is not None:
                scores = scores + bias[:, t].to(dtype)
            scores = scores.masked_fill(hidden, -torch.inf)
            none = hidden.all(-1, keepdim=True)
            # Where nothing is named every weight is 0.
            weights = scores.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
            read = torch.einsum("bhn,bhnv->bhv", weights, values)
            outputs.append(read.masked_fill(none, 0.0))
            total = scores.masked_fill(none, 0.0).logsumexp(-1)
            sums.append(total.masked_fill(none[..., 0], -torch.inf))
        return torch.stack(outputs, dim=1).to(v.dtype), torch.stack(sums, dim=1)

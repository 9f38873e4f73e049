"""Attention over chosen keys, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys (S ≥ T), J index heads, I index width, N chosen keys, H heads, K key, V value (V ≤ K).
After DeepSeek-V3.2, arXiv:2512.02556.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def score(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_j ReLU(q_j · k) of one query: q [B, J, I], k [B, S, I], weights [B, J] → [B, S]."""
    dtype = working_dtype(q, k, weights)
    with torch.autocast(q.device.type, enabled=False):
        products = torch.einsum("bji,bsi->bjs", q.to(dtype), k.to(dtype)).relu()
        return torch.einsum("bj,bjs->bs", weights.to(dtype), products)


def index_scores(q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor:
    """Scores of the chosen keys, or of all; shapes as in `ops.index_scores`."""
    rows = []
    for t in range(q.shape[1]):
        own = score(q[:, t], k, weights[:, t])
        if chosen is None:
            end = k.shape[1] - q.shape[1] + t + 1
            rows.append(own.masked_fill(torch.arange(k.shape[1], device=q.device) >= end, -torch.inf))
        else:
            picked = own.gather(1, chosen[:, t].clamp(min=0))
            rows.append(picked.masked_fill(chosen[:, t] < 0, -torch.inf))
    return torch.stack(rows, dim=1)


def select_keys(q: Tensor, k: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Sort by score, then by recency, and keep the first; shapes as in `ops.select_keys`."""
    batch, time, keys = *q.shape[:2], k.shape[1]
    chosen = torch.full((batch, time, min(keep, keys)), -1, dtype=torch.long, device=q.device)
    for t in range(time):
        end = keys - time + t + 1
        scores = score(q[:, t], k[:, :end], weights[:, t]).nan_to_num(nan=torch.inf)
        # A stable sort of the reversed row leaves later keys in front of earlier ones of the same score.
        best = end - 1 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :keep]
        count = best.shape[1]
        chosen[:, t, chosen.shape[2] - count :] = best.sort(dim=1).values
    return chosen


def index_divergence(
    q: Tensor, k: Tensor, weights: Tensor, queries: Tensor, keys: Tensor, scale: float
) -> Tensor:
    """Each query's divergence over what it sees, and their mean for each batch entry; shapes as in `ops.index_divergence`."""
    dtype = working_dtype(q, k, weights, queries, keys)
    early, total = k.shape[1] - q.shape[1], torch.zeros(q.shape[0], dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            seen = early + t + 1
            own = score(q[:, t], k[:, :seen], weights[:, t]).to(dtype).log_softmax(-1)
            shares = torch.einsum("bhk,bshk->bhs", queries[:, t].to(dtype), keys[:, :seen].to(dtype)) * scale
            shares = shares.detach().softmax(-1).mean(1)
            total = total + (torch.special.xlogy(shares, shares) - shares * own).sum(-1)
    return total / q.shape[1]


def selected_attention(
    q: Tensor, k: Tensor, chosen: Tensor, value: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query over its chosen keys; shapes as in `ops.selected_attention`."""
    dtype = working_dtype(q, k)
    outputs, shares = [], []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            seen = (chosen[:, t] >= 0)[:, None]
            rows = torch.stack(
                [keys[index] for keys, index in zip(k, chosen[:, t].clamp(min=0), strict=True)]
            ).to(dtype)
            scores = torch.einsum("bhk,bnk->bhn", q[:, t].to(dtype), rows) * scale
            # Where nothing is seen every weight is 0.
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
            outputs.append(torch.einsum("bhn,bnv->bhv", weights, rows[..., :value]).to(k.dtype))
            shares.append(weights.detach().mean(1))
    return torch.stack(outputs, dim=1), torch.stack(shares, dim=1)

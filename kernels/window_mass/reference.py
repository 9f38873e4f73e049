"""Windowed softmax attention and its mass, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value.
After the hybrid attention of LoLCATs, arXiv:2410.10254.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query q [B, H, K] over k [B, S, G, K] and v [B, S, G, V]: [B, H, V], and the mass [B, H]."""
    dtype = working_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (k.shape[2], -1))
        scores = torch.einsum("bgrk,bsgk->bgrs", grouped, k.to(dtype)) * scale
        weights = (scores - scores.max(-1, keepdim=True).values).exp()
        mass = weights.sum(-1)
        read = torch.einsum("bgrs,bsgv->bgrv", weights, v.to(dtype)) / mass.unsqueeze(-1)
        return read.flatten(1, 2).to(v.dtype), mass.flatten(1, 2)


def window_mass(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Each query over the keys that it sees; shapes as in `ops.window_mass`."""
    past, results = k.shape[1] - q.shape[1], []
    for t in range(q.shape[1]):
        seen = slice(max(0, past + t + 1 - window), past + t + 1)
        results.append(step(q[:, t], k[:, seen], v[:, seen], scale))
    outputs, masses = zip(*results, strict=True)
    return torch.stack(outputs, dim=1), torch.stack(masses, dim=1)

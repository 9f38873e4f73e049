"""Causal softmax attention, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query q [B, H, K] over all of k [B, S, G, K] and v [B, S, G, V]; zeros where S is 0."""
    dtype = working_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (k.shape[2], -1))
        scores = torch.einsum("bgrk,bsgk->bgrs", grouped, k.to(dtype)) * scale
        output = torch.einsum("bgrs,bsgv->bgrv", scores.softmax(-1), v.to(dtype))
        return output.flatten(1, 2).to(v.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Each query over the keys that it sees; shapes as in `ops.softmax_attention`."""
    outputs = []
    for t in range(q.shape[1]):
        end = k.shape[1] - q.shape[1] + t + 1
        start = 0 if window is None else max(0, end - window)
        outputs.append(step(q[:, t], k[:, start:end], v[:, start:end], scale))
    return torch.stack(outputs, dim=1)

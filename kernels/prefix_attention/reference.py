"""Softmax attention over the first keys of each query, one query after another: the meaning of this operator.

Letters: B batch, T queries, N keys, H heads, G groups that share k and v, K key, V value.
After the compressed branch of arXiv:2502.11089.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Each query over the keys that it sees; shapes as in `ops.prefix_attention`."""
    dtype = working_dtype(q, k, v)
    groups = k.shape[2]
    outputs, weights = [], []
    with torch.autocast(q.device.type, enabled=False):
        for t, count in enumerate(visible.tolist()):
            grouped = q[:, t].to(dtype).unflatten(1, (groups, -1))
            scores = torch.einsum("bgrk,bngk->bgrn", grouped, k[:, :count].to(dtype)) * scale
            shares = scores.softmax(-1)
            outputs.append(torch.einsum("bgrn,bngv->bgrv", shares, v[:, :count].to(dtype)).flatten(1, 2))
            rest = shares.new_zeros(*shares.shape[:-1], k.shape[1] - count)
            weights.append(torch.cat([shares, rest], dim=-1).flatten(1, 2).detach())
        return torch.stack(outputs, dim=1).to(v.dtype), torch.stack(weights, dim=1)

"""Softmax attention over the first keys of each query in large operations.

Letters: B batch, T queries, N keys, H heads, G groups that share k and v, K key, V value.
After the compressed branch of arXiv:2502.11089.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All queries at once; shapes as in `ops.prefix_attention`."""
    dtype = working_dtype(q, k, v)
    batch, time, heads, _ = q.shape
    slots, groups = k.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        queries = (q.to(dtype) * scale).view(batch, time, groups, heads // groups, -1)
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = queries @ k.to(dtype).permute(0, 2, 3, 1)
        seen = torch.arange(slots, device=q.device) < visible[:, None]
        # A row that sees nothing is given any numbers, and taken out below: a softmax of nothing is NaN.
        none = visible == 0
        hidden = torch.zeros(seen.shape, dtype=dtype, device=q.device)
        hidden = hidden.masked_fill(~seen & ~none[:, None], -torch.inf)
        scores = scores.view(batch, groups, -1, time, slots) + hidden
        weights = scores.softmax(-1) * ~none[:, None]
        output = weights.flatten(2, 3) @ v.to(dtype).transpose(1, 2)
        output = output.view(batch, heads, time, -1).transpose(1, 2)
        return output.to(v.dtype), weights.detach().view(batch, heads, time, slots).transpose(1, 2)

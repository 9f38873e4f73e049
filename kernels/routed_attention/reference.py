"""Softmax attention over chosen blocks, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, C groups of heads that choose
together (G divides C, C divides H), M blocks that a query names, K key, V value.
After arXiv:2502.13189 (blocks by head) and arXiv:2502.11089 (blocks by group).
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def _tokens(blocks: Tensor, block: int, length: int) -> list[int]:
    """The tokens before `length` in the blocks [M] that are named."""
    return [
        token
        for number in blocks.tolist()
        if number >= 0
        for token in range(number * block, min(length, number * block + block))
    ]


def step(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One query q [B, H, K] over the tokens before `length` in its blocks [B, C, M]; zeros and −∞ where none is."""
    dtype = working_dtype(q, k, v)
    choosers, groups = blocks.shape[1], k.shape[2]
    outputs, sums = [], []
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for c, queries in enumerate(q[b].to(dtype).chunk(choosers)):
                seen, group = _tokens(blocks[b, c], block, length), c * groups // choosers
                keys, values = k[b, seen, group].to(dtype), v[b, seen, group].to(dtype)
                if seen:
                    scores = queries @ keys.mT * scale
                    outputs.append(scores.softmax(-1) @ values)
                    sums.append(scores.logsumexp(-1))
                else:
                    outputs.append(values.new_zeros(queries.shape[0], v.shape[-1]))
                    sums.append(values.new_full(queries.shape[:1], -torch.inf))
        output = torch.cat(outputs).view(*q.shape[:2], -1)
        return output.to(v.dtype), torch.cat(sums).view(q.shape[:2])


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query over the tokens up to its own in its blocks; shapes as in `ops.routed_attention`."""
    first = k.shape[1] - q.shape[1]
    steps = [step(q[:, t], k, v, blocks[:, t], block, first + t + 1, scale) for t in range(q.shape[1])]
    outputs, sums = zip(*steps, strict=True)
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)

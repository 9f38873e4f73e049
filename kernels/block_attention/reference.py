"""Attention over listed blocks of keys, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value, N query blocks, M key
blocks listed for each, I lists: 1 for all heads, G or H, L listed slots.
After arXiv:1904.10509, 2004.05150 and 2007.14062; the log-sum-exp as in FlashAttention-2, arXiv:2307.08691.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, K] over k [B, L, K] and v [B, L, V] → [B, V] and [B]; nought and -inf where L is 0."""
    scores = torch.einsum("bk,blk->bl", q, k) * scale
    return torch.einsum("bl,blv->bv", scores.softmax(-1), v), scores.logsumexp(-1)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    positions: Tensor,
    block: int,
    key_block: int,
    first: int,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each query over the listed keys that it sees; index [I, N, M], positions [S]; else as in `ops.block_attention`."""
    dtype, out_dtype = working_dtype(q, k, v), v.dtype
    heads, groups = q.shape[2], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        rows, sums = [], []
        for t in range(q.shape[1]):
            position = first + t
            answers = []
            for h in range(heads):
                listed = index[h * index.shape[0] // heads, position // block - first // block]
                slots = (listed[listed >= 0, None] * key_block + torch.arange(key_block)).flatten()
                slots = slots[slots < k.shape[1]]
                seen = positions[slots] <= position
                if window is not None:
                    seen &= positions[slots] > position - window
                slots, group = slots[seen], h * groups // heads
                answers.append(_attend(q[:, t, h], k[:, slots, group], v[:, slots, group], scale))
            rows.append(torch.stack([output for output, _ in answers], dim=1))
            sums.append(torch.stack([total for _, total in answers], dim=1))
        return torch.stack(rows, dim=1).to(out_dtype), torch.stack(sums, dim=1)


def step(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query over the listed slots [I, L] of a cache; as in `ops.block_attention_step`."""
    dtype = working_dtype(q, k, v)
    heads, groups = q.shape[1], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        answers = []
        for h in range(heads):
            own, group = slots[h * slots.shape[0] // heads], h * groups // heads
            own = own[own >= 0]
            answers.append(
                _attend(q[:, h].to(dtype), k[:, own, group].to(dtype), v[:, own, group].to(dtype), scale)
            )
        outputs, sums = zip(*answers, strict=True)
        return torch.stack(outputs, dim=1).to(v.dtype), torch.stack(sums, dim=1)

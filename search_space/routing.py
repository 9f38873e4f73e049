"""What mixers share that choose blocks of the text: the best of scores, and sums of keys by block.

Letters: B batch, T time, G key heads, K key width, N blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def choose(scores: Tensor, count: int) -> Tensor:
    """The `count` best of scores [..., N] that are above -inf, the best first; of equal ones the first. -1 for none.

    No top-k promises an order among equal scores, and a step must choose as a prefill did.
    """
    left, chosen = scores.detach().clone(), [torch.empty_like(scores[..., :0], dtype=torch.int64)]
    for _ in range(min(count, scores.shape[-1])):
        best, place = left.max(-1, keepdim=True)
        chosen.append(torch.where(best > -torch.inf, place, -1))
        left.scatter_(-1, place, -torch.inf)
    return torch.cat(chosen, dim=-1)


def block_sums(keys: Tensor, first: int, block: int) -> Tensor:
    """Sums of keys [B, T, G, K], the first at position `first`, by block from that position's own on: [B, N, G, K]."""
    before = first % block
    behind = -(before + keys.shape[1]) % block
    sums: Tensor = pad(keys, (0, 0, 0, 0, before, behind)).unflatten(1, (-1, block)).sum(2)
    return sums


def mean_chosen(context: int, block: int, count: int) -> float:
    """Keys that a query reads of its own block and of `count` - 1 earlier ones, averaged over a prefill of the context."""
    whole, rest = divmod(context, block)
    inside = whole * block * (block + 1) / 2 + rest * (rest + 1) / 2
    few = min(whole, count)
    others = few * (few - 1) / 2 + (count - 1) * (whole - few)
    return (inside + block * (others * block + rest * min(count - 1, whole))) / context

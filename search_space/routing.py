"""What mixers share that choose parts of the text: the best of scores, sums of keys by block, attention of some tokens.

Letters: B batch, T time, G key heads, R query heads of each, K key width, N blocks, n most tokens of a group.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.softmax_attention.ops import softmax_attention
from kernels.stacked import stackable


def choose(scores: Tensor, count: int) -> Tensor:
    """The `count` best of scores [..., N] that are above -inf, the best first; of equal ones the first. -1 for none.

    No top-k promises an order among equal scores, and a step must choose as a prefill did.
    """
    left, chosen = scores.detach().clone(), [torch.empty_like(scores[..., :0], dtype=torch.int64)]
    for _ in range(min(count, scores.shape[-1])):
        best, place = left.max(-1, keepdim=True)
        chosen.append(torch.where(best > -torch.inf, place, -1))
        left = left.scatter(-1, place, torch.full_like(best, -torch.inf))
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


@stackable()
def attend_taken(q: Tensor, k: Tensor, v: Tensor, taken: Tensor, window: int) -> Tensor:
    """Causal attention of each group among the tokens that it takes: queries [B, T, G, R, K], keys and values [B, T, G, K].

    A taken query [B, T, G] reads the last `window` taken keys, its own among them; the others get noughts. The work grows
    with the square of the tokens that are taken. Returns [B, T, G, R K].
    """
    batch, _, groups, shared, size = q.shape
    most = max(1, int(taken.sum(1).max()))
    order = (~taken).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    index = order[..., None]
    real = taken.gather(1, order)

    def pack(x: Tensor) -> Tensor:
        """[B, T, G, N] to the taken ones [B G, n, 1, N], in their order; behind them lies what nobody reads."""
        packed = x.gather(1, index.expand(-1, -1, -1, x.shape[-1]))
        return packed.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    queries = pack(q.flatten(3)).view(-1, most, shared, size)
    read = softmax_attention(queries, pack(k), pack(v), window=window).flatten(2)
    read = read.view(batch, groups, most, -1).transpose(1, 2).masked_fill(~real[..., None], 0.0)
    return torch.zeros_like(q.flatten(3), dtype=read.dtype).scatter(1, index.expand_as(read), read)

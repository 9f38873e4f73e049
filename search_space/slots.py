"""Slots that sum up stretches of the text: how they are made, kept while the text grows, and what blocks they point to.

Letters: B batch, T time, S tokens, G key heads, K key width, L tokens of a slot, N slots, J blocks, M blocks chosen.
After the compressed branch of NSA, arXiv:2502.11089.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels.block_attention.ops import block_attention
from kernels.prefix_attention.ops import prefix_attention
from search_space.routing import choose
from search_space.state import KeyValue, append_ring, read_ring, start_key_value

Pair = tuple[Tensor, Tensor]

ALWAYS = 1e9
"""More than any sum of weights."""

MOST_TILE = 32
"""Queries that are worked on together, and keys that are read together; a divisor of the block is taken."""


def slots_of(tokens: int, length: int, stride: int) -> int:
    """Slots that are whole after so many tokens."""
    return max(0, (tokens - length) // stride + 1)


def mean_slots(context: int, length: int, stride: int) -> float:
    """Slots that a query sees, averaged over a prefill of the context."""
    slots = slots_of(context, length, stride)
    return (slots * (context - length + 1) - stride * slots * (slots - 1) / 2) / context


class Squeeze(nn.Module):
    """Tokens [B, S, G, K] to slots [B, N, G, K], one each `stride`: by a small network with positions, or as a mean."""

    def __init__(self, size: int, length: int, stride: int, *, learnt: bool) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.place = nn.Parameter(0.02 * torch.randn(length, size)) if learnt else None
        self.up = nn.Linear(length * size, size, bias=False) if learnt else None
        self.down = nn.Linear(size, size, bias=False) if learnt else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.length:
            return x[:, :0]
        windows = x.unfold(1, self.length, self.stride).mT
        if self.place is None or self.up is None or self.down is None:
            return windows.mean(-2)
        y: Tensor = self.down(F.silu(self.up((windows + self.place.to(x.dtype)).flatten(-2))))
        return y


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Slots [B, N, G, K] for as many as may come, and a ring of the last L tokens, of which the next one is made."""

    keys: Tensor
    values: Tensor
    tail: KeyValue


def start_slots(
    batch: int,
    max_len: int,
    squeeze: Squeeze,
    heads: int,
    size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Slots:
    """No slots, and room for those of `max_len` tokens."""
    shape = (batch, slots_of(max_len, squeeze.length, squeeze.stride), heads, size)
    keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    kept = min(max_len, squeeze.length)
    tail = start_key_value(batch, kept, heads, size, size, device=device, dtype=dtype)
    return Slots(keys=keys, values=values, tail=tail)


def whole_slots(state: Slots, squeeze: Squeeze) -> tuple[Tensor, Tensor]:
    """The keys and values of the slots that are complete."""
    count = slots_of(state.tail.length, squeeze.length, squeeze.stride)
    return state.keys[:, :count], state.values[:, :count]


def push_slots(state: Slots, k: Tensor, v: Tensor, squeeze_key: Squeeze, squeeze_value: Squeeze) -> Slots:
    """The state with the slots that keys and values [B, T, G, K] complete."""
    length, stride, start = squeeze_key.length, squeeze_key.stride, state.tail.length
    first, count = slots_of(start, length, stride), slots_of(start + k.shape[1], length, stride)
    if count > first:
        old_k, old_v = read_ring(state.tail)
        skip = first * stride - (start - old_k.shape[1])
        state.keys[:, first:count] = squeeze_key(torch.cat([old_k.to(k.dtype), k], dim=1)[:, skip:])
        state.values[:, first:count] = squeeze_value(torch.cat([old_v.to(v.dtype), v], dim=1)[:, skip:])
    return replace(state, tail=append_ring(state.tail, k, v, length))


def slot_weights(weights: Tensor, overlap: int, strides: int, blocks: int) -> Tensor:
    """The weights of slots [..., N] summed by block [..., J]: each stride of a block counts the slots that cover it.

    Slot i covers the strides i to i + overlap - 1, block j the strides j · strides on (arXiv:2502.11089, equation 9).
    """
    wanted = blocks * strides
    weights = pad(weights, (0, max(0, wanted - weights.shape[-1])))[..., :wanted]
    covered = weights
    for shift in range(1, overlap):
        covered = covered + pad(weights, (shift, 0))[..., :wanted]
    sums: Tensor = covered.unflatten(-1, (blocks, strides)).sum(-1)
    return sums


def pointed(weights: Tensor, start: int, overlap: int, strides: int, block: int, count: int) -> Tensor:
    """The blocks [B, T, G, M] that queries from position `start` read, by the weights [B, T, G, N] that they gave to slots.

    Their own block, the one before and the first come before all others; of equal ones the earlier. -1 for none.
    """
    here = torch.arange(start, start + weights.shape[1], device=weights.device)[:, None, None] // block
    blocks = (start + weights.shape[1] - 1) // block + 1
    scores = slot_weights(weights, overlap, strides, blocks)
    number = torch.arange(blocks, device=weights.device)
    for rank, forced in enumerate((number == 0, number == here - 1, number == here), start=1):
        scores = scores.masked_fill(forced, rank * ALWAYS)
    return choose(scores.masked_fill(number > here, -torch.inf), count)


def read_slots(
    q: Tensor, keys: Tensor, values: Tensor, squeeze: Squeeze, start: int, block: int, count: int
) -> Pair:
    """What queries [B, T, H, K] from position `start` read of slots [B, N, G, K], and `count` blocks to read [B, T, G, M].

    A slot is visible to the token that completes it.
    """
    time = torch.arange(start, start + q.shape[1], device=q.device)
    visible = (time + 1 - squeeze.length).div(squeeze.stride, rounding_mode="floor").add(1).clamp(min=0)
    if not keys.shape[1]:
        keys, values = (x.new_zeros(x.shape[0], 1, *x.shape[2:]) for x in (keys, values))
    read, weights = prefix_attention(q, keys, values, visible)
    weights = weights.unflatten(2, (keys.shape[2], -1)).sum(3)
    overlap, strides = squeeze.length // squeeze.stride, block // squeeze.stride
    return read, pointed(weights, start, overlap, strides, block, count)


def read_blocks(
    q: Tensor, k: Tensor, v: Tensor, slots: Pair, *, start: int, block: int, each: int, bonus: float
) -> Tensor:
    """What queries read of their own block up to themselves, and of the slots of all blocks before it, in one softmax.

    q [B, T, H, K] from position `start` on; k and v [B, S, G, K] from the beginning of its block on, to the last query;
    slots [B, N, G, K], `each` for every block that is over by then. A slot's score is raised by `bonus`.
    """
    tile = max(size for size in range(1, MOST_TILE + 1) if block % size == 0)
    begin, scale = start - start % block, q.shape[-1] ** -0.5
    # Filled up to a whole tile by slots that nobody sees, as their block is yet to end.
    old_k, old_v = (pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tile)) for x in slots)
    number = torch.arange(old_k.shape[1], device=q.device)
    after = (number // each + 1) * block
    here = torch.arange(start // tile, (start + q.shape[1] - 1) // tile + 1, device=q.device)[:, None]
    far = torch.where(after[::tile] < (here + 1) * tile, number[: len(number) // tile], -1)
    near = here // (block // tile) * (block // tile) + torch.arange(block // tile, device=q.device)
    near = torch.where(near <= here, near + (len(number) - begin) // tile, -1)
    if bonus:
        # As one more number of queries and keys, whose product is the bonus.
        q, k, old_k = pad(q, (0, 1), value=1 / scale), pad(k, (0, 1)), pad(old_k, (0, 1), value=bonus)
    keys, values = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
    index = torch.cat([far, near], dim=1)
    positions = torch.cat([after, torch.arange(begin, begin + k.shape[1], device=q.device)])
    read, _ = block_attention(
        q, keys, values, index, block=tile, key_block=tile, first=start, positions=positions, scale=scale
    )
    return read

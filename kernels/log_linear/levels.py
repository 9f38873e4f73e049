"""Where log-linear attention finds a token: what the kernels of both of its bases share.

Letters: B batch, H heads, L levels, K key, V value, C tokens of a chunk, W walks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.log_linear import reference


@triton.jit
def meet(i, j, level, NEAR: tl.constexpr):
    """Whether two tokens of a chunk find one another in a level: in that of the highest bit in which they differ."""
    differ = i ^ j
    return (differ >= (1 << level) >> 1) & ((differ < 1 << level) | (level == NEAR - 1))


@triton.jit
def levels_of(i, j, NEAR: tl.constexpr):
    """The levels in which two tokens of a chunk find one another."""
    level = (i ^ j) * 0
    for bit in tl.static_range(NEAR - 1):
        level += tl.where((i ^ j) >> bit > 0, 1, 0)
    return level


@triton.jit
def weighed(
    pairs,
    weights,
    live,
    H: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    C: tl.constexpr,
    BACK: tl.constexpr,
):
    """Products of pairs of tokens, times the reader's weights: rows read; with BACK columns do."""
    i = tl.arange(0, C)
    place = levels_of(i[:, None], i[None, :], NEAR)
    mix = tl.zeros([C, C], tl.float32)
    for level in range(0, NEAR):
        own = tl.load(weights + i * (H * L) + level, mask=live, other=0.0)
        mix = tl.where(place == level, own[None, :] if BACK else own[:, None], mix)
    return pairs * mix


def by_level(near: Tensor, far: Tensor, levels: int, dim: int) -> Tensor:
    """What lies in a chunk's own levels and then in those of walks, joined: the last level takes all that is older."""
    joined = torch.cat([near, far], dim)
    count = joined.shape[dim]
    if count <= levels:
        shape = list(joined.shape)
        shape[dim] = levels - count
        return torch.cat([joined, joined.new_zeros(shape)], dim)
    kept, older = joined.split([levels - 1, count - levels + 1], dim)
    return torch.cat([kept, older.sum(dim, keepdim=True)], dim)


def first_states(levels: Tensor, length: int, chunk: int, walks: int) -> Tensor:
    """The states [B, H, W, K, V] with which walks go on after `length` tokens, which fill whole chunks."""
    merged, before, top = reference.merge(levels, length), length // chunk, levels.shape[2] - 1
    held: dict[int, Tensor] = {}
    for bit in range(before.bit_length()):
        if before >> bit & 1:
            held[bit] = merged[:, :, min(bit + chunk.bit_length(), top)]
            # Which walk holds the last level's blocks makes no difference to what follows.
            if bit + chunk.bit_length() >= top:
                break
    nothing = torch.zeros_like(merged[:, :, 0])
    states = []
    for walk in range(walks):
        if before >> walk & 1:
            states.append(held.get(walk, nothing))
        else:
            states.append(sum((state for bit, state in held.items() if bit < walk), nothing))
    return torch.stack(states, 2)

"""Rotary positions: part of each head turns with the position (RoFormer, arXiv:2104.09864), pairs half-split or adjacent.

Letters: B batch, T time, H heads, K head width.
"""

import torch
from torch import Tensor

from search_space.positions import Positions, Scaling


def rotate(x: Tensor, start: int, *, fraction: float, base: float) -> Tensor:
    """Turn the first `fraction` of the widths of x [B, T, H, K] by their positions start, start + 1, …, unscaled."""
    return Positions(kind="rope", fraction=fraction, base=base, scaling=Scaling()).turn(x, start)


def turns(angle: Tensor, pairs: int) -> Tensor:
    """Angles [..., N], N ≤ pairs, as complex numbers of length one [..., pairs]; pairs from N on do not turn."""
    if angle.shape[-1] < pairs:
        angle = torch.nn.functional.pad(angle, (0, pairs - angle.shape[-1]))
    return torch.polar(torch.ones_like(angle), angle)


def turn_pairs(x: Tensor, by: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of x [..., K] by complex numbers [..., K / 2]."""
    pairs = torch.view_as_complex(x.to(by.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)

"""Rotary turns of adjacent pairs as complex numbers (RoFormer, arXiv:2104.09864), by angles that a mixer chooses.

Letters: N angles, K head width.
"""

import torch
from torch import Tensor


def turns(angle: Tensor, pairs: int) -> Tensor:
    """Angles [..., N], N ≤ pairs, as complex numbers of length one [..., pairs]; pairs from N on do not turn."""
    if angle.shape[-1] < pairs:
        angle = torch.nn.functional.pad(angle, (0, pairs - angle.shape[-1]))
    return torch.polar(torch.ones_like(angle), angle)


def turn_pairs(x: Tensor, by: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of x [..., K] by complex numbers [..., K / 2]."""
    pairs = torch.view_as_complex(x.to(by.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)

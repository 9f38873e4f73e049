"""Rotary positions: part of each head turns with the position (RoFormer, arXiv:2104.09864), pairs half-split or adjacent.

Letters: B batch, T time, H heads, K head width.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, start: int, *, fraction: float, base: float) -> Tensor:
    """Turn the first `fraction` of the widths of x [B, T, H, K] by their positions start, start + 1, …

    Angles are float32 whatever x is, because a bfloat16 angle is wrong by radians at a few thousand tokens.
    """
    width = int(x.shape[-1] * fraction) // 2 * 2
    if width == 0:
        return x
    position = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angle = position[:, None] * base**-exponent
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    left, right, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


def turn_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of x [..., K] by angle [..., N], N ≤ K/2; pairs from N on stay."""
    width = 2 * angle.shape[-1]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([left * cos - right * sin, right * cos + left * sin], dim=-1).flatten(-2)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)

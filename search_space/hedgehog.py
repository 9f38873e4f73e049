"""Hedgehog's feature map: two softmaxes of a learnt projection, whose products stand for exponentials of scores.

Letters: B batch, T time, H heads, K head width, F features of each sign.
"""

import torch
from torch import Tensor, nn

LEAST = 1e-12
"""Added to each feature, so that what has been seen never sums to nought; published code clamps, which costs a mask."""


class Hedgehog(nn.Module):
    """φ(x) = [softmax(x W), softmax(-x W)] with a W for each head (arXiv:2402.04347)."""

    def __init__(self, heads: int, size: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, size, features) * size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, K], or of fewer heads that stand for several each, to [B, T, H, 2 F] in float32."""
        with torch.autocast(x.device.type, enabled=False):
            heads = spread(x, self.weight.shape[0]).float().transpose(1, 2)
            both = torch.cat([self.weight, -self.weight], dim=-1).float()
            logits = torch.matmul(heads, both).unflatten(-1, (2, -1))
            features: Tensor = logits.softmax(-1).flatten(-2) + LEAST
            return features.transpose(1, 2)


def spread(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Each head of x, in the dimension `dim`, as often as makes so many heads."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)

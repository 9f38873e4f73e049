"""Depthwise causal convolution over W tokens as a sum of W shifted products.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """All tokens at once; shapes as in `ops.short_convolution`."""
    batch, time, channels = x.shape
    taps = weight.shape[1]
    dtype = working_dtype(x, weight, bias, tail)
    with torch.autocast(x.device.type, enabled=False):
        before = x.new_zeros(batch, taps - 1, channels) if tail is None else tail.to(x.dtype)
        seen = torch.cat([before, x], dim=1)
        wide, kernel = seen.to(dtype), weight.to(dtype).mT
        y = wide[:, :time] * kernel[0]
        if bias is not None:
            y = y + bias.to(dtype)
        for tap in range(1, taps):
            y = torch.addcmul(y, wide[:, tap : tap + time], kernel[tap])
        if activation == "silu":
            y = torch.nn.functional.silu(y)
        # A copy: a view would keep the whole sequence alive for as long as the state is carried.
        return y.to(x.dtype), seen[:, time:].clone()

"""Depthwise causal convolution over W tokens, one token after another: the meaning of this operator.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """One token: x [B, C], weight [C, W] or [B, C, W], bias [C] or [B, C], tail [B, W-1, C]."""
    dtype = working_dtype(x, weight, bias, tail)
    with torch.autocast(x.device.type, enabled=False):
        seen = torch.cat([tail.to(x.dtype), x.unsqueeze(1)], dim=1)
        y = (seen.to(dtype) * weight.to(dtype).mT).sum(1)
        if bias is not None:
            y = y + bias.to(dtype)
        if activation == "silu":
            y = torch.nn.functional.silu(y)
        return y.to(x.dtype), seen[:, 1:].clone()


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.short_convolution`."""
    if tail is None:
        tail = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2])
    outputs = []
    for t in range(x.shape[1]):
        y, tail = step(x[:, t], weight, bias, tail, activation)
        outputs.append(y)
    return torch.stack(outputs, dim=1), tail

"""Depthwise causal convolution over W tokens as a sum of W shifted products.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import working_dtype


def _by_tap(weight: Tensor) -> Tensor:
    """[C, W] → [W, 1, C], or [B, C, W] → [W, B, 1, C]: each tap as it is multiplied with [B, T, C]."""
    return weight.movedim(-1, 0).unsqueeze(-2)


class _Taps(torch.autograd.Function):
    """seen [B, W-1+T, C], weight [C, W] or [B, C, W], bias [C] or [B, C] → [B, T, C].

    By hand, as slices would each bring a gradient of noughts.
    """

    @staticmethod
    def forward(
        ctx: Any, seen: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        kernel = _by_tap(weight)
        time = seen.shape[1] - len(kernel) + 1
        y = seen[:, :time] * kernel[0]
        for tap in range(1, len(kernel)):
            y.addcmul_(seen[:, tap : tap + time], kernel[tap])
        if bias is not None:
            y += bias.unsqueeze(-2)
        ctx.own_bias = bias is not None and bias.dim() == 2
        ctx.activated = activation == "silu"
        ctx.save_for_backward(seen, weight, y if ctx.activated else None)
        return torch.nn.functional.silu(y) if ctx.activated else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        seen, weight, y = ctx.saved_tensors
        d_y = torch.ops.aten.silu_backward(grads[0], y) if ctx.activated else grads[0]
        kernel, time = _by_tap(weight), d_y.shape[1]
        d_seen = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_seen = torch.zeros_like(seen)
            for tap in range(len(kernel)):
                d_seen[:, tap : tap + time].addcmul_(d_y, kernel[tap])
        if ctx.needs_input_grad[1]:
            # Over what shares one filter.
            over = 1 if weight.dim() == 3 else (0, 1)
            taps = [(seen[:, tap : tap + time] * d_y).sum(over) for tap in range(len(kernel))]
            d_weight = torch.stack(taps, dim=-1)
        if ctx.needs_input_grad[2]:
            d_bias = d_y.sum(1 if ctx.own_bias else (0, 1))
        return d_seen, d_weight, d_bias, None


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """All tokens at once; shapes as in `ops.short_convolution`."""
    batch, time, channels = x.shape
    taps = weight.shape[-1]
    dtype = working_dtype(x, weight, bias, tail)
    with torch.autocast(x.device.type, enabled=False):
        before = x.new_zeros(batch, taps - 1, channels) if tail is None else tail.to(x.dtype)
        seen = torch.cat([before, x], dim=1)
        y = _Taps.apply(  # type: ignore[no-untyped-call]
            seen.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), activation
        )
        # A copy: a view would keep the whole sequence alive for as long as the state is carried.
        return y.to(x.dtype), seen[:, time:].clone()

"""Norms over the last dimension in the calls of torch that a CPU is fastest with.

Letters: B entries of the first axis, G groups that are normalised apart, D width of a group.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import working_dtype

OPENED: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    activation: str,
    before: bool,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `ops.rms_norm`; the order of the calls is part of what a stored result means."""
    if gate is not None and before:
        x = x * OPENED[activation](gate.to(x.dtype))
    y = x.to(working_dtype(x) if weight is None else weight.dtype)
    size = x.shape[-1] // groups
    if groups == 1 and (weight is None or weight.dim() == 1):
        y = F.rms_norm(y, (size,), weight, eps)
    else:
        y = F.rms_norm(y.unflatten(-1, (groups, size)), (size,), None, eps).flatten(-2)
        if weight is not None:
            y = y * (weight if weight.dim() == 1 else weight.view(len(weight), *(1,) * (x.dim() - 2), -1))
    y = y.to(dtype)
    return y if gate is None or before else (y * OPENED[activation](gate)).to(dtype)


def unit_norm(x: Tensor, eps: float, scale: float, dtype: torch.dtype) -> Tensor:
    """As `ops.unit_norm`."""
    x = x if x.dtype == dtype else x.to(dtype)
    y = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return y if scale == 1.0 else y * scale

"""Norms over the last dimension, one group after another: the meaning of this operator.

Letters: B entries of the first axis, G groups that are normalised apart, D width of a group.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


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
    """As `ops.rms_norm`, all of it in float32, or in float64 where an input is float64."""
    wide = working_dtype(x, weight, gate)
    opened = torch.ones((), dtype=wide, device=x.device)
    if gate is not None:
        opened = torch.sigmoid(gate.to(wide))
        if activation == "silu":
            opened = opened * gate.to(wide)
    y = x.to(wide) * opened if before else x.to(wide)
    y = torch.cat(
        [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in y.chunk(groups, dim=-1)],
        dim=-1,
    )
    if weight is not None and weight.dim() == 2:
        y = torch.stack([own * entry.to(wide) for own, entry in zip(y, weight, strict=True)])
    elif weight is not None:
        y = y * weight.to(wide)
    return (y if before else y * opened).to(dtype)


def unit_norm(x: Tensor, eps: float, scale: float, dtype: torch.dtype) -> Tensor:
    """As `ops.unit_norm`, in float32, or in float64 where x is float64."""
    y = x.to(working_dtype(x))
    return (scale * y / (y.square().sum(-1, keepdim=True) + eps).sqrt()).to(dtype)

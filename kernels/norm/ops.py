"""Norms over the last dimension, with the gate that a mixer puts beside them: the public functions.

Letters: B entries of the first axis, G groups that are normalised apart, D width of a group.  After arXiv:1910.07467.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require_shape, resolve
from kernels.norm import chunked, reference
from kernels.stacked import stackable

ACTIVATIONS = ("silu", "sigmoid")


@stackable(own=("weight",))
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    gate: Tensor | None = None,
    activation: str = "silu",
    before: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x / √(mean(x²) + eps) · weight, each group of the last dimension for itself, and opened by activation(gate).

    x [..., G·D]; weight [G·D], or [B, G·D] with a row for each entry of x's first axis (models trained side by side),
    or None for ones; gate as x. The gate opens what the norm gives, or with `before` what it takes. The result is in
    `dtype`: where that is left out in the gate's type, without a gate in x's. Arithmetic in float32; the chunk form's
    in the weight's type, and it rounds to `dtype` before it gates.
    """
    name = "rms_norm"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    size = _group_size(name, x, groups, eps)
    if weight is not None and weight.shape != x.shape[-1:]:
        if weight.dim() == 1:
            require_shape(name, "weight", weight, (x.shape[-1],), "[G·D]")
        require_shape(name, "weight", weight, (x.shape[0], x.shape[-1]), "[B, G·D]")
    if gate is not None:
        require_shape(name, "gate", gate, tuple(x.shape), "as x")
    elif before:
        raise ValueError(f"{name}: before=True needs a gate; pass one or leave `before` out")
    if dtype is None:
        dtype = x.dtype if gate is None else gate.dtype
    implementation = resolve(backend, "norm", x, weight, gate, widths={"D": size}, missing=_empty(x))
    if implementation == "triton":
        from kernels.norm import triton

        return triton.rms_norm(x, weight, eps, gate, activation, before, groups, dtype)
    if implementation == "chunked":
        return chunked.rms_norm(x, weight, eps, gate, activation, before, groups, dtype)
    return reference.rms_norm(x, weight, eps, gate, activation, before, groups, dtype)


@stackable()
def unit_norm(
    x: Tensor,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """scale · x / √(Σ x² + eps) over the last dimension: a vector of length `scale`, and zero for zero.

    x [..., D]; the result is in `dtype`, where that is left out in x's type. Arithmetic in float32; the chunk form's
    in the type of the result.
    """
    size = _group_size("unit_norm", x, 1, eps)
    dtype = dtype or x.dtype
    implementation = resolve(backend, "norm", x, widths={"D": size}, missing=_empty(x))
    if implementation == "triton":
        from kernels.norm import triton

        return triton.unit_norm(x, eps, scale, dtype)
    if implementation == "chunked":
        return chunked.unit_norm(x, eps, scale, dtype)
    return reference.unit_norm(x, eps, scale, dtype)


def _group_size(name: str, x: Tensor, groups: int, eps: float) -> int:
    """The width of one group."""
    if eps <= 0:
        raise ValueError(f"{name}: eps={eps} must be above 0, because a row of zeros has no direction")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x has shape {list(x.shape)}, but must have a last dimension of at least 1")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"{name}: {groups} groups cannot share a width of {x.shape[-1]} evenly; choose a number of groups "
            f"that divides {x.shape[-1]}"
        )
    return x.shape[-1] // groups


def _empty(x: Tensor) -> str | None:
    return None if x.numel() else "there is nothing to normalise, and a GPU launches no empty grid"

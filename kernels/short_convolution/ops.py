"""Depthwise causal convolution over a few tokens, with its tail as the carried state: the public functions.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.
"""

from typing import Literal

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve, wants_gradient
from kernels.packing import by_document, require_documents
from kernels.short_convolution import chunked, reference
from kernels.stacked import stackable

Activation = Literal["silu"]


def _check(
    name: str, weight: Tensor, bias: Tensor | None, batch: int, channels: int, activation: str | None
) -> int:
    """ValueError where the filter does not fit; else the number of taps."""
    lead, letters = ((batch,), "B, ") if weight.dim() == 3 else ((), "")
    require_axes(name, "weight", weight, f"[{letters}C, W]")
    taps = weight.shape[-1]
    require_shape(name, "weight", weight, (*lead, channels, taps), f"[{letters}C, W]")
    if bias is not None:
        lead, letters = ((batch,), "B, ") if bias.dim() == 2 else ((), "")
        require_shape(name, "bias", bias, (*lead, channels), f"[{letters}C]")
    if activation not in (None, "silu"):
        raise ValueError(f"{name}: activation={activation!r} is not known; use 'silu' or None")
    return taps


@stackable(own=("weight", "bias"))
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    *,
    activation: Activation | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + Σ_i weight[:, W-1-i] · x_{t-i}), channel by channel.

    x [B, T, C]; weight [C, W], whose last tap multiplies the current token; bias [C]; tail [B, W-1, C], the
    inputs (not outputs) just before x, None for zeros. Returns y [B, T, C] in x's dtype and the new tail.
    Where several models share a batch, each entry has a weight [B, C, W] or a bias [B, C] of its own.
    cu_seqlens [N + 1] packs N documents in one row, each with its own tail [N, W-1, C].
    """
    name = "short_convolution"
    require_axes(name, "x", x, "[B, T, C]")
    batch, time, channels = x.shape
    taps = _check(name, weight, bias, batch, channels, activation)
    documents = require_documents(name, cu_seqlens, batch, time)
    if tail is not None:
        require_shape(name, "tail", tail, (documents, taps - 1, channels), "[B, W-1, C]")
    implementation = resolve(backend, name, x, weight, bias, tail, cu_seqlens, widths={"W": taps})
    if implementation == "triton":
        from kernels.short_convolution import triton

        return triton.short_convolution(x, weight, bias, tail, activation, cu_seqlens)
    if cu_seqlens is not None:

        def run(x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
            return short_convolution(x, weight, bias, tail, activation=activation, backend=implementation)

        return by_document(run, (x,), tail, cu_seqlens)
    if implementation == "chunked":
        return chunked.short_convolution(x, weight, bias, tail, activation)
    return reference.short_convolution(x, weight, bias, tail, activation)


@stackable(own=("weight", "bias"))
def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    *,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: x [B, C], weight [C, W], bias [C] or None, tail [B, W-1, C] → y [B, C], the new tail.

    Weight and bias may be [B, C, W] and [B, C]. There is one PyTorch form of a single token, so `reference` and
    `chunked` are the same here; it also answers where a gradient is asked for.
    """
    name = "short_convolution_step"
    require_axes(name, "x", x, "[B, C]")
    batch, channels = x.shape
    taps = _check(name, weight, bias, batch, channels, activation)
    require_shape(name, "tail", tail, (batch, taps - 1, channels), "[B, W-1, C]")
    tensors = (x, weight, bias, tail)
    implementation = resolve(backend, name, *tensors, widths={"W": taps}, kernel="step")
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.short_convolution import triton

        return triton.step(x, weight, bias, tail, activation)
    return reference.step(x, weight, bias, tail, activation)

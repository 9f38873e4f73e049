"""Depthwise causal convolution over a few tokens, with its tail as the carried state: the public functions.

Letters: B batch, T time, C channels, W taps.  As in Mamba, arXiv:2312.00752.
"""

from typing import Literal

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve
from kernels.short_convolution import chunked, reference
from kernels.stacked import stackable

Activation = Literal["silu"]


def _check(name: str, weight: Tensor, bias: Tensor | None, channels: int, activation: str | None) -> int:
    """ValueError where the filter does not fit; else the number of taps."""
    require_axes(name, "weight", weight, "[C, W]")
    taps = weight.shape[1]
    require_shape(name, "weight", weight, (channels, taps), "[C, W]")
    if bias is not None:
        require_shape(name, "bias", bias, (channels,), "[C]")
    if activation not in (None, "silu"):
        raise ValueError(f"{name}: activation={activation!r} is not known; use 'silu' or None")
    return taps


@stackable(each=("weight", "bias"))
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    *,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + Σ_i weight[:, W-1-i] · x_{t-i}), channel by channel.

    x [B, T, C]; weight [C, W], whose last tap multiplies the current token; bias [C]; tail [B, W-1, C], the
    inputs (not outputs) just before x, None for zeros. Returns y [B, T, C] in x's dtype and the new tail.
    """
    name = "short_convolution"
    implementation = resolve(backend, name)
    require_axes(name, "x", x, "[B, T, C]")
    batch, _, channels = x.shape
    taps = _check(name, weight, bias, channels, activation)
    if tail is not None:
        require_shape(name, "tail", tail, (batch, taps - 1, channels), "[B, W-1, C]")
    if implementation == "chunked":
        return chunked.short_convolution(x, weight, bias, tail, activation)
    return reference.short_convolution(x, weight, bias, tail, activation)


@stackable(each=("weight", "bias"))
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

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "short_convolution_step"
    resolve(backend, name)
    require_axes(name, "x", x, "[B, C]")
    batch, channels = x.shape
    taps = _check(name, weight, bias, channels, activation)
    require_shape(name, "tail", tail, (batch, taps - 1, channels), "[B, W-1, C]")
    return reference.step(x, weight, bias, tail, activation)

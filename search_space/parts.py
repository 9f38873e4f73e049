"""Pieces that several mixers are built from: norm, convolution, initial values of decays, counts of attention's work."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm.ops import rms_norm, unit_norm
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import REFERENCE_WIDTH, Frame, round_to


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension: in the weight's type, which autocast leaves wide, returned in x's.

    With a gate of x's shape the result is opened by its activation, in the gate's type.
    """

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None, *, activation: str = "silu") -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, gate=gate, activation=activation)


def unit(x: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """x over its length by the last dimension, times `scale`; the constant keeps a zero vector at zero."""
    return unit_norm(x, eps=1e-6, scale=scale, dtype=dtype)


def open_heads(x: Tensor, gate: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x [..., H, P] opened by the SiLU of a gate like it, after a norm of each head if the heads have weights [H, P]."""
    if weight is None:
        return x * F.silu(gate)
    flat, doors = x.flatten(-2), gate.flatten(-2)
    return rms_norm(flat, weight.float().flatten(), eps=eps, gate=doors, groups=len(weight)).view_as(x)


def first_taps(channels: int, taps: int) -> nn.Parameter | None:
    """[C, W] weights of a short convolution, uniform in ±1/√W; None for no taps."""
    return nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5)) if taps else None


def convolve(x: Tensor, taps: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Any]:
    """SiLU of x [B, T, C] under a short convolution [C, W], or of x as it is; and the tail [B, W-1, C], if one is kept."""
    if taps is None:
        return F.silu(x), tail
    y, after = short_convolution(x, taps, None, None if tail is None else tail.to(x.dtype), activation="silu")
    return y, None if tail is None else after.to(tail.dtype)


def convolve_step(x: Tensor, taps: Tensor | None, tail: Tensor) -> tuple[Tensor, Tensor]:
    """`convolve` of one token [B, C]."""
    if taps is None:
        return F.silu(x), tail
    y, after = short_convolution_step(x, taps, None, tail.to(x.dtype), activation="silu")
    return y, after.to(tail.dtype)


def fit_heads(
    frame: Frame, heads: int | None, head_dim: int | None, *, published: int = 128, inner: int | None = None
) -> tuple[int, int]:
    """Heads and their width where one or both are left to the frame: together they fill `inner`, or the width."""
    inner = inner or frame.width
    if head_dim is None:
        head_dim = max(8, inner // heads // 8 * 8) if heads else frame.head_size(published, inner)
    return heads or max(1, inner // head_dim), head_dim


def fit_groups(name: str, frame: Frame, heads: int, groups: int | None) -> int:
    """The number of groups that share among the heads, one where it is left out.

    Raises:
        ValueError: the groups do not share the heads evenly.
    """
    groups = groups or 1
    if heads % groups:
        raise ValueError(f"{name}: groups={groups} does not divide its {heads} heads at width {frame.width}")
    return groups


def hidden_width(frame: Frame, hidden: int | None, ratio: float) -> int:
    """A channel mixer's hidden width: as given, else a ratio of the width, rounded to 128 for wide frames, 8 for narrow."""
    return hidden or round_to(ratio * frame.width, 128 if frame.width >= REFERENCE_WIDTH // 2 else 8)


def decay_bias(count: int) -> Tensor:
    """[count] biases whose softplus is log-uniform in 0.001 … 0.1: time constants of tens to thousands of tokens."""
    step = torch.exp(torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


def log_rates(count: int, *, least: float = 1.0) -> Tensor:
    """[count] logarithms of decay rates, uniform in `least` … 16; in 1 … 16 as in Mamba-2 and Kimi Linear."""
    return torch.empty(count).uniform_(least, 16.0).log()


def attend_flops(heads: int, key_width: int, value_width: int, keys: float) -> float:
    """FLOPs of one query of every head over a number of keys: scores and weighted values."""
    return 2.0 * heads * (key_width + value_width) * keys


def mean_visible(context: int, window: int | None = None) -> float:
    """Keys that a query sees, averaged over a prefill of the context."""
    if window is None or context < window:
        return (context + 1) / 2
    return window - window * (window - 1) / (2 * context)


def scanned_name(inner: int) -> str:
    """The name in the stream of what the last scan of so many channels gave."""
    return f"scanned.{inner}"

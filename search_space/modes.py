"""Pieces of state-space mixers: initial modes, parameters that move slowly, and the gated way out.

Letters: D width, N real numbers of a state, P = N/2 pairs of conjugate modes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOW = 0.1
"""The value is this share of its parameter.

Time constants are learnt at a tenth of the rate of other weights (S4: at most 1e-3 beside 1e-2), because a pole that
jumps undoes all that was learnt around it. Adam moves a parameter by its rate whatever the gradient's size, so a tenth
of the parameter moves at a tenth of the rate, and no mixer needs a rate of its own.
"""


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: poles bear no rounding to a frame's low precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def slow(value: Tensor) -> nn.Parameter:
    """The parameter whose share `SLOW` is this value."""
    return nn.Parameter((value / SLOW).to(torch.get_default_dtype()))


def log_uniform(low: float, high: float, *shape: int) -> Tensor:
    """Logarithms, uniform between those of the two ends."""
    return torch.empty(shape).uniform_(math.log(low), math.log(high))


def legendre(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS (arXiv:2008.07669) as S4 writes it, Λ − P P*, and B: one of each pair, three of [P] complex128.

    The matrix −√(2n+1)√(2k+1) below the diagonal and −(n+1) on it becomes −1/2 and a skew part when the square of
    P = √(n + 1/2) is added; that has the same eigenvectors as a Hermitian one. Each is turned until P is positive, so
    that nothing depends on the phases that a solver happens to return; B = √2 P then follows.
    """
    order = torch.arange(state, dtype=torch.float64)
    column = (order + 0.5).sqrt()
    # A + P P* + 1/2: what was -2 p p below the diagonal is now - p p below it and + p p above it.
    skew = torch.outer(column, column)
    skew = skew.triu(1) - skew.tril(-1)
    angles, vectors = torch.linalg.eigh(-1j * skew)
    half = state // 2
    share = (vectors[:, half:].mH @ column.to(vectors.dtype)).abs()
    pole = torch.complex(torch.full_like(share, -0.5), angles[half:])
    low_rank = torch.complex(share, torch.zeros_like(share))
    return pole, low_rank, math.sqrt(2) * low_rank


def first_poles(init: str, state: int) -> Tensor:
    """S4D's initial poles (arXiv:2206.11893): [P] complex128, one of each pair, or [N] float64 for `real`."""
    if init == "real":
        return -torch.arange(1, state + 1, dtype=torch.float64)
    if init == "legs":
        return legendre(state)[0]
    order = torch.arange(state // 2, dtype=torch.float64)
    inverse = state / math.pi * (state / (2 * order + 1) - 1)
    angles = math.pi * order if init == "lin" else inverse
    return torch.complex(torch.full_like(angles, -0.5), angles)


class GatedOut(nn.Module):
    """GELU, a linear map to twice the width, and one half gates the other: S4's way out of its channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(x)), dim=-1)


def fft_flops(taps: int) -> float:
    """FLOPs of a channel and token of a causal convolution through transforms of twice its length."""
    return 30 * math.log2(2 * taps)

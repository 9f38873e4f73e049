"""Performer: random features whose products estimate softmax attention, kept in range by a running maximum.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), M features.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from search_space.frame import Frame, round_to
from search_space.parts import fit_heads, unit
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

CHUNK = 64
EPSILON = 1e-6
BOUND = 8.0
NOTHING = -1e30
"""The peak before the first token: below every exponent, and a number, so that differences are numbers too."""


@dataclass(frozen=True, kw_only=True)
class Performer(MixerSpec):
    """FAVOR+ (arXiv:2009.14794): orthogonal random features whose products estimate the exponential of the scores.

    The estimate's error grows with the exponential of the scores, so queries and keys have length one here and each
    head learns how much of `BOUND` its scores may reach. A running maximum in place of one over the whole text keeps
    the features in range without a look at the future.
    """

    name: ClassVar[str] = "performer"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Choromanski et al. 2020, arXiv:2009.14794"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(32, 64, 128, unit="head")
    features: int | None = choice(64, 128, 256, 512, unit="state", searched=True)
    """Random features; K ln K of them, to a multiple of eight, where they are left out."""
    kernel: str = choice("exp", "relu")
    """What is estimated: softmax, or the cheaper kernel whose features are rectified."""
    redraw: int = choice(0, 1000)
    """Steps of the optimiser between two draws of the features; 0 for one draw."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=64)
        features = self.features or round_to(head_dim * math.log(head_dim), 8)
        return replace(self, heads=heads, head_dim=head_dim, features=features)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim and spec.features
        weights = 4 * frame.width * spec.heads * spec.head_dim
        lift = 2 * spec.heads * spec.head_dim * spec.features
        sums = spec.heads * spec.features * (spec.head_dim + 1)
        within = 2 * spec.heads * (spec.features + spec.head_dim + 1) * CHUNK / 2
        exponential = spec.kernel == "exp"
        cache = [("sums", frame.batch * sums * 4)] + [("peak", frame.batch * spec.heads * 4)] * exponential
        return Cost(
            params=weights + spec.heads * exponential,
            flops_prefill=2 * (weights + lift) + 4 * sums + within,
            flops_decode=2 * (weights + lift) + 4 * sums,
            cache=tuple(CacheTensor(name=name, stored_bytes=held, read_bytes=held) for name, held in cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return PerformerMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class PerformerState:
    """Sums [B, H, M, K + 1] over exp of the peak [B, H], the largest exponent of a key so far; float32.

    The last column sums the features alone. Rectified features need no peak.
    """

    sums: Tensor
    peak: Tensor | None


class PerformerMixer(Mixer):
    """The normaliser rides along as one more value that is always one."""

    def __init__(self, spec: Performer, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim and spec.features
        self.heads, self.head_dim, self.features = spec.heads, spec.head_dim, spec.features
        self.redraw, self.steps = spec.redraw, 0
        inner = self.heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, inner, bias=False)
        self.value = nn.Linear(frame.width, inner, bias=False)
        self.out = nn.Linear(inner, frame.width, bias=False)
        self.sharpness = nn.Parameter(torch.zeros(self.heads)) if spec.kernel == "exp" else None
        self.register_buffer("directions", orthogonal_features(self.features, self.head_dim))
        self.directions: Tensor

    def after_step(self) -> None:
        self.steps += 1
        if self.redraw and self.steps % self.redraw == 0:
            self.directions.copy_(orthogonal_features(self.features, self.head_dim))

    def get_extra_state(self) -> int:
        """The steps since the beginning, without which a resumed training would draw at other times."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Go on counting from there."""
        self.steps = state

    def start(self, batch: int, max_len: int) -> PerformerState:  # noqa: ARG002
        device, shape = self.query.weight.device, (batch, self.heads, self.features, self.head_dim + 1)
        peak = None if self.sharpness is None else torch.full(shape[:2], NOTHING, device=device)
        return PerformerState(sums=torch.zeros(shape, device=device), peak=peak)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to rectified features of queries and keys [..., H, M], or to their exponents, and values [..., H, K + 1].

        A query's exponents are none above 0; values end in one. All in float32.
        """
        q, k, v = (
            layer(x).float().unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        v = F.pad(v, (0, 1), value=1.0)
        with torch.autocast(x.device.type, enabled=False):
            directions = self.directions.float().mT
            if self.sharpness is None:
                return (q @ directions).relu(), (k @ directions).relu(), v
            # Scores are c · cos; half the scale goes to each side, and exp(c / 2) cancels in the quotient.
            scale = (BOUND * torch.sigmoid(self.sharpness.float())).sqrt()[:, None]
            q, k = (unit(q) * scale) @ directions, (unit(k) * scale) @ directions
        return q - q.amax(-1, keepdim=True).detach(), k, v

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Divide what was read [..., H, K + 1] by its last column, and project."""
        floor = EPSILON if self.sharpness is None else torch.finfo(torch.float32).tiny
        y: Tensor = self.out((read[..., :-1] / (read[..., -1:] + floor)).flatten(-2).to(x.dtype))
        return y

    def forward(self, x: Tensor, state: PerformerState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        fade, peak = None, None
        if self.sharpness is not None:
            # The result does not depend on the peaks, so no gradient goes through them.
            highest = k.detach().amax(-1)
            before = torch.full_like(highest[:, 0], NOTHING) if state is None else state.peak
            assert before is not None
            highest = torch.cat([before[:, None], highest], dim=1).cummax(dim=1).values
            fade, peak = highest[:, :-1] - highest[:, 1:], highest[:, -1].clone()
            q, k = q.exp(), (k - highest[:, 1:, :, None]).exp()
        read, sums = scalar_decay(q, k, v, fade, state.sums if state else None, chunk=CHUNK)
        return self.finish(read, x), PerformerState(sums=sums, peak=peak) if state else None

    def step(self, x: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
        q, k, v = self.project(x)
        fade, peak = None, None
        if state.peak is not None:
            peak = torch.maximum(state.peak, k.detach().amax(-1))
            fade = state.peak - peak
            q, k = q.exp(), (k - peak[..., None]).exp()
        read, sums = scalar_decay_step(q, k, v, fade, state.sums)
        return self.finish(read, x), PerformerState(sums=sums, peak=peak)


def orthogonal_features(count: int, width: int) -> Tensor:
    """[count, width] Gaussian rows, made orthogonal within each block of `width` of them."""
    rows = []
    for _ in range(-(-count // width)):
        basis, triangle = torch.linalg.qr(torch.randn(width, width))
        # Without the signs the basis is not uniform among all, and the estimate is biased for good.
        rows.append((basis * triangle.diagonal().sign()).mT)
    lengths: Tensor = torch.randn(count, width).norm(dim=-1, keepdim=True)
    return torch.cat(rows)[:count] * lengths

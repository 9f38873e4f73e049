"""Where tokens stand, as attention is told: rotary angles and their scaling, linear slopes, xPos's fading.

Letters: B batch, T time, S keys, H heads, G key heads, K head width.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kernels.stacked import stackable
from search_space.frame import Frame

POSITIONS = ("rope", "alibi", "xpos", "none")
"""Rotary; a slope by head; rotary that fades with the distance; none."""
FAST_TURNS, SLOW_TURNS = 32, 1
"""YaRN: pairs that turn more often than the first within the original length stay, less often than the second shrink."""
FADE_TOKENS = 512
FADE_FLOOR = 0.4
"""xPos: pair i of N fades by ((i/N + floor) / (1 + floor)) every so many tokens."""

SHORT_ROW = 64
"""Below so many numbers a head, a factor broadcast over the heads costs more than a factor for each."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How rotary angles are stretched for texts longer than the first training's (a frame's fields of that name)."""

    kind: str = "none"
    factor: float = 1.0
    length: int | None = None

    @classmethod
    def of(cls, frame: Frame) -> Self:
        """The frame's own."""
        return cls(kind=frame.rotary_scaling, factor=frame.rotary_factor, length=frame.rotary_length)

    @property
    def gain(self) -> float:
        """What YaRN multiplies queries and keys with, so that scores are sharper: the square of it."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        """[width / 2] float32 angles a token turns by: base**(-2i/width), stretched.

        linear divides all (arXiv:2306.15595); ntk raises the base, so that the slowest pair is divided and the
        fastest stays (NTK-aware, arXiv:2309.00071 §3.1); yarn divides the slow pairs only (arXiv:2309.00071), by a
        ramp over the index of the pair between two rounded limits, as published models compute it.
        """
        pair = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
        if self.kind == "ntk" and width > 2:
            # A single pair turns by one radian whatever the base.
            base = base * self.factor ** (width / (width - 2))
        turns = base**-pair
        if self.kind == "linear":
            return turns / self.factor
        if self.kind != "yarn":
            return turns
        low, high = (self._pair(width, base, often) for often in (FAST_TURNS, SLOW_TURNS))
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        index = torch.arange(width // 2, device=device, dtype=torch.float32)
        # Limits that meet leave a step; a thousandth keeps the quotient finite.
        shrunk = ((index - low) / (high - low if high != low else 1e-3)).clamp(0.0, 1.0)
        return turns / self.factor * shrunk + turns * (1.0 - shrunk)

    def _pair(self, width: int, base: float, often: float) -> float:
        """The index of the pair that turns so often within the original length."""
        assert self.length is not None
        return width * math.log(self.length / (often * 2 * math.pi)) / (2 * math.log(base))


def alibi_slopes(heads: int) -> list[float]:
    """A slope for each head, 2**(-8h/H) for h = 1 … H (arXiv:2108.12409).

    Where H is no power of two, the slopes of the next lower power, then every second one of twice that power.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    between = [2.0 ** (-4.0 * head / power) for head in range(1, 2 * (heads - power), 2)]
    return slopes + between


class _Turn(torch.autograd.Function):
    """x · cos + exchanged(x) · sin, where the sine's sign differs by half; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.half = half
        return (x * cos).addcmul_(_exchanged(x, half), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return (grads[0] * cos).addcmul_(_exchanged(grads[0], ctx.half), sin, value=-1.0), None, None, None


@stackable(shared=("cos", "sin"))
def _turned(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """x [B, T, H, K] turned, for one model or several stacked ones."""
    turned: Tensor = _Turn.apply(x, cos, sin, half)  # type: ignore[no-untyped-call]
    return turned


def _exchanged(x: Tensor, half: int) -> Tensor:
    """x [..., K] whose first two halves have changed places."""
    return torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What a layer does about positions.

    Keys are kept turned; what fades is applied when they are read, so that no number grows with the text.
    """

    kind: str
    """One of POSITIONS."""
    fraction: float
    """The part of each head that turns, from the first width on."""
    base: float
    scaling: Scaling

    @classmethod
    def of(cls, frame: Frame, kind: str, fraction: float) -> Self:
        """A layer's positions in a frame; a fraction of nought turns nothing."""
        turning = fraction if kind in ("rope", "xpos") else 0.0
        return cls(kind=kind, fraction=turning, base=frame.rotary_base, scaling=Scaling.of(frame))

    def turn(self, x: Tensor, start: int, *, stride: int = 1, sharpen: bool = True) -> Tensor:
        """x [B, T, H, K] at positions start, start + stride, …; the first half of what turns pairs with the second.

        With the scaling's gain, unless the caller sharpens its scores itself.
        Angles are float32 whatever x is, because a bfloat16 angle is wrong by radians at a few thousand tokens.
        """
        width = self.width(x)
        if width == 0:
            return x
        position = start + stride * torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angle = position[:, None] * self.scaling.frequencies(width, self.base, x.device)
        gain = self.scaling.gain if sharpen else 1.0
        cos, sin = gain * angle.cos(), gain * angle.sin()
        rest = x.shape[-1] - width
        cos = torch.nn.functional.pad(torch.cat([cos, cos], dim=-1), (0, rest), value=1.0)[:, None].to(
            x.dtype
        )
        sin = torch.nn.functional.pad(torch.cat([-sin, sin], dim=-1), (0, rest))[:, None].to(x.dtype)
        if x.shape[-1] < SHORT_ROW:
            cos, sin = (part.expand(*x.shape[1:]).contiguous() for part in (cos, sin))
        return _turned(x, cos, sin, width // 2)

    def width(self, x: Tensor) -> int:
        """How many of the head's widths turn."""
        return int(x.shape[-1] * self.fraction) // 2 * 2

    def slopes(self, heads: int, device: torch.device) -> Tensor | None:
        """[H] where the score falls with the distance."""
        if self.kind != "alibi":
            return None
        return torch.tensor(alibi_slopes(heads), device=device)

    @property
    def fades(self) -> bool:
        """Whether `fade` changes anything."""
        return self.kind == "xpos" and self.fraction > 0

    def fade(self, x: Tensor, back: Tensor) -> Tensor:
        """x [B, T, H, K] faded by its distances [T] in tokens; a query fades by minus its own (xPos, arXiv:2212.10554).

        In float32 at least.
        """
        width = self.width(x)
        pair = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / max(width, 1)
        rate = torch.log((pair + FADE_FLOOR) / (1 + FADE_FLOOR)) / FADE_TOKENS
        factor = torch.exp(back.unsqueeze(-1) * rate).repeat(1, 2)
        factor = torch.nn.functional.pad(factor, (0, x.shape[-1] - width), value=1.0)
        return x * factor.unsqueeze(1)

"""A gated short convolution: three or four tokens of each channel, gated before and behind, and nothing further back.

Letters: B batch, T time, D width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach


@dataclass(frozen=True, kw_only=True)
class ShortConv(MixerSpec):
    """The double-gated convolution of LFM2: y = out(C ⊙ convolution(B ⊙ x)), where B, C and x come from one projection."""

    name: ClassVar[str] = "shortconv"
    family: ClassVar[str] = "convolution"
    reach: ClassVar[Reach] = "window"
    source: ClassVar[str] = "Liquid AI 2025, LFM2, arXiv:2511.23404"

    taps: int = choice(3, 4, searched=True)

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        return self

    def cost(self, frame: Frame) -> Cost:
        width = frame.width
        params = 4 * width * width + self.taps * width
        tail = frame.batch * width * (self.taps - 1) * frame.dtype_bytes
        return Cost(
            params=params,
            flops_prefill=2 * params + 2 * width,
            flops_decode=2 * params + 2 * width,
            cache=(CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),),
        )

    def build(self, frame: Frame) -> Mixer:
        return ShortConvMixer(self, frame)


@dataclass(frozen=True, kw_only=True)
class ShortConvState:
    """The last gated inputs of the convolution, tail [B, taps - 1, D]."""

    tail: Tensor


class ShortConvMixer(Mixer):
    """Project to two gates and a value, gate, convolve, gate, project."""

    def __init__(self, spec: ShortConv, frame: Frame) -> None:
        super().__init__()
        self.frame, bound = frame, spec.taps**-0.5
        self.enter = nn.Linear(frame.width, 3 * frame.width, bias=False)
        self.taps = nn.Parameter(torch.empty(frame.width, spec.taps).uniform_(-bound, bound))
        self.out = nn.Linear(frame.width, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> ShortConvState:  # noqa: ARG002
        shape = (batch, self.taps.shape[1] - 1, self.frame.width)
        return ShortConvState(
            tail=torch.zeros(shape, device=self.taps.device, dtype=DTYPES[self.frame.dtype])
        )

    def forward(self, x: Tensor, state: ShortConvState | None = None) -> tuple[Tensor, Any]:
        before, behind, value = self.enter(x).chunk(3, dim=-1)
        mixed = before * value
        y, tail = short_convolution(mixed, self.taps, None, state.tail.to(mixed.dtype) if state else None)
        kept = replace(state, tail=tail.to(state.tail.dtype)) if state else None
        return self.out(behind * y), kept

    def step(self, x: Tensor, state: ShortConvState) -> tuple[Tensor, ShortConvState]:
        before, behind, value = self.enter(x).chunk(3, dim=-1)
        mixed = before * value
        y, tail = short_convolution_step(mixed, self.taps, None, state.tail.to(mixed.dtype))
        return self.out(behind * y), replace(state, tail=tail.to(state.tail.dtype))

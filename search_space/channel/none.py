"""No channel mixer: the layer is its sequence mixer alone, as in Mamba."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.spec import Channel, ChannelSpec, Cost


@dataclass(frozen=True, kw_only=True)
class NoChannel(ChannelSpec):
    """Nothing: no parameter, no work, and no norm before it."""

    name: ClassVar[str] = "none"
    family: ClassVar[str] = "channel"
    source: ClassVar[str] = "Mamba, arXiv:2312.00752, has no channel mixer"

    def sized(self, frame: Frame) -> Self:
        del frame
        return replace(self)

    def cost(self, frame: Frame) -> Cost:
        del frame
        return Cost()

    def build(self, frame: Frame) -> Channel:
        del frame
        return Nothing()


class Nothing(Channel):
    """Adds nought to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

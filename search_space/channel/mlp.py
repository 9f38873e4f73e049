"""Two matrices with GELU or ReLU between them, on each token by itself.

Letters: D width, F hidden width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.parts import hidden_width
from search_space.setting import choice
from search_space.spec import Channel, ChannelSpec, Cost

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True, kw_only=True)
class MLP(ChannelSpec):
    """The first transformers' channel mixer: up, activation, down; ReLU as published first, or exact GELU."""

    name: ClassVar[str] = "mlp"
    family: ClassVar[str] = "channel"
    source: ClassVar[str] = "Vaswani 2017, arXiv:1706.03762; Hendrycks 2016, arXiv:1606.08415"

    hidden: int | None = choice(2048, 4096, 8192, 16384, unit="rank")
    """The hidden width; None: from the ratio."""
    ratio: float = choice(4.0, 1.0, 2.0, 3.0)
    activation: str = choice(*ACTIVATIONS)

    def sized(self, frame: Frame) -> Self:
        del frame
        return replace(self)

    def cost(self, frame: Frame) -> Cost:
        weights = 2 * frame.width * hidden_width(frame, self.hidden, self.ratio)
        return Cost(params=weights, flops_prefill=2 * weights, flops_decode=2 * weights)

    def build(self, frame: Frame) -> Channel:
        return MLPChannel(self, frame)


class MLPChannel(Channel):
    """y = down(f(up x))."""

    def __init__(self, spec: MLP, frame: Frame) -> None:
        super().__init__()
        hidden = hidden_width(frame, spec.hidden, spec.ratio)
        self.activate = ACTIVATIONS[spec.activation]
        self.up = nn.Linear(frame.width, hidden, bias=False)
        self.down = nn.Linear(hidden, frame.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activate(self.up(x)))
        return y

"""SwiGLU: a gated two-layer network on each token by itself.

Letters: D width, F hidden width.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.parts import hidden_width
from search_space.setting import choice
from search_space.spec import Channel, ChannelSpec, Cost


@dataclass(frozen=True, kw_only=True)
class SwiGLU(ChannelSpec):
    """Gated by SiLU (arXiv:2002.05202); the hidden width is 8/3 of the width unless said otherwise."""

    name: ClassVar[str] = "swiglu"
    family: ClassVar[str] = "channel"
    source: ClassVar[str] = "Shazeer 2020, arXiv:2002.05202"

    hidden: int | None = choice(1024, 2048, 4096, 8192, unit="rank")
    """The hidden width; None: from the ratio."""
    ratio: float = choice(8 / 3, 1.0, 2.0, 3.0, 3.5, 4.0, 5.25)

    def sized(self, frame: Frame) -> Self:
        del frame
        return replace(self)

    def cost(self, frame: Frame) -> Cost:
        weights = 3 * frame.width * hidden_width(frame, self.hidden, self.ratio)
        return Cost(params=weights, flops_prefill=2 * weights, flops_decode=2 * weights)

    def build(self, frame: Frame) -> Channel:
        return SwiGLUChannel(frame.width, hidden_width(frame, self.hidden, self.ratio))


class SwiGLUChannel(Channel):
    """y = down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y

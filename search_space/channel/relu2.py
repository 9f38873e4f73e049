"""Squared ReLU without a gate, on each token by itself or, with a shift, on a blend of it with the token before.

Letters: B batch, T time, D width, F hidden width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.parts import hidden_width
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Channel, ChannelSpec, Cost, Stream


@dataclass(frozen=True, kw_only=True)
class ReLU2(ChannelSpec):
    """Two matrices and a squared ReLU between them (Primer), as in Nemotron-H; with a shift, RWKV-7's channel mix."""

    name: ClassVar[str] = "relu2"
    family: ClassVar[str] = "channel"
    source: ClassVar[str] = "So 2021, arXiv:2109.08668; Peng 2025, arXiv:2503.14456"

    hidden: int | None = choice(2048, 4096, 8192, 16384, unit="rank")
    """The hidden width; None: from the ratio."""
    ratio: float = choice(4.0, 1.0, 2.0, 3.0, 3.5, 5.25)
    shift: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        del frame
        return replace(self)

    def cost(self, frame: Frame) -> Cost:
        weights = 2 * frame.width * hidden_width(frame, self.hidden, self.ratio)
        if not self.shift:
            return Cost(params=weights, flops_prefill=2 * weights, flops_decode=2 * weights)
        held = frame.batch * frame.width * frame.dtype_bytes
        flops = 2 * weights + 3 * frame.width
        return Cost(
            params=weights + frame.width,
            flops_prefill=flops,
            flops_decode=flops,
            cache=(CacheTensor(name="last", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Channel:
        return ReLU2Channel(self, frame)


@dataclass(frozen=True, kw_only=True)
class ReLU2State:
    """The token before, last [B, D]."""

    last: Tensor


class ReLU2Channel(Channel):
    """y = down(relu(up x)²), where x may be a blend with the token before, by channel."""

    def __init__(self, spec: ReLU2, frame: Frame) -> None:
        super().__init__()
        hidden = hidden_width(frame, spec.hidden, spec.ratio)
        self.dtype = DTYPES[frame.dtype]
        self.up = nn.Linear(frame.width, hidden, bias=False)
        self.down = nn.Linear(hidden, frame.width, bias=False)
        # The share of the token before, from nearly all of it in the first channel to none in the last, as RWKV has it.
        share = 1 - torch.arange(frame.width) / frame.width
        self.share = nn.Parameter(share) if spec.shift else None

    def start(self, batch: int) -> Any:
        if self.share is None:
            return ()
        return ReLU2State(
            last=torch.zeros(batch, self.share.shape[0], device=self.share.device, dtype=self.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with(x, None, Stream())[0]

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        if self.share is None:
            return self.transform(x), state, stream
        first = (
            x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state.last.to(x.dtype).unsqueeze(1)
        )
        y = self.transform(self.blend(x, torch.cat([first, x[:, :-1]], dim=1)))
        return y, self.keep(x[:, -1]) if state else None, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        if self.share is None:
            return self.transform(x), state, stream
        return self.transform(self.blend(x, state.last.to(x.dtype))), self.keep(x), stream

    def blend(self, x: Tensor, before: Tensor) -> Tensor:
        """x and the token before each, [..., D]."""
        assert self.share is not None
        return x + (before - x) * self.share.to(x.dtype)

    def keep(self, last: Tensor) -> ReLU2State:
        """The state behind a token [B, D], in memory of its own."""
        return ReLU2State(last=last.to(self.dtype, copy=True))

    def transform(self, x: Tensor) -> Tensor:
        """The two matrices on x [..., D]."""
        y: Tensor = self.down(F.relu(self.up(x)).square())
        return y

"""The minimal gated recurrent unit: one gate, which looks at the token alone, blends a vector with a candidate.

Letters: B batch, T time, D width, I inner width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step
from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

SCAN_FLOPS = 9
"""A channel and token: gate, its complement, candidate, and the blend of both."""


@dataclass(frozen=True, kw_only=True)
class MinGRU(MixerSpec):
    """minGRU (arXiv:2410.01201): with positive candidates, as the paper trains it, or with linear ones, as it derives it.

    The paper scans positive numbers in logarithms; here the same ones come from products of factors below one, in
    float32. An output projection is always there: a state that is never negative could only add to the residual.
    """

    name: ClassVar[str] = "mingru"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Feng et al. 2024, arXiv:2410.01201"

    expand: float = choice(1.0, 1.5, 2.0, searched=True)
    candidate: str = choice("positive", "linear")

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        return self

    def inner(self, frame: Frame) -> int:
        """Channels of the recurrence."""
        return int(frame.width * self.expand)

    def cost(self, frame: Frame) -> Cost:
        inner = self.inner(frame)
        weights = 3 * frame.width * inner
        held = frame.batch * inner * 4
        return Cost(
            params=weights,
            flops_prefill=2 * weights + SCAN_FLOPS * inner,
            flops_decode=2 * weights + SCAN_FLOPS * inner,
            cache=(CacheTensor(name="hidden", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return MinGRUMixer(self, frame)


@dataclass(frozen=True, kw_only=True)
class MinGRUState:
    """Hidden [B, I], float32: a weighted mean of candidates, so never negative where they are not."""

    hidden: Tensor


class MinGRUMixer(Mixer):
    """Candidate and gate from one projection, a blend channel by channel, a projection back."""

    def __init__(self, spec: MinGRU, frame: Frame) -> None:
        super().__init__()
        self.inner, self.positive = spec.inner(frame), spec.candidate == "positive"
        self.enter = nn.Linear(frame.width, 2 * self.inner, bias=False)
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> MinGRUState:  # noqa: ARG002
        return MinGRUState(hidden=torch.zeros(batch, self.inner, device=self.enter.weight.device))

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of what is kept, and what is added, both [..., I] and float32, of x [..., D]."""
        candidate, gate = self.enter(x).float().chunk(2, dim=-1)
        if self.positive:
            candidate = positive(candidate)
        return F.logsigmoid(-gate), torch.sigmoid(gate) * candidate

    def forward(self, x: Tensor, state: MinGRUState | None = None) -> tuple[Tensor, Any]:
        hidden, last = diagonal_scan(*self.scan_inputs(x), state.hidden if state else None)
        return self.out(hidden.to(x.dtype)), replace(state, hidden=last) if state else None

    def step(self, x: Tensor, state: MinGRUState) -> tuple[Tensor, MinGRUState]:
        hidden = diagonal_scan_step(*self.scan_inputs(x), state.hidden)
        return self.out(hidden.to(x.dtype)), replace(state, hidden=hidden)


def positive(x: Tensor) -> Tensor:
    """The paper's g: x + ½ from nought up, the sigmoid below."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))

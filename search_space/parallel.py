"""Several mixers side by side in one layer: each reads the same input, and their normalised outputs are averaged.

Letters: B batch, T time, D width.  After Hymba, arXiv:2411.13676: mean of RMS-normalised branches with learned gains.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search_space.parts import Norm
from search_space.spec import Mixer, Stream


class Parallel(Mixer):
    """The mean of the branches' outputs, each brought to the same scale first; states are kept as a tuple."""

    def __init__(self, branches: Sequence[Mixer], width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(Norm(width, eps=1e-6) for _ in branches)

    def start(self, batch: int, max_len: int) -> tuple[Any, ...]:
        return tuple(branch.start(batch, max_len) for branch in self._mixers())

    def forward(self, x: Tensor, state: tuple[Any, ...] | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        y, state, _ = self.step_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        outputs, kept = [], []
        for branch, own in zip(self._mixers(), state or (None,) * len(self.branches), strict=True):
            y, own, stream = branch.forward_with(x, own, stream)
            outputs.append(y)
            kept.append(own)
        return self._join(outputs), tuple(kept) if state else None, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        outputs, kept = [], []
        for branch, own in zip(self._mixers(), state, strict=True):
            y, own, stream = branch.step_with(x, own, stream)
            outputs.append(y)
            kept.append(own)
        return self._join(outputs), tuple(kept), stream

    def after_step(self) -> None:
        for branch in self._mixers():
            branch.after_step()

    def _mixers(self) -> list[Mixer]:
        return [branch for branch in self.branches if isinstance(branch, Mixer)]

    def _join(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([norm(y) for norm, y in zip(self.norms, outputs, strict=True)]).mean(0)


def parallel_params(branches: int, width: int) -> int:
    """Parameters beyond the branches' own: one gain a branch and channel."""
    return branches * width if branches > 1 else 0

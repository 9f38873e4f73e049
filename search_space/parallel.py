"""Several mixers side by side in one layer: each reads the same input, and their outputs become one.

Letters: B batch, T time, D width, N mixers.  After Hymba, arXiv:2411.13676: mean of RMS-normalised branches with learned
gains, one projection before and one behind where the width is shared; Falcon-H1, arXiv:2507.22448: a scaled sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.layout import Layer
from search_space.parts import Norm
from search_space.spec import Cost, Mixer, Stream
from search_space.vocabulary import branch_frames, mixer_of

EPS = 1e-6


class Parallel(Mixer):
    """Mixers side by side; states are kept as a tuple.

    join `mean`: the mean of their outputs, each brought to one scale by a norm of its own. `sum`: their sum, each by a
    learned factor, at first one. `gate`: as `mean`, by weights that each token chooses, at first equal.
    Without `widths` every mixer is as wide as the layer. With them the input is projected and dealt out, and the outputs
    stand behind one another before one projection: nothing is added up, and the joins weigh the parts.
    """

    def __init__(
        self,
        branches: Sequence[Mixer],
        width: int,
        *,
        join: str = "mean",
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.widths = None if widths is None else tuple(widths)
        wide, count = self.widths or (width,) * len(branches), len(branches)
        self.norms = None if join == "sum" else nn.ModuleList(Norm(size, eps=EPS) for size in wide)
        self.factors = nn.Parameter(torch.ones(count)) if join == "sum" else None
        self.choose = nn.Linear(width, count, bias=False) if join == "gate" else None
        if self.choose is not None:
            nn.init.zeros_(self.choose.weight)
        self.enter = None if widths is None else nn.Linear(width, width, bias=False)
        self.leave = None if widths is None else nn.Linear(width, width, bias=False)

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
        states = state or (None,) * len(self.branches)
        for branch, part, own in zip(self._mixers(), self._deal(x), states, strict=True):
            y, own, stream = branch.forward_with(part, own, stream)
            outputs.append(y)
            kept.append(own)
        return self._join(x, outputs), tuple(kept) if state else None, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        outputs, kept = [], []
        for branch, part, own in zip(self._mixers(), self._deal(x), state, strict=True):
            y, own, stream = branch.step_with(part, own, stream)
            outputs.append(y)
            kept.append(own)
        return self._join(x, outputs), tuple(kept), stream

    def after_step(self) -> None:
        for branch in self._mixers():
            branch.after_step()

    def _mixers(self) -> list[Mixer]:
        return [branch for branch in self.branches if isinstance(branch, Mixer)]

    def _deal(self, x: Tensor) -> Sequence[Tensor]:
        """x for every mixer, or each mixer's own channels of it."""
        if self.enter is None or self.widths is None:
            return (x,) * len(self.branches)
        return [part.contiguous() for part in self.enter(x).split(self.widths, dim=-1)]

    def _join(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        if self.factors is not None:
            outputs = [
                y * factor for y, factor in zip(outputs, self.factors.to(outputs[0].dtype), strict=True)
            ]
        elif self.choose is not None:
            weights = len(outputs) * self.choose(x).float().softmax(-1).to(outputs[0].dtype)
            outputs = [y * weight for y, weight in zip(outputs, weights.split(1, dim=-1), strict=True)]
        if self.leave is not None:
            joined: Tensor = self.leave(torch.cat(list(outputs), dim=-1))
            return joined
        total = torch.stack(list(outputs)).sum(0)
        return total if self.norms is None else total / len(outputs)


def build_parallel(layer: Layer, frame: Frame) -> Parallel:
    """The module of a layer's mixers side by side."""
    own = branch_frames(layer, frame)
    return Parallel(
        [mixer_of(branch).build(inside) for branch, inside in zip(layer.branches, own, strict=True)],
        frame.width,
        join=layer.join,
        widths=[inside.width for inside in own] if layer.branches[0].share else None,
    )


def parallel_cost(layer: Layer, frame: Frame) -> Cost:
    """What joining costs beyond the mixers themselves."""
    count, width = len(layer.branches), frame.width
    if count == 1:
        return Cost()
    shared = bool(layer.branches[0].share)
    weights = 2 * width * width * shared + (width * count if layer.join == "gate" else 0)
    gains = count if layer.join == "sum" else width * (1 if shared else count)
    return Cost(params=weights + gains, flops_prefill=2 * weights, flops_decode=2 * weights)

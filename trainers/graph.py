"""One graph a step: on a GPU the whole training step is captured once and replayed, so that nothing waits for Python.

Forward, backward, clipping and optimiser are some hundreds of launches for a proxy of a few layers, and each costs
the processor more time than the device. A graph replays them all at one stroke, on static memory and static shapes.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.tasks.task import IGNORED

Drawn = tuple[Tensor, Tensor, Tensor]
"""Tokens [B, T], places [N] and wanted [N] that all members share, or one of each for every member [M, …]."""
Run = Callable[[Drawn], Tensor]
WARM_UPS = 3
"""Runs before a capture, in which kernels are compiled and libraries choose their algorithms."""


class Step(Protocol):
    """A training step as a fixed list of operations."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def gradients(self, batch: Drawn) -> Tensor:
        """Its first half, which leaves the parameters as they are."""

    def __call__(self, batch: Drawn) -> Tensor:
        """The whole step."""


def prepare(step: Step, example: Drawn) -> tuple[Run, str]:
    """The step as it is to be run, and how: `replayed` on a GPU that can capture it, else `eager`, with the reason.

    No parameter moves, nor the optimiser's state.
    """
    if step.device.type != "cuda":
        return step, "eager"
    for _ in range(WARM_UPS):
        step.gradients(example)
    try:
        return _Captured(step, example), "replayed"
    except RuntimeError as error:
        # A layout whose operations ask the device for numbers, such as the loads of experts, cannot be captured.
        torch.cuda.synchronize(step.device)
        return step, f"eager: {str(error).splitlines()[0]}"


def replayable(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as one graph on a GPU that can capture it, else as it is: a decode step is a chain of small launches."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        # What asks the device for numbers on its way is served by launches too.
        torch.cuda.synchronize(device)
        return run
    return graph.replay


class _Captured:
    """A captured step with its own memory for the batch and for what it returns."""

    def __init__(self, step: Step, example: Drawn) -> None:
        self.step = step
        self.inputs = (example[0].clone(), example[1].clone(), example[2].clone())
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step(self.inputs)

    def __call__(self, batch: Drawn) -> Tensor:
        fitted = fit(batch, self.inputs)
        if fitted is None:
            return self.step(batch)
        for own, new in zip(self.inputs, fitted, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.result


def fit(batch: Drawn, like: Drawn) -> Drawn | None:
    """The batch with its list of asked places filled up to the static length; None where it is of another shape."""
    tokens, places, wanted = batch
    missing = like[1].shape[-1] - places.shape[-1]
    if tokens.shape != like[0].shape or missing < 0:
        return None
    return tokens, pad(places, (0, missing)), pad(wanted, (0, missing), value=IGNORED)

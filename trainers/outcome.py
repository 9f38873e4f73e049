"""Endings of a trial, named for what the caller does next. A bug is none of them: it is raised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The layout was trained and scored: keep it, and tell the search."""

    quality: float
    """Weighted mean of the tasks' scores, 0 … 1."""
    scores: Mapping[str, float]
    """By task: 0 is chance, 1 is perfect."""
    metrics: Mapping[str, float]
    """What the scores were made from, in the tasks' own units."""
    steps: int
    """Of all learning rates, from the first step on; what an earlier call trained and a checkpoint kept is included."""
    tokens: int
    train_s: float
    """Seconds inside training loops, an earlier call's included."""
    worker_s: float
    """Seconds of the whole evaluation, an earlier call's included."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Learning curves, learning rates that won, hash of the data, why no checkpoint could be used or written."""
    rung: int = 0
    """The rung that was scored; the last one where the training ended."""
    trained_steps: int | None = None
    """Of this call alone; None: all of them."""
    rungs: tuple["Measured", ...] = ()
    """What was scored at lower rungs on the way."""

    @property
    def new_steps(self) -> int:
        """Steps of this call."""
        return self.steps if self.trained_steps is None else self.trained_steps


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """The layout is to blame: tell the search, and go on."""

    why: str
    diverged: bool = False
    """Its numbers left the finite range, rather than a limit of time or memory."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """The machine is to blame: the same layout may be tried again."""

    why: str
    crashed: bool = False
    """The worker's process died, which the layout may have brought about after all."""


Outcome = Measured | Unfit | Lost

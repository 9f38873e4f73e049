"""The front of trials that end one after the other: each is compared with the front alone, however many there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nas.front import trained_axis, values_of
from storage import pareto
from storage.records import Axis, TrialRecord


@dataclass
class Best:
    """What `nas.front` says of all trials that were seen."""

    axes: Sequence[Axis]
    values: dict[int, list[float]] = field(default_factory=dict)
    """Of the finished ones, by number."""
    on_front: set[int] = field(default_factory=set)
    _volume: float | None = 0.0

    def see(self, trial: TrialRecord) -> None:
        """Take a trial as it now stands; further seeds may have changed the values of one that was seen before."""
        if trial.state != "done" or trial.result is None:
            return
        number, values = trial.number, values_of(trial, self.axes)
        before = self.values.get(number)
        if before == values:
            return
        self.values[number] = values
        # A value that changed may let others onto the front that were beaten by the one before.
        self._find([*self.on_front, number] if before is None else list(self.values))

    def _find(self, numbers: list[int]) -> None:
        signs = np.array([-1.0 if axis.maximise else 1.0 for axis in self.axes])
        points = np.array([self.values[number] for number in numbers], dtype=np.float64) * signs
        found = {numbers[index] for index in pareto.front(points)}
        if found != self.on_front or len(numbers) == len(self.values):
            self.on_front, self._volume = found, None

    @property
    def hypervolume(self) -> float:
        """Share of the study's frozen box of objectives that the front dominates."""
        if self._volume is None:
            raw = np.array([self.values[number] for number in sorted(self.on_front)], dtype=np.float64)
            self._volume = pareto.hypervolume(pareto.losses(self.axes, raw))
        return self._volume

    @property
    def first(self) -> int | None:
        """The trial of the front that is best in what training tells; None where there is no front."""
        up = trained_axis(self.axes)
        place = None if up is None else list(self.axes).index(up)
        score = {number: 0.0 if place is None else self.values[number][place] for number in self.on_front}
        return min(score, key=lambda number: (-score[number], number), default=None)

"""What of a study is explained: its fully trained trials, the answers that drew them, and one objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nas.front import finished, minimised, values_of
from nas.samplers.encoding import Params
from search_space.notation import nearest
from storage import pareto
from storage.records import StudyRecord, TrialRecord

Numbers = NDArray[np.float64]
LEAST = 12
"""Trials below which chances and guesses say more of themselves than of the layers."""


@dataclass(frozen=True)
class Studied:
    """The trials of a study that were trained to the end, in their order."""

    study: StudyRecord
    trials: tuple[TrialRecord, ...]

    @cached_property
    def ranks(self) -> NDArray[np.intp]:
        """[N] 0 on the front, 1 on the front of the rest, and so on."""
        return pareto.ranks(minimised(self.trials, self.study.axes))

    @cached_property
    def inside(self) -> NDArray[np.intp]:
        """Places of the trials whose layouts the space holds: those that it could ask for all of their mixers."""
        return np.array(
            [
                place
                for place, trial in enumerate(self.trials)
                if trial.params and all(f"{p}.mixer" in trial.params for p in range(self.layers))
            ],
            dtype=np.intp,
        )

    @cached_property
    def params(self) -> list[Params]:
        """The answers of those."""
        return [self.trials[place].params for place in self.inside]

    @cached_property
    def layers(self) -> int:
        """Layers of the patterns."""
        return max((len(trial.layout.layers) for trial in self.trials), default=0)

    @cached_property
    def learnt(self) -> tuple[str, ...]:
        """The objectives that only training tells."""
        counted = self.trials[0].costs if self.trials else {}
        return tuple(axis.name for axis in self.study.axes if axis.name not in counted)

    @cached_property
    def explainable(self) -> Mapping[str, bool]:
        """What can be explained, and whether more of it is better: the learnt objectives and the tasks' scores."""
        found = {axis.name: axis.maximise for axis in self.study.axes if axis.name in self.learnt}
        for trial in self.trials[:1]:
            for name in trial.result.scores if trial.result else ():
                if all(other.result and name in other.result.scores for other in self.trials):
                    found.setdefault(name, True)
        return found

    def values(self, name: str) -> Numbers:
        """[N] an objective or a score, as it was measured."""
        axes = [axis.name for axis in self.study.axes]
        if name in axes:
            place = axes.index(name)
            return np.array([values_of(trial, self.study.axes)[place] for trial in self.trials])
        return np.array([trial.value(name) for trial in self.trials if trial.result])

    def check(self, name: str) -> None:
        """Raise ValueError for what cannot be explained."""
        if name in self.explainable:
            return
        there = ", ".join(self.explainable)
        if any(name == axis.name for axis in self.study.axes) or (
            self.trials and name in self.trials[0].costs
        ):
            raise ValueError(
                f"{name} is counted, not learnt: nas show says what each layer of a layout adds to it "
                f"(explained can be {there})"
            )
        raise ValueError(f"no objective {name!r}{nearest(name, self.explainable)} (explained can be {there})")


def studied(study: StudyRecord, trials: Sequence[TrialRecord]) -> Studied:
    """Those of a study's trials that count."""
    done = sorted(finished(trials), key=lambda trial: trial.number)
    sound = [trial for trial in done if np.isfinite(values_of(trial, study.axes)).all()]
    return Studied(study, tuple(sound))


def too_early(count: int) -> str:
    """Why so few trials are not explained."""
    trained = f"{count} trained layout{'' if count == 1 else 's'} of the space"
    return f"it is too early: {trained}, and {LEAST} are needed"


def label(layer: Mapping[str, object]) -> str:
    """What stands in a layer of a stored layout: its mixer, or several side by side."""
    return "|".join(mixers_of(layer))


def mixers_of(layer: Mapping[str, object]) -> list[str]:
    """The mixers of a layer of a stored layout."""
    branches = layer["branches"]
    assert isinstance(branches, Sequence)
    return [str(branch["mixer"]) for branch in branches]

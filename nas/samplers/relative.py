"""Optuna samplers that choose all answers of a trial at once, from what became of the trials before it.

What they share: the space they choose from, the study as they see it, and a start that covers the space. A proposal
follows from the seed and from the trials alone, so that a study that was interrupted goes on as if it had not been.

Letters: N trials, M objectives.
"""

import operator
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.samplers.choices import Choices, LayoutChoices, PlainChoices
from nas.samplers.encoding import Encoding, Key, Params
from search_space.layout import Layout
from search_space.space import Space

PROPOSED = "layout:proposed"
"""Where a trial's proposal is kept, since a running trial may not have asked for all of it yet."""
SPREAD_OVER, MOST_COMPARED = 64, 100
"""Random sets that a start is the farthest of, and the sets that it is compared with."""


@dataclass(frozen=True)
class History:
    """A study as a sampler sees it."""

    finished: tuple[Key, ...]
    values: NDArray[np.float64]
    """[N, M], smaller is better."""
    running: tuple[Key, ...]
    seen: dict[Key, None]
    """All that was ever proposed, failed or not."""
    beside: NDArray[np.float64]
    """Values of finished trials that the space does not hold: they are on the front as well."""

    @classmethod
    def of(
        cls,
        trials: Iterable[FrozenTrial],
        encoding: Encoding,
        signs: Sequence[float],
        but: int,
        ended_keys: dict[int, Key | None],
    ) -> "History":
        """Of all trials but one; keys of trials that have ended are kept in `ended_keys`, by number."""
        finished, running, rows, beside = [], [], [], []
        seen: dict[Key, None] = {}
        for trial in trials:
            if trial.number == but:
                continue
            ended = trial.state == TrialState.COMPLETE and all(map(np.isfinite, trial.values))
            if trial.number in ended_keys:
                key = ended_keys[trial.number]
            else:
                params = trial.system_attrs.get(PROPOSED, trial.params)
                key = encoding.key(params) if params and encoding.takes(params) else None
                if trial.state.is_finished():
                    ended_keys[trial.number] = key
            if key is None:
                beside += [trial.values] if ended else []
                continue
            seen[key] = None
            if ended:
                finished.append(key)
                rows.append(trial.values)
            elif trial.state in (TrialState.RUNNING, TrialState.WAITING):
                running.append(key)
        return cls(tuple(finished), _turned(rows, signs), tuple(running), seen, _turned(beside, signs))


def _turned(rows: Sequence[Sequence[float]], signs: Sequence[float]) -> NDArray[np.float64]:
    turned: NDArray[np.float64] = np.array(rows, dtype=np.float64).reshape(-1, len(signs)) * np.array(signs)
    return turned


class RelativeSampler(BaseSampler):
    """What an Optuna sampler must be besides its choice; `propose` is for the ones below to say."""

    def __init__(
        self,
        space: Space | None,
        search_space: Mapping[str, BaseDistribution] | None,
        usable: Callable[[Params], bool] | None,
        why_not: Callable[[Layout], str | None] | None,
        seed: int | None,
    ) -> None:
        if space is not None and (usable is not None or search_space is not None):
            raise ValueError(
                "space: layouts have questions and rules of their own; give why_not for further rules"
            )
        if space is None and why_not is not None:
            raise ValueError("why_not: it is asked of layouts; give their space, or usable for parameters")
        self.search_space, self.usable = search_space, usable
        self.seed = random.randrange(2**32) if seed is None else seed
        self._layouts = None if space is None else LayoutChoices(space, why_not)
        self._independent = RandomSampler(seed=self.seed)
        self._last: tuple[tuple[float, ...], Choices] | None = None
        self._ended_keys: tuple[int, dict[int, Key | None]] = (-1, {})

    def propose(self, choices: Choices, signs: tuple[float, ...], history: History) -> Key | None:
        """The next set of choices; None leaves every answer to chance."""
        raise NotImplementedError

    def reseed_rng(self) -> None:
        """For a process of its own that asks the same study."""
        self.seed = random.randrange(2**32)
        self._independent.reseed_rng()
        self._last = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All questions of the space of layouts, or what every trial so far was asked."""
        del trial
        if self._layouts is not None:
            return dict(self._layouts.encoding.distributions)
        if self.search_space is not None:
            return dict(self.search_space)
        found = IntersectionSearchSpace(include_pruned=True).calculate(study)
        return {name: own for name, own in found.items() if not own.single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random: what only some trials are asked, and everything in the first one."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next set of choices; empty where there is nothing to choose."""
        if not search_space:
            return {}
        signs = tuple(-1.0 if way == StudyDirection.MAXIMIZE else 1.0 for way in study.directions)
        choices = self._choices_of(search_space, signs)
        # Two studies may have one sampler, and keys are of one space.
        if self._ended_keys[0] != study._study_id:
            self._ended_keys = (study._study_id, {})
        trials = study.get_trials(deepcopy=False)
        history = History.of(trials, choices.encoding, signs, trial.number, self._ended_keys[1])
        key = self.propose(choices, signs, history)
        if key is None:
            return {}
        params = choices.encoding.params(key)
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSED, params)
        return params

    def _choices_of(self, distributions: Mapping[str, BaseDistribution], signs: tuple[float, ...]) -> Choices:
        """The same ones as long as the study asks the same; without a space it may change as trials ask something else."""
        last = self._last
        if last is None or last[0] != signs or dict(last[1].encoding.distributions) != dict(distributions):
            last = self._last = (signs, self._layouts or PlainChoices(dict(distributions), self.usable))
            self._ended_keys = (-1, {})
        return last[1]


def spread(choices: Choices, seen: Mapping[Key, None], rng: random.Random) -> Key | None:
    """A set far from what was seen, every other time one whose places hold one option; None where none is left."""
    lines = [key for key in choices.uniform() if key not in seen]
    drawn = dict.fromkeys(choices.sample(rng) for _ in range(SPREAD_OVER))
    fresh = [key for key in drawn if key is not None and key not in seen]
    if lines and (len(seen) % 2 == 0 or not fresh):
        return rng.choice(lines)
    near = list(seen)[:MOST_COMPARED]
    return max(fresh, key=lambda key: min((_differ(key, other) for other in near), default=0), default=None)


def _differ(key: Key, other: Key) -> int:
    """In how many answers two sets of choices differ."""
    return sum(map(operator.ne, key, other))

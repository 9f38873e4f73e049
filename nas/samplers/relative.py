"""Optuna samplers that choose all answers of a trial at once, from what became of the trials before it.

What they share: the space they choose from, the study as they see it, and a start that covers the space. A proposal
follows from the seed and from the trials alone, so that a study that was interrupted goes on as if it had not been.
"""

import operator
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from nas.samplers.choices import Choices, LayoutChoices, PlainChoices
from nas.samplers.encoding import Key, Params
from nas.samplers.history import PROPOSED, History, Questions, Reader
from search_space.layout import Layout
from search_space.space import Space

SPREAD_OVER, MOST_COMPARED = 64, 100
"""Random sets that a start is the farthest of, and the sets that it is compared with."""


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
        self._forget()

    def _forget(self) -> None:
        """Drop all that follows from the trials and is kept only to save time."""
        self._last: tuple[tuple[float, ...], Choices, Reader] | None = None
        self._questions = Questions()
        # Optuna asks from several threads at once where a study is optimised with n_jobs.
        self._asking = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what `_forget` drops, which neither a copy nor another process needs."""
        fresh = object.__new__(type(self))
        fresh._forget()
        return {name: value for name, value in vars(self).items() if name not in vars(fresh)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

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
        with self._asking:
            found = self._questions.common(study.get_trials(deepcopy=False))
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
        with self._asking:
            choices, reader = self._choices_of(search_space, signs)
            history = reader.read(study.get_trials(deepcopy=False), but=trial.number)
            key = self.propose(choices, signs, history)
            if key is None:
                return {}
            params = choices.encoding.params(key)
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSED, params)
        return params

    def _choices_of(
        self, distributions: Mapping[str, BaseDistribution], signs: tuple[float, ...]
    ) -> tuple[Choices, Reader]:
        """The same ones as long as the study asks the same; without a space it may change as trials ask something else."""
        last = self._last
        if last is None or last[0] != signs or dict(last[1].encoding.distributions) != dict(distributions):
            choices = self._layouts or PlainChoices(dict(distributions), self.usable)
            last = self._last = (signs, choices, Reader(choices.encoding, signs))
        return last[1], last[2]


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

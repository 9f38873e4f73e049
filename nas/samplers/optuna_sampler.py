"""Optuna's samplers, and ours that are written for it, behind one door: a study in memory, rebuilt from our tables."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from nas.samplers.evolution import EvolutionSampler
from nas.samplers.layout import LayoutSampler
from nas.samplers.sampler import Aim, Known, Proposal
from search_space.space import Space, T

optuna.logging.set_verbosity(optuna.logging.ERROR)
STARTS = 8
POPULATION = 20


def _quietly(make: Callable[[], BaseSampler]) -> BaseSampler:
    with warnings.catch_warnings():
        # Multivariate and grouped sampling are what conditional settings need, experimental as they are called.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make()


class SteadyNSGAII(NSGAIISampler):
    """NSGA-II whose parents stand in the order of their trials, be they just selected or remembered from before.

    Optuna's own gives its random numbers to parents by their places, which differ between the two.
    """

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The parents of a generation."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class SteadyNSGAIII(NSGAIIISampler):
    """NSGA-III in the same order."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The parents of a generation."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


MAKERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: _quietly(
        lambda: TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTS
        )
    ),
    "nsga2": lambda seed: SteadyNSGAII(seed=seed, population_size=POPULATION),
    "nsga3": lambda seed: _quietly(lambda: SteadyNSGAIII(seed=seed, population_size=POPULATION)),
    "gp": lambda seed: _quietly(lambda: GPSampler(seed=seed, n_startup_trials=STARTS)),
}
"""By name, and from a seed alone: a sampler is made anew for each question, so that an answer depends on the seed and
on the trials known so far, and not on how often the search was interrupted. Ours promise that by themselves."""


class Revisable(InMemoryStorage):
    """Optuna's memory, in which a finished trial may be told again: what was expected of it gives way to what it is."""

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        """Every trial is."""


class OptunaChooser:
    """Lets an Optuna trial pick."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def choose(self, name: str, options: Sequence[T]) -> T:
        """One of the options, by the sampler."""
        choices: Any = tuple(options)
        chosen: T = self.trial.suggest_categorical(name, choices)
        return chosen


class OptunaSampler:
    """An Optuna sampler over a space; it is told losses on the frozen scale of the axes."""

    def __init__(self, name: str, space: Space, aim: Aim, *, seed: int) -> None:
        self.space, self.aim, self.seed = space, aim, seed
        self.options = space.distributions()
        self.make = MAKERS.get(name)
        sampler = self._own(name) if self.make is None else self.make(seed)
        self.memory = Revisable()
        self.study = optuna.create_study(
            storage=self.memory, sampler=sampler, directions=["minimize"] * len(aim.axes)
        )

    def _own(self, name: str) -> BaseSampler:
        if name == "evolution":
            return EvolutionSampler(space=self.space, why_not=self.aim.why_not, seed=self.seed)
        known = None if self.aim.known is None else self.aim.known_losses
        return LayoutSampler(space=self.space, known_layout=known, why_not=self.aim.why_not, seed=self.seed)

    def learn(self, known: Known) -> int:
        """Add a trial to the memory.

        Of one with other choices than the space offers ours take the values, which may be on the front; Optuna's can do
        nothing with it, and it is kept out (its token is -1).
        """
        params = dict(known.params)
        if any(value not in self.options.get(name, ()) for name, value in params.items()):
            params = {}
        if not params and self.make is not None:
            return -1
        distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(self.options[name]) for name in params
        }
        ended = known.values is not None
        state = TrialState.FAIL if known.failed else TrialState.COMPLETE if ended else TrialState.RUNNING
        self.study.add_trial(
            create_trial(
                state=state,
                values=None if known.values is None else self.aim.losses(known.values),
                params=params,
                distributions=distributions,
                system_attrs=dict(known.attrs),
            )
        )
        return len(self.study.get_trials(deepcopy=False)) - 1

    def ask(self, number: int, attempt: int) -> Proposal:
        """A pattern by the sampler, seeded by the study's seed, the trial's number and the attempt."""
        if self.make is not None:
            self.study.sampler = self.make(_seed(self.seed, number, attempt))
        trial = self.study.ask()
        layout = self.space.draw(OptunaChooser(trial))
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        return Proposal(
            layout=layout, params=dict(frozen.params), attrs=dict(frozen.system_attrs), token=trial.number
        )

    def tell(self, token: int, values: Sequence[float] | None) -> None:
        """End a trial of the memory, or end it otherwise than was told before."""
        if token < 0:
            return
        losses = None if values is None else self.aim.losses(values)
        trial = self.study.get_trials(deepcopy=False)[token]
        if not trial.state.is_finished():
            self.study.tell(token, losses, state=TrialState.FAIL if values is None else None)
            return
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        study_id = self.memory.get_study_id_from_name(self.study.study_name)
        trial_id = self.memory.get_trial_id_from_study_id_trial_number(study_id, token)
        self.memory.set_trial_state_values(trial_id, state, losses)


def _seed(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")

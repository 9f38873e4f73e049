"""Optuna's samplers behind ours: a study in memory, rebuilt from our tables whenever a search goes on."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from nas.samplers.sampler import Known, Proposal
from search_space.space import Space, T

optuna.logging.set_verbosity(optuna.logging.ERROR)


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        # Multivariate and grouped sampling are what conditional settings need, experimental as they are called.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=8)


class SteadyNSGAII(NSGAIISampler):
    """NSGA-II whose parents stand in the order of their trials, be they just selected or remembered from before.

    Optuna's own gives its random numbers to parents by their places, which differ between the two.
    """

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The parents of a generation."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


MAKERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": _tpe,
    "nsga2": lambda seed: SteadyNSGAII(seed=seed, population_size=20),
}
"""By name, and from a seed alone: a sampler is made anew for each question, so that an answer depends on the seed and
on the trials known so far, and not on how often the search was interrupted."""


class OptunaChooser:
    """Lets an Optuna trial pick."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def choose(self, name: str, options: Sequence[T]) -> T:
        """One of the options, by the sampler."""
        index: int = self.trial.suggest_categorical(name, tuple(range(len(options))))
        return options[index]


class OptunaSampler:
    """One of MAKERS over a space; options are told to Optuna by their index, so that any value may be one."""

    def __init__(self, name: str, space: Space, *, maximise: Sequence[bool], seed: int) -> None:
        self.make, self.space, self.seed = MAKERS[name], space, seed
        self.options = space.distributions()
        self.study = optuna.create_study(
            sampler=self.make(seed), directions=["maximize" if up else "minimize" for up in maximise]
        )

    def learn(self, known: Known) -> int:
        """Add a trial to the memory; one with other choices than the space offers is kept out (its token is -1)."""
        indices: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, value in known.params.items():
            options = self.options.get(name, ())
            if value not in options:
                return -1
            indices[name] = options.index(value)
            distributions[name] = CategoricalDistribution(tuple(range(len(options))))
        if not indices:
            return -1
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING if known.values is None else TrialState.COMPLETE,
                values=None if known.values is None else list(known.values),
                params=indices,
                distributions=distributions,
                system_attrs=dict(known.attrs),
            )
        )
        return len(self.study.get_trials(deepcopy=False)) - 1

    def ask(self, number: int, attempt: int) -> Proposal:
        """A pattern by the sampler, seeded by the study's seed, the trial's number and the attempt."""
        self.study.sampler = self.make(_seed(self.seed, number, attempt))
        trial = self.study.ask()
        layout = self.space.draw(OptunaChooser(trial))
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        params = {name: self.options[name][index] for name, index in frozen.params.items()}
        return Proposal(layout=layout, params=params, attrs=dict(frozen.system_attrs), token=trial.number)

    def tell(self, token: int, values: Sequence[float] | None) -> None:
        """End a trial of the memory."""
        if token < 0:
            return
        if values is None:
            self.study.tell(token, state=TrialState.FAIL)
        else:
            self.study.tell(token, list(values))


def _seed(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")

"""What is compared: our sampler and what it is without its parts, Optuna's samplers, BoTorch, and the project's others.

Each is driven by the same two verbs, asked so many times before the first answer is told as the batch is large.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from benchmarks.search_problems import Params, Problem
from nas.samplers.choices import Choices
from nas.samplers.encoding import Encoding, Key
from nas.samplers.layout import LayoutSampler
from nas.samplers.proposer import Numbers, Proposer

POPULATION = 20
STARTS = 10
"""Random sets that BoTorch is given before its first model, as many as Optuna's samplers take."""
DRAWN = 1000
"""Random sets that BoTorch weighs, besides all those that are one choice away from the front."""
FITTED = 75
"""Steps in which BoTorch finds a kernel's weights; left to itself it takes up to ten times as many, for hours a seed."""


class Driver(Protocol):
    """A sampler at work on a problem."""

    def ask(self) -> tuple[Any, Params]:
        """A token and a set of choices."""

    def tell(self, token: Any, values: tuple[float, ...]) -> None:
        """What it gave; smaller is better."""


class OptunaDriver:
    """An Optuna sampler over a study in memory."""

    def __init__(self, problem: Problem, sampler: BaseSampler, integers: bool = False) -> None:
        self.options, self.integers = problem.options, integers
        self.distributions: dict[str, BaseDistribution] = dict(problem.distributions)
        if integers:
            # Some samplers draw categories at random whatever they do with numbers.
            self.distributions = {
                name: IntDistribution(0, len(own) - 1) for name, own in self.options.items()
            }
        self.study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(problem.objectives))

    def ask(self) -> tuple[Any, Params]:
        """The study's next trial."""
        trial = self.study.ask(self.distributions)
        if not self.integers:
            return trial, trial.params
        return trial, {name: self.options[name][place] for name, place in trial.params.items()}

    def tell(self, token: Any, values: tuple[float, ...]) -> None:
        """End it."""
        self.study.tell(token, list(values))


class BotorchDriver:
    """BoTorch's qLogNEHVI: Gaussian processes with its kernel for categories, one an objective.

    A loop of our own: the acquisition is not optimised in a relaxed space but weighed over sets of choices themselves,
    those that were not evaluated yet, which suits a discrete space better than rounding. Daulton and others, arXiv:2105.08195; Ament and
    others, arXiv:2310.20708.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        import torch

        self.torch, self.seed = torch, seed
        self.names = list(problem.options)
        self.options = problem.options
        self.widths = [len(own) for own in problem.options.values()]
        self.rng = np.random.default_rng(seed)
        self.told: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        self.running: list[tuple[int, ...]] = []

    def ask(self) -> tuple[Any, Params]:
        """The best by the acquisition, after random starts."""
        seen = {key for key, _ in self.told} | set(self.running)
        if len(seen) < STARTS or len(self.told) < 2:
            key = tuple(int(self.rng.integers(width)) for width in self.widths)
        else:
            pool = np.array([key for key in map(tuple, self._pool()) if key not in seen])
            key = tuple(map(int, pool[int(np.argmax(self._weigh(pool)))]))
        self.running.append(key)
        return key, {name: self.options[name][place] for name, place in zip(self.names, key, strict=True)}

    def tell(self, token: Any, values: tuple[float, ...]) -> None:
        """Remember it."""
        self.running.remove(token)
        self.told.append((token, values))

    def _pool(self) -> NDArray[np.intp]:
        drawn = [[int(self.rng.integers(width)) for width in self.widths] for _ in range(DRAWN)]
        values = np.array([row for _, row in self.told], dtype=np.float64)
        theirs, own = values[None], values[:, None]
        beats = np.all(theirs <= own, axis=2) & np.any(theirs < own, axis=2)
        beaten = np.any(beats, axis=1).tolist()
        for (key, _), lost in zip(self.told, beaten, strict=True):
            if not lost:
                for place, width in enumerate(self.widths):
                    drawn += [[*key[:place], other, *key[place + 1 :]] for other in range(width)]
        return np.unique(np.array(drawn), axis=0)

    def _weigh(self, pool: NDArray[np.intp]) -> NDArray[np.float64]:
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import MixedSingleTaskGP, ModelListGP
        from botorch.sampling import SobolQMCNormalSampler
        from botorch.utils.multi_objective.hypervolume import infer_reference_point
        from botorch.utils.multi_objective.pareto import is_non_dominated
        from gpytorch.mlls import ExactMarginalLogLikelihood

        torch = self.torch
        torch.manual_seed(self.seed * 100_003 + len(self.told) + len(self.running))
        known = torch.tensor([key for key, _ in self.told], dtype=torch.double)
        values = -torch.tensor([row for _, row in self.told], dtype=torch.double)
        values = (values - values.mean(0)) / values.std(0).clamp_min(1e-9)
        places = list(range(len(self.widths)))
        models = []
        for column in values.T:
            model = MixedSingleTaskGP(known, column[:, None], cat_dims=places)
            fit_gpytorch_mll(
                ExactMarginalLogLikelihood(model.likelihood, model),
                optimizer_kwargs={"options": {"maxiter": FITTED}},
            )
            models.append(model)
        reference = infer_reference_point(values[is_non_dominated(values)])
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            ModelListGP(*models),
            ref_point=reference.tolist(),
            X_baseline=known,
            prune_baseline=True,
            sampler=SobolQMCNormalSampler(torch.Size([64]), seed=self.seed),
            X_pending=torch.tensor(self.running, dtype=torch.double) if self.running else None,
        )
        with torch.no_grad():
            asked = torch.tensor(pool, dtype=torch.double)[:, None]
            found = torch.cat([acquisition(part) for part in asked.split(512)])
        weights: NDArray[np.float64] = found.numpy()
        return weights


class Unordered(Encoding):
    """Answers alone: neither how often an option stands in a sequence nor which follows which."""

    @cached_property
    def sequences(self) -> list[list[str]]:
        """None."""
        return []


class Sure(Proposer):
    """Takes every guess for certain."""

    def weigh(
        self,
        keys: Sequence[Key],
        values: Numbers,
        running: Sequence[Key],
        beside: Numbers,
        doubt: float = 1.0,
    ) -> tuple[tuple[Key, ...], Numbers]:
        """As if the guesses had no spread."""
        del doubt
        return super().weigh(keys, values, running, beside, 0.0)


class Changed(LayoutSampler):
    """Ours, each of whose proposers is changed by a rule."""

    _changed: tuple[tuple[Proposer, Proposer], ...] = ()

    def _proposer_of(self, choices: Choices, signs: tuple[float, ...], veiled: bool) -> Proposer:
        made = super()._proposer_of(choices, signs, veiled)
        for before, after in self._changed:
            if before is made:
                return after
        self._changed = (*self._changed, (made, self._change(made)))
        return self._changed[-1][1]

    def _change(self, made: Proposer) -> Proposer:
        raise NotImplementedError


class WithoutPairs(Changed):
    """Ours, told of each answer alone."""

    def _change(self, made: Proposer) -> Proposer:
        choices = copy.copy(made.choices)
        choices.encoding = Unordered(made.choices.encoding.distributions)
        return Proposer(choices, made.costs, made.seed)


class WithoutDoubt(Changed):
    """Ours, that goes by the likeliest values alone."""

    def _change(self, made: Proposer) -> Proposer:
        return Sure(made.choices, made.costs, made.seed)


class WithoutVeil(LayoutSampler):
    """Ours, that always goes by the costs it knows."""

    def _proposer_of(self, choices: Choices, signs: tuple[float, ...], veiled: bool) -> Proposer:
        del veiled
        return super()._proposer_of(choices, signs, False)


def _ours(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return OptunaDriver(problem, LayoutSampler(problem.known, space=problem.space, seed=seed))


def _ours_unknown(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return OptunaDriver(problem, LayoutSampler(space=problem.space, seed=seed))


def _ours_without_pairs(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return OptunaDriver(problem, WithoutPairs(problem.known, space=problem.space, seed=seed))


def _ours_without_doubt(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return OptunaDriver(problem, WithoutDoubt(problem.known, space=problem.space, seed=seed))


def _ours_without_veil(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return OptunaDriver(problem, WithoutVeil(problem.known, space=problem.space, seed=seed))


def _optuna(make: Callable[[int, int], BaseSampler], integers: bool = False) -> "Make":
    def driver(problem: Problem, seed: int, batch: int) -> Driver:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return OptunaDriver(problem, make(seed, batch), integers)

    return driver


def _botorch(problem: Problem, seed: int, batch: int) -> Driver:
    del batch
    return BotorchDriver(problem, seed)


def _evolution(problem: Problem, seed: int, batch: int) -> Driver:
    from nas.samplers.evolution import EvolutionSampler

    del batch
    return OptunaDriver(problem, EvolutionSampler(space=problem.space, seed=seed))


Make = Callable[[Problem, int, int], Driver]
"""From a problem, a seed and the batch."""
OURS: dict[str, Make] = {
    "ours": _ours,
    "ours_unknown": _ours_unknown,
    "ours_without_pairs": _ours_without_pairs,
    "ours_without_doubt": _ours_without_doubt,
    "ours_without_veil": _ours_without_veil,
}
"""With costs known and, by name, without: known costs, what sequences tell, uncertainty, guesses of known costs."""
PEERS: dict[str, Make] = {
    "random": _optuna(lambda seed, _: RandomSampler(seed=seed)),
    "qmc": _optuna(lambda seed, _: QMCSampler(seed=seed, scramble=True), integers=True),
    "tpe": _optuna(lambda seed, batch: TPESampler(seed=seed, constant_liar=batch > 1)),
    "tpe_group": _optuna(
        lambda seed, batch: TPESampler(seed=seed, multivariate=True, group=True, constant_liar=batch > 1)
    ),
    "nsga2": _optuna(lambda seed, _: NSGAIISampler(seed=seed, population_size=POPULATION)),
    "nsga3": _optuna(lambda seed, _: NSGAIIISampler(seed=seed, population_size=POPULATION)),
    "evolution": _evolution,
    "gp": _optuna(lambda seed, _: GPSampler(seed=seed)),
    "botorch": _botorch,
}
ALL: dict[str, Make] = OURS | PEERS
ABOUT = {
    "ours": "LayoutSampler, costs known",
    "ours_unknown": "LayoutSampler, nothing known",
    "ours_without_pairs": "LayoutSampler, costs known, without counts and pairs of layers",
    "ours_without_doubt": "LayoutSampler, costs known, without uncertainty",
    "ours_without_veil": "LayoutSampler, costs known and never guessed",
    "random": "Optuna RandomSampler",
    "qmc": "Optuna QMCSampler, scrambled Sobol points, options as integers",
    "tpe": "Optuna TPESampler",
    "tpe_group": "Optuna TPESampler, multivariate and grouped",
    "nsga2": f"Optuna NSGAIISampler, population {POPULATION}",
    "nsga3": f"Optuna NSGAIIISampler, population {POPULATION}",
    "evolution": "regularised evolution over layouts",
    "gp": "Optuna GPSampler",
    "botorch": f"BoTorch qLogNEHVI, weighed over {DRAWN} random sets of choices and all neighbours of the front; a Gaussian "
    "process for categories an objective",
}
NEEDS = {"botorch": "botorch"}
"""Packages that are not the project's own."""


def why_not(name: str) -> str | None:
    """Why a sampler cannot be run here, or None."""
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install -c constraints.txt -e '.[bench]'"
    if name == "evolution" and importlib.util.find_spec("nas.samplers.evolution") is None:
        return "the project has no sampler of this name"
    return None

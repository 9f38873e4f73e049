"""How long our sampler takes for a proposal once many trials have finished: batches of 8, one thread, processor time."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from benchmarks.common import save
from nas.config import resolve
from nas.plan import make_plan
from nas.samplers.layout import LayoutSampler
from search_space.layout import Layout
from search_space.space import Space, T

TRIALS = (1000, 10_000)
BATCH, BATCHES = 8, 5
Params = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A space and what its choices give; smaller is better."""

    draw: Callable[[random.Random], Params]
    values: Callable[[Params], Sequence[float]]
    known: Callable[[Params], Sequence[float | None]]
    options: Mapping[str, Sequence[Any]]
    space: Space | None = None


def cell() -> Case:
    """Six operators of five kinds, as in NAS-Bench-201: all 15,625 are weighed; an error and a latency that is known."""
    options = {f"Op{place}": tuple(range(5)) for place in range(6)}
    rng = random.Random(0)
    worth = {(name, option): rng.random() for name, own in options.items() for option in own}
    price = {option: rng.random() for option in range(5)}

    def known(params: Params) -> list[float | None]:
        return [None, sum(price[option] for option in params.values())]

    def values(params: Params) -> list[float]:
        error = sum(worth[item] for item in params.items()) + 0.3 * (params["Op0"] == params["Op3"])
        return [error, sum(price[option] for option in params.values())]

    def draw(rng: random.Random) -> Params:
        return {name: rng.choice(own) for name, own in options.items()}

    return Case(draw=draw, values=values, known=known, options=options)


@dataclass(frozen=True)
class _Answers:
    """Draws what a set of choices says."""

    params: Params

    def choose(self, name: str, options: Sequence[T]) -> T:
        """The option that the set holds."""
        del options
        value: T = self.params[name]
        return value


def layouts() -> Case:
    """12 layers of the default mixers with their settings; an error, and cache bytes and parameters that are known."""
    space = make_plan(resolve({"space": {"layers": 12}})).space
    rng = random.Random(0)
    worth = {(place, letter): rng.random() for place in range(space.layers) for letter in space.alphabet}

    def cost(layout: Layout, name: str) -> float:
        pairs = zip(space.weights, layout.layers, strict=True)
        return sum(weight * space.prices[layer][name] for weight, layer in pairs)

    def known(params: Params) -> list[float | None]:
        layout = space.draw(_Answers(params))
        return [None, cost(layout, "kv_bytes"), cost(layout, "params")]

    def values(params: Params) -> list[float]:
        layout = space.draw(_Answers(params))
        error = sum(worth[item] for item in enumerate(layout.layers))
        return [error, cost(layout, "kv_bytes"), cost(layout, "params")]

    def draw(rng: random.Random) -> Params:
        params = space.params_of(space.sample(rng))
        assert params is not None
        return params

    return Case(draw=draw, values=values, known=known, options=space.distributions(), space=space)


CASES: dict[str, Callable[[], Case]] = {"cell": cell, "layouts_12": layouts}


def measure(case: Case, trials: int, batches: int = BATCHES) -> dict[str, float]:
    """Milliseconds of processor time: of the first proposal, which learns everything anew, then of batches, mean a proposal, and the worst.

    Between batches each trial is told, so that every batch has something to learn.
    """
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = LayoutSampler(case.known, space=case.space, seed=0)
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(tuple(own)) for name, own in case.options.items()
    }
    study = optuna.create_study(
        sampler=sampler, directions=["minimize"] * len(case.values(case.draw(random.Random(0))))
    )
    rng = random.Random(1)
    for _ in range(trials):
        params = case.draw(rng)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                values=list(case.values(params)),
                params=dict(params),
                distributions={name: distributions[name] for name in params},
            )
        )

    def ask() -> tuple[optuna.Trial, Params, float]:
        began = time.process_time()
        if case.space is None:
            trial = study.ask(distributions)
        else:
            trial = study.ask()
            case.space.draw(_Asking(trial))
        return trial, trial.params, (time.process_time() - began) * 1e3

    trial, params, first = ask()
    study.tell(trial, list(case.values(params)))
    each = []
    for _ in range(batches):
        asked = [ask() for _ in range(BATCH)]
        each.append([spent for _, _, spent in asked])
        for trial, params, _ in asked:
            study.tell(trial, list(case.values(params)))
    flat = [spent for batch in each for spent in batch]
    return {
        "first_ms": round(first, 1),
        "mean_ms": round(statistics.mean(flat), 1),
        "batch_median_ms": round(statistics.median(sum(batch) for batch in each) / BATCH, 1),
        "worst_ms": round(max(flat), 1),
    }


@dataclass(frozen=True)
class _Asking:
    """Lets an Optuna trial pick among the options themselves."""

    trial: optuna.Trial

    def choose(self, name: str, options: Sequence[T]) -> T:
        """One of the options, by the sampler."""
        choices: Any = tuple(options)
        chosen: T = self.trial.suggest_categorical(name, choices)
        return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case in a process of its own, so that numpy is loaded with one thread, and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asking", description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(CASES),
        choices=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    parser.add_argument("--trials", nargs="+", type=int, default=list(TRIALS))
    parser.add_argument("--alone", action="store_true", help="measure here and print, without saving")
    chosen = parser.parse_args(arguments)
    if chosen.alone:
        rows = [
            {"case": name, "trials": trials, **measure(CASES[name](), trials)}
            for name in chosen.cases
            for trials in chosen.trials
        ]
        print(json.dumps(rows))
        return
    rows = []
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    for name in chosen.cases:
        for trials in chosen.trials:
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--alone",
                "--cases",
                name,
                "--trials",
                str(trials),
            ]
            done = subprocess.run(
                command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows += json.loads(done.stdout)
    save("asking", {"batch": BATCH, "optuna": optuna.__version__, "rows": rows})


if __name__ == "__main__":
    main()

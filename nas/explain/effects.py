"""What changing one layer would do, by a surrogate of the records: expected changes with their uncertainty.

A Gaussian process over the answers that drew the layouts, fitted to the values themselves rather than to their ranks, so
that an average over layouts is as normal as each of them and its interval is exact for the process. How wrong it is about
trials that it was not shown is measured first, and widens the intervals where they claim too much.

Letters: N trials, D columns, S sets of layouts that are averaged over, M layouts in each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from dashboards.reasons import Effect, Effects, Pair, Swap, Trust
from nas.explain.answers import Answers, encoding_of
from nas.explain.studied import LEAST, Numbers, Studied, too_early
from nas.samplers.encoding import Encoding, Params
from nas.samplers.surrogate import Process, squares, weigh

FOLDS = 5
MOST = 400
"""Trials that the surrogate learns from; of more, so many by lot."""
MOST_LAYOUTS, MOST_POINTS = 100, 1200
"""Layouts that a change is averaged over, and sets of answers that are compared at once."""
SEEN_LEAST = 3
"""Trials that must hold what a comparison is about."""
MOST_PAIRS = 40
TWO_SIDED = 1.96
UNSURE = 10
"""The intervals are wider by this over the number of trials, since the process takes its own weights for known. Measured
on additive truths: without it those of 16 to 32 trials held the truth of four swaps in five, with it of nineteen in twenty.
"""


@dataclass(frozen=True)
class Averages:
    """What a process believes of averages over sets of layouts, jointly."""

    mean: Numbers
    """[S]"""
    covariance: Numbers
    """[S, S]"""

    @classmethod
    def of(cls, process: Process, sets: Numbers) -> "Averages":
        """Of columns [S, M, D]."""
        count, size, width = sets.shape
        points = sets.reshape(count * size, width) * process.root
        own = np.exp(-squares(points, points)).reshape(count, size, count, size).mean((1, 3))
        known = np.exp(-squares(points, process.columns)).reshape(count, size, -1).mean(1)
        reach: Numbers = solve_triangular(process.factor, known.T, lower=True)
        return cls(process.mean + reach.T @ process.half, process.scale * (own - reach.T @ reach))

    def estimate(self, weights: Numbers) -> tuple[float, float]:
        """A weighted sum [S] of the averages, and its standard deviation."""
        return float(weights @ self.mean), math.sqrt(max(0.0, float(weights @ self.covariance @ weights)))


@dataclass(frozen=True)
class Surrogate:
    """A process over answers, in units of the values' standard deviation."""

    encoding: Encoding
    process: Process
    unit: float
    """Standard deviation of the values."""
    widen: float
    """What the intervals are widened by, since they claim too much."""

    def columns(self, answers: Sequence[Params]) -> Numbers:
        """[M, D] of answers."""
        return self.encoding.of_keys([self.encoding.key(own) for own in answers])

    def interval(self, averages: Averages, weights: dict[int, float]) -> dict[str, float]:
        """The change, and the interval around it."""
        vector = np.zeros(len(averages.mean))
        for place, weight in weights.items():
            vector[place] += weight
        change, deviation = averages.estimate(vector)
        half = TWO_SIDED * deviation * self.widen
        return {
            "change": change * self.unit,
            "low": (change - half) * self.unit,
            "high": (change + half) * self.unit,
        }


def effects(studied: Studied, objective: str) -> Effects:
    """What the records say of changes to their layouts."""
    places = studied.inside
    if len(places) > MOST:
        places = np.sort(np.random.default_rng(0).choice(places, MOST, replace=False))
    values = studied.values(objective)[places]
    on_front = studied.ranks[places] == 0
    params = [studied.trials[place].params for place in places]
    rng = np.random.default_rng(0)
    chosen, front = _some(np.arange(len(places)), rng), _some(np.flatnonzero(on_front), rng)

    def none(why: str, trust: Trust | None = None) -> Effects:
        return Effects(
            objective=objective,
            trials=len(places),
            layouts=len(chosen),
            front_layouts=len(front),
            trust=trust,
            why_not=why,
        )

    if len(places) < LEAST:
        return none(too_early(len(places)))
    if np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return none(f"every trial has the same {objective}, {values[0]:.3g}")
    answers = Answers(params)
    if len(answers.mixers) < 2:
        return none(f"all layers of all trials hold {answers.mixers[0]}")
    encoding = encoding_of(params)
    columns = encoding.of_keys([encoding.key(own) for own in params])
    trust, widen = _trust(encoding, columns, values)
    spread = float(values.std())
    process = _fit(encoding, columns, (values - values.mean()) / spread)
    surrogate = Surrogate(encoding, process, spread, widen)
    seen = [answers.params[place] for place in chosen]
    best = [answers.params[place] for place in front]
    cells, swaps = _cells(surrogate, answers, seen, maximise=studied.explainable[objective])
    return Effects(
        objective=objective,
        trials=len(places),
        layouts=len(seen),
        front_layouts=len(best),
        trust=trust,
        cells=cells,
        front_cells=_cells(surrogate, answers, best, maximise=True)[0] if best else (),
        swaps=swaps,
        pairs=_pairs(surrogate, answers, seen),
    )


def _some(places: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    return places if len(places) <= MOST_LAYOUTS else np.sort(rng.choice(places, MOST_LAYOUTS, replace=False))


def _fit(encoding: Encoding, columns: Numbers, scores: Numbers) -> Process:
    theta = weigh(columns, scores, encoding.groups, encoding.starts)
    return Process(columns, scores, encoding.groups, theta)


def _trust(encoding: Encoding, columns: Numbers, values: Numbers) -> tuple[Trust, float]:
    """How well each fifth of the trials is foretold from the others, and by how much the claims are too narrow."""
    count = len(values)
    guessed, doubt, means = np.empty(count), np.empty(count), np.empty(count)
    order = np.random.default_rng(0).permutation(count)
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        known = np.setdiff1d(order, held)
        mean, spread = values[known].mean(), float(values[known].std()) or 1.0
        process = _fit(encoding, columns[known], (values[known] - mean) / spread)
        guess, deviation = process.predict(columns[held])
        guessed[held], means[held] = mean + spread * guess, mean
        doubt[held] = spread * np.sqrt(deviation**2 + process.noise * process.scale)
    misses = values - guessed
    trust = Trust(
        trials=count,
        folds=FOLDS,
        rank_correlation=rank_correlation(values, guessed),
        by_chance=min(1.0, 1.645 / math.sqrt(count - 1)),
        error=_root_mean_square(misses),
        spread=_root_mean_square(values - means),
    )
    return trust, max(1.0, _root_mean_square(misses / doubt)) * (1 + UNSURE / count)


def rank_correlation(one: Numbers, other: Numbers) -> float:
    """Spearman's, with the mean rank for equal values; 0 where one of the two never changes."""
    ranks = []
    for values in (one, other):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        own = (np.cumsum(counts) - (counts - 1) / 2)[places]
        ranks.append(own - own.mean())
    size = math.sqrt(float((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def _root_mean_square(values: Numbers) -> float:
    return math.sqrt(float((values * values).mean()))


def _cells(
    surrogate: Surrogate, answers: Answers, layouts: Sequence[Params], *, maximise: bool
) -> tuple[tuple[Effect, ...], tuple[Swap, ...]]:
    """Every mixer in every position, and each position's best against its others."""
    cells: list[Effect] = []
    swaps: list[Swap] = []
    mixers = answers.mixers
    few = layouts[: max(5, MOST_POINTS // (1 + len(mixers)))]
    base = surrogate.columns(few)
    for position in answers.positions:
        put = [[answers.put(own, position, mixer, i) for i, own in enumerate(few)] for mixer in mixers]
        averages = Averages.of(surrogate.process, np.stack([base, *map(surrogate.columns, put)]))
        own = [
            Effect(
                position=position,
                mixer=mixer,
                seen=answers.seen(position, mixer),
                **surrogate.interval(averages, {1 + place: 1.0, 0: -1.0}),
            )
            for place, mixer in enumerate(mixers)
        ]
        cells += own
        tried = [effect for effect in own if effect.seen >= SEEN_LEAST]
        if not tried:
            continue
        best = (max if maximise else min)(tried, key=lambda effect: effect.change)
        for place, mixer in enumerate(mixers):
            if mixer != best.mixer:
                swaps.append(
                    Swap(
                        position=position,
                        mixer=best.mixer,
                        against=mixer,
                        seen=min(best.seen, own[place].seen),
                        **surrogate.interval(averages, {1 + mixers.index(best.mixer): 1.0, 1 + place: -1.0}),
                    )
                )
    return tuple(cells), tuple(swaps)


def _pairs(surrogate: Surrogate, answers: Answers, layouts: Sequence[Params]) -> tuple[Pair, ...]:
    """What one mixer right after another gives beyond the two of them, averaged over the depth."""
    steps = [(p, q) for p, q in zip(answers.positions, answers.positions[1:], strict=False) if q == p + 1]
    if not steps:
        return ()
    few = layouts[: max(3, MOST_POINTS // (6 * len(steps)))]
    seen: dict[tuple[str, str], int] = {}
    for own in answers.params:
        for p, q in steps:
            follows = own[f"{p}.mixer"], own[f"{q}.mixer"]
            seen[follows] = seen.get(follows, 0) + 1
    common = sorted((pair for pair in seen if seen[pair] >= SEEN_LEAST), key=lambda pair: (-seen[pair], pair))
    base = surrogate.columns([own for _ in steps for own in few])
    alone: dict[tuple[str, int], list[Params]] = {}

    def put(mixer: str, which: int) -> list[Params]:
        if (mixer, which) not in alone:
            alone[mixer, which] = [
                answers.put(own, step[which], mixer, i) for step in steps for i, own in enumerate(few)
            ]
        return alone[mixer, which]

    found = []
    for first, second in common[:MOST_PAIRS]:
        begun = put(first, 0)
        places = [(q, i) for _, q in steps for i in range(len(few))]
        both = [answers.put(own, q, second, i) for own, (q, i) in zip(begun, places, strict=True)]
        sets = (both, begun, put(second, 1))
        averages = Averages.of(surrogate.process, np.stack([*(surrogate.columns(s) for s in sets), base]))
        found.append(
            Pair(
                first=first,
                second=second,
                seen=seen[first, second],
                **surrogate.interval(averages, {0: 1.0, 1: -1.0, 2: -1.0, 3: 1.0}),
            )
        )
    return tuple(sorted(found, key=lambda pair: -abs(pair.change)))

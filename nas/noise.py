"""What seeds say of a front: an interval for every trained number, and how likely each layout is to stand on the front.

Layouts that were trained with several seeds tell how far seeds lie apart. A layout's own seeds and those of all others
count together, the others for no more than a few of its own, since layouts differ in their spread. What is not known
until training is then a Student t about the mean of the layout's seeds; costs are exact.

Letters: N layouts, M objectives, S draws, D degrees of freedom.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from nas.front import finished, minimised
from storage import pareto
from storage.points import Points
from storage.records import Axis, TrialRecord

CONFIDENCE = 0.95
MOST_BORROWED = 8
"""Degrees of freedom that the spread of other layouts counts for at most."""
MOST_DRAWS, LEAST_DRAWS = 2000, 200
WORK = 2e8
"""Comparisons that a question may take, about a second; more candidates get fewer draws."""
FAR = 5.0
"""Standard errors, beyond which nothing is expected of a layout."""
NEAREST = 0.05
"""Standard errors, below which no more candidates are left out."""
MOST_NEAR = 1000
"""Candidates for the front, of which more would be compared for minutes."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A trained number over a layout's seeds."""

    mean: float
    error: float
    """Standard error of the mean."""
    freedom: int
    """Degrees of freedom behind the error."""
    seeds: int
    low: float
    """The interval that holds the mean over all seeds with 95 % confidence, to `high`."""
    high: float


def is_trained(axis: Axis, trials: Sequence[TrialRecord]) -> bool:
    """Whether only training tells an objective of these trials."""
    return bool(trials) and axis.name not in trials[0].costs


def estimates(trials: Sequence[TrialRecord], axis: Axis) -> dict[int, Estimate]:
    """By number, of finished trials and an objective that training tells; empty where no layout has a second seed."""
    seeds = {trial.number: trial.by_seed(axis.name) for trial in finished(trials)}
    squares = {number: _squares(values) for number, values in seeds.items()}
    freedom = sum(len(values) - 1 for values in seeds.values())
    total = math.fsum(squares.values())
    found = {}
    for number, values in seeds.items() if freedom else ():
        own = len(values) - 1
        others = freedom - own
        borrowed = min(others, MOST_BORROWED)
        variance = (total - squares[number]) / others * borrowed if borrowed else 0.0
        variance = max(0.0, (variance + squares[number]) / (borrowed + own))
        mean, error = sum(values) / len(values), math.sqrt(variance / len(values))
        reach = float(student.ppf(0.5 + CONFIDENCE / 2, borrowed + own)) * error
        low, high = mean - reach, mean + reach
        if not axis.log:
            # Scores end at the ends of their scale.
            low, high = max(min(axis.low, mean), low), min(max(axis.high, mean), high)
        found[number] = Estimate(
            mean=mean, error=error, freedom=borrowed + own, seeds=len(values), low=low, high=high
        )
    return found


def candidates(points: Points, repeated: Sequence[TrialRecord]) -> list[int]:
    """The numbers of all trials whose chance is not nought, and of a few more; `repeated`: those with several seeds.

    The chances of these and the repeated ones among themselves are those that they have among all.
    """
    errors = np.zeros(len(points.axes))
    for column, axis in enumerate(points.axes):
        if is_trained(axis, repeated):
            seeds = [trial.by_seed(axis.name) for trial in repeated]
            errors[column] = math.sqrt(
                math.fsum(map(_squares, seeds)) / max(1, sum(len(own) - 1 for own in seeds))
            )
    # Trials of one seed all have this error. Their worst alone beat nothing that all the worst together do not.
    single = ~np.isin(points.numbers, [trial.number for trial in repeated])
    near = _near(points.minimised, np.broadcast_to(errors, points.values.shape), among=single)
    return sorted({*points.numbers[near].tolist(), *points.front.tolist()})


def _squares(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)


def chances(trials: Sequence[TrialRecord], axes: Sequence[Axis], seed: int = 0) -> dict[int, float]:
    """How likely each finished trial is to stand on the front, by number; empty where no layout has a second seed.

    The same trials give the same answer: the draws begin from the seed.
    """
    done = finished(trials)
    by_axis: list[Mapping[int, Estimate] | None] = [
        estimates(done, axis) if is_trained(axis, done) else None for axis in axes
    ]
    if not any(by_axis):
        return {}
    means = minimised(done, axes)
    errors, freedom = np.zeros_like(means), np.ones_like(means)
    for column, found in enumerate(by_axis):
        if found:
            errors[:, column] = [found[trial.number].error for trial in done]
            freedom[:, column] = [found[trial.number].freedom for trial in done]
    near = _near(means, errors)
    drawn = _share_on_front(means[near], errors[near], freedom[near], np.random.default_rng(seed))
    result = dict.fromkeys((trial.number for trial in done), 0.0)
    return result | {done[index].number: share for index, share in zip(near, drawn, strict=True)}


def _near(means: Floats, errors: Floats, among: NDArray[np.bool_] | None = None) -> list[int]:
    """Those that are not beaten, at their very best, by another at its very worst, or by one `among` the others.

    Where that is said of too many, the very best and worst are taken less far out, until it holds of few.
    """
    far = FAR
    while True:
        best, worst = means - far * errors, (means + far * errors)[slice(None) if among is None else among]
        near = np.ones(len(best), dtype=np.bool_)
        for point in worst[pareto.front(worst)]:
            near &= ~((point <= best).all(axis=1) & (point < best).any(axis=1))
        if near.sum() <= MOST_NEAR or far < NEAREST:
            found: list[int] = np.flatnonzero(near).tolist()
            return found
        far /= 2


def _share_on_front(means: Floats, errors: Floats, freedom: Floats, rng: np.random.Generator) -> list[float]:
    """[N]: in how many of S draws nothing beats each."""
    count = len(means)
    draws = int(min(MOST_DRAWS, max(LEAST_DRAWS, WORK / max(1, count) ** 2)))
    unsure = np.flatnonzero(errors.any(axis=0))
    sure = np.setdiff1d(np.arange(means.shape[1]), unsure)
    spread = rng.standard_t(freedom[:, unsure], size=(draws, count, len(unsure)))
    drawn = means[:, unsure] + errors[:, unsure] * spread
    shares = []
    for index in range(count):
        rivals = np.flatnonzero((means[:, sure] <= means[index, sure]).all(axis=1))
        cheaper = (means[rivals][:, sure] < means[index, sure]).any(axis=1)
        own, theirs = drawn[:, index : index + 1], drawn[:, rivals]
        beaten = (theirs <= own).all(axis=2) & (cheaper | (theirs < own).any(axis=2))
        shares.append(float(1.0 - beaten.any(axis=1).mean()))
    return shares

"""Who goes on from a rung and who rests: asynchronous successive halving by non-dominated rank, on numbers alone.

After ASHA, Li et al. 2018, arXiv:1810.05934, and its ranks for several objectives, Schmucker et al. 2021,
arXiv:2106.12639; the promise that protects, and what is learnt from those that went on by chance, are ours.

Letters: N trials, M objectives.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import kendalltau

from nas.prospects import Front, Pairs, Prospects
from storage import pareto
from storage.records import Axis

TRUST_PAIRS = 15
"""Before a rung has so many pairs, nothing is held against it."""
SLACK = 1e-9
"""What rounding may add to a sum."""
RESAMPLES = 300
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How strict the rungs are; `rungs` counts those below the end, which is itself rung number `rungs`."""

    rungs: int
    keep: float
    """The share of those at a rung that goes on by rank."""
    chance: float
    """The share of all trials that goes to the end whatever its rank."""
    trust: float
    """The least Kendall τ between a rung and the end at which the rung may stop anybody."""
    seed: int
    risk: float = 0.1
    """The share of those left at a rung for good that may at most be expected to have joined the front."""
    loss: float = 0.02
    """The share of the hypervolume that may at most be expected to be lost with them."""
    protect: bool = True
    """Whether what may still join the front is protected."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A trial as the rungs see it."""

    number: int
    values: Mapping[int, Sequence[float]]
    """The objectives by rung, where it was scored, in the order of the axes."""
    heading: int | None = None
    """The rung that it is on its way to."""
    over: bool = False
    """It gave no result at its last attempt, and never will."""

    @cached_property
    def rung(self) -> int:
        """The highest rung that it was scored at; -1 for none."""
        return max(self.values, default=-1)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a rung is worth: how alike it and the end order the trials that have both."""

    rung: int
    pairs: int
    tau: float | None
    """Kendall τ-b, the least one of several trained objectives; None below two pairs."""
    low: float | None
    """The interval that holds 95 % of the τ of resampled pairs, to `high`."""
    high: float | None
    by_chance: int
    """How many of the pairs went on by chance."""
    tau_by_chance: float | None
    trusted: bool


class Ladder:
    """The decisions on a set of trials, which depend on nothing else: not on their order, not on what was decided before.

    The promise: of the trials that are left at a rung for good, at most the share `risk` would have joined the front,
    had they been trained to the end, and together they would have enlarged its hypervolume by the share `loss` at most.
    It is kept in expectation, as far as a trial gains from there to the end as those do that went on and stood nearest
    to it at the rung; that is why some go on by chance.
    """

    def __init__(
        self,
        rules: Rules,
        axes: Sequence[Axis],
        learnt: Sequence[int],
        standings: Sequence[Standing],
        known: Prospects | None = None,
    ) -> None:
        self.rules, self.axes, self.learnt = rules, tuple(axes), list(learnt)
        self.standings = sorted(standings, key=lambda standing: standing.number)
        self.signs = np.array([-1.0 if axis.maximise else 1.0 for axis in axes])
        self.known = known or Prospects(axes=self.axes, learnt=tuple(self.learnt))
        self.needed = math.ceil(1 / rules.risk) - 1
        """Pairs without which no chance can be as small as the promise."""

    # What is asked

    def by_chance(self, number: int) -> bool:
        """Whether this trial goes to the end whatever its rank: a draw by the seed and its number alone."""
        return _draw(self.rules.seed, number) < self.rules.chance

    def goal(self, number: int, rung: int) -> int:
        """The next rung that may stop the trial, which stands at `rung`."""
        end = self.rules.rungs
        if self.by_chance(number):
            return end
        return next((above for above in range(rung + 1, end) if self.trusted[above]), end)

    def promotable(self) -> list[int]:
        """Who goes on at once, those at higher rungs first, of equals the better ranks."""
        chosen: list[int] = []
        for rung in reversed(range(self.rules.rungs)):
            order = self._order(rung)
            kept = {standing.number for standing in order[: math.floor(self.rules.keep * len(order))]}
            kept |= self._calibrating(rung)
            chosen += [
                standing.number
                for standing in order
                if self._rests(standing, rung)
                and (not self.trusted[rung] or standing.number in kept or self.by_chance(standing.number))
            ]
        return chosen

    def protected(self) -> list[int]:
        """Who rests and is to go on for the promise's sake, those at higher rungs first, of equals who may add most.

        The others are the most of those that may add least who together keep it.
        """
        if not self.rules.protect:
            return []
        resting: list[tuple[float, float, int, int]] = []
        for rung in range(self.rules.rungs):
            here = [standing for standing in self._order(rung) if self._rests(standing, rung)]
            chances, gains = self.prospects(rung, [standing.values[rung] for standing in here])
            numbers = (one.number for one in here)
            resting += zip(gains.tolist(), chances.tolist(), repeat(rung), numbers, strict=False)
        resting.sort()
        lost, joined, left = 0.0, 0.0, 0
        for gain, chance, _, _ in resting:
            lost, joined = lost + gain, joined + chance
            if (
                lost > self.rules.loss * self._hypervolume + SLACK
                or joined > self.rules.risk * (left + 1) + SLACK
            ):
                break
            left += 1
        return [
            number for _, _, _, number in sorted(resting[left:], key=lambda one: (-one[2], -one[0], one[3]))
        ]

    def prospects(self, rung: int, values: Sequence[Sequence[float]]) -> tuple[Floats, Floats]:
        """Of trials with these values [N, M] at a rung, the chance to join the front of the fully trained ones [N], and
        by how much they are expected to enlarge its hypervolume [N], on the frozen scale.

        With too few pairs the chance is 1, and the gain all that is left.
        """
        points: Floats = np.array(values, dtype=np.float64).reshape(-1, len(self.axes)) * self.signs
        pairs = self._pairs(rung)
        if len(pairs) < self.needed or not len(points):
            return np.ones(len(points)), np.ones(len(points))
        return self.known.of(rung, points, pairs, self._front)

    def expected(self, rung: int, values: Sequence[Sequence[float]]) -> list[list[float]]:
        """The objectives at the end that trials with these values [N, M] at a rung are expected to have.

        By a monotone fit to the pairs; the values themselves while there are too few.
        """
        guesses = np.array(values, dtype=np.float64).reshape(-1, len(self.axes))
        pairs = self._pairs(rung)
        at, end = pairs.at, pairs.end
        if len(pairs) >= self.needed:
            for column, objective in enumerate(self.learnt):
                order = np.argsort(at[:, column], kind="stable")
                fitted = isotonic_regression(end[order, column]).x
                sign = self.signs[objective]
                guesses[:, objective] = sign * np.interp(
                    sign * guesses[:, objective], *_merged(at[order, column], fitted)
                )
        listed: list[list[float]] = guesses.tolist()
        return listed

    def calibration(self, rung: int) -> Calibration:
        """How far a rung is to be believed, with its interval."""
        pairs = self._pairs(rung)
        at, end, drawn = pairs.at, pairs.end, self._drawn(pairs.numbers)
        low = high = None
        if len(at) >= 2:
            rng = np.random.default_rng(self.rules.seed)
            taus = []
            for _ in range(RESAMPLES):
                picked = rng.integers(len(at), size=len(at))
                taus.append(_tau(at[picked], end[picked]) or 0.0)
            low, high = (float(bound) for bound in np.quantile(taus, (0.025, 0.975)))
        return Calibration(
            rung=rung,
            pairs=len(at),
            tau=_tau(at, end),
            low=low,
            high=high,
            by_chance=int(drawn.sum()),
            tau_by_chance=_tau(at[drawn], end[drawn]),
            trusted=self.trusted[rung],
        )

    @cached_property
    def trusted(self) -> tuple[bool, ...]:
        """By rung, whether it may stop anybody."""
        return tuple(self._trusts(rung) for rung in range(self.rules.rungs))

    def _trusts(self, rung: int) -> bool:
        pairs = self._pairs(rung)
        at, end, drawn = pairs.at, pairs.end, self._drawn(pairs.numbers)
        if drawn.sum() >= TRUST_PAIRS:
            # Those that went on by rank are alike, which makes any order look worse than it is.
            at, end = at[drawn], end[drawn]
        return len(at) < TRUST_PAIRS or (_tau(at, end) or 0.0) >= self.rules.trust

    # What it is answered from

    @cached_property
    def _front(self) -> Front:
        end = self.rules.rungs
        rows = [standing.values[end] for standing in self.standings if end in standing.values]
        points: Floats = np.array(rows, dtype=np.float64).reshape(-1, len(self.axes)) * self.signs
        return Front.of(self.axes, points, self.signs)

    @cached_property
    def _hypervolume(self) -> float:
        return pareto.hypervolume(self._front.losses)

    def _pairs(self, rung: int) -> Pairs:
        """What training told of those that were scored at a rung and at the end."""
        if rung not in self._paired:
            end = self.rules.rungs
            both = [one for one in self.standings if rung in one.values and end in one.values]
            at, final = (
                np.array([one.values[place] for one in both], dtype=np.float64).reshape(-1, len(self.axes))
                for place in (rung, end)
            )
            signs = self.signs[self.learnt]
            self._paired[rung] = Pairs(
                numbers=tuple(one.number for one in both),
                at=at[:, self.learnt] * signs,
                end=final[:, self.learnt] * signs,
            )
        return self._paired[rung]

    @cached_property
    def _paired(self) -> dict[int, Pairs]:
        return {}

    def _drawn(self, numbers: Sequence[int]) -> NDArray[np.bool_]:
        return np.array([self.by_chance(number) for number in numbers], dtype=np.bool_)

    def _rests(self, standing: Standing, rung: int) -> bool:
        return standing.rung == rung and standing.heading is None and not standing.over

    def _calibrating(self, rung: int) -> set[int]:
        """The first that rest here, as many as still lack for a promise when those have ended that are on their way."""
        if not self.rules.protect:
            return set()
        coming = sum(self._pairs_up(standing, rung) for standing in self.standings)
        resting = [standing.number for standing in self.standings if self._rests(standing, rung)]
        return set(resting[: max(0, self.needed - coming)])

    def _pairs_up(self, standing: Standing, rung: int) -> bool:
        """Whether a trial is, or is about to be, a pair of this rung and the end."""
        if self.rules.rungs in standing.values or standing.over:
            return rung in standing.values and not standing.over
        # One that rests at a higher rung is counted too: the first of those go on from there for its own sake.
        ahead = standing.rung if standing.heading is None else standing.heading
        return ahead > rung

    def _order(self, rung: int) -> list[Standing]:
        """All that reached a rung, the best first: by non-dominated rank, then by the room around them, then by number."""
        if rung not in self._orders:
            self._orders[rung] = self._ordered(rung)
        return self._orders[rung]

    @cached_property
    def _orders(self) -> dict[int, list[Standing]]:
        return {}

    def _ordered(self, rung: int) -> list[Standing]:
        there = [standing for standing in self.standings if rung in standing.values]
        if not there:
            return []
        values = np.array([standing.values[rung] for standing in there], dtype=np.float64)
        ranks, room = pareto.ranks(values * self.signs), np.zeros(len(there))
        losses = pareto.losses(self.axes, values)
        for rank in np.unique(ranks):
            own = np.flatnonzero(ranks == rank)
            room[own] = crowding(losses[own])
        return [there[index] for index in np.lexsort((-room, ranks))]


@lru_cache(maxsize=1 << 16)
def _draw(seed: int, number: int) -> float:
    return random.Random(f"{seed}/{number}/chance").random()


def crowding(losses: Floats) -> Floats:
    """How far the neighbours of each point [N, M] are apart, summed over the objectives; infinite at the ends (NSGA-II)."""
    room = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        gaps = np.full(len(column), np.inf)
        gaps[1:-1] = column[order][2:] - column[order][:-2]
        room[order] += gaps
    return room


def _merged(at: Floats, fitted: Floats) -> tuple[Floats, Floats]:
    """Places that rise [P], each once, with the mean of what was fitted there."""
    places, inverse = np.unique(at, return_inverse=True)
    return places, np.bincount(inverse, weights=fitted) / np.bincount(inverse)


def _tau(at: Floats, end: Floats) -> float | None:
    """The least Kendall τ-b of the columns [P, L]; 0 where either side is all alike, which orders nothing."""
    if len(at) < 2:
        return None
    taus = [float(kendalltau(at[:, column], end[:, column]).statistic) for column in range(at.shape[1])]
    return min(0.0 if math.isnan(tau) else tau for tau in taus)

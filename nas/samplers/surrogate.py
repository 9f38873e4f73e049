"""What an untried set of choices will give, and how sure that is: a Gaussian process over encoded choices.

Values are told by their ranks, so that a few disasters do not hide the differences among what is good, and the answer
is given back in values. The weights of the columns are found by the likelihood of what was seen (automatic relevance
determination, Rasmussen and Williams 2006, §5.1); rank by normal scores is Salinas and others, arXiv:1909.13595.

Letters: N known, M asked, D columns, G groups of columns, Q nodes of a quadrature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import ndtri

from nas.samplers.triangle import factor, forward, kept_rows

Numbers = NDArray[np.float64]
NOISE = 0.02
"""Share of the variance that a second look at the same choices would differ by, before the data say otherwise."""
FLOOR = 1e-5
MOST_WEIGHED = 300
"""Known points that the weights are found by; their number hardly changes beyond."""
STEPS = 30
SPARE = 16
"""Rows made room for at once where points are believed in."""
NODES, SHARES = np.polynomial.hermite_e.hermegauss(11)
SHARES = SHARES / SHARES.sum()


@dataclass(frozen=True)
class Scores:
    """Values by their ranks among themselves, as a normal distribution would have them, and the way back."""

    values: Numbers

    @cached_property
    def _knots(self) -> tuple[Numbers, Numbers]:
        different, counts = np.unique(self.values, return_counts=True)
        ranks = np.cumsum(counts) - counts / 2
        return different, ndtri(ranks / len(self.values))

    def forward(self) -> Numbers:
        """[N] normal scores of the values; equal values share one."""
        different, scores = self._knots
        result: Numbers = scores[np.searchsorted(different, self.values)]
        return result

    def back(self, scores: Numbers) -> Numbers:
        """Values of any scores: between known ones in proportion, beyond the ends as the outer fifth goes on."""
        different, known = self._knots
        result = np.interp(scores, known, different)
        outer = max(2, len(known) // 5)
        if len(known) < 2:
            return result
        below = (different[outer - 1] - different[0]) / (known[outer - 1] - known[0])
        above = (different[-1] - different[-outer]) / (known[-1] - known[-outer])
        result = np.where(scores < known[0], different[0] + below * (scores - known[0]), result)
        return np.where(scores > known[-1], different[-1] + above * (scores - known[-1]), result)


def squares(a: Numbers, b: Numbers) -> Numbers:
    """[N, M] squared distances of the rows of a [N, D] and of b [M, D]."""
    return _apart(2 * a, _lengths(a), b, _lengths(b))


def _lengths(a: Numbers) -> Numbers:
    lengths: Numbers = (a * a).sum(1)
    return lengths


def _apart(twice: Numbers, lengths: Numbers, b: Numbers, others: Numbers) -> Numbers:
    """[N, M] squared distances of points of these lengths, which are given twice as long, and of b [M, D]."""
    apart: Numbers = lengths[:, None] + others
    apart -= twice @ b.T
    return np.maximum(apart, 0.0, out=apart)


def _near(twice: Numbers, lengths: Numbers, b: Numbers, others: Numbers) -> Numbers:
    apart = _apart(twice, lengths, b, others)
    return np.exp(np.negative(apart, out=apart), out=apart)


def weigh(
    columns: Numbers, scores: Numbers, groups: NDArray[np.intp], starts: Numbers, theta: Numbers | None = None
) -> Numbers:
    """[G + 1] logarithms of the groups' weights and of the noise, most likely after what is known.

    columns [N, D], scores [N]; from `theta` on where one is given. A prior keeps each near its start.
    """
    chosen = np.linspace(0, len(scores) - 1, min(len(scores), MOST_WEIGHED)).astype(np.intp)
    columns, scores = columns[chosen], scores[chosen] - scores[chosen].mean()
    count = len(scores)
    apart = np.stack([squares(columns[:, groups == g], columns[:, groups == g]) for g in range(len(starts))])
    centre = np.append(starts, math.log(NOISE))
    spread = np.append(np.ones(len(starts)), 1.5)

    def loss(point: Numbers) -> tuple[float, Numbers]:
        weights, noise = np.exp(point[:-1]), math.exp(point[-1])
        kernel = np.exp(-np.tensordot(weights, apart, 1))
        factor = cho_factor(kernel + (noise + FLOOR) * np.eye(count), lower=True)
        solved = cho_solve(factor, scores)
        scale = (scores @ solved + 0.1) / count
        deviation = (point - centre) / spread
        value = 0.5 * count * math.log(scale) + np.log(np.diag(factor[0])).sum() + 0.5 * (deviation**2).sum()
        slope = cho_solve(factor, np.eye(count)) - np.outer(solved, solved) / scale
        by_weight = -0.5 * weights * np.einsum("ij,gij->g", slope * kernel, apart)
        return float(value), np.append(by_weight, 0.5 * np.trace(slope) * noise) + deviation / spread

    start = centre if theta is None else theta
    found: Numbers = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    return found


class Process:
    """A Gaussian process with given weights; further points can be believed without their values being known.

    The factor of the first `base` points, of all if left out, is found at once, that of the others in steps. `before`
    is one that knew some of the same points: what of its factor still holds is taken over.
    """

    def __init__(
        self,
        columns: Numbers,
        scores: Numbers,
        groups: NDArray[np.intp],
        theta: Numbers,
        base: int | None = None,
        before: "Process | None" = None,
    ) -> None:
        self.root = np.exp(0.5 * theta[:-1])[groups]
        self.noise = math.exp(theta[-1]) + FLOOR
        self.mean = float(scores.mean())
        self.columns = columns * self.root
        self._twice, self._lengths = 2 * self.columns, _lengths(self.columns)
        self.base = len(scores) if base is None else base
        kept = None if before is None else self._kept(before)
        self.factor: Numbers = factor(self._kernel, len(scores), self.base, kept)
        half = forward(self.factor, scores - self.mean)
        self.scale = float((half @ half + 0.1) / len(scores))
        self.half: Numbers = half

    def _kept(self, before: "Process") -> Numbers | None:
        """The factor of the first points that are the same; none where they are weighed otherwise."""
        alike = (self.noise, self.base) == (before.noise, before.base)
        if not alike or not np.array_equal(self.root, before.root):
            return None
        most = min(len(self.columns), len(before.columns))
        other = (self.columns[:most] != before.columns[:most]).any(axis=1)
        kept = kept_rows(int(other.argmax()) if other.any() else most, self.base)
        return before.factor[:kept, :kept]

    def _kernel(self, start: int, end: int) -> Numbers:
        """[end - start, end] how near points are to those before them and to each other, with the noise."""
        own = slice(start, end)
        near = _near(self._twice[own], self._lengths[own], self.columns[:end], self._lengths[:end])
        near[:, start:] += self.noise * np.eye(end - start)
        return near

    def ask(self, columns: Numbers) -> "Asked":
        """What is thought of points [M, D]; to be told of points that are believed in later."""
        scaled = columns * self.root
        lengths = _lengths(scaled)
        reach = forward(self.factor, _near(self._twice, self._lengths, scaled, lengths))
        return Asked(
            process=self,
            columns=scaled,
            lengths=lengths,
            rows=reach,
            count=len(reach),
            mean=self.mean + self.half @ reach,
            left=1.0 - (reach * reach).sum(0),
        )

    def predict(self, columns: Numbers) -> tuple[Numbers, Numbers]:
        """Mean and standard deviation [M] of the scores at columns [M, D], noise apart."""
        asked = self.ask(columns)
        return asked.mean, asked.deviation


@dataclass(kw_only=True)
class Asked:
    """Points [M, D] that a process was asked about, and what it thinks of them as further points become sure."""

    process: Process
    columns: Numbers
    """[M, D], scaled."""
    lengths: Numbers
    """[M], squared."""
    rows: Numbers
    """[R, M], of which the first `count` say how the points follow from those that are known or believed."""
    count: int
    mean: Numbers
    """[M]"""
    left: Numbers
    """[M] the share of the variance that is left."""

    @classmethod
    def joined(cls, parts: Sequence["Asked"]) -> "Asked":
        """Several answers of one process, that were told the same, as one."""
        return cls(
            process=parts[0].process,
            columns=np.concatenate([part.columns for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            rows=np.concatenate([part.reach for part in parts], axis=1),
            count=parts[0].count,
            mean=np.concatenate([part.mean for part in parts]),
            left=np.concatenate([part.left for part in parts]),
        )

    @property
    def reach(self) -> Numbers:
        """[N, M]"""
        return self.rows[: self.count]

    @property
    def deviation(self) -> Numbers:
        """[M] standard deviation of the scores, noise apart."""
        deviation: Numbers = np.sqrt(np.maximum(self.left, 1e-8) * self.process.scale)
        return deviation

    def believe(self, other: "Asked") -> None:
        """Take the one point of `other` as if it had turned out as expected: what is near it becomes sure, and no mean moves.

        `other` must have been told of all that this one was told.
        """
        near = _near(2 * other.columns, other.lengths, self.columns, self.lengths)[0]
        towards = near - other.reach[:, 0] @ self.reach
        row = towards / math.sqrt(max(float(other.left[0]), 0.0) + self.process.noise)
        if self.count == len(self.rows):
            self.rows = np.concatenate([self.rows, np.empty((SPARE, len(row)))])
        self.rows[self.count] = row
        self.count += 1
        self.left = self.left - row * row

"""What may still become of trials that rest at a rung: the chance to join the front, and what they would add to it.

Letters: N trials that rest, P pairs of a rung and the end, K nearest pairs, M objectives, L those that training tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nas.samplers.gain import Guess, boxes, expected_gain
from storage import pareto
from storage.records import Axis

NEAREST = 39
"""Pairs that prospects are found from, the nearest at the rung."""
BLOCK = 512
"""Trials whose prospects are found at a time, for the memory's sake."""
ORDER = 1e-12
"""Of pairs that are equally near the first one counts: distances differ by so much a trial."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Trials that were scored at a rung and at the end, in the order of their numbers."""

    numbers: tuple[int, ...]
    at: Floats
    """[P, L] what training told at the rung, smaller is better."""
    end: Floats
    """[P, L] and at the end."""

    def __len__(self) -> int:
        return len(self.numbers)

    def only(self, places: Sequence[int]) -> "Pairs":
        """Some of them."""
        numbers = tuple(self.numbers[place] for place in places)
        return Pairs(numbers=numbers, at=self.at[places], end=self.end[places])

    def by_number(self) -> dict[int, list[list[float]]]:
        """What each one was told."""
        rows: list[list[list[float]]] = np.stack([self.at, self.end], axis=1).tolist()
        return dict(zip(self.numbers, rows, strict=True))


@dataclass(frozen=True, kw_only=True)
class Front:
    """The front of those that are fully trained."""

    points: Floats
    """[F, M], smaller is better."""
    losses: Floats
    """[F, M] on the frozen scale."""
    room: Floats
    """[S, 2, M] the boxes that it leaves of the unit box."""

    @classmethod
    def of(cls, axes: Sequence[Axis], points: Floats, signs: Floats) -> "Front":
        """From points [N, M], of which those that are beaten are left out."""
        kept = points[pareto.front(points)]
        losses = pareto.losses(axes, kept * signs)
        return cls(points=kept, losses=losses, room=boxes(losses, np.ones(len(axes))))


@dataclass
class Prospects:
    """Finds prospects, and keeps them for as long as they hold: until the front moves, or a nearer pair turns up.

    What is kept changes no answer, so that it may live as long as the search.
    """

    axes: tuple[Axis, ...]
    learnt: tuple[int, ...]
    _points: Floats | None = None
    """The front that what is kept was found from."""
    _seen: dict[int, Pairs] = field(default_factory=dict)
    """By rung, the pairs that what is kept was found from."""
    _kept: dict[int, dict[bytes, tuple[float, float, float, int]]] = field(default_factory=dict)
    """By rung and values, how far the last of the nearest pairs is away, the chance, the gain, and how many of those
    pairs' gains would do."""

    def __post_init__(self) -> None:
        self.signs = np.array([-1.0 if axis.maximise else 1.0 for axis in self.axes])
        own = [self.axes[place] for place in self.learnt]
        self.ideal = np.array([-axis.high if axis.maximise else axis.low for axis in own])
        self.scale = np.array([axis.high - axis.low for axis in own])

    def of(self, rung: int, points: Floats, pairs: Pairs, front: Front) -> tuple[Floats, Floats]:
        """Of trials at these points [N, M] of a rung, the chance to join the front [N], and the expected gain of its
        hypervolume on the frozen scale [N].

        By the gains of the nearest pairs; the chance is counted as conformal prediction counts, with one more pair whose
        gain would do.
        """
        kept = self._still(rung, pairs, front)
        keys = [point.tobytes() for point in points]
        missing = [place for place, key in enumerate(keys) if key not in kept]
        for first in range(0, len(missing), BLOCK):
            places = missing[first : first + BLOCK]
            found = self._find(points[places], pairs, front)
            kept.update(zip((keys[place] for place in places), zip(*found, strict=True), strict=True))
        table = np.array([kept[key][1:3] for key in keys]).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def _still(self, rung: int, pairs: Pairs, front: Front) -> dict[bytes, tuple[float, float, float, int]]:
        """What still holds of what was kept."""
        self._follow(front.points)
        before, kept = self._seen.get(rung), self._kept.setdefault(rung, {})
        self._seen[rung] = pairs
        if not kept or before is None:
            return kept
        old = dict(
            zip(before.numbers, zip(before.at.tolist(), before.end.tolist(), strict=True), strict=True)
        )
        new = dict(zip(pairs.numbers, zip(pairs.at.tolist(), pairs.end.tolist(), strict=True), strict=True))
        if any(new.get(number) != row for number, row in old.items()):
            kept.clear()
            return kept
        fresh = [place for place, number in enumerate(pairs.numbers) if number not in old]
        if fresh:
            points = np.array([np.frombuffer(key) for key in kept])
            reach = np.array([row[0] for row in kept.values()])
            nearer = (self._apart(points, pairs.only(fresh)) < reach[:, None]).any(axis=1)
            keys = list(kept)
            for place in np.flatnonzero(nearer):
                del kept[keys[place]]
        return kept

    def _follow(self, points: Floats) -> None:
        """Forget what a front that moved has changed."""
        before, self._points = self._points, points
        if before is None or np.array_equal(before, points):
            return
        if all((points <= point).all(axis=1).any() for point in before):
            # It went forward: who could not join what it was, and would add nothing, cannot do so now.
            for rung, rows in self._kept.items():
                self._kept[rung] = {key: row for key, row in rows.items() if row[2] == 0.0 and row[3] == 0}
        else:
            self._kept.clear()

    def _apart(self, points: Floats, pairs: Pairs) -> Floats:
        """[N, P] how far trials are away from pairs: in the objective where they are farthest apart."""
        apart = np.zeros((len(points), len(pairs)))
        for column, place in enumerate(self.learnt):
            own = np.abs(pairs.at[:, column] - points[:, place, None]) / self.scale[column]
            np.maximum(apart, own, out=apart)
        apart += ORDER * np.array(pairs.numbers)
        return apart

    def _find(
        self, points: Floats, pairs: Pairs, front: Front
    ) -> tuple[list[float], list[float], list[float], list[int]]:
        near = min(NEAREST, len(pairs))
        apart = self._apart(points, pairs)
        nearest = np.sort(np.argpartition(apart, near - 1, axis=1)[:, :near], axis=1)
        # With all of them used, any further one is nearer.
        whole = near == len(pairs) < NEAREST
        reach = np.full(len(points), np.inf)
        if not whole:
            reach = np.take_along_axis(apart, nearest, axis=1).max(axis=1)
        learnt = list(self.learnt)
        ends: Floats = np.repeat(points[:, None], near, axis=1)
        moved = points[:, None, learnt] - (pairs.at - pairs.end)[nearest]
        ends[:, :, learnt] = np.maximum(moved, self.ideal)
        joins = ~beaten(ends, front.points, learnt)
        # What is beaten adds nothing, and most is.
        gain = np.zeros(joins.shape)
        losses = pareto.losses(self.axes, ends[joins] * self.signs)
        guesses = [Guess(column[:, None], np.ones(1)) for column in losses.T]
        gain[joins] = expected_gain(guesses, front.room)
        doing = joins.sum(axis=1)
        chances = (doing + 1) / (near + 1)
        return reach.tolist(), chances.tolist(), gain.mean(axis=1).tolist(), doing.tolist()


def beaten(points: Floats, others: Floats, learnt: Sequence[int]) -> NDArray[np.bool_]:
    """Which of points [N, K, M] one of the others [F, M] dominates [N, K]; the K differ in what is learnt alone."""
    sure = [place for place in range(points.shape[2]) if place not in learnt]
    known, rest = points[:, 0][:, None, sure], others[None, :, sure]
    behind: NDArray[np.bool_] = np.all(known >= rest, axis=2)
    worse: NDArray[np.bool_] = np.any(known > rest, axis=2)
    moved, stay = points[:, :, learnt], others[:, learnt]
    lost: NDArray[np.bool_] = np.zeros(points.shape[:2], dtype=np.bool_)
    if len(learnt) == 1:
        # Of the others that are as good in all that is sure, the best one in what is learnt counts.
        level = np.where(behind, stay[:, 0], np.inf).min(axis=1, initial=np.inf)[:, None]
        ahead = np.where(behind & worse, stay[:, 0], np.inf).min(axis=1, initial=np.inf)[:, None]
        np.logical_or(moved[:, :, 0] > level, moved[:, :, 0] >= ahead, out=lost)
        return lost
    for place, other in enumerate(stay):
        there = np.flatnonzero(behind[:, place])
        own = moved[there]
        lost[there] |= (other <= own).all(axis=2) & (worse[there, place, None] | (other < own).any(axis=2))
    return lost

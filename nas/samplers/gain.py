"""By how much a point is expected to enlarge a front: exactly, for values that are known and values that are guessed.

What no point of the front beats is cut into boxes. A point's gain is, summed over the boxes, the product over the
objectives of how far it undercuts a box within it; for independent objectives the expectation of a product is the
product of expectations (Yang and others, Journal of Global Optimization 75, 2019), and a value that is known is one that
is guessed without doubt. Smaller is better everywhere.

Letters: M objectives, F points of the front, S boxes, N points asked, Q nodes of a quadrature.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Box = tuple[list[float], list[float]]
MOST_BOXES = 4000
"""Above so many boxes the front is thinned out before it is cut."""


AT_ONCE = 128
"""Points whose boxes are multiplied at once, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Guess:
    """One objective of N points: Q values each with their shares, a single one where it is known."""

    values: Numbers
    """[N, Q]"""
    shares: Numbers
    """[Q]"""

    def below(self, bounds: Numbers) -> Numbers:
        """[N, B] the expectation of how far each point lies below each bound; nothing where it lies above."""
        expected = np.zeros((len(self.values), len(bounds)))
        room = np.empty_like(self.values)
        for place, bound in enumerate(bounds.tolist()):
            if bound > -np.inf:
                np.subtract(bound, self.values, out=room)
                expected[:, place] = np.maximum(room, 0.0, out=room) @ self.shares
        return expected


def boxes(front: Numbers, reference: Numbers) -> Numbers:
    """[S, 2, M] lower and upper corners of boxes that together are what the front [F, M] leaves below the reference."""
    inside = front[(front < reference).all(axis=1)]
    found = _cut(inside, reference)
    while len(found) > MOST_BOXES:
        inside = inside[np.argsort(inside[:, 0], kind="stable")][::2]
        found = _cut(inside, reference)
    return np.array(found, dtype=np.float64).reshape(-1, 2, len(reference))


def _cut(front: Numbers, reference: Numbers) -> list[Box]:
    """Of three objectives by a sweep; of more, slabs along the last, each cut by the points that lie below it in the others."""
    width = len(reference)
    if width == 1:
        return [([-np.inf], [float(min([*front[:, 0], reference[0]]))])]
    if width == 3:
        return _sweep(front, reference)
    ordered = front[np.argsort(front[:, -1], kind="stable")]
    edges = [-np.inf, *ordered[:, -1].tolist(), float(reference[-1])]
    found = []
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        if low < high:
            for lower, upper in _cut(_front(ordered[:place, :-1]), reference[:-1]):
                found.append(([*lower, low], [*upper, high]))
    return found


def _sweep(front: Numbers, reference: Numbers) -> list[Box]:
    """Two boxes a point: strips of the plane of the first two objectives grow along the third until a point cuts them."""
    right, top, end = map(float, reference)
    # Strips lie end to end along the second objective, from `lows` on; they reach to `ups` in the first, which falls.
    lows, ups, starts = [-np.inf], [right], [-np.inf]
    found: list[Box] = []

    def close(place: int, z: float) -> None:
        high = lows[place + 1] if place + 1 < len(lows) else top
        if starts[place] < z:
            found.append(([-np.inf, lows[place], starts[place]], [ups[place], high, z]))

    for x, y, z in front[np.lexsort((front[:, 1], front[:, 0], front[:, 2]))].tolist():
        first = last = bisect.bisect_right(lows, y) - 1
        while last < len(ups) and ups[last] > x:
            close(last, z)
            last += 1
        if first < last:
            below = lows[first] < y
            kept = ([lows[first]], [ups[first]], [z]) if below else ([], [], [])
            lows[first:last], ups[first:last], starts[first:last] = (
                [*kept[0], y],
                [*kept[1], x],
                [*kept[2], z],
            )
    for place in range(len(lows)):
        close(place, end)
    return found


def _front(points: Numbers) -> Numbers:
    """Those of a few points that no other one beats, equal ones once."""
    unique = np.unique(points, axis=0)
    beaten = [bool(((unique <= point).all(axis=1) & (unique < point).any(axis=1)).any()) for point in unique]
    return unique[~np.array(beaten, dtype=bool)] if len(unique) else unique


def expected_gain(guesses: Sequence[Guess], cut: Numbers) -> Numbers:
    """[N] the expected volume by which each point enlarges what the front beats, from the boxes that it leaves."""
    sides = []
    for objective, guess in enumerate(guesses):
        bounds, places = np.unique(cut[:, :, objective], return_inverse=True)
        sides.append((guess.below(bounds), *places.reshape(len(cut), 2).T))
    gain = np.empty(len(guesses[0].values))
    for start in range(0, len(gain), AT_ONCE):
        own = slice(start, start + AT_ONCE)
        product = np.ones((len(gain[own]), len(cut)))
        for below, lower, upper in sides:
            product *= below[own].take(upper, axis=1) - below[own].take(lower, axis=1)
        gain[own] = product.sum(axis=1)
    return gain

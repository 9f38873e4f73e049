"""What the patterns of a space can reach under bounds on sums: whether any keeps all, the nearest value, a random one.

From the last position back, the sums that the rest of a pattern can still add are kept, those that another one beats
left out. A beginning can be finished if one of them keeps every bound, so that nothing is drawn in vain.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_space.constraint import Constraint
from search_space.layout import Layer, Layout
from search_space.walk import Walk
from storage import pareto

MOST_SUMS = 400
"""Sums kept for one end of a pattern; where there are more, an even choice of them, and `exact` says no."""
Numbers = NDArray[np.float64]


class Reach:
    """Patterns of letters, by columns of prices of which each sum has a most; turn a price's sign for a least.

    `owners` and `variants` say which entry a letter belongs to and with which settings; a pattern that is drawn holds
    one variant of each entry where settings are `shared`.
    """

    def __init__(
        self,
        letters: Sequence[Layer],
        *,
        owners: Sequence[int],
        variants: Sequence[Any],
        shared: bool,
        structure: Sequence[Constraint],
        prices: Numbers,
        most: Sequence[float],
        weights: Sequence[int],
    ) -> None:
        self.letters, self.owners, self.variants, self.shared = list(letters), owners, variants, shared
        if not most:
            raise ValueError("no column to reach for: leave such questions to the space")
        self.prices = np.asarray(prices, dtype=np.float64).reshape(len(self.letters), len(most))
        bounds = np.array(most, dtype=np.float64)
        # A hair of room: sums in another order may differ in their last bits, and the exact ones are asked afterwards.
        self.most = bounds + 1e-9 * np.abs(bounds)
        self.weights = weights
        self.walk = Walk(letters, owners=owners, constraints=structure, prices={}, weights=weights)
        self.memory: dict[tuple[int, Any], Numbers] = {}
        self.exact = True

    def rest(self, position: int, state: Any) -> Numbers:
        """[N, K] what finishing from a position can add, unbeaten; no row where it cannot be finished."""
        if position == len(self.weights):
            return np.zeros((1, self.prices.shape[1]))
        key = (position, state)
        if key not in self.memory:
            found = [np.empty((0, self.prices.shape[1]))]
            for new, indices in self._moves(position, state).items():
                own = self.weights[position] * _unbeaten(self.prices[indices])
                below = self.rest(position + 1, new)
                found.append((own[:, None] + below[None]).reshape(-1, self.prices.shape[1]))
            sums = _unbeaten(np.concatenate(found))
            if len(sums) > MOST_SUMS:
                self.exact, sums = False, _some(sums)
            self.memory[key] = sums
        return self.memory[key]

    def sums(self) -> Numbers:
        """[N, K] the unbeaten sums of whole patterns; no row where the structure leaves none."""
        return self.rest(0, self.walk.start)

    def keeps(self) -> bool:
        """Whether some pattern keeps every bound; a no is proven where `exact`."""
        return bool((self.sums() <= self.most).all(axis=1).any())

    def least(self, column: int, *, heeding: bool) -> float | None:
        """The least of a column over all patterns, exactly; or over those that keep every other bound, if any does."""
        sums = self.sums()
        if heeding:
            others = np.arange(sums.shape[1]) != column
            sums = sums[(sums <= self.most)[:, others].all(axis=1)]
        return float(sums[:, column].min()) if len(sums) else None

    def sample(self, rng: random.Random) -> Layout | None:
        """A random pattern that keeps every bound; None where the draw found no way, as shared settings may have it."""
        state, spent, chosen = self.walk.start, np.zeros(self.prices.shape[1]), list[Layer]()
        held: dict[int, Any] = {}
        for position, weight in enumerate(self.weights):
            ways: dict[int, list[tuple[int, Any]]] = {}
            for new, indices in self._moves(position, state).items():
                sums = spent + weight * self.prices[indices]
                below = self.rest(position + 1, new)
                fits: NDArray[np.bool_] = np.all(sums[:, None] + below[None] <= self.most, axis=2)
                for index in np.asarray(indices)[np.any(fits, axis=1)].tolist():
                    owner = self.owners[index]
                    if not self.shared or held.get(owner, self.variants[index]) == self.variants[index]:
                        ways.setdefault(owner, []).append((index, new))
            if not ways:
                return None
            # The entry first and its settings then, as a random chooser draws them.
            index, state = rng.choice(ways[rng.choice(sorted(ways))])
            held[self.owners[index]] = self.variants[index]
            spent = spent + weight * self.prices[index]
            chosen.append(self.letters[index])
        return Layout(tuple(chosen))

    def _moves(self, position: int, state: Any) -> dict[Any, list[int]]:
        """The letters that may stand next, by what they leave behind for the rules of structure."""
        moves: dict[Any, list[int]] = {}
        for index in range(len(self.letters)):
            new = self.walk.after(position, state, index)
            if new is not None:
                moves.setdefault(new, []).append(index)
        return moves


def _unbeaten(sums: Numbers) -> Numbers:
    different = np.unique(sums, axis=0)
    kept: Numbers = different[pareto.front(different)]
    return kept


def _some(sums: Numbers) -> Numbers:
    """An even choice along each column in turn, the least of every column always among them."""
    each = MOST_SUMS // sums.shape[1]
    places = np.linspace(0, len(sums) - 1, each).round().astype(int)
    picked = [np.argsort(sums[:, column], kind="stable")[places] for column in range(sums.shape[1])]
    chosen: Numbers = sums[np.unique(np.concatenate(picked))]
    return chosen

"""Regularised evolution over layouts: the best of a few of the youngest, changed by one move, and age as the only death.

Source: Real and others, arXiv:1802.01548; with several objectives the best is the one of the lowest non-dominated rank,
and among equals the one whose neighbours on the front are farthest (Deb and others, NSGA-II, 2002).
"""

import random
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from nas.samplers.choices import Choices
from nas.samplers.encoding import Key, Params
from nas.samplers.history import History
from nas.samplers.relative import RelativeSampler, spread
from search_space.layout import Layout
from search_space.space import Space
from storage import pareto

POPULATION, CANDIDATES = 40, 8
"""How many of the youngest trials live, and how many of them compete to be a parent."""
CROSSED = 0.25
"""Share of the children that have two parents."""
MOST_TRIES = 60


class EvolutionSampler(RelativeSampler):
    """Regularised evolution with the moves of layouts: another layer, an exchange, a shift, a setting, a crossing.

    Parameters as for LayoutSampler. Nothing is proposed twice as long as moves lead to anything new.
    """

    def __init__(
        self,
        *,
        space: Space | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        usable: Callable[[Params], bool] | None = None,
        why_not: Callable[[Layout], str | None] | None = None,
        population: int = POPULATION,
        seed: int | None = None,
    ) -> None:
        if population < 2:
            raise ValueError(f"population={population}: at least 2 are needed to choose a parent from")
        super().__init__(space, search_space, usable, why_not, seed)
        self.population = population

    def propose(self, choices: Choices, signs: tuple[float, ...], history: History) -> Key | None:
        """A child of the living; a spread start until half of a population has ended."""
        del signs
        rng = random.Random(f"{self.seed}/{len(history.seen)}")
        living = history.finished[-self.population :]
        if len(living) < self.population // 2:
            return spread(choices, history.seen, rng)
        values = history.values[-self.population :]
        order = np.lexsort((-crowding(values), pareto.ranks(values)))
        places = {int(index): place for place, index in enumerate(order)}

        def parent() -> Key:
            drawn = rng.sample(range(len(living)), min(CANDIDATES, len(living)))
            return living[min(drawn, key=lambda index: places[index])]

        for _ in range(MOST_TRIES):
            child = parent()
            if rng.random() < CROSSED:
                child = choices.cross(child, parent(), rng) or child
            changed = choices.change(child, rng)
            if changed is not None and changed not in history.seen:
                return changed
        return spread(choices, history.seen, rng)


def crowding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] how far apart each point's neighbours of its own rank are, of values [N, M]; without bound at the ends."""
    distance = np.zeros(len(values))
    ranks = pareto.ranks(values)
    for rank in np.unique(ranks):
        own = np.flatnonzero(ranks == rank)
        for column in values[own].T:
            order = np.argsort(column, kind="stable")
            span = column[order[-1]] - column[order[0]] or 1.0
            distance[own[order[[0, -1]]]] = np.inf
            distance[own[order[1:-1]]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance

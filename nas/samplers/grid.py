"""Every pattern of the space once, in an order that the seed shuffles, so that a part of it is a fair sample."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from nas.samplers.choices import LayoutChoices
from nas.samplers.sampler import Aim, Known, Proposal
from search_space.space import Space

MOST_GRID = 200_000


class GridSampler:
    """The whole space; ask it for as many trials as the space has layouts.

    Raises:
        ValueError: the space is too large to be gone through.
    """

    def __init__(self, space: Space, aim: Aim, *, seed: int) -> None:
        self.choices = LayoutChoices(space, aim.why_not)
        every = self.choices.all(MOST_GRID)
        if every is None:
            raise ValueError(
                f"sampler grid tries every layout, and the space has {space.size().count:,}: name fewer mixers, sizes "
                f"or layers (at most {MOST_GRID:,} layouts), or choose another sampler"
            )
        random.Random(seed).shuffle(every)
        if not every:
            raise ValueError(
                "sampler grid: no pattern of the space keeps its constraints: loosen one of them"
            )
        self.every = every
        self.left = dict.fromkeys(every)
        self.tokens = 0

    def learn(self, known: Known) -> int:
        """Cross a trial off, whatever became of it; one of another space is not on the list (its token is -1)."""
        if not known.params or not self.choices.encoding.takes(known.params):
            return -1
        return self._cross_off(known.params)

    def ask(self, number: int, attempt: int) -> Proposal:
        """The first pattern that has not been tried; once all have, the first of all again."""
        del number, attempt
        key = next(iter(self.left or self.every))
        params = self.choices.encoding.params(key)
        return Proposal(layout=self.choices.layout(key), params=params, token=self._cross_off(params))

    def tell(self, token: int, values: Sequence[float] | None) -> None:
        """Nothing depends on how it ended."""
        del token, values

    def _cross_off(self, params: Mapping[str, Any]) -> int:
        key = self.choices.encoding.key(params)
        self.left.pop(key, None)
        self.tokens += 1
        return self.tokens - 1

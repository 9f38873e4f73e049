"""Counting and drawing patterns exactly: how many ways there are to finish one from every position."""

import bisect
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from search_space.constraint import Bound, Constraint, Count, Place, belongs
from search_space.layout import Layer, Layout

MOST_STATES = 50_000
"""Partial patterns that an exact count under cost bounds may keep; beyond, the count is an upper bound."""
FEW_LETTERS = 16
"""A larger alphabet may keep fewer of them in proportion, since every one is followed by every letter."""


class TooManyStates(Exception):
    """The sums that cost bounds must tell apart outgrew MOST_STATES."""


class Walk:
    """Counts and draws the patterns over one alphabet, position by position, by what the constraints remember.

    `owners` says which entry each letter belongs to, `prices` what it costs once, `weights` how often each position
    stands in the target network.
    """

    def __init__(
        self,
        letters: Sequence[Layer],
        *,
        owners: Sequence[int],
        constraints: Sequence[Constraint],
        prices: Mapping[Layer, Mapping[str, float]],
        weights: Sequence[int],
        all_of: Sequence[int] = (),
        ways: Sequence[int] = (),
        bounded: bool = True,
    ) -> None:
        self.letters, self.owners, self.prices, self.weights = list(letters), owners, prices, weights
        self.all_of = frozenset(all_of)
        self.ways = ways
        """By entry, how often the count takes a pattern for the first layer of it: once for every assignment."""
        self.counts = [rule for rule in constraints if isinstance(rule, Count)]
        self.places = [rule for rule in constraints if isinstance(rule, Place)]
        self.bounds = [rule for rule in constraints if isinstance(rule, Bound) and bounded]
        self.memory: dict[tuple[int, Any], int] = {}
        # By letter, what `after` asks a hundred thousand times: the rules it counts for, its places, its prices.
        last = len(weights) - 1
        self.held = [tuple(belongs(letter, rule.what) for rule in self.counts) for letter in self.letters]
        self.barred = [
            {0 if place.where == "first" else last for place in self.places if belongs(letter, place.what)}
            for letter in self.letters
        ]
        self.paid = [tuple(prices[letter][rule.cost] for rule in self.bounds) for letter in self.letters]
        self.start = ((0,) * len(self.counts), (0.0,) * len(self.bounds), frozenset[int]())
        # The cheapest way to finish from each position, so that hopeless beginnings are cut at once.
        cheapest = [min(prices[letter][rule.cost] for letter in self.letters) for rule in self.bounds]
        self.least_rest = [
            tuple(price * sum(weights[position:]) for price in cheapest)
            for position in range(len(weights) + 1)
        ]

    def after(self, position: int, state: Any, index: int) -> Any | None:
        """The state once a letter stands at a position, or None if that breaks a rule for good."""
        if position in self.barred[index]:
            return None
        left = len(self.weights) - 1 - position
        counts = []
        for rule, count, holds in zip(self.counts, state[0], self.held[index], strict=True):
            count += holds
            if (rule.most is not None and count > rule.most) or count + left < rule.least:
                return None
            counts.append(min(count, rule.least) if rule.most is None else count)
        sums = []
        rests = self.least_rest[position + 1]
        for bound, spent, price, rest in zip(self.bounds, state[1], self.paid[index], rests, strict=True):
            spent += self.weights[position] * price
            if spent + rest > bound.most:
                return None
            sums.append(spent)
        used = state[2] | {self.owners[index]} if self.all_of or self.ways else state[2]
        return tuple(counts), tuple(sums), used

    def count(self, position: int, state: Any) -> int:
        """Ways to finish the pattern from a position."""
        if position == len(self.weights):
            return int(self.all_of == state[2]) if self.all_of else 1
        key = (position, state)
        if key not in self.memory:
            if (
                len(self.memory) > MOST_STATES * FEW_LETTERS / max(FEW_LETTERS, len(self.letters))
                and self.bounds
            ):
                raise TooManyStates
            found = 0
            for index, owner in enumerate(self.owners):
                new = self.after(position, state, index)
                if new is not None:
                    times = self.ways[owner] if self.ways and owner not in state[2] else 1
                    found += times * self.count(position + 1, new)
            self.memory[key] = found
        return self.memory[key]

    def sample(self, rng: random.Random) -> Layout:
        """One pattern, each with the same probability."""
        state, chosen = self.start, []
        for position in range(len(self.weights)):
            moved = [self.after(position, state, index) for index in range(len(self.letters))]
            ways = [0 if new is None else self.count(position + 1, new) for new in moved]
            # Whole numbers, because the ways of a long pattern exceed every float.
            index = bisect.bisect(list(itertools.accumulate(ways)), rng.randrange(sum(ways)))
            chosen.append(self.letters[index])
            state = moved[index] or state
        return Layout(tuple(chosen))

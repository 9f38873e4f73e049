"""What may be proposed next: all of a small space, or what an inner search finds in a large one.

Letters: N sets of choices, M objectives, D columns.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.samplers.choices import Choices
from nas.samplers.encoding import Key, Params

Numbers = NDArray[np.float64]
Row = Sequence[float | None]
Known = Callable[[Params], Row]
MOST_LISTED = 20_000
"""Sets of choices that are all weighed against each other; of more, an inner search looks at some."""
MOST_KNOWN = 100_000
"""Sets of choices whose known costs are remembered before all are forgotten."""
DRAWN, ROUNDS, KEPT, OFFSPRING = 400, 6, 40, 160
"""The inner search: random draws, rounds, how many go on from round to round, and their offspring in each."""
CROSSED = 0.2
"""Share of the offspring that have two parents."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Sets of choices with what is known of them."""

    keys: tuple[Key, ...]
    columns: Numbers
    """[N, D]"""
    known: tuple[Numbers | None, ...]
    """By objective [N], smaller is better; None where a trial must tell."""

    @classmethod
    def joined(cls, parts: Sequence["Pool"]) -> "Pool":
        """Several pools as one."""
        known = [
            [own for own in column if own is not None]
            for column in zip(*(part.known for part in parts), strict=True)
        ]
        return cls(
            keys=tuple(key for part in parts for key in part.keys),
            columns=np.concatenate([part.columns for part in parts]),
            known=tuple(np.concatenate(column) if column else None for column in known),
        )


class Costs:
    """What is known of a set of choices, by its key, and which way each objective is better: 1 where smaller is, else -1."""

    def __init__(self, known: Callable[[Key], Row] | None, signs: tuple[float, ...]) -> None:
        self.known, self.signs = known, signs
        self._rows: dict[Key, Row] = {}

    def of(self, choices: Choices, keys: Sequence[Key]) -> Pool:
        """A pool of these."""
        columns = choices.encoding.of_keys(keys)
        if self.known is None:
            return Pool(keys=tuple(keys), columns=columns, known=(None,) * len(self.signs))
        if len(self._rows) > MOST_KNOWN:
            self._rows.clear()
        for key in keys:
            if key not in self._rows:
                self._rows[key] = self.known(key)
        rows = [self._rows[key] for key in keys]
        wrong = [len(row) for row in rows if len(row) != len(self.signs)]
        if wrong:
            raise ValueError(
                f"known gives {wrong[0]} values for {len(self.signs)} objectives: give one for each, None for what is "
                "to be learnt"
            )
        known = tuple(
            None if any(value is None for value in column) else np.array(column, dtype=np.float64) * sign
            for column, sign in zip(zip(*rows, strict=True), self.signs, strict=True)
        )
        return Pool(keys=tuple(keys), columns=columns, known=known)


def listed(choices: Choices, costs: Costs) -> Pool | None:
    """The whole space, None where it is too large."""
    every = choices.all(MOST_LISTED)
    return None if every is None else costs.of(choices, every)


def searched(
    choices: Choices,
    costs: Costs,
    best: Sequence[Key],
    gain: Callable[[Pool], Numbers],
    rng: random.Random,
) -> list[Pool]:
    """Random sets and the best that are known, then rounds of moves from what promises most; what `gain` was asked."""
    gains: dict[Key, float] = {}
    pools: list[Pool] = []

    def weigh(made: Sequence[Key | None]) -> None:
        new = [key for key in dict.fromkeys(made) if key is not None and key not in gains]
        if new:
            pools.append(costs.of(choices, new))
            gains.update(zip(new, gain(pools[-1]).tolist(), strict=True))

    weigh([*best, *(choices.sample(rng) for _ in range(DRAWN))])
    for _ in range(ROUNDS):
        parents = sorted(gains, key=lambda key: -gains[key])[:KEPT]
        made: list[Key | None] = []
        for _ in range(OFFSPRING if parents else 0):
            parent = rng.choice(parents)
            crossed = rng.random() < CROSSED
            made.append(
                choices.cross(parent, rng.choice(parents), rng) if crossed else choices.change(parent, rng)
            )
        weigh(made)
    return pools

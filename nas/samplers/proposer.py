"""From what finished trials gave to how much each set of choices is expected to add; Optuna is not needed for it.

Letters: N sets of choices, M objectives.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.samplers.choices import Choices
from nas.samplers.encoding import Key
from nas.samplers.gain import Guess, boxes, expected_gain
from nas.samplers.pool import KEPT, Costs, Pool, listed, searched
from nas.samplers.surrogate import NODES, SHARES, Asked, Process, Scores, weigh
from storage import pareto

Numbers = NDArray[np.float64]
MOST_LEARNT = 1200
"""Finished trials that a surrogate goes by; of more, those nearest the front."""
REFIT = 1.15
"""The weights are found anew whenever so many times as many trials have finished."""
MOST_REFIT = 1000
MOST_WORK = 4e9
"""Products of a triangular solve above which an inner search looks at a part even of a space that is listed."""
MARGIN = 0.1
"""The reference point lies beyond the worst value seen by this share of the range."""


class Belief:
    """What finished trials say of a pool, and the front so far with what running ones are expected to add to it."""

    def __init__(
        self, values: Numbers, beside: Numbers, surrogates: Sequence[tuple[Scores, Process] | None]
    ) -> None:
        self.values, self.beside, self.surrogates = values, beside, surrogates
        """[N, M], smaller is better; further points of the front; by objective, None where it is known."""
        self.believed: list[tuple[Key, tuple[Asked | None, ...]]] = []
        self.cut = _left(values, beside)

    def ask(self, pool: Pool) -> tuple[Asked | None, ...]:
        """What the surrogates think of a pool, by objective."""
        asked = tuple(None if own is None else own[1].ask(pool.columns) for own in self.surrogates)
        for _, others in self.believed:
            _tell(asked, others)
        return asked

    def gain(self, pool: Pool, asked: Sequence[Asked | None], doubt: float = 1.0) -> Numbers:
        """[N] the expected gain of hypervolume, were the guesses so many times as unsure as they are."""
        guesses = []
        for surrogate, own, known in zip(self.surrogates, asked, pool.known, strict=True):
            if surrogate is None or own is None:
                assert known is not None
                guesses.append(Guess(known[:, None], np.ones(1)))
            else:
                scores = own.mean[:, None] + doubt * own.deviation[:, None] * NODES
                guesses.append(Guess(surrogate[0].back(scores), SHARES))
        return expected_gain(guesses, self.cut)

    def believe(self, running: Pool, others: Sequence[tuple[Asked | None, ...]]) -> None:
        """Let one running trial have ended as expected: the front grows by it, and what is near it is sure.

        `others` are answers given before, which are brought up to date.
        """
        asked = self.ask(running)
        expected = np.empty((1, len(self.surrogates)))
        for place, (surrogate, own, known) in enumerate(
            zip(self.surrogates, asked, running.known, strict=True)
        ):
            if surrogate is None or own is None:
                assert known is not None
                expected[:, place] = known
            else:
                expected[:, place] = surrogate[0].back(own.mean)
        for other in others:
            _tell(other, asked)
        self.believed.append((running.keys[0], asked))
        self.values = np.concatenate([self.values, expected])
        self.cut = _left(self.values, self.beside)


def _tell(asked: Sequence[Asked | None], others: Sequence[Asked | None]) -> None:
    for own, other in zip(asked, others, strict=True):
        if own is not None and other is not None:
            own.believe(other)


@dataclass(frozen=True)
class _Stand:
    """What was worked out for a state of the study: it holds until another trial ends."""

    keys: tuple[Key, ...]
    values: Numbers
    beside: Numbers
    belief: Belief
    pool: Pool
    asked: tuple[Asked | None, ...]

    def holds(self, keys: tuple[Key, ...], values: Numbers, beside: Numbers, running: Sequence[Key]) -> bool:
        """Whether it still does; a running trial that was believed in may have failed since."""
        believed = [key for key, _ in self.belief.believed]
        return (
            self.keys == keys
            and np.array_equal(self.values, values)
            and np.array_equal(self.beside, beside)
            and believed == list(running[: len(believed)])
        )


class Proposer:
    """Weighs one space by what is known of it. What it answers follows from the trials and the seed alone."""

    def __init__(self, choices: Choices, costs: Costs, seed: int) -> None:
        self.choices, self.costs, self.seed = choices, costs, seed
        self.all = listed(choices, costs)
        self._weights: dict[tuple[int, tuple[Key, ...]], Numbers] = {}
        self._last: _Stand | None = None

    def weigh(
        self,
        keys: Sequence[Key],
        values: Numbers,
        running: Sequence[Key],
        beside: Numbers,
        doubt: float = 1.0,
    ) -> tuple[tuple[Key, ...], Numbers]:
        """What may be proposed [N] and its expected gains [N], after finished trials [N, M] and with running ones.

        `beside` are values of finished trials that the space does not hold.
        """
        finished, last = tuple(keys), self._last
        if last is None or not last.holds(finished, values, beside, running):
            belief = Belief(values, beside, self._learn(finished, values))
            pool, asked = self._pool(finished, values, belief)
            last = self._last = _Stand(finished, values, beside, belief, pool, asked)
        belief = last.belief
        for fresh in running[len(belief.believed) :]:
            # One by one, so that the numbers are the same however many of them are new.
            belief.believe(self.costs.of(self.choices, [fresh]), [last.asked])
        return last.pool.keys, belief.gain(last.pool, last.asked, doubt)

    def _learn(self, keys: Sequence[Key], values: Numbers) -> list[tuple[Scores, Process] | None]:
        kept = nearest(values, MOST_LEARNT)
        finished = self.costs.of(self.choices, [keys[place] for place in kept])
        surrogates: list[tuple[Scores, Process] | None] = []
        for place, known in enumerate(finished.known):
            if known is not None:
                surrogates.append(None)
                continue
            scores = Scores(values[kept, place])
            base = _milestone(len(keys))
            weights = self._weights_of(place, keys[:base], values[:base, place])
            groups = self.choices.encoding.groups
            before = self._last.belief.surrogates[place] if self._last is not None else None
            process = Process(
                finished.columns,
                scores.forward(),
                groups,
                weights,
                base,
                None if before is None else before[1],
            )
            surrogates.append((scores, process))
        return surrogates

    def _weights_of(self, place: int, keys: Sequence[Key], values: Numbers) -> Numbers:
        """Found from the first so many trials, so that they are the same however often a search was interrupted."""
        key = (place, tuple(keys))
        if key not in self._weights:
            encoding = self.choices.encoding
            self._weights[key] = weigh(
                encoding.of_keys(keys), Scores(values).forward(), encoding.groups, encoding.starts
            )
        return self._weights[key]

    def _pool(
        self, keys: Sequence[Key], values: Numbers, belief: Belief
    ) -> tuple[Pool, tuple[Asked | None, ...]]:
        """What may be proposed, and what is thought of it."""
        learnt = min(len(keys), MOST_LEARNT)
        if self.all is not None and len(self.all.keys) * learnt * (learnt + MOST_LEARNT / 4) < MOST_WORK:
            return self.all, belief.ask(self.all)
        best = [keys[place] for place in nearest(values, KEPT)]
        rng = random.Random(f"{self.seed}/pool/{len(keys)}")
        answers: list[tuple[Asked | None, ...]] = []

        def gain(pool: Pool) -> Numbers:
            answers.append(belief.ask(pool))
            return belief.gain(pool, answers[-1])

        pools = searched(self.choices, self.costs, best, gain, rng)
        by_objective = ([own for own in column if own is not None] for column in zip(*answers, strict=True))
        return Pool.joined(pools), tuple(Asked.joined(own) if own else None for own in by_objective)


def _milestone(count: int) -> int:
    """The first so many of the finished trials, by which the weights are found."""
    milestone = 2
    while (after := max(milestone + 1, int(milestone * REFIT))) <= min(count, MOST_REFIT):
        milestone = after
    return milestone


def nearest(values: Numbers, most: int) -> NDArray[np.intp]:
    """At most so many places [N]: those nearest the front by non-dominated rank, in their order."""
    if len(values) <= most:
        return np.arange(len(values))
    return np.sort(np.argsort(pareto.ranks(values), kind="stable")[:most])


def _left(values: Numbers, beside: Numbers) -> Numbers:
    """The boxes that the front of these values leaves below the worst of them and a margin."""
    values = np.concatenate([values, beside])
    low, high = values.min(0), values.max(0)
    reference = high + MARGIN * np.where(high > low, high - low, 1.0)
    return boxes(values[pareto.front(values)], reference)

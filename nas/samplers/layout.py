"""Our sampler: a surrogate of what is unknown, what is known as it is, and the expected gain of hypervolume.

An ordinary Optuna sampler, for studies of one or several objectives over categorical and numeric parameters. Costs
that follow from the choices alone need not be learnt: `known` says them. With a space of layouts it knows its
constraints and moves besides. It proposes nothing twice, as long as there is anything else.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution

from nas.samplers.choices import Choices
from nas.samplers.encoding import Key, Params
from nas.samplers.history import History
from nas.samplers.pool import Costs, Known, Row
from nas.samplers.proposer import Proposer
from nas.samplers.relative import RelativeSampler, spread
from search_space.layout import Layout
from search_space.space import Space

STARTS = 10
BOLD_EVERY, DOUBT = 3, 2.5
"""One proposal in so many takes the guesses for so many times as unsure: who always trusts them stays beside what is known."""
VEILED_EVERY, VEILED_UNTIL = 2, 200
"""One proposal in so many, before so many trials have finished, guesses what is known as well. A gain where a known cost is
low reaches over all that costs more, so that who goes by known costs alone leaves the dear end for later."""


class LayoutSampler(RelativeSampler):
    """Proposes what is expected to enlarge the front most.

    known: from a set of parameters to one value an objective, None for what only a trial can tell. space: the space of
    layouts that the parameters draw; known_layout: in place of known, of the layout; why_not: why a layout may not be proposed though it is in the space, None if it
    may. search_space: in place of a space of layouts, the parameters and what they may be; without either it is what
    all finished trials were asked, and the first trial is left to chance. usable: whether a set of parameters may be
    proposed. batch_aware: running trials are taken as if they had ended as expected. n_startup_trials: proposals that
    spread over the space before the first guess. The same seed and the same trials give the same proposal.
    """

    def __init__(
        self,
        known: Known | None = None,
        *,
        space: Space | None = None,
        known_layout: Callable[[Layout], Row] | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        usable: Callable[[Params], bool] | None = None,
        why_not: Callable[[Layout], str | None] | None = None,
        batch_aware: bool = True,
        n_startup_trials: int = STARTS,
        seed: int | None = None,
    ) -> None:
        if n_startup_trials < 2:
            raise ValueError(
                f"n_startup_trials={n_startup_trials}: a guess needs at least 2 trials before it"
            )
        super().__init__(space, search_space, usable, why_not, seed)
        if known_layout is not None and (space is None or known is not None):
            raise ValueError("known_layout: it takes the place of known where there is a space of layouts")
        self.known, self.known_layout = known, known_layout
        self.batch_aware, self.starts = batch_aware, n_startup_trials

    def _forget(self) -> None:
        super()._forget()
        self._proposers: dict[bool, tuple[Any, Proposer]] = {}

    def propose(self, choices: Choices, signs: tuple[float, ...], history: History) -> Key | None:
        """What is expected to add most, among all of a small space or what an inner search found in a large one."""
        seen = history.seen
        rng = random.Random(f"{self.seed}/{len(seen)}")
        if len(seen) < self.starts or len(history.finished) < 2:
            return spread(choices, seen, rng)
        running = history.running if self.batch_aware else ()
        doubt = DOUBT if len(seen) % BOLD_EVERY == 0 else 1.0
        veiled = len(seen) % VEILED_EVERY == 0 and len(history.finished) < VEILED_UNTIL
        proposer = self._proposer_of(choices, signs, veiled)
        keys, gains = proposer.weigh(history.finished, history.values, running, history.beside, doubt)
        for place in np.argsort(-gains, kind="stable"):
            if keys[place] not in seen:
                return keys[place]
        if proposer.all is not None:
            return next((key for key in proposer.all.keys if key not in seen), None)
        return spread(choices, seen, rng)

    def _proposer_of(self, choices: Choices, signs: tuple[float, ...], veiled: bool) -> Proposer:
        known = self._known_of(choices)
        veiled = veiled and known is not None
        of = (id(choices), signs, self.seed)
        if veiled not in self._proposers or self._proposers[veiled][0] != of:
            self._proposers[veiled] = (
                of,
                Proposer(choices, Costs(None if veiled else known, signs), self.seed),
            )
        return self._proposers[veiled][1]

    def _known_of(self, choices: Choices) -> Callable[[Key], Row] | None:
        known, known_layout, layouts = self.known, self.known_layout, self._layouts
        if known_layout is not None and layouts is not None:
            return lambda key: known_layout(layouts.layout(key))
        return None if known is None else lambda key: known(choices.encoding.params(key))

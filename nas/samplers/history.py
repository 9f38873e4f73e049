"""A study as a sampler sees it; what has ended is read once, unless it was told again.

Letters: N trials, M objectives.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from nas.samplers.encoding import Encoding, Key, Params

PROPOSED = "layout:proposed"
"""Where a trial's proposal is kept, since a running trial may not have asked for all of it yet."""


@dataclass(frozen=True)
class History:
    """A study as a sampler sees it."""

    finished: tuple[Key, ...]
    values: NDArray[np.float64]
    """[N, M], smaller is better."""
    running: tuple[Key, ...]
    seen: dict[Key, None]
    """All that was ever proposed, failed or not."""
    beside: NDArray[np.float64]
    """Values of finished trials that the space does not hold: they are on the front as well."""


@dataclass
class _Rows:
    """Trials in their order, taken apart."""

    finished: list[Key] = field(default_factory=list)
    values: list[Sequence[float]] = field(default_factory=list)
    running: list[Key] = field(default_factory=list)
    seen: dict[Key, None] = field(default_factory=dict)
    beside: list[Sequence[float]] = field(default_factory=list)

    def add(self, trial: FrozenTrial, key: Key | None) -> None:
        ended = trial.state == TrialState.COMPLETE and all(map(math.isfinite, trial.values))
        if key is None:
            self.beside += [trial.values] if ended else []
            return
        self.seen[key] = None
        if ended:
            self.finished.append(key)
            self.values.append(trial.values)
        elif trial.state in (TrialState.RUNNING, TrialState.WAITING):
            self.running.append(key)


class Reader:
    """Reads trials over one encoding; what it answers follows from the trials alone, not from those it read before.

    A storage of Optuna puts another object in place of a trial that changes. So the trials at the beginning of a study
    that have all ended are known by their being the same objects, and everything is put together anew where one is not.
    """

    def __init__(self, encoding: Encoding, signs: Sequence[float]) -> None:
        self.encoding, self.signs = encoding, np.array(signs)
        self._keys: dict[int, tuple[Params, Key | None]] = {}
        self._start_over()

    def _start_over(self) -> None:
        self._lead: list[FrozenTrial] = []
        self._rows = _Rows()
        self._values, self._beside = self._turned([]), self._turned([])

    def read(self, trials: Sequence[FrozenTrial], but: int) -> History:
        """All trials but the one of this number."""
        if len(trials) < len(self._lead) or not all(map(operator.is_, self._lead, trials)):
            self._start_over()
        rest = iter(trials[len(self._lead) :])
        tail = _Rows()
        for trial in rest:
            if trial.number == but or not trial.state.is_finished():
                self._enter(tail, trial, but)
                break
            self._lead.append(trial)
            self._enter(self._rows, trial, but)
        for trial in rest:
            self._enter(tail, trial, but)
        rows = self._rows
        self._values = self._longer(self._values, rows.values[len(self._values) :])
        self._beside = self._longer(self._beside, rows.beside[len(self._beside) :])
        return History(
            finished=(*rows.finished, *tail.finished),
            values=self._longer(self._values, tail.values),
            running=tuple(tail.running),
            seen=rows.seen | tail.seen,
            beside=self._longer(self._beside, tail.beside),
        )

    def _enter(self, rows: _Rows, trial: FrozenTrial, but: int) -> None:
        if trial.number != but:
            rows.add(trial, self._key(trial))

    def _key(self, trial: FrozenTrial) -> Key | None:
        params = trial.system_attrs.get(PROPOSED, trial.params)
        known = self._keys.get(trial.number)
        # Mostly it is the same object; a comparison of the answers is still far cheaper than their places.
        if known is not None and (known[0] is params or known[0] == params):
            return known[1]
        key = self.encoding.key(params) if params and self.encoding.takes(params) else None
        if trial.state.is_finished():
            # Not before: Optuna writes answers into the very object that a running trial has.
            self._keys[trial.number] = (params, key)
        return key

    def _turned(self, rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
        turned: NDArray[np.float64] = (
            np.array(rows, dtype=np.float64).reshape(-1, len(self.signs)) * self.signs
        )
        return turned

    def _longer(self, before: NDArray[np.float64], rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
        return np.concatenate([before, self._turned(rows)]) if rows else before


class Questions:
    """What all trials that gave something were asked, with the same options: Optuna's intersection, each read once."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._read: list[FrozenTrial | None] = []
        self._common: dict[str, BaseDistribution] | None = None

    def common(self, trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
        """By name, sorted; none before the first trial has ended."""
        fresh = self._fresh(trials)
        if any(self._read[place] is not None for place in fresh):
            self._start_over()
            fresh = self._fresh(trials)
        for place in fresh:
            trial = trials[place]
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._take(trial.distributions)
            if trial.state.is_finished():
                self._read[place] = trial
        return dict(sorted((self._common or {}).items()))

    def _fresh(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """Places of what was not read yet; something that was, where the trials are others than before."""
        if len(trials) < len(self._read):
            self._start_over()
        self._read += [None] * (len(trials) - len(self._read))
        pairs = enumerate(zip(trials, self._read, strict=True))
        return [place for place, (trial, read) in pairs if trial is not read]

    def _take(self, asked: dict[str, BaseDistribution]) -> None:
        if self._common is None:
            self._common = dict(asked)
            return
        pairs = ((name, own, asked.get(name)) for name, own in self._common.items())
        self._common = {name: own for name, own, other in pairs if own is other or own == other}

"""Choices as numbers: what a surrogate sees of a set of parameters.

Letters: N sets of choices, D columns, G groups of columns that share a weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Numbers = NDArray[np.float64]
Params = Mapping[str, Any]
Key = tuple[Any, ...]
"""One number a parameter, None for one that is not asked: what tells two sets of choices apart."""
SPREAD = 1.2
"""Parameters of unit weight that a typical pair of random choices may differ in, until the data say otherwise."""


@dataclass(frozen=True)
class Encoding:
    """Columns such that two sets of choices differ by squared distances: by parameter, and by how often options stand.

    A categorical parameter is one column an option, a number is one column between 0 and 1, and one that is not asked
    differs from every answer. Parameters that offer the same options are taken for places of one sequence: how often
    each option stands in it is told besides, and with `ordered` how often each follows each other one.
    """

    distributions: Mapping[str, BaseDistribution]
    ordered: bool = False

    @cached_property
    def sequences(self) -> list[list[str]]:
        """Names of two or more categorical parameters with the same options, in their order."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for name, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution) and len(distribution.choices) > 1:
                found.setdefault(tuple(map(repr, distribution.choices)), []).append(name)
        return [names for names in found.values() if len(names) > 1]

    @cached_property
    def _plan(self) -> tuple[list[int], list[float]]:
        """The group of each column, and the logarithm of the weight that each group starts with."""
        groups: list[int] = []
        starts: list[float] = []

        def add(columns: int, start: float) -> None:
            groups.extend([len(starts)] * columns)
            starts.append(math.log(start))

        each = SPREAD / max(1, len(self.distributions))
        for distribution in self.distributions.values():
            if isinstance(distribution, CategoricalDistribution):
                add(len(distribution.choices) + 1, each)
            else:
                add(2, 4 * each)
        for names in self.sequences:
            options = self._options(names)
            for _ in range(options):
                add(1, 1.5 * SPREAD / len(names) ** 2)
            if self.ordered:
                add(options**2, 0.25 * SPREAD / len(names))
        return groups, starts

    @property
    def groups(self) -> NDArray[np.intp]:
        """[D] the group of each column."""
        return np.array(self._plan[0], dtype=np.intp)

    @property
    def starts(self) -> Numbers:
        """[G] the logarithm of each group's weight before anything is known."""
        return np.array(self._plan[1])

    def takes(self, params: Params) -> bool:
        """Whether these answers are among the options; a study may hold trials of a space that was changed."""
        return all(
            params[name] in own.choices
            if isinstance(own, CategoricalDistribution)
            else own._contains(params[name])
            for name, own in self.distributions.items()
            if name in params
        )

    @cached_property
    def _places(self) -> dict[str, dict[Any, int] | None]:
        """The place of each option, None for a number: Optuna's own way of asking goes through all of them."""
        return {
            name: {option: place for place, option in enumerate(own.choices)}
            if isinstance(own, CategoricalDistribution)
            else None
            for name, own in self.distributions.items()
        }

    @cached_property
    def _choices(self) -> list[tuple[str, tuple[Any, ...] | None, BaseDistribution]]:
        """By parameter its options, None for a number."""
        return [
            (name, own.choices if isinstance(own, CategoricalDistribution) else None, own)
            for name, own in self.distributions.items()
        ]

    def params(self, key: Key) -> dict[str, Any]:
        """The set of choices of a key."""
        return {
            name: own.to_external_repr(value) if options is None else options[value]
            for (name, options, own), value in zip(self._choices, key, strict=True)
            if value is not None
        }

    def key(self, params: Params) -> Key:
        """What tells two sets of choices apart, whatever else they hold."""
        return tuple(
            None if name not in params else params[name] if places is None else places[params[name]]
            for name, places in self._places.items()
        )

    def of_keys(self, keys: Sequence[Key]) -> Numbers:
        """[N, D] columns of sets of choices that are given by their keys."""
        # None becomes nan.
        table = np.array(keys, dtype=np.float64).reshape(len(keys), len(self.distributions))
        places = self._columns
        columns = np.zeros((len(keys), places.total))
        absent = np.isnan(table)
        answers = np.where(absent, places.options, table)[:, places.categorical].astype(np.intp)
        rows = np.arange(len(keys))[:, None]
        columns[rows, places.starts + answers] = 1 / math.sqrt(2)
        for place, start, distribution in places.numbers:
            own = table[:, place]
            columns[:, start] = np.where(absent[:, place], 0.5, _unit(own, distribution))
            columns[:, start + 1] = absent[:, place]
        for members, options, start in places.sequences:
            stands = (answers[:, members, None] == np.arange(options)).astype(np.float64)
            columns[:, start : start + options] = stands.sum(1)
            if self.ordered:
                pairs = stands[:, :-1].transpose(0, 2, 1) @ stands[:, 1:]
                columns[:, start + options : start + options + options**2] = pairs.reshape(
                    len(keys), options**2
                )
        return columns

    @cached_property
    def _columns(self) -> "_Columns":
        """Where everything stands, in the order of `_plan`."""
        start, starts, categorical, numbers, options = 0, [], [], [], []
        for place, (_, choices, own) in enumerate(self._choices):
            options.append(0 if choices is None else len(choices))
            if choices is None:
                numbers.append((place, start, own))
                start += 2
            else:
                categorical.append(place)
                starts.append(start)
                start += len(choices) + 1
        order = {self._choices[place][0]: index for index, place in enumerate(categorical)}
        sequences = []
        for names in self.sequences:
            count = self._options(names)
            sequences.append((np.array([order[name] for name in names]), count, start))
            start += count + (count**2 if self.ordered else 0)
        return _Columns(
            total=start,
            options=np.array(options),
            categorical=np.array(categorical, dtype=np.intp),
            starts=np.array(starts, dtype=np.intp),
            numbers=tuple(numbers),
            sequences=tuple(sequences),
        )

    def _options(self, names: Sequence[str]) -> int:
        distribution = self.distributions[names[0]]
        assert isinstance(distribution, CategoricalDistribution)
        return len(distribution.choices)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where the columns of an encoding stand."""

    total: int
    options: NDArray[np.intp]
    """By parameter how many options it has: the place of what is not asked. 0 for a number."""
    categorical: NDArray[np.intp]
    """Which parameters have options."""
    starts: NDArray[np.intp]
    """The first column of each of them."""
    numbers: tuple[tuple[int, int, BaseDistribution], ...]
    """Of each other parameter its place and its first column."""
    sequences: tuple[tuple[NDArray[np.intp], int, int], ...]
    """Of each sequence its places among those with options, how many options they have, and its first column."""


def _unit(column: Numbers, distribution: BaseDistribution) -> Numbers:
    """Numbers on the way from their least to their largest, by ratios where the distribution is logarithmic."""
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = float(distribution.low), float(distribution.high)
    if low == high:
        return np.full_like(column, 0.5)
    if distribution.log:
        low, high, column = math.log(low), math.log(high), np.log(np.maximum(column, low))
    unit: Numbers = (column - low) / (high - low)
    return unit

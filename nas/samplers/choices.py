"""Sets of choices to choose from: all of them, random ones, and those a move away from others."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nas.samplers.encoding import Encoding, Key, Params
from search_space.layout import Layer, Layout
from search_space.space import Space, T

MOST_TRIES = 50
MOST_REMEMBERED = 100_000
"""Patterns whose keys were asked for and that need not be drawn again."""


class Choices(Protocol):
    """A space as a sampler sees it; sets of choices go by their keys."""

    encoding: Encoding

    def all(self, most: int) -> list[Key] | None:
        """Every set of choices, None where there are more than `most`."""

    def sample(self, rng: random.Random) -> Key | None:
        """A random set that may be used, None where none was found."""

    def change(self, key: Key, rng: random.Random) -> Key | None:
        """A set one move away, None where the move led nowhere."""

    def cross(self, first: Key, second: Key, rng: random.Random) -> Key | None:
        """The beginning of one set and the end of another, None where that may not be used."""

    def uniform(self) -> list[Key]:
        """Sets whose places all hold the same option."""


class PlainChoices:
    """Independent parameters, of which nothing is known but their options."""

    def __init__(
        self, distributions: Mapping[str, BaseDistribution], usable: Callable[[Params], bool] | None = None
    ) -> None:
        self.encoding = Encoding(distributions)
        self.usable = usable

    def all(self, most: int) -> list[Key] | None:
        """Every set of choices, None where there are more than `most`."""
        options, count = [], 1
        for distribution in self.encoding.distributions.values():
            own = _options(distribution, most)
            if own is None:
                return None
            options.append(own)
            count *= len(own)
            if count > most:
                return None
        names = list(self.encoding.distributions)
        every = (dict(zip(names, values, strict=True)) for values in itertools.product(*options))
        return [key for params in every if (key := self._key(params)) is not None]

    def sample(self, rng: random.Random) -> Key | None:
        """A random set that may be used, None where none was found."""
        for _ in range(MOST_TRIES):
            drawn = {name: _draw(own, rng) for name, own in self.encoding.distributions.items()}
            key = self._key(drawn)
            if key is not None:
                return key
        return None

    def change(self, key: Key, rng: random.Random) -> Key | None:
        """One answer anew, two places of a sequence exchanged, or a sequence shifted by one."""
        params = self.encoding.params(key)
        changed, kind = dict(params), rng.random()
        sequences = self.encoding.sequences
        if sequences and kind < 0.3:
            first, second = rng.sample(rng.choice(sequences), 2)
            changed[first], changed[second] = changed[second], changed[first]
        elif sequences and kind < 0.4:
            places = rng.choice(sequences)
            for name, other in zip(places, places[1:] + places[:1], strict=True):
                changed[name] = params[other]
        else:
            name = rng.choice(list(self.encoding.distributions))
            changed[name] = _draw(self.encoding.distributions[name], rng)
        return self._key(changed)

    def cross(self, first: Key, second: Key, rng: random.Random) -> Key | None:
        """The beginning of one set and the end of another, None where that may not be used."""
        cut = rng.randrange(1, len(first)) if len(first) > 1 else 0
        return self._key(self.encoding.params((*first[:cut], *second[cut:])))

    def uniform(self) -> list[Key]:
        """One option in all places of a sequence; the first option, or the middle, of what stands in none."""
        sequences = self.encoding.sequences
        if not sequences:
            return []
        rest = {name: _middle(own) for name, own in self.encoding.distributions.items()}
        most = max(len(self._options_of(names)) for names in sequences)
        made = []
        for place in range(most):
            params = dict(rest)
            for names in sequences:
                options = self._options_of(names)
                params |= dict.fromkeys(names, options[place % len(options)])
            made.append(params)
        return [key for params in made if (key := self._key(params)) is not None]

    def _key(self, params: Params) -> Key | None:
        return self.encoding.key(params) if self.usable is None or self.usable(params) else None

    def _options_of(self, names: Sequence[str]) -> tuple[Any, ...]:
        distribution = self.encoding.distributions[names[0]]
        assert isinstance(distribution, CategoricalDistribution)
        return tuple(distribution.choices)


def _options(distribution: BaseDistribution, most: int) -> list[Any] | None:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= most else None
    return None


def _draw(distribution: BaseDistribution, rng: random.Random) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return rng.choice(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = distribution.low, distribution.high
    value = (
        float(np.exp(rng.uniform(np.log(low), np.log(high)))) if distribution.log else rng.uniform(low, high)
    )
    if isinstance(distribution, IntDistribution):
        return min(high, int(low) + distribution.step * round((value - low) / distribution.step))
    if distribution.step is not None:
        return min(high, low + distribution.step * round((value - low) / distribution.step))
    return value


def _middle(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if isinstance(distribution, IntDistribution):
        return (
            distribution.low
            + (distribution.high - distribution.low) // (2 * distribution.step) * distribution.step
        )
    return (distribution.low + distribution.high) / 2


class LayoutChoices:
    """A space of layouts, with its constraints, its conditional settings and the moves of layouts.

    Parameters hold the options themselves, as `Space.params_of` writes them.
    """

    def __init__(self, space: Space, why_not: Callable[[Layout], str | None] | None = None) -> None:
        self.space, self.why_not = space, why_not or space.why_not
        questions = space.distributions().items()
        self.encoding = Encoding(
            {name: CategoricalDistribution(options) for name, options in questions}, ordered=True
        )
        self._drawn: dict[Key, Layout] = {}

    def all(self, most: int) -> list[Key] | None:
        """Every pattern that keeps the constraints, None where there are more than `most`."""
        if self.space.size().count > most:
            return None
        found = dict.fromkeys(_every(self.space))
        return [key for layout in found if (key := self.key(layout)) is not None]

    def sample(self, rng: random.Random) -> Key | None:
        """A random pattern that may be used, None where none was found."""
        for _ in range(MOST_TRIES):
            try:
                key = self.key(self.space.sample(rng))
            except ValueError:
                return None
            if key is not None:
                return key
        return None

    def change(self, key: Key, rng: random.Random) -> Key | None:
        """Another layer in one place, two places exchanged, a shift by one, or one setting anew."""
        layers = list(self.layout(key).layers)
        first, second = rng.randrange(len(layers)), rng.randrange(len(layers))
        kind = rng.random()
        if kind < 0.5:
            layers[first] = rng.choice(self._letters)
        elif kind < 0.65:
            layers[first] = rng.choice(self._kin[layers[first]])
        elif kind < 0.9:
            layers[first], layers[second] = layers[second], layers[first]
        else:
            layers = layers[1:] + layers[:1]
        return self.key(Layout(tuple(layers)))

    def cross(self, first: Key, second: Key, rng: random.Random) -> Key | None:
        """The first layers of one pattern and the last ones of another."""
        ones, others = self.layout(first).layers, self.layout(second).layers
        cut = rng.randrange(1, len(ones)) if len(ones) > 1 else 0
        return self.key(Layout((*ones[:cut], *others[cut:])))

    def uniform(self) -> list[Key]:
        """One pattern an entry."""
        return [key for layout in self.space.uniform() if (key := self.key(layout)) is not None]

    def layout(self, key: Key) -> Layout:
        """The pattern that choices draw."""
        if key not in self._drawn:
            self._remember(key, self._layout(key))
        return self._drawn[key]

    def _layout(self, key: Key) -> Layout:
        if self.space.sharing == "layer":
            width = self._width
            layers = [self._written.get(key[start : start + width]) for start in range(0, len(key), width)]
            written = tuple(layer for layer in layers if layer is not None)
            if len(written) == self.space.layers:
                return Layout(written)
        # What another way of choosing wrote, or a setting that all places share.
        return self.space.draw(Answers(self.encoding.params(key)))

    def key(self, layout: Layout) -> Key | None:
        """The choices that draw a pattern, None where it is not in the space or may not be used."""
        key = self._key(layout)
        if key is None or self.why_not(layout) is not None:
            return None
        self._remember(key, layout)
        return key

    def _key(self, layout: Layout) -> Key | None:
        if self.space.sharing != "layer":
            params = self.space.params_of(layout)
            return None if params is None else self.encoding.key(params)
        parts = [part for layer in layout.layers if (part := self._answers.get(layer)) is not None]
        if not len(parts) == len(layout) == self.space.layers:
            return None
        return tuple(itertools.chain.from_iterable(parts))

    def _remember(self, key: Key, layout: Layout) -> None:
        if len(self._drawn) > MOST_REMEMBERED:
            self._drawn.clear()
        self._drawn[key] = layout

    @cached_property
    def _answers(self) -> dict[Layer, Key]:
        """By layer its part of a key, which is the same in all places where every place has settings of its own."""
        found = {}
        for letter in self.space.alphabet:
            params = self.space.params_of(Layout((letter,) * self.space.layers))
            assert params is not None
            found[letter] = self.encoding.key(params)[: self._width]
        return found

    @cached_property
    def _width(self) -> int:
        """How many questions each place has."""
        return len(self.encoding.distributions) // self.space.layers

    @cached_property
    def _written(self) -> dict[Key, Layer]:
        """By part of a key the layer that it writes, of the parts that `_answers` has."""
        return {part: layer for layer, part in self._answers.items()}

    @cached_property
    def _letters(self) -> list[Layer]:
        return list(self.space.alphabet)

    @cached_property
    def _kin(self) -> dict[Layer, list[Layer]]:
        """The layers of the same entry, by layer."""
        owners: dict[int, list[Layer]] = {}
        for letter, (owner, _, _) in self.space.alphabet.items():
            owners.setdefault(owner, []).append(letter)
        return {letter: owners[owner] for letter, (owner, _, _) in self.space.alphabet.items()}


class Answers:
    """Draws what a set of choices says."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def choose(self, name: str, options: Sequence[T]) -> T:
        """The option that the set holds."""
        del options
        value: T = self.params[name]
        return value


def _every(space: Space) -> Iterator[Layout]:
    """All patterns that a space draws, by going through the answers of every question as an odometer does."""
    path: list[int] = []
    while True:
        walk = _Odometer(path)
        yield space.draw(walk)
        path = walk.path
        while path and path[-1] + 1 == walk.widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


class _Odometer:
    """Answers as its path says, and beyond its end with the first option."""

    def __init__(self, path: Sequence[int]) -> None:
        self.path, self.place = list(path), 0
        self.widths: list[int] = []

    def choose(self, name: str, options: Sequence[T]) -> T:
        """The next answer."""
        del name
        if self.place == len(self.path):
            self.path.append(0)
        self.widths.append(len(options))
        self.place += 1
        return options[self.path[self.place - 1]]

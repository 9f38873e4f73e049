"""The space of patterns: which layers may stand where; drawing, counting, neighbours and mutation, under constraints."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from search_space.constraint import Bound, Constraint
from search_space.cost import at_depth, costs_by_name
from search_space.entries import Entry
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.setting import Value
from search_space.vocabulary import plain
from search_space.walk import TooManyStates, Walk

T = TypeVar("T")
SWIGLU = Branch("swiglu")
Sharing = Literal["layer", "study"]
MOST_TABLES = 1000
"""Assignments of shared settings that a count under cost bounds may try one by one; beyond, likewise."""
Choices = tuple[int, tuple[Value, ...], Branch | None]
"""What leads to a layer: the entry's index, the values of its settings, and the channel mixer if one is chosen."""
_Place = tuple[str, list[list[tuple[str, tuple[Value, ...]]]], str]
"""The questions of a place: its mixer, by entry its settings with their options, and its channel mixer."""
_Tables = tuple[list[str], list[tuple[list[str], dict[tuple[Value, ...], Layer]]], list[_Place]]
"""The entries' names; by entry its channel mixers and the layers by channel mixer and settings; the places."""


class Chooser(Protocol):
    """Whoever picks: a sampler, a random walk, a test."""

    def choose(self, name: str, options: Sequence[T]) -> T:
        """One of the options; `name` is the same for the same question."""


@dataclass(frozen=True, kw_only=True)
class RandomChooser:
    """Picks uniformly."""

    rng: random.Random

    def choose(self, name: str, options: Sequence[T]) -> T:
        """One of the options, by the generator."""
        del name
        return self.rng.choice(options)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many patterns a space holds; an upper bound where it is not exact."""

    count: int
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Space:
    """Patterns of `layers` layers, each one of the entries; sizes are in units of the target frame."""

    layers: int
    entries: tuple[Entry, ...]
    channels: tuple[Branch, ...]
    sharing: Sharing
    constraints: tuple[Constraint, ...]
    frame: Frame
    fill: str = "stack"

    @cached_property
    def alphabet(self) -> dict[Layer, Choices]:
        """Every layer that may stand somewhere, and the choices that lead to it."""
        letters: dict[Layer, Choices] = {}
        for choices, layer in self.written.items():
            letters.setdefault(layer, choices)
        return letters

    @cached_property
    def written(self) -> dict[Choices, Layer]:
        """The layer that each choice of an entry, its settings and its channel mixer writes."""
        return {
            (index, values, channel): plain(Layout((entry.fill(values, channel),)), self.frame).layers[0]
            for index, entry in enumerate(self.entries)
            for channel in self._channels_of(entry)
            for values in itertools.product(*(options for _, options in entry.free))
        }

    def _usual(self, entry: Entry) -> Layer:
        """The entry's layer as it is, or with the first channel mixer of the space where its own is not among them."""
        first, *_ = channels = self._channels_of(entry)
        return entry.layer if first is None or SWIGLU in channels else replace(entry.layer, channel=first)

    def _channels_of(self, entry: Entry) -> tuple[Branch | None, ...]:
        # An entry that names its own channel mixer keeps it.
        return self.channels if entry.layer.channel == SWIGLU and self.channels else (None,)

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """How often each position of the pattern stands in the target network."""
        marks = Layout(tuple(Layer((Branch(f"_{index}"),)) for index in range(self.layers)))
        network = at_depth(marks, self.frame, self.fill).layers
        return tuple(network.count(mark) for mark in marks.layers)

    @cached_property
    def prices(self) -> dict[Layer, dict[str, float]]:
        """Costs of each letter once, by the names that bounds use."""
        return {layer: costs_by_name(layer, self.frame) for layer in self.alphabet}

    def draw(self, chooser: Chooser) -> Layout:
        """A pattern by the chooser's picks; it may break the constraints, `why_not` tells."""
        layers, answers = [], dict[str, Value]()
        names, written, places = self._tables
        for mixer, asked, channel in places:
            index = names.index(chooser.choose(mixer, names))
            values = []
            for question, options in asked[index]:
                # Asked once, because a shared setting has one answer in the whole pattern.
                if question not in answers:
                    answers[question] = chooser.choose(question, options)
                values.append(answers[question])
            texts, made = written[index]
            text = chooser.choose(channel, texts) if len(texts) > 1 else texts[0]
            layers.append(made[text, *values])
        return Layout(tuple(layers))

    @cached_property
    def _tables(self) -> "_Tables":
        """What `draw` asks, and what the answers write."""
        texts = [[str(channel) for channel in self._channels_of(entry)] for entry in self.entries]
        made: list[dict[tuple[Value, ...], Layer]] = [{} for _ in self.entries]
        for (index, values, channel), layer in self.written.items():
            made[index][str(channel), *values] = layer
        return (
            [entry.name for entry in self.entries],
            list(zip(texts, made, strict=True)),
            [self._asked_at(position) for position in range(self.layers)],
        )

    def _asked_at(self, position: int) -> "_Place":
        asked = [
            [(self._question(position, entry, setting), options) for setting, options in entry.free]
            for entry in self.entries
        ]
        return f"{position}.mixer", asked, f"{position}.channel"

    def _question(self, position: int, entry: Entry, setting: str) -> str:
        return f"{position}.{entry.name}.{setting}" if self.sharing == "layer" else f"{entry.name}.{setting}"

    def params_of(self, layout: Layout) -> dict[str, Any] | None:
        """The choices that draw this pattern, or None if it is not in the space."""
        if len(layout) != self.layers or any(layer not in self.alphabet for layer in layout.layers):
            return None
        params: dict[str, Any] = {}
        for position, layer in enumerate(layout.layers):
            index, values, channel = self.alphabet[layer]
            entry = self.entries[index]
            answers: dict[str, Any] = {f"{position}.mixer": entry.name}
            for (setting, _), value in zip(entry.free, values, strict=True):
                answers[self._question(position, entry, setting)] = value
            if channel is not None and len(self._channels_of(entry)) > 1:
                answers[f"{position}.channel"] = str(channel)
            if any(params.get(name, value) != value for name, value in answers.items()):
                return None
            params |= answers
        return params

    def distributions(self) -> dict[str, tuple[Value, ...]]:
        """Every question that `draw` may ask, with its options."""
        asked: dict[str, tuple[Value, ...]] = {}
        for position in range(self.layers):
            asked[f"{position}.mixer"] = tuple(entry.name for entry in self.entries)
            for entry in self.entries:
                for setting, options in entry.free:
                    asked[self._question(position, entry, setting)] = options
            if len(self.channels) > 1:
                asked[f"{position}.channel"] = tuple(str(channel) for channel in self.channels)
        return asked

    def why_not(self, layout: Layout) -> str | None:
        """Why a pattern breaks the constraints, or None. Its mixers need not be of this space."""
        for constraint in self.constraints:
            if isinstance(constraint, Bound):
                cost = sum(
                    weight * self._prices_of(layer)[constraint.cost]
                    for weight, layer in zip(self.weights, layout.layers, strict=True)
                )
                if cost > constraint.most:
                    return f"{constraint.cost} is {cost:.0f}, at most {constraint.most:.0f} is allowed"
            elif broken := constraint.broken_by(layout):
                return broken
        return None

    def _prices_of(self, layer: Layer) -> dict[str, float]:
        return self.prices[layer] if layer in self.alphabet else costs_by_name(layer, self.frame)

    def sample(self, rng: random.Random) -> Layout:
        """A random pattern that keeps the constraints.

        Raises:
            ValueError: none was found; `size` says whether there is any.
        """
        for _ in range(200):
            layout = self.draw(RandomChooser(rng=rng))
            if self.why_not(layout) is None:
                return layout
        for letters in self._shuffled_alphabets(rng):
            walk, count, _ = self._walk(letters)
            for _ in range(200 if count else 0):
                layout = walk.sample(rng)
                if self.why_not(layout) is None:
                    return layout
        raise ValueError("no pattern of the space keeps its constraints: loosen one of them")

    def _shuffled_alphabets(self, rng: random.Random) -> Iterator[list[Layer]]:
        if self.sharing == "layer":
            return iter([list(self.alphabet)])
        variants = [self._variants(index) for index in range(len(self.entries))]
        for letters in variants:
            rng.shuffle(letters)
        return _joined(variants)

    def size(self) -> Size:
        """How many different patterns keep the constraints."""
        if self.sharing == "layer":
            _, count, exact = self._walk(list(self.alphabet))
            return Size(count=count, exact=exact)
        variants = [self._variants(index) for index in range(len(self.entries))]
        bounded = any(isinstance(rule, Bound) for rule in self.constraints)
        if not bounded or math.prod(1 + len(letters) for letters in variants) > MOST_TABLES:
            # Only bounds look at settings; without them one assignment stands for all, as many times as there are.
            letters = [layer for letters in variants if letters for layer in letters[0]]
            walk = self._over(letters, ways=[len(letters) for letters in variants], bounded=False)
            return Size(count=walk.count(0, walk.start), exact=not bounded)
        count, exact = 0, True
        for used in range(1, min(self.layers, len(self.entries)) + 1):
            for subset in itertools.combinations(variants, used):
                for letters in _joined(subset):
                    _, ways, counted = self._walk(letters, [self.alphabet[letter][0] for letter in letters])
                    count, exact = count + ways, exact and counted
        return Size(count=count, exact=exact)

    def _walk(self, letters: Sequence[Layer], all_of: Sequence[int] = ()) -> tuple[Walk, int, bool]:
        """A walk over an alphabet, the number of its patterns, and whether that number heeds the bounds exactly."""
        walk = self._over(letters, all_of=all_of)
        try:
            return walk, walk.count(0, walk.start), True
        except TooManyStates:
            walk = self._over(letters, all_of=all_of, bounded=False)
            return walk, walk.count(0, walk.start), False

    def _over(
        self,
        letters: Sequence[Layer],
        *,
        all_of: Sequence[int] = (),
        ways: Sequence[int] = (),
        bounded: bool = True,
    ) -> Walk:
        return Walk(
            letters,
            owners=[self.alphabet[letter][0] for letter in letters],
            constraints=self.constraints,
            prices=self.prices,
            weights=self.weights,
            all_of=all_of,
            ways=ways,
            bounded=bounded,
        )

    def _variants(self, index: int) -> list[list[Layer]]:
        """An entry's layers by the values of its settings: one list an assignment, one layer a channel mixer."""
        variants: dict[tuple[Value, ...], list[Layer]] = {}
        for layer, (owner, values, _) in self.alphabet.items():
            if owner == index:
                variants.setdefault(values, []).append(layer)
        return list(variants.values())

    def neighbours(self, layout: Layout) -> list[Layout]:
        """Every pattern one move away that keeps the constraints.

        A move puts another layer in one place, swaps two places, or, where settings are shared, chooses one entry's anew.
        """
        found: dict[Layout, None] = {}
        for position in range(self.layers):
            for letter in self.alphabet:
                found.setdefault(_with(layout, position, letter))
        for first, second in itertools.combinations(range(self.layers), 2):
            swapped = _with(layout, first, layout.layers[second])
            found.setdefault(_with(swapped, second, layout.layers[first]))
        if self.sharing == "study":
            for index, values in dict.fromkeys((index, values) for index, values, _ in self.written):
                found.setdefault(Layout(tuple(self._again(layer, index, values) for layer in layout.layers)))
        found.pop(layout, None)
        return [other for other in found if self.params_of(other) is not None and self.why_not(other) is None]

    def _again(self, layer: Layer, index: int, values: tuple[Value, ...]) -> Layer:
        """The layer with other values for its settings if it is of that entry, else as it is."""
        owner, _, channel = self.alphabet.get(layer, (None, (), None))
        return self.written[index, values, channel] if owner == index else layer

    def mutate(self, layout: Layout, rng: random.Random) -> Layout:
        """A random neighbour; the same layout where it has none."""
        others = self.neighbours(layout)
        return rng.choice(others) if others else layout

    def uniform(self) -> list[Layout]:
        """One pattern an entry, all of that entry, with the sizes that the frame itself would choose."""
        layers = (self._usual(entry) for entry in self.entries)
        made = (plain(Layout((layer,) * self.layers), self.frame) for layer in layers)
        return [layout for layout in dict.fromkeys(made) if self.why_not(layout) is None]


def _joined(variants: Sequence[Sequence[Sequence[Layer]]]) -> Iterator[list[Layer]]:
    """One alphabet for every assignment of shared settings: one variant of each entry."""
    for combination in itertools.product(*(letters for letters in variants if letters)):
        yield [layer for letters in combination for layer in letters]


def _with(layout: Layout, position: int, letter: Layer) -> Layout:
    return Layout((*layout.layers[:position], letter, *layout.layers[position + 1 :]))

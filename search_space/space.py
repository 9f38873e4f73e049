"""The space of patterns: which layers may stand where; drawing, counting, neighbours and mutation, under constraints."""

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from search_space.constraint import Bound, Constraint, Count, Place, belongs, families
from search_space.cost import at_depth, layer_cost
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.notation import nearest
from search_space.setting import Value, settings_of
from search_space.vocabulary import CHANNELS, VOCABULARY, branch_of, check, mixer_of, plain, read

T = TypeVar("T")
Sharing = Literal["layer", "study"]
MOST_STATES = 200_000
"""Partial patterns that an exact count under cost bounds may keep; beyond, the count is an upper bound."""
MOST_TABLES = 1000
"""Assignments of shared settings that a count under cost bounds may try one by one; beyond, likewise."""
Choices = tuple[int, tuple[Value, ...], Branch | None]
"""What leads to a layer: the entry's index, the values of its settings, and the channel mixer if one is chosen."""


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
class Entry:
    """One word of the space: a layer text whose mixer may have free settings."""

    name: str
    layer: Layer
    free: tuple[tuple[str, tuple[Value, ...]], ...]
    """Settings of the layer's only branch that the search chooses."""

    def fill(self, values: Sequence[Value], channel: Branch | None) -> Layer:
        """The layer with its free settings chosen, and another channel mixer if one is given."""
        branches = self.layer.branches
        if self.free:
            names = [name for name, _ in self.free]
            spec = mixer_of(
                Branch(branches[0].mixer, (*branches[0].settings, *zip(names, values, strict=True)))
            )
            branches = (branch_of(spec),)
        return Layer(branches, channel or self.layer.channel)


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

    def _channels_of(self, entry: Entry) -> tuple[Branch | None, ...]:
        # An entry that names its own channel mixer keeps it.
        return self.channels if entry.layer.channel == Branch("swiglu") and self.channels else (None,)

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
        layers, names = [], [entry.name for entry in self.entries]
        answers: dict[str, Value] = {}
        for position in range(self.layers):
            index = names.index(chooser.choose(f"{position}.mixer", names))
            entry, values = self.entries[index], []
            for setting, options in entry.free:
                question = self._question(position, entry, setting)
                # Asked once, because a shared setting has one answer in the whole pattern.
                if question not in answers:
                    answers[question] = chooser.choose(question, options)
                values.append(answers[question])
            channels = self._channels_of(entry)
            channel = channels[0]
            if len(channels) > 1:
                texts = [str(option) for option in channels]
                channel = channels[texts.index(chooser.choose(f"{position}.channel", texts))]
            layers.append(self.written[index, tuple(values), channel])
        return Layout(tuple(layers))

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
            walk = Walk(self, letters, ways=[len(letters) for letters in variants], bounded=False)
            return Size(count=walk.count(0, walk.start), exact=not bounded)
        count, exact = 0, True
        for used in range(1, min(self.layers, len(self.entries)) + 1):
            for subset in itertools.combinations(variants, used):
                for letters in _joined(subset):
                    _, ways, counted = self._walk(letters, [self.alphabet[letter][0] for letter in letters])
                    count, exact = count + ways, exact and counted
        return Size(count=count, exact=exact)

    def _walk(self, letters: Sequence[Layer], all_of: Sequence[int] = ()) -> tuple["Walk", int, bool]:
        """A walk over an alphabet, the number of its patterns, and whether that number heeds the bounds exactly."""
        walk = Walk(self, letters, all_of=all_of)
        try:
            return walk, walk.count(0, walk.start), True
        except TooManyStates:
            walk = Walk(self, letters, all_of=all_of, bounded=False)
            return walk, walk.count(0, walk.start), False

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
        made = (plain(Layout((entry.layer,) * self.layers), self.frame) for entry in self.entries)
        return [layout for layout in dict.fromkeys(made) if self.why_not(layout) is None]


class TooManyStates(Exception):
    """The sums that cost bounds must tell apart outgrew MOST_STATES."""


class Walk:
    """Counts and draws the patterns over one alphabet, position by position, by what the constraints remember."""

    def __init__(
        self,
        space: Space,
        letters: Sequence[Layer],
        *,
        all_of: Sequence[int] = (),
        ways: Sequence[int] = (),
        bounded: bool = True,
    ) -> None:
        self.space, self.letters = space, list(letters)
        self.owners = [space.alphabet[letter][0] for letter in self.letters]
        self.all_of = frozenset(all_of)
        self.ways = ways
        """By entry, how often the count takes a pattern for the first layer of it: once for every assignment."""
        self.counts = [rule for rule in space.constraints if isinstance(rule, Count)]
        self.places = [rule for rule in space.constraints if isinstance(rule, Place)]
        self.bounds = [rule for rule in space.constraints if isinstance(rule, Bound) and bounded]
        self.memory: dict[tuple[int, Any], int] = {}
        self.start = ((0,) * len(self.counts), (0.0,) * len(self.bounds), frozenset[int]())
        # The cheapest way to finish from each position, so that hopeless beginnings are cut at once.
        cheapest = [min(space.prices[letter][rule.cost] for letter in self.letters) for rule in self.bounds]
        self.least_rest = [
            tuple(price * sum(space.weights[position:]) for price in cheapest)
            for position in range(space.layers + 1)
        ]

    def after(self, position: int, state: Any, index: int) -> Any | None:
        """The state once a letter stands at a position, or None if that breaks a rule for good."""
        letter, last = self.letters[index], self.space.layers - 1
        for place in self.places:
            if position == (0 if place.where == "first" else last) and belongs(letter, place.what):
                return None
        counts = []
        for rule, count in zip(self.counts, state[0], strict=True):
            count += belongs(letter, rule.what)
            if (rule.most is not None and count > rule.most) or count + last - position < rule.least:
                return None
            counts.append(min(count, rule.least) if rule.most is None else count)
        sums = []
        for bound, spent, rest in zip(self.bounds, state[1], self.least_rest[position + 1], strict=True):
            spent += self.space.weights[position] * self.space.prices[letter][bound.cost]
            if spent + rest > bound.most:
                return None
            sums.append(spent)
        used = state[2] | {self.owners[index]} if self.all_of or self.ways else state[2]
        return tuple(counts), tuple(sums), used

    def count(self, position: int, state: Any) -> int:
        """Ways to finish the pattern from a position."""
        if position == self.space.layers:
            return int(self.all_of == state[2]) if self.all_of else 1
        key = (position, state)
        if key not in self.memory:
            if len(self.memory) > MOST_STATES and self.bounds:
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
        for position in range(self.space.layers):
            moved = [self.after(position, state, index) for index in range(len(self.letters))]
            ways = [0 if new is None else self.count(position + 1, new) for new in moved]
            # Whole numbers, because the ways of a long pattern exceed every float.
            index = bisect.bisect(list(itertools.accumulate(ways)), rng.randrange(sum(ways)))
            chosen.append(self.letters[index])
            state = moved[index] or state
        return Layout(tuple(chosen))


def _joined(variants: Sequence[Sequence[Sequence[Layer]]]) -> Iterator[list[Layer]]:
    """One alphabet for every assignment of shared settings: one variant of each entry."""
    for combination in itertools.product(*(letters for letters in variants if letters)):
        yield [layer for letters in combination for layer in letters]


def costs_by_name(layer: Layer, frame: Frame) -> dict[str, float]:
    """A layer's exact costs by the names that objectives and bounds use."""
    cost = layer_cost(layer, frame)
    return {
        "kv_bytes": cost.stored_bytes,
        "params": cost.params,
        "flops_prefill": cost.flops_prefill,
        "flops_decode": cost.flops_decode,
    }


def make_entries(
    names: Sequence[str], settings: Mapping[str, Mapping[str, Sequence[Value]]], frame: Frame
) -> tuple[Entry, ...]:
    """Entries from mixer names, family names or whole layer texts; settings say which values the search tries.

    Raises:
        ValueError: a name, setting or value is unknown, or nothing is left.
    """
    wanted: dict[str, None] = {}
    for name in names:
        of_family = [spec.name for spec in VOCABULARY.values() if spec.family == name]
        wanted.update(dict.fromkeys(of_family or [name]))
    if not wanted:
        raise ValueError("the space is empty: allow at least one mixer, such as full")
    for name in settings:
        if name not in wanted:
            raise ValueError(
                f"settings are given for {name!r}, which the space does not hold{nearest(name, wanted)}"
            )
    return tuple(_entry(name, settings.get(name, {}), frame) for name in wanted)


def _entry(name: str, chosen: Mapping[str, Sequence[Value]], frame: Frame) -> Entry:
    if name.isidentifier() and name not in VOCABULARY:
        raise ValueError(f"no mixer or family {name!r}{nearest(name, [*VOCABULARY, *families()])}")
    layout = read(name)
    check(layout, frame)
    if name not in VOCABULARY:
        if chosen:
            raise ValueError(f"{name!r} is a whole layer: write its settings in the layer itself")
        if len(layout) != 1:
            raise ValueError(f"{name!r} is more than one layer: an entry of the space is one")
        return Entry(name=str(layout), layer=layout.layers[0], free=())
    known = {setting.name: setting for setting in settings_of(VOCABULARY[name])}
    for setting in chosen:
        if setting not in known:
            raise ValueError(f'{name} has no setting "{setting}"{nearest(setting, known)}')
    free = []
    for setting, described in known.items():
        options = chosen.get(setting, described.options if described.searched else ())
        try:
            options = tuple(dict.fromkeys(described.read(option) for option in options))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        usable = tuple(value for value in options if _fits(name, setting, value, frame))
        if options and not usable:
            raise ValueError(f"{name}: no value of {setting} fits width {frame.width}; tried {options}")
        if usable:
            free.append((setting, usable))
    entry = Entry(name=name, layer=layout.layers[0], free=tuple(free))
    for values in itertools.product(*(options for _, options in free)):
        check(Layout((entry.fill(values, None),)), frame)
    return entry


def _fits(name: str, setting: str, value: Value, frame: Frame) -> bool:
    """Whether the value goes with the frame; options such as eight key heads do not go with every width."""
    try:
        mixer_of(Branch(name, ((setting, value),))).sized(frame)
    except ValueError:
        return False
    return True


def make_channels(texts: Sequence[str]) -> tuple[Branch, ...]:
    """Channel mixers from their texts; raises ValueError for an unknown one."""
    made = []
    for text in texts:
        if text.split("[")[0] not in CHANNELS:
            raise ValueError(f"no channel mixer {text!r}{nearest(text, CHANNELS)}")
        layout = read(f"full/{text}")
        if len(layout) != 1:
            raise ValueError(f"{text!r} is not valid: write one channel mixer")
        made.append(layout.layers[0].channel)
    return tuple(dict.fromkeys(made))


def _with(layout: Layout, position: int, letter: Layer) -> Layout:
    return Layout((*layout.layers[:position], letter, *layout.layers[position + 1 :]))

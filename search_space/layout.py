"""Layouts: which mixer stands in which layer, as a frozen value, a line of text, JSON, and a stable key.

    layout   = item { " " item }
    item     = [ count "*" ] ( layer | "(" layout ")" )
    layer    = branch { "|" branch } [ "&" join ] [ "/" channel ]
    branch   = mixer [ "[" name "=" value { "," name "=" value } "]" ] [ "@" share ]
    join     = how mixers side by side become one: mean, sum or gate
    share    = parts of the layer's width that the mixer gets; without any, each is as wide as the layer
    channel  = a branch of the channel mixers; swiglu where nothing is written, "none" for no channel mixer

Equal layouts print equally: runs and nested repeats are folded to the shortest text, defaults are left out.
"""

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from search_space.setting import Value, show_value

DEFAULT_CHANNEL = "swiglu"
JOINS = ("mean", "sum", "gate")
"""How mixers side by side become one: the mean of their normalised outputs, a sum with a learned factor each, or a
normalised mean whose weights each token chooses."""
MOST_SHARES = 64


class Hashed:
    """A frozen value whose hash is worked out once, as a search asks for it thousands of times.

    It does not travel: words hash differently in another process.
    """

    __match_args__: ClassVar[tuple[str, ...]]

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__match_args__))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_hash"}


@dataclass(frozen=True, order=True)
class Branch(Hashed):
    """A mixer's name and those of its settings that differ from the default, sorted by name."""

    __hash__ = Hashed.__hash__

    mixer: str
    settings: tuple[tuple[str, Value], ...] = ()
    share: int = 0
    """Parts of the layer's width, of all that the mixers side by side have; 0: as wide as the layer."""

    def __str__(self) -> str:
        inside = ",".join(f"{name}={show_value(value)}" for name, value in self.settings)
        text = f"{self.mixer}[{inside}]" if inside else self.mixer
        return f"{text}@{self.share}" if self.share else text

    def to_json(self) -> dict[str, Any]:
        """The branch as plain JSON."""
        plain = {"mixer": self.mixer, "settings": dict(self.settings)}
        return plain | {"share": self.share} if self.share else plain


@dataclass(frozen=True, order=True)
class Layer(Hashed):
    """One or more mixers side by side, how they are joined, and the channel mixer that follows them.

    Raises:
        ValueError: an unknown join, one of a single mixer, or shares of some mixers only.
    """

    __hash__ = Hashed.__hash__

    branches: tuple[Branch, ...]
    channel: Branch = Branch(DEFAULT_CHANNEL)
    join: str = JOINS[0]

    def __post_init__(self) -> None:
        if self.join not in JOINS:
            raise ValueError(f"no join {self.join!r}: use one of {', '.join(JOINS)}")
        shared = [branch for branch in self.branches if branch.share]
        if len(self.branches) == 1 and (shared or self.join != JOINS[0]):
            raise ValueError(f"{self.branches[0]} stands alone: @ and & are for mixers side by side")
        if shared and len(shared) < len(self.branches):
            raise ValueError("a share is given to some of the mixers only: give one to each, or to none")
        if any(not 1 <= branch.share <= MOST_SHARES for branch in shared):
            raise ValueError(f"a share is a whole number from 1 to {MOST_SHARES}")

    def __str__(self) -> str:
        text = "|".join(str(branch) for branch in self.branches)
        if self.join != JOINS[0]:
            text = f"{text}&{self.join}"
        return text if self.channel == Branch(DEFAULT_CHANNEL) else f"{text}/{self.channel}"

    def to_json(self) -> dict[str, Any]:
        """The layer as plain JSON."""
        plain = {
            "branches": [branch.to_json() for branch in self.branches],
            "channel": self.channel.to_json(),
        }
        return plain if self.join == JOINS[0] else plain | {"join": self.join}


@dataclass(frozen=True, order=True)
class Layout:
    """A sequence of layers; `str` gives its canonical notation.

    Raises:
        ValueError: there is no layer.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layout has no layer: write at least one mixer, such as full")

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """The canonical notation."""
        return fold([str(layer) for layer in self.layers])

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that equal layouts share, today and in ten years."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def to_json(self) -> list[dict[str, Any]]:
        """One object a layer."""
        return [layer.to_json() for layer in self.layers]

    def dump(self) -> str:
        """The JSON form as text."""
        return json.dumps(self.to_json())


def from_json(layers: Sequence[Mapping[str, Any]]) -> Layout:
    """The layout that `to_json` wrote; settings are not checked here, the vocabulary does that."""

    def branch(item: Mapping[str, Any]) -> Branch:
        return Branch(item["mixer"], tuple(sorted(item["settings"].items())), item.get("share", 0))

    return Layout(
        tuple(
            Layer(tuple(map(branch, item["branches"])), branch(item["channel"]), item.get("join", JOINS[0]))
            for item in layers
        )
    )


def stack(pattern: Layout, depth: int) -> Layout:
    """The pattern repeated until `depth` layers stand; the last repeat may be cut."""
    _check_depth(depth)
    times = -(-depth // len(pattern))
    return Layout((pattern.layers * times)[:depth])


def stretch(pattern: Layout, depth: int) -> Layout:
    """Each layer of the pattern repeated in place, so that relative positions are kept at `depth` layers."""
    _check_depth(depth)
    return Layout(tuple(pattern.layers[index * len(pattern) // depth] for index in range(depth)))


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"depth {depth} is not valid: a network has at least one layer")


def fold(tokens: Sequence[str]) -> str:
    """The shortest notation of a sequence of layers, by runs and nested repeats; ties go to the later split, so that a cut
    stack reads 2*(kda mla) kda."""
    count = len(tokens)
    period = next(p for p in range(1, count + 1) if count % p == 0 and tokens[p:] == tokens[:-p])
    unit = tokens[:period]
    return _repeat(_write(unit, _plan(unit), 0, period), period, count // period)


def _plan(tokens: Sequence[str]) -> dict[tuple[int, int], tuple[int, bool]]:
    """How the shortest text of each stretch of tokens begins: with so many tokens, and whether those repeat throughout.

    The work grows with the cube of the count, so the innermost loop adds whole lists of lengths.
    """
    plan: dict[tuple[int, int], tuple[int, bool]] = {}
    matches = _matches(tokens)
    by_start, by_end = [[len(token)] for token in tokens], [[len(token)] for token in tokens]
    for length in range(2, len(tokens) + 1):
        periods = [period for period in range(1, length // 2 + 1) if length % period == 0]
        for start in range(len(tokens) - length + 1):
            end = start + length
            period = next((p for p in periods if matches[p][start] >= length - p), None)
            if period is not None:
                # Brackets count two; the period is primitive, so that only one token goes without.
                size = by_start[start][period - 1] + len(f"{length // period}*") + 2 * (period > 1)
                plan[start, end] = period, True
            else:
                sums = list(map(operator.add, by_start[start], reversed(by_end[end - 1])))
                size = min(sums) + 1
                plan[start, end] = len(sums) - sums[::-1].index(size - 1), False
            by_start[start].append(size)
            by_end[end - 1].append(size)
    return plan


def _matches(tokens: Sequence[str]) -> list[list[int]]:
    """By distance and start: how many tokens in a row equal the ones that stand so far behind them."""
    table = []
    for distance in range(len(tokens)):
        runs, run = [0] * len(tokens), 0
        for start in range(len(tokens) - distance - 1, -1, -1):
            run = run + 1 if tokens[start] == tokens[start + distance] else 0
            runs[start] = run
        table.append(runs)
    return table


def _write(
    tokens: Sequence[str], plan: Mapping[tuple[int, int], tuple[int, bool]], start: int, end: int
) -> str:
    """The text of tokens[start:end] by the plan."""
    parts, todo = [], [(start, end)]
    while todo:
        start, end = todo.pop()
        if end - start == 1:
            parts.append(tokens[start])
            continue
        first, repeats = plan[start, end]
        if repeats:
            unit = _write(tokens, plan, start, start + first)
            parts.append(_repeat(unit, first, (end - start) // first))
        else:
            todo += [(start + first, end), (start, start + first)]
    return " ".join(parts)


def _repeat(unit: str, layers: int, times: int) -> str:
    if times == 1:
        return unit
    return f"{times}*{unit}" if layers == 1 else f"{times}*({unit})"

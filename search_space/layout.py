"""Layouts: which mixer stands in which layer, as a frozen value, a line of text, JSON, and a stable key.

    layout   = item { " " item }
    item     = [ count "*" ] ( layer | "(" layout ")" )
    layer    = branch { "|" branch } [ "/" channel ]
    branch   = mixer [ "[" name "=" value { "," name "=" value } "]" ]
    channel  = a branch of the channel mixers; swiglu where nothing is written, "none" for no channel mixer

Equal layouts print equally: runs and nested repeats are folded to the shortest text, defaults are left out.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search_space.setting import Value, show_value

DEFAULT_CHANNEL = "swiglu"


@dataclass(frozen=True, order=True)
class Branch:
    """A mixer's name and those of its settings that differ from the default, sorted by name."""

    mixer: str
    settings: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{name}={show_value(value)}" for name, value in self.settings)
        return f"{self.mixer}[{inside}]" if inside else self.mixer

    def to_json(self) -> dict[str, Any]:
        """The branch as plain JSON."""
        return {"mixer": self.mixer, "settings": dict(self.settings)}


@dataclass(frozen=True, order=True)
class Layer:
    """One or more mixers side by side, and the channel mixer that follows them."""

    branches: tuple[Branch, ...]
    channel: Branch = Branch(DEFAULT_CHANNEL)

    def __str__(self) -> str:
        text = "|".join(str(branch) for branch in self.branches)
        return text if self.channel == Branch(DEFAULT_CHANNEL) else f"{text}/{self.channel}"

    def to_json(self) -> dict[str, Any]:
        """The layer as plain JSON."""
        return {"branches": [branch.to_json() for branch in self.branches], "channel": self.channel.to_json()}


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
        return Branch(item["mixer"], tuple(sorted(item["settings"].items())))

    return Layout(
        tuple(Layer(tuple(map(branch, item["branches"])), branch(item["channel"])) for item in layers)
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
    """The shortest notation of a sequence of layers, by runs and nested repeats; ties go to the earlier split."""
    count = len(tokens)
    period = next(p for p in range(1, count + 1) if count % p == 0 and tokens[p:] == tokens[:-p])
    best: dict[tuple[int, int], tuple[str, bool]] = {}
    for length in range(1, period + 1):
        for start in range(period - length + 1):
            best[start, start + length] = _shortest(tokens, best, start, start + length)
    return _repeat(*best[0, period], count // period)


def _shortest(
    tokens: Sequence[str], best: Mapping[tuple[int, int], tuple[str, bool]], start: int, end: int
) -> tuple[str, bool]:
    """The shortest text of tokens[start:end], and whether it is a single item."""
    length = end - start
    if length == 1:
        return tokens[start], True
    for period in range(1, length // 2 + 1):
        if length % period == 0 and tokens[start : end - period] == tokens[start + period : end]:
            return _repeat(*best[start, start + period], length // period), True
    split = min(range(start + 1, end), key=lambda cut: len(best[start, cut][0]) + len(best[cut, end][0]))
    return f"{best[start, split][0]} {best[split, end][0]}", False


def _repeat(text: str, single: bool, times: int) -> str:
    if times == 1:
        return text
    # A repeat of a repeat would need parentheses too, but periods are primitive, so it never occurs here.
    return f"{times}*{text}" if single else f"{times}*({text})"

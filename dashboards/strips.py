"""A layout as a row of cells: a colour by family, a mark by mixer, so that colour is never alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from search_space.family import FAMILIES, UNKNOWN_FAMILY, Family
from storage.records import LayoutRecord


@dataclass(frozen=True, kw_only=True)
class Part:
    """One mixer of a layer; a layer has several where heads of different mixers stand side by side."""

    mixer: str
    family: str
    mark: str
    """One or two letters, unlike those of every other mixer of the study."""
    label: str
    """The part as the notation writes it: window[size=512]."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer of a strip."""

    parts: tuple[Part, ...]
    channel: str
    join: str = ""
    """How parts side by side become one, where it is not their mean."""

    @property
    def label(self) -> str:
        """The whole layer, to be read out or shown on hover."""
        text = "|".join(part.label for part in self.parts) + (f"&{self.join}" if self.join else "")
        return text if self.channel in ("", "swiglu") else f"{text}/{self.channel}"

    @property
    def mark(self) -> str:
        """The marks of all parts, side by side."""
        return "|".join(part.mark for part in self.parts)


Strip = tuple[Cell, ...]


def family_of(name: str) -> Family:
    """A family by name; names that came from a newer or older vocabulary are the unknown one."""
    return FAMILIES.get(name, UNKNOWN_FAMILY)


def family_order(name: str) -> int:
    """Where a family stands in the vocabulary's own order; the unknown one last."""
    return list(FAMILIES).index(name) if name in FAMILIES else len(FAMILIES)


def marks(mixers: Iterable[str]) -> dict[str, str]:
    """The shortest telling letters of each mixer among its fellows: full F, mamba2 Ma, mla Ml."""
    names = sorted(set(mixers))
    initials = [name[:1].upper() for name in names]
    taken: dict[str, str] = {}
    for name, initial in zip(names, initials, strict=True):
        candidates = [initial] if initials.count(initial) == 1 else []
        words = [word for word in name.split("_") if word]
        if len(words) > 1:
            candidates.append("".join(word[0] for word in words[:2]).upper())
        candidates += [initial + letter for letter in name[1:] if letter.isalnum()]
        candidates += [f"{initial}{i}" for i in range(len(names) + 1)]
        taken[next(mark for mark in candidates if mark not in taken)] = name
    return {name: mark for mark, name in taken.items()}


def strip(layout: LayoutRecord, families: Mapping[str, str], letters: Mapping[str, str]) -> Strip:
    """The cells of a stored layout, in order of depth."""
    return tuple(_cell(layer, families, letters) for layer in layout.layers)


def text(cells: Strip) -> str:
    """The strip in letters, for places that show no colour."""
    return " ".join(cell.mark for cell in cells)


def style() -> str:
    """The families' colours as CSS, so that pages, pictures and terminal take them from one list."""
    families = [*FAMILIES.values(), UNKNOWN_FAMILY]
    light = "".join(_variables(f.name, f.colour) for f in families)
    # Colours chosen for white paper sink into a dark page, so they are lifted towards white there.
    dark = "".join(_variables(f.name, _lifted(f.colour)) for f in families)
    rules = "".join(
        f".family-{f.name}{{--family:var(--family-{f.name});--family-ink:var(--family-ink-{f.name});}}\n"
        for f in families
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{rules}"


def _cell(layer: Mapping[str, Any], families: Mapping[str, str], letters: Mapping[str, str]) -> Cell:
    parts = []
    for branch in layer.get("branches", ()):
        mixer = str(branch["mixer"])
        parts.append(
            Part(
                mixer=mixer,
                family=family_of(families.get(mixer, "")).name,
                mark=letters.get(mixer, mixer[:2]),
                label=_notation(mixer, branch.get("settings") or {})
                + (f"@{branch['share']}" if branch.get("share") else ""),
            )
        )
    channel = layer.get("channel") or {}
    written = _notation(str(channel.get("mixer", "")), channel.get("settings") or {})
    return Cell(parts=tuple(parts), channel=written, join=str(layer.get("join", "")))


def _notation(name: str, settings: Mapping[str, Any]) -> str:
    inner = ",".join(f"{key}={value}" for key, value in settings.items())
    return f"{name}[{inner}]" if inner else name


def _variables(name: str, colour: str) -> str:
    ink = max(("#ffffff", "#14161a"), key=lambda candidate: contrast(colour, candidate))
    return f"--family-{name}:{colour};--family-ink-{name}:{ink};"


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _lifted(colour: str, share: float = 0.28) -> str:
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in _channels(colour))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    lights = sorted(_luminance(colour) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    shares = [c / 255 for c in _channels(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

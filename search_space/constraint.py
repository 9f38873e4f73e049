"""Rules that a pattern must keep, written as people say them: full>=1 · attention<=2 · full not first · kv_bytes<=64MiB."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from search_space.layout import Layer, Layout
from search_space.notation import nearest
from search_space.quantity import read_quantity
from search_space.vocabulary import VOCABULARY

BOUNDED = ("kv_bytes", "params", "active_params", "flops_prefill", "flops_decode", "serial_steps")
"""Costs that a bound may name: those that add up over layers and are exact before any training."""

_RULE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(<=|>=)\s*(\S.*?)\s*")
_PLACE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s+not\s+(first|last)\s*")


def families() -> set[str]:
    """The families that the vocabulary has."""
    return {spec.family for spec in VOCABULARY.values()}


def belongs(layer: Layer, what: str) -> bool:
    """Whether a layer holds a mixer of that name or family."""
    return any(branch.mixer == what or VOCABULARY[branch.mixer].family == what for branch in layer.branches)


@dataclass(frozen=True, kw_only=True)
class Count:
    """At least and at most so many layers of the pattern hold a mixer or family."""

    what: str
    least: int
    most: int | None

    def broken_by(self, layout: Layout) -> str | None:
        """Why a layout breaks the rule, or None."""
        count = sum(belongs(layer, self.what) for layer in layout.layers)
        if count < self.least:
            return f"{count} layers of {self.what}, at least {self.least} are asked for"
        if self.most is not None and count > self.most:
            return f"{count} layers of {self.what}, at most {self.most} are allowed"
        return None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A mixer or family that may not stand first, or last."""

    what: str
    where: Literal["first", "last"]

    def broken_by(self, layout: Layout) -> str | None:
        """Why a layout breaks the rule, or None."""
        layer = layout.layers[0 if self.where == "first" else -1]
        return f"{self.what} stands {self.where}" if belongs(layer, self.what) else None


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A cost of the whole target network that may not be exceeded."""

    cost: str
    most: float


Constraint = Count | Place | Bound


def read_constraint(text: str, names: Collection[str] | None = None) -> Constraint:
    """The rule that a text says.

    Raises:
        ValueError: it is no rule, or names neither a mixer, a family nor a cost.
    """
    groups = set(names or VOCABULARY) | families()
    placed = _PLACE.fullmatch(text)
    if placed:
        _check_name(placed.group(1), groups, text)
        return Place(what=placed.group(1), where="first" if placed.group(2) == "first" else "last")
    rule = _RULE.fullmatch(text)
    if not rule:
        raise ValueError(
            f"constraint {text!r} is not understood: write it like full>=1, attention<=2, full not first or kv_bytes<=64MiB"
        )
    what, sign, number = rule.groups()
    if what in BOUNDED:
        if sign == ">=":
            raise ValueError(f"constraint {text!r}: a cost can only be bounded from above, with <=")
        return Bound(cost=what, most=read_quantity(number))
    _check_name(what, groups, text)
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"constraint {text!r}: {number!r} is not a number of layers")
    return Count(
        what=what, least=int(number) if sign == ">=" else 0, most=int(number) if sign == "<=" else None
    )


def _check_name(what: str, known: Collection[str], text: str) -> None:
    if what not in known:
        raise ValueError(
            f"constraint {text!r}: no mixer, family or cost {what!r}{nearest(what, [*known, *BOUNDED])}"
        )


def read_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """All rules of a list; raises ValueError as `read_constraint`."""
    return tuple(read_constraint(text) for text in texts)

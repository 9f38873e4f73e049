"""What every sampler is: it proposes patterns and learns from what became of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from search_space.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A pattern, the choices that drew it, and what the sampler wants to be reminded of when it is rebuilt."""

    layout: Layout
    params: Mapping[str, Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    token: int = -1
    """The sampler's own name for the proposal."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A finished or running trial as a sampler is told of it; `values` is None while it runs."""

    params: Mapping[str, Any]
    attrs: Mapping[str, Any]
    values: Sequence[float] | None


class Sampler(Protocol):
    """Asked for one pattern at a time; the caller says how each one ended."""

    def learn(self, known: Known) -> int:
        """Take in a trial that was not asked for here, or before a restart; returns its token."""

    def ask(self, number: int, attempt: int) -> Proposal:
        """A pattern for trial `number`; a later `attempt` follows a proposal that could not be used."""

    def tell(self, token: int, values: Sequence[float] | None) -> None:
        """Objective values in the study's order, or None for a pattern that gave none."""

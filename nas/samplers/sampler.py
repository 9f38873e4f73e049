"""What every sampler is: it proposes patterns and learns from what became of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from search_space.layout import Layout
from storage import pareto
from storage.records import Axis


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a search is after, and what is known of a pattern before it is trained."""

    axes: tuple[Axis, ...]
    known: Callable[[Layout], Sequence[float | None]] | None = None
    """One value an axis; None for what a trial must tell."""
    why_not: Callable[[Layout], str | None] | None = None
    """Why a pattern is not to be trained, None if it may be; the space's own constraints if left out."""

    def losses(self, values: Sequence[float]) -> list[float]:
        """Values on the frozen scale of the axes, where 0 is best."""
        scaled: list[float] = pareto.losses(self.axes, [list(values)])[0].tolist()
        return scaled

    def known_losses(self, layout: Layout) -> list[float | None]:
        """The same of what is known of a pattern."""
        if self.known is None:
            return [None] * len(self.axes)
        values = self.known(layout)
        filled = [axis.low if value is None else value for axis, value in zip(self.axes, values, strict=True)]
        scaled = self.losses(filled)
        return [None if value is None else loss for value, loss in zip(values, scaled, strict=True)]


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
    """A trial as a sampler is told of it; `values` is None while it runs, and where it failed.

    Of one that rests at a rung they are the values that are expected at its end.
    """

    params: Mapping[str, Any]
    attrs: Mapping[str, Any]
    values: Sequence[float] | None
    failed: bool = False


class Sampler(Protocol):
    """Asked for one pattern at a time; the caller says how each one ended."""

    def learn(self, known: Known) -> int:
        """Take in a trial that was not asked for here, or before a restart; returns its token."""

    def ask(self, number: int, attempt: int) -> Proposal:
        """A pattern for trial `number`; a later `attempt` follows a proposal that could not be used."""

    def tell(self, token: int, values: Sequence[float] | None) -> None:
        """Objective values in the order of the axes, or None for a pattern that gave none.

        A trial that rests at a rung is told with what is expected of it; told again, the later values stand.
        """

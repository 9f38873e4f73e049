"""What the interface answers: plain numbers in the unit of their key, typed for its OpenAPI description."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dashboards.view import Point
from storage.glances import Glance
from storage.records import Axis, State


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no other answer, in one line."""

    detail: str


@dataclass(frozen=True, kw_only=True)
class StudyAnswer:
    """A study in a list."""

    name: str
    path: str
    """Where the interface has more of it; names of any characters are quoted there."""
    state: str
    planned: int | None
    counts: Mapping[State, int]
    created_at: float
    hypervolume: float


@dataclass(frozen=True, kw_only=True)
class FullStudyAnswer:
    """One study with its axes and configuration."""

    study: StudyAnswer
    axes: tuple[Axis, ...]
    families: Mapping[str, str]
    config_hash: str
    config: Mapping[str, Any]
    hypervolume: float


@dataclass(frozen=True, kw_only=True)
class FrontAnswer:
    """The front, best on the first axis first."""

    axes: tuple[Axis, ...]
    hypervolume: float
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trial in a list."""

    number: int
    state: State
    origin: str
    layout: str
    on_front: bool
    rung: int | None
    seeds: int
    values: Mapping[str, float]
    """By objective, as far as it has some."""
    costs: Mapping[str, float]
    scores: Mapping[str, float]
    why: str
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, kw_only=True)
class TrialsAnswer:
    """Some trials of those that were asked for."""

    total: int
    offset: int
    trials: list[Line]


@dataclass(frozen=True, kw_only=True)
class FigureAnswer:
    """A picture as plotly.js draws it. Colours written as var(--name) are the page's own."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    version: int
    """The number of the study's last event in it; `since` asks for what came later."""
    increment: bool = False
    """True where the crowd of beaten layouts holds only what changed after `since`."""


def line(seen: Glance, axes: tuple[Axis, ...], on_front: bool) -> Line:
    """A trial as a line of a list."""
    values = {axis.name: seen.value(axis.name) for axis in axes}
    return Line(
        number=seen.number,
        state=seen.state,
        origin=seen.origin,
        layout=seen.layout.text,
        on_front=on_front,
        rung=seen.rungs[-1][0] if seen.rungs else None,
        seeds=len(seen.by_seed("quality")),
        values={name: value for name, value in values.items() if value is not None},
        costs=seen.costs,
        scores=seen.scores or {},
        why=seen.why,
        started_at=seen.started_at,
        ended_at=seen.ended_at,
    )

"""A study as people look at it: points, front, hypervolume and what was beaten, computed from records alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dashboards import quantities
from dashboards.strips import Strip, marks, strip
from storage import pareto
from storage.records import Axis, StudyRecord, TrialRecord

Kind = Literal["found", "uniform", "preset"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured layout with a value on every axis."""

    number: int
    text: str
    origin: str
    kind: Kind
    strip: Strip
    values: Mapping[str, float]
    """By axis name."""
    costs: Mapping[str, float]
    on_front: bool
    rank: int
    """0 on the front, 1 on the front of what remains without it, and so on."""
    ended_at: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The hypervolume after so many measured trials."""

    measured: int
    number: int
    """The trial that had just ended."""
    hypervolume: float


@dataclass(frozen=True, kw_only=True)
class Beaten:
    """A preset or a uniform layout, and a found layout that is no worse on any axis and better on one."""

    number: int
    text: str
    origin: str
    by_number: int
    by_text: str
    changes: tuple[str, ...]
    """From the beaten to the better one: "quality +.05"."""


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """Everything that the pictures and tables of a study are drawn from."""

    name: str
    axes: tuple[Axis, ...]
    context: float | None
    """The target's context, at which the plain cache cost is taken."""
    marks: Mapping[str, str]
    families: Mapping[str, str]
    points: tuple[Point, ...]
    """In order of trial number."""
    progress: tuple[Progress, ...]
    beaten: tuple[Beaten, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The front, best on the first axis first; a layout measured twice to the same values stands once."""
        first = self.axes[0]
        sign = -1.0 if first.maximise else 1.0
        once = {(p.text, tuple(sorted(p.values.items()))): p for p in reversed(self.points) if p.on_front}
        return tuple(sorted(once.values(), key=lambda p: (sign * p.values[first.name], p.number)))

    @property
    def hypervolume(self) -> float:
        """Where the progress stands now."""
        return self.progress[-1].hypervolume if self.progress else 0.0

    def axis(self, name: str) -> Axis:
        """An axis by name; KeyError for a name that the study has not."""
        return {axis.name: axis for axis in self.axes}[name]

    def title(self, name: str) -> str:
        """What an axis or a cost is called here, contexts included."""
        return quantities.title(name, self.context)


def value_on(axis: Axis, trial: TrialRecord) -> float | None:
    """A trial's value on an axis: its quality, a cost of its layout, or its score in a task."""
    return trial.value(axis.name)


def kind_of(origin: str) -> Kind:
    """Whether the search found it, it is one mixer throughout, or a known model's pattern."""
    if origin == "uniform":
        return "uniform"
    return "found" if origin in ("search", "") else "preset"


def study_view(study: StudyRecord, trials: Sequence[TrialRecord]) -> StudyView:
    """The view of a study; trials that are not done, or lack a finite value on an axis, are no points."""
    letters = marks(study.families)
    measured: list[tuple[TrialRecord, dict[str, float]]] = []
    for trial in sorted(trials, key=lambda t: t.number):
        values = {axis.name: value_on(axis, trial) for axis in study.axes}
        finite = {name: x for name, x in values.items() if x is not None and math.isfinite(x)}
        if trial.state == "done" and len(finite) == len(study.axes):
            measured.append((trial, finite))
    raw = np.array([[v[axis.name] for axis in study.axes] for _, v in measured], dtype=float)
    raw = raw.reshape(len(measured), len(study.axes))
    directed = raw * np.array([-1.0 if axis.maximise else 1.0 for axis in study.axes])
    front = {int(i) for i in pareto.front(directed)} if measured else set()
    ranks: Sequence[int] = pareto.ranks(directed).tolist() if measured else []
    points = tuple(
        Point(
            number=trial.number,
            text=trial.layout.text,
            origin=trial.origin,
            kind=kind_of(trial.origin),
            strip=strip(trial.layout, study.families, letters),
            values=values,
            costs=dict(trial.costs),
            on_front=i in front,
            rank=ranks[i],
            ended_at=trial.ended_at or 0.0,
        )
        for i, (trial, values) in enumerate(measured)
    )
    return StudyView(
        name=study.name,
        axes=study.axes,
        context=_context(study.config),
        marks=letters,
        families=study.families,
        points=points,
        progress=_progress(study.axes, points, raw),
        beaten=_beaten(study.axes, points, directed, _context(study.config)),
    )


def _context(config: Mapping[str, Any]) -> float | None:
    target = config.get("target")
    context = target.get("context") if isinstance(target, Mapping) else None
    return float(context) if isinstance(context, int | float) else None


def _progress(axes: Sequence[Axis], points: Sequence[Point], raw: np.ndarray) -> tuple[Progress, ...]:
    if not points:
        return ()
    losses = np.asarray(pareto.losses(axes, raw), dtype=float)
    order = sorted(range(len(points)), key=lambda i: (points[i].ended_at, points[i].number))
    kept = np.empty((0, len(axes)))
    history, volume = [], 0.0
    for step, i in enumerate(order, start=1):
        # A point that something kept already covers adds nothing, so most steps cost one comparison.
        if not bool(np.any(np.all(kept <= losses[i], axis=1))):
            kept = np.vstack([kept[~np.all(kept >= losses[i], axis=1)], losses[i]])
            volume = float(pareto.hypervolume(kept))
        history.append(Progress(measured=step, number=points[i].number, hypervolume=volume))
    return tuple(history)


def _beaten(
    axes: Sequence[Axis], points: Sequence[Point], directed: np.ndarray, context: float | None
) -> tuple[Beaten, ...]:
    told = []
    for i, point in enumerate(points):
        if point.kind == "found":
            continue
        better = [int(j) for j in pareto.beaten_by(directed, i) if points[j].kind == "found"]
        if not better:
            continue
        # Of several, the one that is best on the first axis: the easiest to believe.
        winner = points[min(better, key=lambda j: directed[j, 0])]
        told.append(
            Beaten(
                number=point.number,
                text=point.text,
                origin=point.origin,
                by_number=winner.number,
                by_text=winner.text,
                changes=_changes(axes, point, winner, context),
            )
        )
    return tuple(told)


def _changes(axes: Sequence[Axis], worse: Point, better: Point, context: float | None) -> tuple[str, ...]:
    words = []
    for axis in axes:
        before, after = worse.values[axis.name], better.values[axis.name]
        if before == after:
            continue
        change = quantities.change(axis.name, before, after, log=axis.log)
        words.append(f"{quantities.title(axis.name, context)} {change}")
    return tuple(words)

"""A study as people look at it: points, front, hypervolume and what was beaten, computed from records alone.

Letters: T trials, by number; M objectives. What a trial has not is NaN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dashboards import quantities
from dashboards.strips import Strip, marks, strip
from storage import pareto
from storage.glances import Glance, glance_of
from storage.records import Axis, StudyRecord, TrialRecord

Kind = Literal["found", "uniform", "preset"]
RANKED = 5000
"""Of so many measured trials at most the ranks of all are worked out."""
Floats = NDArray[np.float64]
Numbers = NDArray[np.intp]


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
    """0 on the front, 1 on the front of what remains without it, and so on; of very many, 1 for all that are beaten."""
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


@dataclass(frozen=True)
class Growth:
    """The hypervolume so far, with what is needed to go on: the losses that no other covers."""

    steps: tuple[Progress, ...]
    kept: Floats
    last: tuple[float, int] = (-math.inf, -1)
    """When the last trial ended, and its number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyView:
    """Everything that the pictures and tables of a study are drawn from."""

    name: str
    axes: tuple[Axis, ...]
    context: float | None
    """The target's context, at which the plain cache cost is taken."""
    marks: Mapping[str, str]
    families: Mapping[str, str]
    glances: Sequence[Glance | None]
    """[T] whatever stands there, measured or not."""
    values: Floats
    """[T, M] on the axes; a row of NaN where a trial has not all of them."""
    measured: Numbers
    """Numbers of trials with a value on every axis."""
    known: Numbers
    """Those of them that the search did not find: presets, and one mixer throughout."""
    front_numbers: Numbers
    growth: Growth

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Every measured layout, in order of trial number."""
        return self.points_of(self.measured)

    @cached_property
    def front(self) -> tuple[Point, ...]:
        """The front, best on the first axis first; a layout measured twice to the same values stands once."""
        first = self.axes[0]
        sign = -1.0 if first.maximise else 1.0
        found = self.points_of(self.front_numbers)
        once = {(p.text, tuple(sorted(p.values.items()))): p for p in reversed(found)}
        return tuple(sorted(once.values(), key=lambda p: (sign * p.values[first.name], p.number)))

    @property
    def progress(self) -> tuple[Progress, ...]:
        """How the hypervolume grew, in order of ending."""
        return self.growth.steps

    @property
    def hypervolume(self) -> float:
        """Where the progress stands now."""
        return self.progress[-1].hypervolume if self.progress else 0.0

    @cached_property
    def directed(self) -> Floats:
        """[T, M] values turned so that smaller is better."""
        turned: Floats = self.values * np.array([-1.0 if axis.maximise else 1.0 for axis in self.axes])
        return turned

    @cached_property
    def ranks(self) -> Mapping[int, int]:
        """The non-dominated rank of every measured trial."""
        found = pareto.ranks(self.directed[self.measured]) if len(self.measured) else ()
        return {int(n): int(rank) for n, rank in zip(self.measured, found, strict=True)}

    @cached_property
    def on_front(self) -> frozenset[int]:
        """Numbers of the trials that no other beats."""
        return frozenset(self.front_numbers.tolist())

    @cached_property
    def beaten(self) -> tuple[Beaten, ...]:
        """Known layouts that a found one beats."""
        return _beaten(self)

    def glance(self, number: int) -> Glance:
        """A trial by number; KeyError where there is none."""
        found = self.glances[number] if 0 <= number < len(self.glances) else None
        if found is None:
            raise KeyError(number)
        return found

    def points_of(self, numbers: Sequence[int] | Numbers) -> tuple[Point, ...]:
        """These measured trials as points, in the order given."""
        return tuple(self.point(int(number)) for number in numbers)

    def point(self, number: int) -> Point:
        """One measured trial as a point."""
        seen = self.glance(number)
        on_front = number in self.on_front
        return Point(
            number=number,
            text=seen.layout.text,
            origin=seen.origin,
            kind=kind_of(seen.origin),
            strip=strip(seen.layout, self.families, self.marks),
            values=dict(zip((axis.name for axis in self.axes), self.values[number].tolist(), strict=True)),
            costs=dict(seen.costs),
            on_front=on_front,
            rank=0 if on_front else self.ranks.get(number, 1) if len(self.measured) <= RANKED else 1,
            ended_at=seen.ended_at or 0.0,
        )

    def column(self, name: str) -> Floats:
        """[T] values on an axis; KeyError for a name that the study has not."""
        place = {axis.name: index for index, axis in enumerate(self.axes)}[name]
        column: Floats = self.values[:, place]
        return column

    def axis(self, name: str) -> Axis:
        """An axis by name; KeyError for a name that the study has not."""
        return {axis.name: axis for axis in self.axes}[name]

    def title(self, name: str) -> str:
        """What an axis or a cost is called here, contexts included."""
        return quantities.title(name, self.context)


def value_on(axis: Axis, trial: TrialRecord | Glance) -> float | None:
    """A trial's value on an axis: its quality, a cost of its layout, or its score in a task."""
    return trial.value(axis.name)


def kind_of(origin: str) -> Kind:
    """Whether the search found it, it is one mixer throughout, or a known model's pattern."""
    if origin == "uniform":
        return "uniform"
    return "found" if origin in ("search", "") else "preset"


def study_view(study: StudyRecord, trials: Sequence[TrialRecord]) -> StudyView:
    """The view of a study; trials that are not done, or lack a finite value on an axis, are no points."""
    glances: list[Glance | None] = [None] * (1 + max((trial.number for trial in trials), default=-1))
    for trial in trials:
        glances[trial.number] = glance_of(trial)
    values = np.full((len(glances), len(study.axes)), np.nan)
    for seen in glances:
        if seen is not None:
            values[seen.number] = values_of(study.axes, seen)
    return view_of(study, glances, values)


def values_of(axes: Sequence[Axis], seen: Glance) -> Sequence[float]:
    """A trial's values on all axes, or NaN throughout where it is not done or lacks one."""
    values = [value_on(axis, seen) for axis in axes] if seen.state == "done" else []
    if not values or any(x is None or not math.isfinite(x) for x in values):
        return [math.nan] * len(axes)
    return [float(x) for x in values if x is not None]


def view_of(
    study: StudyRecord, glances: Sequence[Glance | None], values: Floats, before: StudyView | None = None
) -> StudyView:
    """The view of what was read; `before` is one of the same trials with fewer of them measured."""
    known_values = ~np.isnan(values).any(axis=1) if study.axes else np.zeros(len(values))
    there = np.asarray(known_values, dtype=bool)
    measured = np.flatnonzero(there)
    fresh = rivals = measured
    if before is not None:
        there[before.measured] = False
        fresh = np.flatnonzero(there)
        # What was beaten before is beaten still: only the old front and the new trials can stand on the new one.
        rivals = np.sort(np.concatenate([before.front_numbers, fresh]))
    known = [n for n in fresh.tolist() if (seen := glances[n]) and kind_of(seen.origin) != "found"]
    turned = values[rivals] * np.array([-1.0 if axis.maximise else 1.0 for axis in study.axes])
    view = StudyView(
        name=study.name,
        axes=study.axes,
        context=_context(study.config),
        marks=before.marks if before else marks(study.families),
        families=study.families,
        glances=glances,
        values=values,
        measured=measured,
        known=np.array([*known, *(() if before is None else before.known.tolist())], dtype=np.intp),
        front_numbers=rivals[pareto.front(turned)] if len(rivals) else rivals,
        growth=Growth((), np.empty((0, len(study.axes)))),
    )
    return replace(view, growth=_grown(view, fresh, before))


def _context(config: Mapping[str, Any]) -> float | None:
    target = config.get("target")
    context = target.get("context") if isinstance(target, Mapping) else None
    return float(context) if isinstance(context, int | float) else None


def _grown(view: StudyView, fresh: Numbers, before: StudyView | None) -> Growth:
    ended = {int(n): (view.glance(int(n)).ended_at or 0.0, int(n)) for n in fresh}
    order = sorted(ended, key=lambda n: ended[n])
    grown = view.growth if before is None else before.growth
    if order and ended[order[0]] < grown.last:
        # One that ended earlier is told of late: the story is told again from the beginning.
        return _grown(view, view.measured, None)
    if not order:
        return grown
    losses = np.asarray(pareto.losses(view.axes, view.values[order]), dtype=float)
    steps, kept = list(grown.steps), grown.kept
    volume = steps[-1].hypervolume if steps else 0.0
    for number, loss in zip(order, losses, strict=True):
        # A point that something kept already covers adds nothing, so most steps cost one comparison.
        if not bool(np.any(np.all(kept <= loss, axis=1))):
            kept = np.vstack([kept[~np.all(kept >= loss, axis=1)], loss])
            volume = float(pareto.hypervolume(kept))
        steps.append(Progress(measured=len(steps) + 1, number=number, hypervolume=volume))
    return Growth(tuple(steps), kept, ended[order[-1]])


def _beaten(view: StudyView) -> tuple[Beaten, ...]:
    if not len(view.known):
        return ()
    found = np.setdiff1d(view.measured, view.known, assume_unique=True)
    # Whatever beats a layout, something that no other found one beats does as well.
    best = found[pareto.front(view.directed[found])] if len(found) else found
    told = []
    for number in sorted(view.known.tolist()):
        own = view.directed[number]
        rivals = view.directed[best]
        better = best[(rivals <= own).all(axis=1) & (rivals < own).any(axis=1)]
        if not len(better):
            continue
        # Of several, the one that is best on the first axis: the easiest to believe.
        winner = int(better[np.argmin(view.directed[better, 0])])
        beaten, by = view.glance(number), view.glance(winner)
        told.append(
            Beaten(
                number=number,
                text=beaten.layout.text,
                origin=beaten.origin,
                by_number=winner,
                by_text=by.layout.text,
                changes=changes(view, number, winner),
            )
        )
    return tuple(told)


def changes(view: StudyView, before: int, after: int) -> tuple[str, ...]:
    """What becomes of each objective from one measured trial to another, in words."""
    words = []
    for place, axis in enumerate(view.axes):
        one, other = (float(view.values[number, place]) for number in (before, after))
        if one != other:
            words.append(f"{view.title(axis.name)} {quantities.change(axis.name, one, other, log=axis.log)}")
    return tuple(words)

"""The tables of the pages: what stands behind every picture, for people who read or hear rather than look."""

from collections.abc import Sequence
from dataclasses import dataclass

from dashboards import addresses, quantities, strips
from dashboards.strips import Strip
from dashboards.trial_charts import curves_of
from dashboards.view import Point, StudyView, value_on
from storage.records import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its words, and whether it holds numbers, which stand to the right."""

    title: str
    numeric: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell of a table."""

    text: str
    sort: float | None = None
    """What the column is sorted by, where that is not the text."""
    strip: Strip = ()
    href: str = ""
    copy: bool = False
    """True for a notation that people take to the command line."""
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table, of a trial where it belongs to one."""

    entries: tuple[Entry, ...]
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as a page shows it; every word of it is text, never markup."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def front(view: StudyView, *, linked: bool) -> Table:
    """The front, one row a layout: strip, notation, every objective, the other costs, origin."""
    names = [axis.name for axis in view.axes]
    others = _other_costs(view.front, names)
    units = {axis.name: axis.unit for axis in view.axes}
    rows = [
        Row(
            trial=p.number,
            entries=(
                _number(view.name, p.number, linked=linked),
                Entry(text=p.text, strip=p.strip, copy=True),
                *(_value(name, p.values[name], units[name]) for name in names),
                *(_value(name, p.costs.get(name)) for name in others),
                Entry(text=p.origin),
            ),
        )
        for p in view.front
    ]
    columns = (
        Column(title="trial", numeric=True),
        Column(title="layout"),
        *(Column(title=view.title(name), numeric=True) for name in (*names, *others)),
        Column(title="origin"),
    )
    return Table(caption="The front", columns=columns, rows=tuple(rows))


def trials(view: StudyView, records: Sequence[TrialRecord], *, linked: bool) -> Table:
    """Trials as they stand, ended or not, with their values as far as they have some."""
    on_front = {p.number for p in view.points if p.on_front}
    letters = view.marks
    rows = []
    for trial in records:
        state = "front" if trial.number in on_front else trial.state
        rows.append(
            Row(
                trial=trial.number,
                entries=(
                    _number(view.name, trial.number, linked=linked),
                    Entry(text=trial.layout.text, strip=strips.strip(trial.layout, view.families, letters)),
                    Entry(text=state, state=state),
                    *(_value(axis.name, value_on(axis, trial), axis.unit) for axis in view.axes),
                    Entry(text=trial.origin),
                    Entry(text=trial.why),
                ),
            )
        )
    columns = (
        Column(title="trial", numeric=True),
        Column(title="layout"),
        Column(title="state"),
        *(Column(title=view.title(axis.name), numeric=True) for axis in view.axes),
        Column(title="origin"),
        Column(title="why"),
    )
    return Table(caption="Trials", columns=columns, rows=tuple(rows))


def hypervolume(view: StudyView) -> Table:
    """The steps at which the hypervolume grew."""
    rows, before = [], -1.0
    for step in view.progress:
        if step.hypervolume > before:
            rows.append(
                Row(
                    trial=step.number,
                    entries=(
                        Entry(text=str(step.measured), sort=step.measured),
                        Entry(text=str(step.number), sort=step.number),
                        Entry(text=quantities.quality(step.hypervolume), sort=step.hypervolume),
                    ),
                )
            )
        before = step.hypervolume
    columns = (
        Column(title="measured layouts", numeric=True),
        Column(title="trial", numeric=True),
        Column(title="hypervolume", numeric=True),
    )
    return Table(caption="Trials that made the hypervolume grow", columns=columns, rows=tuple(rows))


def layers(view: StudyView, trial: TrialRecord) -> Table:
    """What each layer of the pattern costs."""
    names = list(dict.fromkeys(name for costs in trial.layer_costs for name in costs))
    cells = strips.strip(trial.layout, view.families, view.marks)
    rows = [
        Row(
            entries=(
                Entry(text=str(depth + 1), sort=depth),
                Entry(text=cell.label, strip=(cell,)),
                *(_value(name, costs.get(name)) for name in names),
            )
        )
        for depth, (cell, costs) in enumerate(zip(cells, trial.layer_costs, strict=False))
    ]
    columns = (
        Column(title="layer", numeric=True),
        Column(title="mixer"),
        *(Column(title=view.title(name), numeric=True) for name in names),
    )
    return Table(caption="Cost by layer of the pattern", columns=columns, rows=tuple(rows))


def curves(trial: TrialRecord) -> Table:
    """First, last and lowest loss of each task's learning curve."""
    rows = []
    for task, curve in curves_of(trial).items():
        if curve:
            losses = [loss for _, loss in curve]
            shown = (losses[0], losses[-1], min(losses))
            rows.append(Row(entries=(Entry(text=task), *(Entry(text=f"{x:.4g}", sort=x) for x in shown))))
    columns = (
        Column(title="task"),
        *(Column(title=f"{which} loss (nats)", numeric=True) for which in ("first", "last", "lowest")),
    )
    return Table(caption="Learning curves", columns=columns, rows=tuple(rows))


def costs(view: StudyView, trial: TrialRecord) -> Table:
    """What the whole target network costs."""
    rows = [Row(entries=(Entry(text=view.title(name)), _value(name, x))) for name, x in trial.costs.items()]
    columns = (Column(title="cost at the target's size"), Column(title="value", numeric=True))
    return Table(caption="Costs of the whole network", columns=columns, rows=tuple(rows))


def scores(trial: TrialRecord) -> Table:
    """Every score of every rung."""
    rows = [
        Row(
            entries=(
                Entry(text=str(result.rung), sort=result.rung),
                Entry(text=task),
                Entry(text=quantities.quality(score), sort=score),
                Entry(text=f"{result.steps:,}", sort=result.steps),
                Entry(text=f"{result.tokens:,}", sort=result.tokens),
                Entry(text=quantities.duration(result.worker_s), sort=result.worker_s),
                Entry(text=str(result.seed), sort=result.seed),
            )
        )
        for result in sorted(trial.results, key=lambda r: r.rung)
        for task, score in (("quality", result.quality), *result.scores.items())
    ]
    titles = ("rung", "task", "score", "steps", "tokens", "worker time", "seed")
    columns = tuple(Column(title=title, numeric=title != "task") for title in titles)
    return Table(caption="Scores by task", columns=columns, rows=tuple(rows))


def _other_costs(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    """Costs beyond the objectives: the cache at other contexts first, parameters last; work stays on its own page."""
    present = {name for p in points for name in p.costs if name.partition("_")[0] not in ("flops", "read")}
    present -= set(names)
    return sorted(present, key=lambda name: (name == "params", name.partition("@")[0], _context(name)))


def _context(name: str) -> int:
    at = name.partition("@")[2]
    return int(at) if at.isdigit() else 0


def _number(study: str, number: int, *, linked: bool) -> Entry:
    return Entry(text=str(number), sort=number, href=addresses.trial(study, number) if linked else "")


def _value(name: str, x: float | None, unit: str = "") -> Entry:
    return Entry(text=quantities.value(name, x, unit), sort=x)

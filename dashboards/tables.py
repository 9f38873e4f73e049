"""The tables of the pages: what stands behind every picture, for people who read or hear rather than look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dashboards import addresses, quantities, strips
from dashboards.choice import NUMBER, Choice
from dashboards.growth_chart import telling
from dashboards.scene import NO_DOUBT, Doubt
from dashboards.strips import Strip
from dashboards.view import Point, StudyView, value_on
from storage.glances import Glance
from storage.records import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its words, and whether it holds numbers, which stand to the right."""

    title: str
    numeric: bool = False
    href: str = ""
    """Where the server sorts by it."""
    order: Literal["", "ascending", "descending"] = ""
    """How the rows are sorted by it."""


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
    pick: int | None = None
    """A trial that can be marked for comparison here."""
    picked: bool = False
    choose: str = ""
    """A study that can be marked here, to be laid over others."""


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
                *(value_entry(name, p.values[name], units[name]) for name in names),
                *(value_entry(name, p.costs.get(name)) for name in others),
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


def trials(view: StudyView, seen: Sequence[Glance], *, linked: bool, sorting: Choice | None = None) -> Table:
    """Trials as they stand, ended or not, with their values as far as they have some; sortable by the server or here."""
    rows = []
    for trial in seen:
        state = "front" if trial.number in view.on_front else trial.state
        rows.append(
            Row(
                trial=trial.number,
                entries=(
                    _number(view.name, trial.number, linked=linked),
                    Entry(
                        text=trial.layout.text, strip=strips.strip(trial.layout, view.families, view.marks)
                    ),
                    Entry(text=state, state=state),
                    *(value_entry(axis.name, value_on(axis, trial), axis.unit) for axis in view.axes),
                    Entry(text=trial.origin),
                    Entry(text=trial.why),
                ),
            )
        )
    columns = (
        sorted_column("trial", NUMBER, sorting),
        Column(title="layout"),
        Column(title="state"),
        *(sorted_column(view.title(axis.name), axis.name, sorting) for axis in view.axes),
        Column(title="origin"),
        Column(title="why"),
    )
    return Table(caption="Trials", columns=columns, rows=tuple(rows))


def beside(view: StudyView, points: Sequence[Point], choice: Choice, doubt: Doubt = NO_DOUBT) -> Table:
    """Layouts next to the picture: a box to mark it, strip and notation, every objective, how sure its place is."""
    sure = bool(doubt.chances)
    rows = [
        Row(
            trial=p.number,
            entries=(
                Entry(text=f"compare trial {p.number}", pick=p.number, picked=p.number in choice.pick),
                Entry(
                    text=p.text,
                    strip=p.strip,
                    href=addresses.trial(view.name, p.number),
                    state="front" if p.on_front else "done",
                ),
                *(value_entry(axis.name, p.values[axis.name], axis.unit) for axis in view.axes),
                *((_chance(doubt.chances.get(p.number)),) if sure else ()),
            ),
        )
        for p in points
    ]
    columns = (
        Column(title="compare"),
        Column(title="layout"),
        *(sorted_column(view.title(axis.name), axis.name, choice) for axis in view.axes),
        *((Column(title="chance of the front", numeric=True),) if sure else ()),
    )
    return Table(caption="Layouts beside the picture", columns=columns, rows=tuple(rows))


def sorted_column(title: str, name: str, sorting: Choice | None) -> Column:
    """A column of numbers, with the address that sorts by it, or by it the other way round."""
    if sorting is None:
        return Column(title=title, numeric=True)
    here = sorting.sort == name
    down = not sorting.down if here else False
    return Column(
        title=title,
        numeric=True,
        href="?" + sorting.query(sort=name, down=down),
        order=("descending" if sorting.down else "ascending") if here else "",
    )


def _chance(chance: float | None) -> Entry:
    return Entry(text="–" if chance is None else quantities.share(chance), sort=chance)


def hypervolume(view: StudyView) -> Table:
    """The steps at which the hypervolume grew."""
    rows, before = [], -1.0
    for step in telling(view.progress):
        if step.hypervolume > before:
            entries = (
                Entry(text=str(step.measured), sort=step.measured),
                Entry(text=str(step.number), sort=step.number),
                Entry(text=quantities.quality(step.hypervolume), sort=step.hypervolume),
            )
            rows.append(Row(trial=step.number, entries=entries))
        before = step.hypervolume
    titles = ("measured layouts", "trial", "hypervolume")
    columns = tuple(Column(title=title, numeric=True) for title in titles)
    return Table(caption="Trials that made the hypervolume grow", columns=columns, rows=tuple(rows))


def costs(view: StudyView, trial: TrialRecord) -> Table:
    """What the whole target network costs."""
    rows = [
        Row(entries=(Entry(text=view.title(name)), value_entry(name, x))) for name, x in trial.costs.items()
    ]
    columns = (Column(title="cost at the target's size"), Column(title="value", numeric=True))
    return Table(caption="Costs of the whole network", columns=columns, rows=tuple(rows))


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


def value_entry(name: str, x: float | None, unit: str = "") -> Entry:
    return Entry(text=quantities.value(name, x, unit), sort=x)

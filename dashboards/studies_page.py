"""The pages of several studies: the list of all, and some of them laid over one another."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dashboards import addresses, commands, facts, quantities, tables
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from dashboards.choice import choose_axes
from dashboards.desk import Desk, Missing
from dashboards.front_page import Option
from dashboards.memory import Snapshot
from dashboards.pages import Page
from dashboards.tables import Column, Entry, Row, Table
from dashboards.trial_charts import COLOURS, DASHES
from dashboards.view import Numbers
from storage import pareto
from storage.records import Axis

MOST = 8
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")


@dataclass(frozen=True, kw_only=True)
class StudiesPage(Page):
    """Every study of the database."""

    template = "studies.html"
    storage: str
    studies: Table
    start: str
    several: bool


@dataclass(frozen=True, kw_only=True)
class TogetherPage(Page):
    """Several studies in one picture."""

    template = "together.html"
    names: tuple[str, ...]
    across: tuple[Option, ...]
    up: tuple[Option, ...]
    source: str
    words: str
    studies: Table


def studies_page(desk: Desk) -> StudiesPage:
    """Every study of the database, the newest first."""
    with desk.store() as store:
        found = [desk.library.snapshot(store, study) for study in reversed(store.studies())]
        shown_url = store.shown_url
    return StudiesPage(
        storage=shown_url,
        studies=_table(found, boxes=len(found) > 1),
        start=commands.search(shown_url, "quick"),
        several=len(found) > 1,
    )


def together_page(desk: Desk, names: Sequence[str], x: str | None, y: str | None) -> TogetherPage:
    """Some studies in one picture; Missing for an unknown one, ValueError where they share too few axes."""
    found = together(desk, names)
    axes = shared_axes(found)
    across, up, _ = choose_axes(axes, x, y)
    title = found[0].view.title
    options = [
        tuple(Option(value=axis.name, title=title(axis.name), on=axis.name == own) for axis in axes)
        for own in (across.name, up.name)
    ]
    return TogetherPage(
        names=tuple(one.study.name for one in found),
        across=options[0],
        up=options[1],
        source=addresses.together([one.study.name for one in found], x=across.name, y=up.name),
        words=f"The front of each study of the two objectives shown: {title(up.name)} against {title(across.name)}.",
        studies=_table(found, boxes=False),
    )


def together(desk: Desk, names: Sequence[str]) -> list[Snapshot]:
    """The studies of these names; Missing for an unknown one, ValueError for too few or too many."""
    if not 1 <= len(names) <= MOST:
        raise ValueError(f"{len(names)} studies are asked for: choose 1 to {MOST}")
    found = []
    with desk.store() as store:
        known = {study.name: study for study in store.studies()}
        for name in dict.fromkeys(names):
            if name not in known:
                raise Missing(f"There is no study called “{name}” in {store.shown_url}.")
            found.append(desk.library.snapshot(store, known[name]))
    return found


def shared_axes(found: Sequence[Snapshot]) -> tuple[Axis, ...]:
    """Objectives that all studies have; ValueError where they are fewer than two."""
    names = set.intersection(*({axis.name for axis in one.view.axes} for one in found))
    axes = tuple(axis for axis in found[0].view.axes if axis.name in names)
    if len(axes) < 2:
        raise ValueError(
            "these studies have fewer than two objectives in common: choose others, or look at one at a time"
        )
    return axes


def laid_over(found: Sequence[Snapshot], x: str | None, y: str | None) -> Figure:
    """The front of two objectives of each study, as a staircase with its layouts."""
    across, up, _ = choose_axes(shared_axes(found), x, y)
    title = found[0].view.title
    traces: list[Figure] = []
    values: list[tuple[float, float]] = []
    for place, one in enumerate(found):
        view, numbers = one.view, front_of_two(one, across, up)
        own = [(float(view.column(across.name)[n]), float(view.column(up.name)[n])) for n in numbers.tolist()]
        values += own
        colour = COLOURS[place % 5]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(one.study.name),
                "x": [a for a, _ in own],
                "y": [b for _, b in own],
                "line": {"shape": "hv", "color": colour, "dash": DASHES[place % 5], "width": 2},
                "marker": {"symbol": SYMBOLS[place % 8], "size": 9, "color": colour},
                "hovertext": [
                    f"{plain(one.study.name)}, trial {n}<br><b>{plain(view.glance(n).layout.text)}</b><br>"
                    f"{plain(title(up.name))} {quantities.value(up.name, b, up.unit)}<br>"
                    f"{plain(title(across.name))} {quantities.value(across.name, a, across.unit)}"
                    for n, (a, b) in zip(numbers.tolist(), own, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    layout = bare_layout(height=460)
    for key, axis, place in (("xaxis", across, 0), ("yaxis", up, 1)):
        column = [pair[place] for pair in values] or [axis.low, axis.high]
        places, words = quantities.ticks(axis.name, min(column), max(column), log=axis.log, unit=axis.unit)
        better = "higher is better" if axis.maximise else "lower is better"
        layout[key] = bare_axis(plain(f"{title(axis.name)} · {better}")) | {
            "type": "log" if axis.log else "linear",
            "tickvals": places,
            "ticktext": words,
        }
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def front_of_two(one: Snapshot, across: Axis, up: Axis) -> Numbers:
    """Numbers of the trials that no other beats in two objectives, from the best to the worst end across."""
    view = one.view
    places = [[axis.name for axis in view.axes].index(axis.name) for axis in (across, up)]
    directed = view.directed[view.measured][:, places]
    best = view.measured[pareto.front(directed)] if len(view.measured) else view.measured
    order: Numbers = best[np.argsort(view.directed[best, places[0]], kind="stable")]
    return order


def _table(found: Sequence[Snapshot], *, boxes: bool) -> Table:
    columns = (
        *((Column(title="together"),) if boxes else ()),
        Column(title="study"),
        Column(title="state"),
        Column(title="trials", numeric=True),
        Column(title="best of each objective"),
        Column(title="best layout"),
        Column(title="hypervolume", numeric=True),
        Column(title="made", numeric=True),
    )
    rows = tuple(_row(one, boxes=boxes) for one in found)
    return Table(caption="Studies, the newest first", columns=columns, rows=rows)


def _row(one: Snapshot, *, boxes: bool) -> Row:
    study, view = one.study, one.view
    plan, total = one.planned, one.total
    state = facts.state(one.counts, plan)
    best = view.front[0] if len(view.measured) else None
    words = []
    for axis in study.axes if best else ():
        column = view.column(axis.name)[view.measured]
        value = float(column.max() if axis.maximise else column.min())
        words.append(f"{view.title(axis.name)} {quantities.value(axis.name, value, axis.unit)}")
    age = time.time() - study.created_at
    return Row(
        entries=(
            *((Entry(text=f"lay {study.name} over others", choose=study.name),) if boxes else ()),
            Entry(text=study.name, href=addresses.study(study.name)),
            Entry(text=state, state=state),
            Entry(text=f"{total:,} of {plan:,}" if plan else f"{total:,}", sort=total),
            Entry(text=" · ".join(words) or "–"),
            Entry(text=best.text, strip=best.strip) if best else tables.Entry(text="–"),
            Entry(text=quantities.quality(view.hypervolume) if best else "–", sort=view.hypervolume),
            Entry(text=quantities.age(age), sort=-age),
        )
    )

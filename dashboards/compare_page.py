"""The page that lays two to six layouts side by side: strips, costs against context, scores, and words."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dashboards import addresses, quantities, strips, tables
from dashboards.choice import Choice
from dashboards.desk import Desk, Missing, NetworkPrice
from dashboards.front_page import tabs
from dashboards.latencies import with_latencies
from dashboards.memory import Snapshot
from dashboards.pages import LegendItem, Page, Tab, legend
from dashboards.strips import Strip
from dashboards.tables import Column, Entry, Row, Table
from dashboards.trial_page import Deployment, own_width
from dashboards.view import StudyView, changes
from storage.glances import Glance

MOST = 6
Line = list[tuple[int, float]]
"""Context and cost."""
CONTEXTS = tuple(2**power for power in range(9, 21))
"""The contexts at which costs are taken, from 512 to 1M; that of the study is another one."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the layouts."""

    number: int
    href: str
    strip: Strip
    text: str
    origin: str
    without: str
    """The address of the page without it."""


@dataclass(frozen=True, kw_only=True)
class ComparePage(Page):
    """Two to six layouts of a study."""

    template = "compare.html"
    name: str
    study_path: str
    tabs: tuple[Tab, ...]
    sides: tuple[Side, ...]
    layers: int
    legend: tuple[LegendItem, ...]
    words: tuple[str, ...]
    crossings: tuple[str, ...]
    costs_source: str
    scores_source: str
    values: Table
    costs: Table
    times_source: str
    times: Table
    most: int


def compare_page(desk: Desk, segment: str, choice: Choice) -> ComparePage:
    """Layouts by their numbers; Missing for one that is not there."""
    snapshot = desk.snapshot(segment)
    view, name = snapshot.view, snapshot.study.name
    picked = seen_of(snapshot, choice)
    sides = tuple(_side(view, seen, choice) for seen in picked)
    prices = prices_of(desk, snapshot, picked) if len(picked) > 1 else ()
    used = {part.mixer for side in sides for cell in side.strip for part in cell.parts}
    query = choice.query()
    asked = f"?{query}" if query else ""
    return ComparePage(
        name=name,
        study_path=f"{addresses.study(name)}{asked}",
        tabs=tabs(name, "Compare", query),
        sides=sides,
        layers=max((len(side.strip) for side in sides), default=0),
        legend=tuple(item for item in legend(view) if item.mixer in used),
        words=tuple(difference(view, picked[0], other) for other in picked[1:]),
        crossings=crossings(picked, prices),
        costs_source=addresses.figure(name, "contexts") + asked if prices else "",
        scores_source=addresses.figure(name, "tasks") + asked,
        values=_values(view, picked),
        costs=_costs(picked, prices),
        times_source=addresses.figure(name, "latencies") + asked,
        times=_times(picked, prices),
        most=MOST,
    )


def seen_of(snapshot: Snapshot, choice: Choice) -> list[Glance]:
    """The trials that are compared, each once; Missing for one that is not there."""
    found = []
    for number in dict.fromkeys(choice.pick):
        try:
            found.append(snapshot.view.glance(number))
        except KeyError:
            raise Missing(f"The study “{snapshot.study.name}” has no trial {number}.") from None
    return found


def prices_of(desk: Desk, snapshot: Snapshot, picked: Sequence[Glance]) -> tuple[Sequence[NetworkPrice], ...]:
    """Each layout's costs at all contexts, at the study's batch; nothing where nobody prices.

    With its latency where it was measured.
    """
    if desk.workshop is None:
        return ()
    searched, batch = Deployment().of(snapshot.study)
    points = [(context, batch) for context in sorted({*CONTEXTS, searched})]
    found = []
    for seen in picked:
        config, width = snapshot.study.config, own_width(seen.costs)
        try:
            found.append(desk.workshop.price(config, seen.layout.text, points, width=width))
        except Missing:
            return ()
    return tuple(with_latencies(desk, snapshot, found))


def difference(view: StudyView, one: Glance, other: Glance) -> str:
    """How another layout differs from the first, and what that does to the objectives."""
    cells = [strips.strip(seen.layout, view.families, view.marks) for seen in (one, other)]
    measured = set(view.measured.tolist())
    did = ", ".join(changes(view, one.number, other.number)) if {one.number, other.number} <= measured else ""
    end = f": {did}" if did else ""
    head = f"Trial {other.number} against trial {one.number}"
    if len(cells[0]) != len(cells[1]):
        counts = [Counter(cell.label for cell in own) for own in cells]
        told = [
            f"{counts[0][label]}→{counts[1][label]} layers of {label}"
            for label in dict.fromkeys((*counts[0], *counts[1]))
            if counts[0][label] != counts[1][label]
        ]
        return f"{head}: {len(cells[1])} layers in place of {len(cells[0])} ({', '.join(told) or 'of the same kinds'}){end}."
    places: dict[tuple[str, str], list[int]] = {}
    for place, (mine, theirs) in enumerate(zip(*cells, strict=True), start=1):
        if mine.label != theirs.label:
            places.setdefault((mine.label, theirs.label), []).append(place)
    if not places:
        return f"{head}: the same layers{end}."
    told = [
        f"{theirs} in place of {mine} in layer{'s' if len(at) > 1 else ''} {quantities.listed(at)}"
        for (mine, theirs), at in places.items()
    ]
    return f"{head}: {'; '.join(told)}{end}."


def crossings(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> tuple[str, ...]:
    """From which context on which of two layouts keeps less, or takes less time, for every two that change places."""
    kept: list[Line] = [[(price.context, price.stored_bytes) for price in own] for own in prices]
    took: list[Line] = [
        [(price.context, price.latency.latency_ms) for price in own if price.latency] for own in prices
    ]
    return (*_turns(picked, kept, "keep less"), *_turns(picked, took, "take less time a step"))


def _turns(picked: Sequence[Glance], lines: Sequence[Line], does: str) -> Iterator[str]:
    for i, one in enumerate(lines):
        for j in range(i + 1, len(lines)):
            values, others = dict(one), dict(lines[j])
            at = [context for context in values if context in others]
            gap = np.sign([values[context] - others[context] for context in at])
            for k in range(1, len(gap)):
                if gap[k] * gap[k - 1] < 0:
                    less = picked[j if gap[k] > 0 else i].number
                    more = picked[i if gap[k] > 0 else j].number
                    low, high = (quantities.tokens(at[n]) for n in (k - 1, k))
                    yield f"Between {low} and {high} of context trial {less} comes to {does} than trial {more}."


def _side(view: StudyView, seen: Glance, choice: Choice) -> Side:
    rest = [n for n in dict.fromkeys(choice.pick) if n != seen.number]
    return Side(
        number=seen.number,
        href=addresses.trial(view.name, seen.number),
        strip=strips.strip(seen.layout, view.families, view.marks),
        text=seen.layout.text,
        origin=seen.origin,
        without="?" + choice.query(pick=rest),
    )


def _values(view: StudyView, picked: Sequence[Glance]) -> Table:
    names = list(dict.fromkeys([*(axis.name for axis in view.axes), *(n for s in picked for n in s.costs)]))
    tasks = list(dict.fromkeys(task for seen in picked for task in seen.scores or ()))
    units = {axis.name: axis.unit for axis in view.axes}
    rows = [
        Row(
            entries=(
                Entry(text=view.title(name)),
                *(tables.value_entry(name, seen.value(name), units.get(name, "")) for seen in picked),
            )
        )
        for name in dict.fromkeys((*names, *tasks))
    ]
    columns = (
        Column(title="objective, score or cost"),
        *(Column(title=f"trial {seen.number}", numeric=True) for seen in picked),
    )
    return Table(caption="The layouts in numbers", columns=columns, rows=tuple(rows))


def _costs(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> Table:
    rows = []
    for at in zip(*prices, strict=True):
        sizes = tuple(tables.value_entry("stored_bytes", price.stored_bytes) for price in at)
        rows.append(Row(entries=(_context(at[0].context), *sizes)))
    return Table(caption="Cache against context", columns=_columns("cache", picked), rows=tuple(rows))


def _times(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> Table:
    """Decode latency at the contexts at which any of the layouts was measured."""
    rows = []
    for at in zip(*prices, strict=True):
        times = [price.latency.latency_ms if price.latency else None for price in at]
        if any(time is not None for time in times):
            told = tuple(tables.value_entry("latency_ms", time) for time in times)
            rows.append(Row(entries=(_context(at[0].context), *told)))
    columns = _columns("decode latency", picked)
    return Table(caption="Decode latency against context", columns=columns, rows=tuple(rows))


def _context(context: int) -> Entry:
    return Entry(text=quantities.tokens(context), sort=context)


def _columns(cost: str, picked: Sequence[Glance]) -> tuple[Column, ...]:
    return (
        Column(title="context", numeric=True),
        *(Column(title=f"{cost} of trial {seen.number}", numeric=True) for seen in picked),
    )

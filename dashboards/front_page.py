"""The page of a study's front: the picture, the strips beside it, what was beaten, and every trial."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np

from dashboards import addresses, commands, facts, quantities, selection, tables
from dashboards.charts import Figure
from dashboards.choice import NONE, Choice, choose_axes
from dashboards.desk import Desk
from dashboards.facts import Fact, FactGroup
from dashboards.front_chart import front, height_px
from dashboards.limits import limits_of
from dashboards.memory import Snapshot
from dashboards.pages import LegendItem, Page, Tab, legend
from dashboards.scene import Scene, kinds_of
from dashboards.space_chart import front_3d
from dashboards.tables import Table
from dashboards.view import Beaten, Kind, Numbers, StudyView
from storage.records import STATES, State

PAGE_ROWS, STRIPS = 50, 40
DONE: tuple[State, ...] = ("done",)
KIND_WORDS: dict[Kind, str] = {"found": "found", "uniform": "one mixer", "preset": "known models"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing that can be chosen: what the address says, what a reader reads, and whether it is chosen now."""

    value: str
    title: str
    on: bool


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Everything that can be chosen on the page."""

    across: tuple[Option, ...]
    up: tuple[Option, ...]
    third: tuple[Option, ...]
    view: tuple[Option, ...]
    x_scale: tuple[Option, ...]
    y_scale: tuple[Option, ...]
    origins: tuple[Option, ...]
    rungs: tuple[Option, ...]
    states: tuple[Option, ...]
    mixers: tuple[tuple[LegendItem, bool], ...]
    area: str
    sort: str
    down: bool
    plain: str
    """The address without filters; empty where there are none."""


@dataclass(frozen=True, kw_only=True)
class Still:
    """Where the still picture of a view is, for a page and for a phone, and how high each is."""

    wide: str
    narrow: str
    height_px: int
    narrow_height_px: int


@dataclass(frozen=True, kw_only=True)
class FrontPage(Page):
    """One study: its front, what was beaten, all trials, what was searched."""

    template = "front.html"
    name: str
    tabs: tuple[Tab, ...]
    state: str
    counted: str
    unread: str
    measured: int
    figures: tuple[Fact, ...]
    progress: float | None
    controls: Controls
    chart: str
    source: str
    still: Still | None
    """The same picture without a script; none in three dimensions."""
    words: str
    trials_path: str
    events: str
    beside: Table
    beside_words: str
    compare: str
    pick: tuple[int, ...]
    legend: tuple[LegendItem, ...]
    beaten: tuple[Beaten, ...]
    front: Table
    trials: Table
    page: int
    pages: int
    newer: str
    older: str
    downloads: tuple[tuple[str, str], ...]
    facts: tuple[FactGroup, ...]
    command: str


def tabs(name: str, here: str, query: str = "") -> tuple[Tab, ...]:
    """The pages of a study."""
    asked = f"?{query}" if query else ""
    places = (
        ("Front", f"{addresses.study(name)}{asked}"),
        ("Compare", f"{addresses.study(name)}/compare{asked}"),
        ("Why", f"{addresses.study(name)}/why"),
    )
    return tuple(Tab(title=title, href=href, here=title == here) for title, href in places)


def headline(view: StudyView, trials: int) -> tuple[Fact, ...]:
    """The few numbers that tell how a study stands."""
    told = [
        Fact(term="on the front", text=f"{len(view.front)} of {trials:,}"),
        Fact(term="hypervolume", text=quantities.quality(view.hypervolume)),
    ]
    for axis in view.axes:
        if len(view.measured):
            column = view.column(axis.name)[view.measured]
            word = "highest" if axis.maximise else "lowest"
            best = float(column.max() if axis.maximise else column.min())
            text = quantities.value(axis.name, best, axis.unit)
            told.append(Fact(term=f"{word} {view.title(axis.name)}", text=text))
    if len(view.known):
        told.append(
            Fact(term="known layouts beaten", text=f"{len(view.beaten)} of {len(set(view.known.tolist()))}")
        )
    return tuple(told)


def scene(
    desk: Desk,
    snapshot: Snapshot,
    choice: Choice,
    *,
    narrow: bool = False,
    fresh: frozenset[int] | None = None,
) -> Scene:
    """What the picture of a choice shows; ValueError where the choice makes no sense."""
    shown = selection.measured(snapshot, choice)
    return Scene(
        choice=choice,
        shown=shown,
        caught=selection.caught(snapshot, choice, shown) if choice.area else None,
        running=snapshot.running,
        limits=limits_of(snapshot.study.config),
        doubt=desk.doubt(snapshot),
        narrow=narrow,
        fresh=fresh,
    )


def picture(
    desk: Desk,
    snapshot: Snapshot,
    choice: Choice,
    *,
    narrow: bool = False,
    fresh: frozenset[int] | None = None,
) -> Figure:
    """The figure of a choice, in two dimensions or three; ValueError where the choice makes no sense."""
    drawn = scene(desk, snapshot, choice, narrow=narrow, fresh=fresh)
    return front_3d(snapshot.view, drawn) if choice.view == "space" else front(snapshot.view, scene=drawn)


def front_page(desk: Desk, segment: str, choice: Choice) -> FrontPage:
    """One study; Missing where there is none, ValueError where the axes or the lasso make no picture."""
    with desk.study(segment) as (store, study):
        snapshot = desk.library.snapshot(store, study)
        shown_url = store.shown_url
        done = store.trials(study, states=DONE, limit=4)
    view, name = snapshot.view, study.name
    across, up, third = choose_axes(study.axes, choice.x, choice.y, choice.third)
    plan = snapshot.planned
    ended = snapshot.total - snapshot.counts["waiting"] - snapshot.counts["running"] - snapshot.unread
    rows = selection.listed(snapshot, choice)
    pages = max(1, -(-len(rows) // PAGE_ROWS))
    page = min(choice.page, pages)
    lines = rows[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]
    shown = selection.measured(snapshot, choice)
    inside = selection.caught(snapshot, choice, shown)
    strips = _strips(snapshot, choice, inside)
    query = choice.query()
    counted = f"{facts.counted(snapshot.counts)} · made {quantities.age(time.time() - study.created_at)}"
    return FrontPage(
        name=name,
        tabs=tabs(name, "Front", query),
        state=facts.state(snapshot.counts, plan),
        counted=counted,
        unread=f"reading {snapshot.unread:,} trials …" if snapshot.unread else "",
        measured=len(view.measured),
        figures=headline(view, snapshot.total) if len(view.measured) else (),
        progress=min(1.0, ended / plan) if plan else None,
        controls=_controls(snapshot, choice),
        chart="front",
        source=f"{addresses.figure(name, 'front')}{'?' + query if query else ''}",
        still=None if choice.view == "space" else _still(name, query, third is not None),
        words=_words(view, choice, len(inside), across.name, up.name),
        trials_path=f"{addresses.study(name)}/trials",
        events=f"{addresses.api(name)}/events",
        beside=tables.beside(view, view.points_of(strips), choice, desk.doubt(snapshot)),
        beside_words=_beside_words(choice, len(strips), len(inside)),
        compare=f"{addresses.study(name)}/compare",
        pick=tuple(choice.pick),
        legend=tuple(item for item in legend(view) if item.mixer in snapshot.mixers_present),
        beaten=view.beaten,
        front=tables.front(view, linked=True),
        trials=tables.trials(view, [view.glance(int(n)) for n in lines], linked=True, sorting=choice),
        page=page,
        pages=pages,
        newer=f"?{choice.query(page=page - 1)}#trials" if page > 1 else "",
        older=f"?{choice.query(page=page + 1)}#trials" if page < pages else "",
        downloads=_downloads(name, choice),
        facts=facts.searched(study, done, whole=len(done) == snapshot.counts["done"]),
        command=commands.search(shown_url, name),
    )


def _still(name: str, query: str, shaded: bool) -> Still:
    return Still(
        wide=addresses.still(name, query),
        narrow=addresses.still(name, query, narrow=True),
        height_px=height_px(narrow=False, shaded=shaded),
        narrow_height_px=height_px(narrow=True, shaded=shaded),
    )


def _strips(snapshot: Snapshot, choice: Choice, inside: Numbers) -> Numbers:
    ordered = selection.best_first(snapshot, choice, inside)
    if choice.sort or choice.area:
        return ordered[:STRIPS]
    # A layout that was measured twice to the same values stands once, as on the front.
    texts, once = set(), []
    for number in ordered[: 2 * STRIPS].tolist():
        text = snapshot.view.glance(number).layout.text
        if text not in texts:
            texts.add(text)
            once.append(number)
    return np.array(once[:STRIPS], dtype=np.intp)


def _beside_words(choice: Choice, shown: int, there: int) -> str:
    what = "within the lasso" if choice.area else "after the filters" if choice.filters else "measured"
    order = "as sorted" if choice.sort else "the front first"
    return f"{shown} of {there:,} {what}, {order}" if there else f"none {what}"


def _words(view: StudyView, choice: Choice, there: int, x: str, y: str) -> str:
    shown = (
        f"{there:,} of {len(view.measured):,} layouts" if choice.filters else f"{there:,} measured layouts"
    )
    space = " in three dimensions; drag to turn" if choice.view == "space" else ""
    return (
        f"{shown}, {view.title(y)} against {view.title(x)}{space}. Opaque marks are on the front of all objectives, "
        "the line is the front of the two shown. The table of trials holds the same numbers."
    )


def _controls(snapshot: Snapshot, choice: Choice) -> Controls:
    view = snapshot.view
    across, up, third = choose_axes(view.axes, choice.x, choice.y, choice.third)
    axes = [(axis.name, view.title(axis.name)) for axis in view.axes]
    highest = int(snapshot.columns.rungs.max(initial=0))
    rungs = range(1, highest + 1)
    words = {"": "as given", "log": "logarithmic", "linear": "linear"}
    return Controls(
        across=_options(axes, across.name),
        up=_options(axes, up.name),
        third=_options([*axes, (NONE, "nothing")], third.name if third else NONE),
        view=_options([("plane", "2-D"), ("space", "3-D")], choice.view) if len(axes) > 2 else (),
        x_scale=_options(words.items(), choice.x_scale),
        y_scale=_options(words.items(), choice.y_scale),
        origins=tuple(
            Option(value=kind, title=KIND_WORDS[kind], on=kind in choice.origin) for kind in kinds_of(view)
        ),
        rungs=_options([("0", "any"), *((str(r), f"rung {r} and above") for r in rungs)], str(choice.rung))
        if rungs
        else (),
        states=_options(
            [("", "any"), *((s, s) for s in STATES if snapshot.counts[s] or s == choice.state)], choice.state
        ),
        mixers=tuple(
            (item, item.mixer in choice.mixer)
            for item in legend(view)
            if item.mixer in snapshot.mixers_present or item.mixer in choice.mixer
        ),
        area=choice.area,
        sort=choice.sort,
        down=choice.down,
        plain="?" + choice.query(mixer=[], origin=[], rung=0, area="", state="")
        if choice.filters or choice.state
        else "",
    )


def _options(pairs: Iterable[tuple[str, str]], chosen: str) -> tuple[Option, ...]:
    return tuple(Option(value=value, title=title, on=value == chosen) for value, title in pairs)


def _downloads(name: str, choice: Choice) -> tuple[tuple[str, str], ...]:
    path = f"{addresses.api(name)}/download"
    asked = choice.query(page=1)
    kinds = (("CSV", "csv"), ("JSON", "json"), ("Parquet", "parquet"))
    return tuple(
        (title, f"{path}?{urlencode({'format': kind})}{'&' + asked if asked else ''}")
        for title, kind in kinds
    )

"""The page that says why: importance, shares, ratios, the hypervolume against luck, and how rungs foretell the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dashboards import addresses, quantities, tables
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from dashboards.desk import Desk
from dashboards.front_page import tabs
from dashboards.growth_chart import Baseline
from dashboards.memory import Snapshot
from dashboards.pages import Page, Tab
from dashboards.reasons import Reasons
from dashboards.tables import Column, Entry, Row, Table
from dashboards.view import Progress
from dashboards.why import Why, why
from storage.records import StudyRecord
from storage.store import Store

MOST_DOTS = 2000
RANDOM = "random"
Pairs = dict[tuple[int, int], list[tuple[int, float, float]]]
"""By rung and the next one that a trial reached: its number, and its quality at both."""


@dataclass(frozen=True, kw_only=True)
class WhyPage(Page):
    """Why a study's layouts are as good as they are."""

    template = "why.html"
    name: str
    tabs: tuple[Tab, ...]
    events: str
    measured: int
    waiting: str
    """Why there are no reasons yet; empty where there are."""
    reasons: Why | None
    sources: dict[str, str]
    luck: str
    growth: Table
    rungs: Table


def why_page(desk: Desk, segment: str) -> WhyPage:
    """The page of one study; Missing where there is none."""
    snapshot = desk.snapshot(segment)
    name = snapshot.study.name
    found = reasons_of(desk, snapshot)
    section = None if isinstance(found, str) else why(found, snapshot.study.families)
    keys = [picture.key for picture in section.pictures] if section else []
    return WhyPage(
        name=name,
        tabs=tabs(name, "Why"),
        events=f"{addresses.api(name)}/events",
        measured=len(snapshot.view.measured),
        waiting=found if isinstance(found, str) else "",
        reasons=section,
        sources={key: addresses.figure(name, key) for key in (*keys, "hypervolume", "calibration")},
        luck=luck_words(snapshot, desk.luck(snapshot)),
        growth=tables.hypervolume(snapshot.view),
        rungs=calibration_table(snapshot),
    )


def reasons_of(desk: Desk, snapshot: Snapshot) -> Reasons | str:
    """The reasons, or in words why there are none now."""
    if desk.workshop is None:
        return "This dashboard was started without the part that explains: use nas explain."
    return desk.workshop.reasons(snapshot.study, len(snapshot.view.measured))


def luck_words(snapshot: Snapshot, luck: Baseline | None) -> str:
    """How the search compares with its own layouts in a random order, at a quarter of the way."""
    steps = snapshot.view.progress
    if luck is None or not steps:
        return "Too few layouts are measured to tell the search from luck."
    place = int(np.searchsorted(luck.measured, min(luck.measured[-1], max(1, len(steps) // 4))))
    at, middle = luck.measured[place], luck.middle[place]
    own = steps[at - 1].hypervolume
    than = "more than" if own > luck.high[place] else "less than" if own < luck.low[place] else "within"
    return (
        f"After {at:,} layouts the front covered {quantities.quality(own)}, {than} what nine in ten random orders give "
        f"({quantities.quality(luck.low[place])} to {quantities.quality(luck.high[place])}; middle {quantities.quality(middle)})."
    )


def random_studies(desk: Desk, store: Store, study: StudyRecord) -> Sequence[tuple[str, Sequence[Progress]]]:
    """Other studies of the database with the same axes whose layouts were drawn by lot."""
    found = []
    for other in store.studies():
        if other.name != study.name and other.axes == study.axes and other.config.get("sampler") == RANDOM:
            found.append((other.name, desk.library.snapshot(store, other).view.progress))
    return found[:3]


def _pairs(snapshot: Snapshot) -> Pairs:
    found: Pairs = {}
    # The last ones tell as much as all of very many.
    seen_at_two = [seen for seen in snapshot.view.glances if seen is not None and len(seen.rungs) > 1]
    for seen in seen_at_two[-MOST_DOTS:]:
        for (low, before), (high, after) in pairwise(seen.rungs):
            found.setdefault((low, high), []).append((seen.number, before, after))
    return dict(sorted(found.items()))


def calibration(snapshot: Snapshot) -> Figure:
    """Quality at a rung against quality at the next, one mark a layout."""
    traces: list[Figure] = []
    ends: list[float] = []
    for place, ((low, high), pairs) in enumerate(_pairs(snapshot).items()):
        ends += [x for _, *both in pairs for x in both]
        colour = f"var(--curve-{place % 5 + 1})"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"rung {low} to {high}",
                "x": [before for _, before, _ in pairs],
                "y": [after for _, _, after in pairs],
                "customdata": [number for number, _, _ in pairs],
                "hovertext": [
                    f"{plain(snapshot.view.glance(n).layout.text)}<br>{quantities.quality(b)} at rung {low}, "
                    f"{quantities.quality(a)} at rung {high}"
                    for n, b, a in pairs
                ],
                "hoverinfo": "text",
                "marker": {
                    "symbol": ("circle", "diamond", "square")[place % 3],
                    "size": 8,
                    "opacity": 0.7,
                    "color": colour,
                },
            }
        )
    if ends:
        line = [min(ends), max(ends)]
        traces.append(
            {"type": "scatter", "mode": "lines", "name": "as good as before", "x": line, "y": line}
            | {"line": {"color": "var(--faint)", "dash": "dot", "width": 1}, "hoverinfo": "skip"}
        )
    layout = bare_layout(height=340)
    layout["xaxis"] = bare_axis("quality at the lower rung")
    layout["yaxis"] = bare_axis("quality at the higher rung")
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def calibration_table(snapshot: Snapshot) -> Table:
    """How well each rung orders layouts as the next one does."""
    rows = []
    for (low, high), pairs in _pairs(snapshot).items():
        order = rank_correlation([b for _, b, _ in pairs], [a for _, _, a in pairs])
        rows.append(
            Row(
                entries=(
                    Entry(text=f"{low} to {high}", sort=low),
                    Entry(text=f"{len(pairs):,}", sort=len(pairs)),
                    Entry(text="–" if order is None else f"{order:.2f}", sort=order),
                )
            )
        )
    titles = ("rung", "layouts at both", "rank correlation (Spearman)")
    columns = tuple(Column(title=title, numeric=True) for title in titles)
    return Table(caption="How rungs foretell the next", columns=columns, rows=tuple(rows))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, ties sharing their mean rank; None where either has no spread."""
    ranks = [_mean_ranks(np.asarray(values, dtype=float)) for values in (one, other)]
    if len(one) < 3 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: np.ndarray = ends - (counts - 1) / 2
    return middle[places]

"""The hypervolume over time, against what the same layouts would have given in any other order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dashboards import quantities
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from dashboards.view import Floats, Progress, StudyView
from storage import pareto

DASHES = ("dash", "dot", "dashdot", "longdash")
SHUFFLES, PLACES = 20, 40
MOST_SHUFFLED = 20_000
"""Of more layouts the band ends here: what so many give in any order, all of them give."""
_STEPS_WITH_MARKS = 80


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Of random orders of the measured layouts, the hypervolume after so many: the middle one, and 9 in 10."""

    measured: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


def baseline(view: StudyView, seed: int = 0) -> Baseline | None:
    """What luck alone would have made of these layouts; None where there are too few to tell."""
    count = len(view.measured)
    if count < 8:
        return None
    losses: Floats = np.asarray(pareto.losses(view.axes, view.values[view.measured]))
    rng = np.random.default_rng(seed)
    most = min(count, MOST_SHUFFLED)
    places = np.unique(np.geomspace(1, most, min(most, PLACES)).astype(int))
    volumes = np.empty((SHUFFLES, len(places)))
    for row in range(SHUFFLES):
        order = rng.choice(count, most, replace=False)
        kept, before = np.empty((0, len(view.axes))), 0
        for column, place in enumerate(places):
            kept = np.vstack([kept, losses[order[before:place]]])
            kept, before = kept[pareto.front(kept)], int(place)
            volumes[row, column] = pareto.hypervolume(kept)
    low, middle, high = np.quantile(volumes, (0.05, 0.5, 0.95), axis=0)
    return Baseline(
        measured=tuple(places.tolist()),
        low=tuple(low.tolist()),
        middle=tuple(middle.tolist()),
        high=tuple(high.tolist()),
    )


def telling(steps: Sequence[Progress]) -> tuple[Progress, ...]:
    """Those at which it grew, and the last: what lies between draws the same line."""
    if len(steps) < _STEPS_WITH_MARKS:
        return tuple(steps)
    grown = [
        one
        for before, one in zip((None, *steps), steps, strict=False)
        if before is None or one.hypervolume > before.hypervolume
    ]
    return (*grown, steps[-1])


def hypervolume(
    view: StudyView, luck: Baseline | None = None, others: Sequence[tuple[str, Sequence[Progress]]] = ()
) -> Figure:
    """How much of the space of objectives the front covers, as trials end; `others` are studies of random search."""
    traces: list[Figure] = []
    if luck is not None:
        x = list(luck.measured)
        edge = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"width": 0}, "x": x}
        traces += [
            edge | {"y": list(luck.high), "showlegend": False},
            edge
            | {
                "y": list(luck.low),
                "fill": "tonexty",
                "fillcolor": "var(--band)",
                "name": "9 in 10 random orders",
            },
            {
                "type": "scatter",
                "mode": "lines",
                "name": "the same layouts in a random order",
                "line": {"color": "var(--faint)", "width": 1.5, "dash": "dot"},
                "x": x,
                "y": list(luck.middle),
                "hovertext": [
                    f"after {n} in a random order: {quantities.quality(v)}"
                    for n, v in zip(luck.measured, luck.middle, strict=True)
                ],
                "hoverinfo": "text",
            },
        ]
    for place, (name, steps) in enumerate(others):
        shown = telling(steps)
        traces.append(
            _line(shown, f"random search: {name}", "var(--curve-2)") | {"mode": "lines"}
            | {"line": {"shape": "hv", "color": "var(--curve-2)", "width": 1.5, "dash": DASHES[place % 4]}}
        )  # fmt: skip
    steps = telling(view.progress)
    traces.append(_line(steps, "this study", "var(--accent)"))
    layout = bare_layout(height=300)
    layout["xaxis"] = bare_axis("measured layouts, in order of ending")
    layout["yaxis"] = bare_axis("hypervolume (share of 1)") | {"rangemode": "tozero"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = len(traces) > 1
    return {"data": traces, "layout": layout}


def _line(steps: Sequence[Progress], name: str, colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) < _STEPS_WITH_MARKS else "lines",
        "name": plain(name),
        "line": {"shape": "hv", "color": colour, "width": 2},
        "marker": {"size": 4, "color": colour},
        "x": [step.measured for step in steps],
        "y": [step.hypervolume for step in steps],
        "customdata": [step.number for step in steps],
        "hovertext": [
            f"{plain(name)}, after {step.measured} measured: {quantities.quality(step.hypervolume)}<br>trial {step.number}"
            for step in steps
        ],
        "hoverinfo": "text",
    }

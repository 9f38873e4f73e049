"""The front as a picture: every layout on two axes, with its staircase, its bounds and its doubts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dashboards import labels, quantities
from dashboards.charts import FAINT, INK, Figure, bare_layout, plain
from dashboards.choice import choose_axes, scaled
from dashboards.limits import Limit
from dashboards.scales import bounds, drawn, drawn_all, logged, scale, shade, shown_range
from dashboards.scene import (
    CROWD,
    KIND_TITLES,
    NOTHING,
    SYMBOLS,
    Doubt,
    Scene,
    hover,
    kind_name,
    name_of,
    packed,
    packed_numbers,
    parted,
)
from dashboards.view import Kind, Numbers, Point, StudyView
from storage.glances import Glance
from storage.records import Axis

OPACITY, OUTSIDE = 0.35, 0.04
"""Of a dot of the crowd, and of one that a lasso left out."""


@dataclass(frozen=True)
class _Plane:
    """The two axes with their scales and the range that each shows."""

    view: StudyView
    x: Axis
    y: Axis
    third: Axis | None
    logs: tuple[bool, bool]
    ranges: tuple[tuple[float, float], tuple[float, float]]

    def share(self, place: int, value: float) -> float:
        """Where a value stands along an axis, from 0 to 1."""
        low, high = self.ranges[place]
        at = math.log10(max(value, 1e-300)) if self.logs[place] else value
        return (at - low) / (high - low)


def front(view: StudyView, x: str | None = None, y: str | None = None, scene: Scene = NOTHING) -> Figure:
    """Every layout on two axes, a third by size and shade; the staircase is the front of the two axes shown.

    ValueError where the axes make no picture.
    """
    choice = scene.choice
    across, up, third = choose_axes(view.axes, x or choice.x, y or choice.y, choice.third)
    shown = view.measured if scene.shown is None else scene.shown
    logs = (scaled(across, choice.x_scale), scaled(up, choice.y_scale))
    best = view.front_numbers[np.isin(view.front_numbers, shown)].tolist()
    whiskers = [_ends(best, axis, scene.doubt) for axis in (across, up)]
    ranges = (
        shown_range(view, across, logs[0], shown, whiskers[0]),
        shown_range(view, up, logs[1], shown, whiskers[1]),
    )
    plane = _Plane(view, across, up, third, logs, ranges)
    crowd, marked = parted(view, shown)
    traces: list[Figure] = [] if not len(crowd) else [_crowd(plane, crowd, scene)]
    stairs = _staircase(plane)
    traces.append(stairs)
    placed = _placed(plane, marked, stairs, scene.narrow)
    inside = None if scene.caught is None else frozenset(scene.caught.tolist())
    for on_front in (False, True):
        for kind in SYMBOLS:
            of_kind = [p for p in marked if p.on_front is on_front and p.kind == kind]
            if of_kind:
                traces.append(_marks(plane, of_kind, scene, inside, placed))
    if scene.running:
        traces += _rings(plane, scene.running)
    traces += [_key(kind) for kind in SYMBOLS if any(p.kind == kind for p in marked)]
    layout = bare_layout(height=height_px(narrow=scene.narrow, shaded=third is not None))
    layout["xaxis"] = _axis(plane, 0)
    layout["yaxis"] = _axis(plane, 1)
    layout["shapes"], layout["annotations"] = _refused(plane, scene.limits)
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"}
    layout["dragmode"] = "zoom"
    if len(crowd):
        # A mark reaches no further than a dot of the crowd does, or none beside the front could be pointed at.
        layout["hoverdistance"] = 6
    if third:
        layout["coloraxis"] = shade(view, third, shown, narrow=scene.narrow)
    return {"data": traces, "layout": layout}


def height_px(*, narrow: bool, shaded: bool) -> int:
    """How high the picture is; on a phone the scale of a third objective stands below it."""
    return (440 if shaded else 360) if narrow else 470


def _crowd(plane: _Plane, crowd: Numbers, scene: Scene) -> Figure:
    """The crowd as one trace; where there is a lasso, the last `caught` of it are within, and the others stand back."""
    meta: Figure = {"units": [_unit(axis) for axis in (plane.x, plane.y)]}
    if scene.caught is not None:
        inside = np.isin(crowd, scene.caught)
        crowd = np.concatenate([crowd[~inside], crowd[inside]])
        meta |= {"caught": int(inside.sum()), "outside": OUTSIDE}
    if scene.fresh is not None:
        crowd = crowd[np.isin(crowd, np.array(sorted(scene.fresh), dtype=np.intp))]
    columns = [
        drawn_all(axis, plane.view.column(axis.name)[crowd], log)
        for axis, log in zip((plane.x, plane.y), plane.logs, strict=True)
    ]
    words = "<br>".join(
        f"{plain(plane.view.title(a.name))} %{{{k}}}" for a, k in ((plane.y, "y"), (plane.x, "x"))
    )
    return {
        "type": "scattergl",
        "mode": "markers",
        "name": CROWD,
        "showlegend": False,
        "x": packed(columns[0]),
        "y": packed(columns[1]),
        "customdata": packed_numbers(crowd),
        "hovertemplate": f"trial %{{customdata}}<br>{words}<extra></extra>",
        "marker": {"size": 4, "color": FAINT, "opacity": OPACITY},
        "meta": meta,
    }


def _unit(axis: Axis) -> str:
    base = axis.name.partition("@")[0]
    return "B" if "bytes" in base and base != "bytes" else axis.unit


def _staircase(plane: _Plane) -> Figure:
    view, signs = plane.view, [-1.0 if axis.maximise else 1.0 for axis in (plane.x, plane.y)]
    # What is not beaten on two axes is matched on both by something that is not beaten on all: the front is enough.
    across, up = (view.column(axis.name)[view.front_numbers] for axis in (plane.x, plane.y))
    # Walking away from the best end of the horizontal axis, a step is kept where it gains on the vertical one.
    order = np.lexsort((signs[1] * up, signs[0] * across))
    heights = signs[1] * up[order]
    best = np.minimum.accumulate(heights) if len(heights) else heights
    gains = order[np.concatenate([[True], heights[1:] < best[:-1]])] if len(order) else order
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front of these two axes",
        "x": drawn_all(plane.x, across[gains], plane.logs[0]).tolist(),
        "y": drawn_all(plane.y, up[gains], plane.logs[1]).tolist(),
        "line": {"shape": "hv", "color": INK, "width": 1.5},
        "hoverinfo": "skip",
    }


def _marks(
    plane: _Plane,
    points: Sequence[Point],
    scene: Scene,
    inside: frozenset[int] | None,
    placed: Mapping[int, str],
) -> Figure:
    view, third = plane.view, plane.third
    kind, on_front = points[0].kind, points[0].on_front
    opaque = 0.95 if on_front else 0.3
    marker: Figure = {
        "symbol": SYMBOLS[kind],
        "size": [9 + 13 * share for share in _shares(view, third, points)] if third else 11,
        "opacity": opaque
        if inside is None
        else [opaque if p.number in inside else 0.12 if on_front else 0.06 for p in points],
        "line": {"color": INK if on_front else FAINT, "width": 1.5 if on_front else 1},
    }
    if third:
        shades = [logged(third, drawn(third, p.values[third.name], third.log)) for p in points]
        marker |= {"color": shades, "coloraxis": "coloraxis"}
    else:
        marker |= {"color": "var(--accent)"}
    trace = {
        "type": "scatter",
        "mode": "markers" if kind == "found" else "markers+text",
        "name": kind_name(kind, on_front),
        "showlegend": False,
        "x": [drawn(plane.x, p.values[plane.x.name], plane.logs[0]) for p in points],
        "y": [drawn(plane.y, p.values[plane.y.name], plane.logs[1]) for p in points],
        "text": [plain(name_of(p)) if p.number in placed else "" for p in points],
        "textposition": [placed.get(p.number, "top center") for p in points],
        "textfont": {"size": 11, "color": INK if on_front else "var(--muted)"},
        "marker": marker,
        "cliponaxis": False,
        "customdata": [p.number for p in points],
        "hovertext": [hover(view, p, scene.doubt) for p in points],
        "hoverinfo": "text",
    }
    if on_front or kind != "found":
        for letter, axis in (("x", plane.x), ("y", plane.y)):
            bars = _bars(points, axis, scene.doubt)
            trace |= {f"error_{letter}": bars} if bars else {}
    return trace


def _ends(numbers: Sequence[int], axis: Axis, doubt: Doubt) -> list[float]:
    """Where the intervals of these trials begin and end."""
    known = doubt.intervals.get(axis.name, {})
    return [end for number in numbers for end in known.get(number, ())]


def _bars(points: Sequence[Point], axis: Axis, doubt: Doubt) -> Figure | None:
    known = doubt.intervals.get(axis.name)
    if not known:
        return None
    ends = [known.get(p.number, (p.values[axis.name],) * 2) for p in points]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - p.values[axis.name] for p, (_, high) in zip(points, ends, strict=True)],
        "arrayminus": [p.values[axis.name] - low for p, (low, _) in zip(points, ends, strict=True)],
        "color": "var(--muted)",
        "thickness": 1,
        "width": 3,
    }


def _rings(plane: _Plane, running: Sequence[Glance]) -> list[Figure]:
    """Trials that are being trained: their costs are known, and what is not stands at its axis."""
    traces = []
    places: list[tuple[float, float, str, int]] = []
    for seen in running:
        spots = []
        for place, axis in enumerate((plane.x, plane.y)):
            value = seen.value(axis.name)
            low = plane.ranges[place][0]
            known = value is not None and math.isfinite(value)
            edge = 10**low if plane.logs[place] else low
            spots.append(drawn(axis, value, plane.logs[place]) if known and value is not None else edge)
        words = f"<b>{plain(seen.layout.text)}</b><br>trial {seen.number} is being trained"
        places.append((spots[0], spots[1], words, seen.number))
    if places:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "in training",
                "x": [p[0] for p in places],
                "y": [p[1] for p in places],
                "hovertext": [p[2] for p in places],
                "customdata": [p[3] for p in places],
                "hoverinfo": "text",
                "cliponaxis": False,
                "marker": {"symbol": "circle-open", "size": 13, "color": "var(--good)", "line": {"width": 2}},
            }
        )
    return traces


def _key(kind: Kind) -> Figure:
    """A trace of no points for the legend: the real ones have a shade each, which a legend cannot show."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": KIND_TITLES[kind],
        "x": [None],
        "y": [None],
        "marker": {
            "symbol": SYMBOLS[kind],
            "size": 10,
            "color": "var(--scale-mid)",
            "line": {"color": INK, "width": 1.5},
        },
        "hoverinfo": "skip",
    }


def _refused(plane: _Plane, limits: Sequence[Limit]) -> tuple[list[Figure], list[Figure]]:
    """What the study's bounds exclude, as shaded regions with a word at their edge."""
    shapes, words = [], []
    for limit in limits:
        for place, (letter, axis) in enumerate((("x", plane.x), ("y", plane.y))):
            if limit.name != axis.name:
                continue
            edge = plane.share(place, limit.bound)
            if not 0 <= edge < 1 and not (edge <= 0 and limit.upper):
                continue
            span = (max(0.0, edge), 1.0) if limit.upper else (0.0, max(0.0, edge))
            other = "y" if letter == "x" else "x"
            shapes.append(
                {"type": "rect", "layer": "below", "xref": "paper", "yref": "paper", "line": {"width": 0}}
                | {f"{letter}0": span[0], f"{letter}1": span[1], f"{other}0": 0, f"{other}1": 1}
                | {"fillcolor": "var(--refused)"}
            )
            said = f"{'above' if limit.upper else 'below'} {quantities.value(axis.name, limit.bound, axis.unit)}: excluded"
            words.append(
                {"xref": "paper", "yref": "paper", "showarrow": False, "text": plain(said)}
                | {"x": span[0] if letter == "x" else 1, "y": 0 if letter == "x" else span[0]}
                | {"xanchor": "left" if letter == "x" else "right", "yanchor": "bottom"}
                | {"font": {"size": 11, "color": "var(--muted)"}}
            )
    return shapes, words


def _placed(plane: _Plane, points: Sequence[Point], stairs: Figure, narrow: bool) -> dict[int, str]:
    spots = [
        labels.Spot(
            key=p.number,
            x=plane.share(0, drawn(plane.x, p.values[plane.x.name], plane.logs[0])),
            y=plane.share(1, drawn(plane.y, p.values[plane.y.name], plane.logs[1])),
            text="" if p.kind == "found" else name_of(p),
            weight=1 if p.on_front else 0,
        )
        for p in points
        if p.on_front or p.kind != "found"
    ]
    at = [(plane.share(0, x), plane.share(1, y)) for x, y in zip(stairs["x"], stairs["y"], strict=True)]
    lines = [part for (x0, y0), (x1, y1) in pairwise(at) for part in ((x0, y0, x1, y0), (x1, y0, x1, y1))]
    return labels.places(spots, width=280 if narrow else 620, height=280 if narrow else 400, lines=lines)


def _shares(view: StudyView, axis: Axis, points: Sequence[Point]) -> list[float]:
    """Where points stand between the ends of an axis, from 0 to 1."""
    low, high = (logged(axis, x) for x in bounds(view, axis, axis.log, view.measured))
    at = [logged(axis, drawn(axis, p.values[axis.name], axis.log)) for p in points]
    return [(x - low) / (high - low) if high > low else 0.5 for x in at]


def _axis(plane: _Plane, place: int) -> Figure:
    axis = (plane.x, plane.y)[place]
    return scale(plane.view, axis, plane.logs[place], plane.ranges[place]) | {
        "range": list(plane.ranges[place]),
        "automargin": True,
    }

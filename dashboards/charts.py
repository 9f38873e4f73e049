"""Pictures of a study as Plotly figures: plain JSON, drawn by the reader's browser.

Colours are names of CSS variables; static/charts.js resolves them, so that one figure serves light and dark.
"""

import math
from collections.abc import Sequence
from typing import Any

from dashboards import quantities, strips
from dashboards.view import Kind, Point, StudyView
from storage.records import Axis

Figure = dict[str, Any]

INK, FAINT, GRID = "var(--ink)", "var(--faint)", "var(--line)"
SCALE = [[0.0, "var(--scale-low)"], [0.5, "var(--scale-mid)"], [1.0, "var(--scale-high)"]]
SYMBOLS: dict[Kind, str] = {"found": "circle", "uniform": "square", "preset": "diamond"}
KIND_TITLES: dict[Kind, str] = {
    "found": "found by the search",
    "uniform": "one mixer throughout",
    "preset": "known model",
}


def plain(text: str) -> str:
    """Text that Plotly prints as it is: it would otherwise read a few tags of HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def front(view: StudyView, x: str | None = None, y: str | None = None) -> Figure:
    """Every layout on two axes, a third by size and shade; the staircase is the front of the two axes shown."""
    horizontal, vertical, third = choose_axes(view.axes, x, y)
    traces: list[Figure] = [_staircase(view, horizontal, vertical)]
    for on_front in (False, True):
        for kind in SYMBOLS:
            points = [p for p in view.points if p.on_front is on_front and p.kind == kind]
            if points:
                traces.append(_marks(view, points, horizontal, vertical, third))
    traces += [_key(kind) for kind in SYMBOLS if any(p.kind == kind for p in view.points)]
    layout = bare_layout(height=460)
    layout["xaxis"] = _axis(view, horizontal)
    layout["yaxis"] = _axis(view, vertical)
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"}
    if third:
        layout["coloraxis"] = _shade(view, third)
    return {"data": traces, "layout": layout}


def front_3d(view: StudyView) -> Figure:
    """Every layout on the first three axes; empty where the study has fewer."""
    if len(view.axes) < 3:
        return {"data": [], "layout": bare_layout(height=300)}
    first, second, third = view.axes[1], view.axes[2], view.axes[0]
    traces: list[Figure] = []
    for on_front in (False, True):
        for kind in SYMBOLS:
            points = [p for p in view.points if p.on_front is on_front and p.kind == kind]
            if not points:
                continue
            traces.append(
                {
                    "type": "scatter3d",
                    "mode": "markers",
                    "name": _kind_name(kind, on_front),
                    "showlegend": on_front,
                    "x": [_drawn(first, p) for p in points],
                    "y": [_drawn(second, p) for p in points],
                    "z": [_drawn(third, p) for p in points],
                    "marker": {
                        "symbol": SYMBOLS[kind],
                        "size": 6 if on_front else 3.5,
                        "color": "var(--accent)" if on_front else FAINT,
                        "opacity": 1 if on_front else 0.6,
                        "line": {"width": 0},
                    },
                    "customdata": [p.number for p in points],
                    "hovertext": [_hover(view, p) for p in points],
                    "hoverinfo": "text",
                }
            )
    layout = bare_layout(height=480)
    scene: Figure = {
        "bgcolor": "rgba(0,0,0,0)",
        "camera": {"eye": {"x": 1.7, "y": -1.7, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.12}},
    }
    names = zip(("xaxis", "yaxis", "zaxis"), (first, second, third), strict=True)
    flat = {"showbackground": False, "linecolor": GRID, "showspikes": False}
    for key, axis in names:
        scene[key] = {k: v for k, v in _axis(view, axis, sparse=True).items() if k != "automargin"} | flat
    layout["scene"] = scene
    layout["margin"] = {"l": 0, "r": 0, "t": 8, "b": 0}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def layouts(view: StudyView, limit: int = 60) -> Figure:
    """Strips of the best measured layouts, front first: one row a layout, one cell a layer."""
    first = view.axes[0] if view.axes else None
    sign = -1.0 if first and first.maximise else 1.0
    ordered = sorted(
        view.points, key=lambda p: (p.rank, sign * p.values[first.name] if first else 0.0, p.number)
    )
    shown = ordered[:limit]
    families = {part.family for p in shown for cell in p.strip for part in cell.parts}
    used = sorted(families, key=strips.family_order)
    rows = [f"{p.number}" for p in shown]
    traces: list[Figure] = []
    for family in used:
        bars: Figure = {
            "type": "bar",
            "orientation": "h",
            "name": strips.family_of(family).title,
            "marker": {"color": f"var(--family-{family})", "line": {"color": "var(--paper)", "width": 1}},
            "x": [],
            "y": [],
            "base": [],
            "text": [],
            "hovertext": [],
            "customdata": [],
            "hoverinfo": "text",
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": f"var(--family-ink-{family})"},
            "constraintext": "none",
        }
        for p, row in zip(shown, rows, strict=True):
            for depth, cell in enumerate(p.strip):
                for i, part in enumerate(cell.parts):
                    if part.family != family:
                        continue
                    bars["x"].append(1 / len(cell.parts))
                    bars["base"].append(depth + i / len(cell.parts))
                    bars["y"].append(row)
                    bars["text"].append(plain(part.mark))
                    bars["customdata"].append(p.number)
                    bars["hovertext"].append(f"layer {depth + 1}: {plain(cell.label)}<br>{plain(p.text)}")
        traces.append(bars)
    layout = bare_layout(height=90 + 22 * max(4, len(shown)))
    layout |= {"barmode": "overlay", "bargap": 0.12}
    depth = max((len(p.strip) for p in shown), default=0)
    layout["xaxis"] = bare_axis("layer of the pattern") | {
        "showgrid": False,
        "tickvals": [layer + 0.5 for layer in range(depth)],
        "ticktext": [str(layer + 1) for layer in range(depth)],
    }
    layout["yaxis"] = bare_axis("trial, front first") | {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rows[::-1],
        "showgrid": False,
    }
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def hypervolume(view: StudyView) -> Figure:
    """How much of the space of objectives the front covers, as trials end."""
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(view.progress) < 80 else "lines",
        "line": {"shape": "hv", "color": "var(--accent)", "width": 2},
        "marker": {"size": 4, "color": "var(--accent)"},
        "x": [step.measured for step in view.progress],
        "y": [step.hypervolume for step in view.progress],
        "customdata": [step.number for step in view.progress],
        "hovertext": [
            f"after {step.measured} measured: {quantities.quality(step.hypervolume)}<br>trial {step.number}"
            for step in view.progress
        ],
        "hoverinfo": "text",
        "showlegend": False,
    }
    layout = bare_layout(height=280)
    layout["xaxis"] = bare_axis("measured layouts, in order of ending")
    layout["yaxis"] = bare_axis("hypervolume (share of 1)") | {"rangemode": "tozero"}
    return {"data": [trace], "layout": layout}


def choose_axes(axes: Sequence[Axis], x: str | None, y: str | None) -> tuple[Axis, Axis, Axis | None]:
    """The axes across and up, and the one left over; by default cost across and quality up.

    ValueError for a name that the study has not, or for the same axis twice.
    """
    names = [axis.name for axis in axes]
    if len(names) < 2:
        raise ValueError(f"a front needs two axes, and this study has {len(names)}")
    for name in (x, y):
        if name is not None and name not in names:
            raise ValueError(f"this study has no axis {name!r}; it has {', '.join(names)}")
    if x is not None and x == y:
        raise ValueError(f"both axes are {x!r}: choose two different ones")
    up = y or next(name for name in names if name != x)
    across = x or next(name for name in reversed(names) if name != up)
    rest = [name for name in names if name not in (up, across)]
    by_name = {axis.name: axis for axis in axes}
    return by_name[across], by_name[up], by_name[rest[0]] if rest else None


def _staircase(view: StudyView, x: Axis, y: Axis) -> Figure:
    better_up = -1.0 if y.maximise else 1.0
    better_across = -1.0 if x.maximise else 1.0
    # Walking away from the best end of the horizontal axis, a step is kept where it gains on the vertical one.
    ordered = sorted(
        view.points, key=lambda p: (better_across * p.values[x.name], better_up * p.values[y.name])
    )
    steps: list[Point] = []
    for p in ordered:
        if not steps or better_up * p.values[y.name] < better_up * steps[-1].values[y.name]:
            steps.append(p)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front of these two axes",
        "x": [_drawn(x, p) for p in steps],
        "y": [_drawn(y, p) for p in steps],
        "line": {"shape": "hv", "color": INK, "width": 1.5},
        "hoverinfo": "skip",
    }


def _marks(view: StudyView, points: Sequence[Point], x: Axis, y: Axis, third: Axis | None) -> Figure:
    kind, on_front = points[0].kind, points[0].on_front
    marker: Figure = {
        "symbol": SYMBOLS[kind],
        "size": [9 + 13 * _share(view, third, p) for p in points] if third else 11,
        "opacity": 0.95 if on_front else 0.3,
        "line": {"color": INK if on_front else FAINT, "width": 1.5 if on_front else 1},
    }
    if third:
        marker |= {"color": [_log(third, _drawn(third, p)) for p in points], "coloraxis": "coloraxis"}
    else:
        marker |= {"color": "var(--accent)"}
    return {
        "type": "scatter",
        "mode": "markers" if kind == "found" else "markers+text",
        "name": _kind_name(kind, on_front),
        "showlegend": False,
        "x": [_drawn(x, p) for p in points],
        "y": [_drawn(y, p) for p in points],
        "text": [plain(_name(p)) for p in points],
        "textposition": "top center",
        "textfont": {"size": 11, "color": INK if on_front else "var(--muted)"},
        "marker": marker,
        "cliponaxis": False,
        "customdata": [p.number for p in points],
        "hovertext": [_hover(view, p) for p in points],
        "hoverinfo": "text",
    }


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


def _name(point: Point) -> str:
    """What a marked point is called in the picture: the preset's name, or the mixer that stands everywhere."""
    if point.kind == "preset":
        return point.origin
    mixers = {cell.label for cell in point.strip}
    return mixers.pop() if len(mixers) == 1 else point.text


def _kind_name(kind: Kind, on_front: bool) -> str:
    return f"{KIND_TITLES[kind]}, {'on the front' if on_front else 'beaten'}"


def _hover(view: StudyView, point: Point) -> str:
    values = [
        f"{view.title(a.name)}  {quantities.value(a.name, point.values[a.name], a.unit)}" for a in view.axes
    ]
    costs = [
        f"{view.title(name)}  {quantities.value(name, x)}"
        for name, x in point.costs.items()
        if name not in point.values
    ]
    head = f"<b>{plain(point.text)}</b><br>{plain(strips.text(point.strip))}"
    tail = f"trial {point.number} · {plain(point.origin)}"
    return "<br>".join([head, *(plain(line) for line in (*values, *costs)), tail])


def _drawn(axis: Axis, point: Point) -> float:
    """The value as drawn; a logarithmic axis has no place for 0, which stands at its low end instead."""
    x = point.values[axis.name]
    return max(x, axis.low) if axis.log and x <= 0 else x


def _log(axis: Axis, x: float) -> float:
    return math.log10(x) if axis.log else x


def _range(view: StudyView, axis: Axis) -> tuple[float, float]:
    values = [_drawn(axis, p) for p in view.points] or [axis.low, axis.high]
    return min(values), max(values)


def _share(view: StudyView, axis: Axis, point: Point) -> float:
    low, high = (_log(axis, x) for x in _range(view, axis))
    return (_log(axis, _drawn(axis, point)) - low) / (high - low) if high > low else 0.5


def _shade(view: StudyView, axis: Axis) -> Figure:
    low, high = _range(view, axis)
    places, words = quantities.ticks(axis.name, low, high, log=axis.log, unit=axis.unit)
    return {
        "colorscale": SCALE,
        "colorbar": {
            "title": {"text": plain(view.title(axis.name)), "side": "right", "font": {"size": 12}},
            "tickvals": [_log(axis, x) for x in places],
            "ticktext": words,
            "thickness": 8,
            "len": 0.8,
            "outlinewidth": 0,
            "ticks": "",
        },
    }


def _axis(view: StudyView, axis: Axis, *, sparse: bool = False) -> Figure:
    low, high = _range(view, axis)
    places, words = quantities.ticks(axis.name, low, high, log=axis.log, unit=axis.unit)
    if not axis.log and len(places) < 2:
        places, words = quantities.ticks(axis.name, axis.low, axis.high, log=False, unit=axis.unit)
    stride = max(1, -(-len(places) // 4)) if sparse else 1
    better = "higher is better" if axis.maximise else "lower is better"
    title = view.title(axis.name) if sparse else f"{view.title(axis.name)} · {better}"
    return bare_axis(plain(title)) | {
        "type": "log" if axis.log else "linear",
        "tickvals": places[::stride],
        "ticktext": words[::stride],
    }


def bare_axis(title: str) -> Figure:
    """An axis in the house's style."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": "var(--muted)"}},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "tickfont": {"size": 11, "color": "var(--muted)"},
        "automargin": True,
    }


def bare_layout(*, height: int) -> Figure:
    """A picture in the house's style, without axes."""
    return {
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": INK},
        "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
        "hoverlabel": {
            "bgcolor": "var(--raised)",
            "bordercolor": GRID,
            "font": {"color": INK, "size": 12},
            "align": "left",
        },
        "hovermode": "closest",
        # A picture that is drawn again with newer trials keeps its zoom.
        "uirevision": "kept",
    }

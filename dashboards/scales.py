"""Axes and shades of a front's pictures: where a value stands, which range is shown, which words stand at it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dashboards import quantities
from dashboards.charts import SCALE, Figure, bare_axis, plain
from dashboards.view import Floats, Numbers, StudyView
from storage.records import Axis


def drawn(axis: Axis, x: float, log: bool) -> float:
    """The value as drawn; a logarithmic axis has no place for 0, which stands at its low end instead."""
    return (axis.low if axis.low > 0 else 1e-9) if log and x <= 0 else x


def drawn_all(axis: Axis, x: Floats, log: bool) -> Floats:
    return np.where(x <= 0, axis.low if axis.low > 0 else 1e-9, x) if log else x


def logged(axis: Axis, x: float) -> float:
    return math.log10(x) if axis.log else x


def bounds(view: StudyView, axis: Axis, log: bool, shown: Numbers) -> tuple[float, float]:
    values = drawn_all(axis, view.column(axis.name)[shown], log)
    return (float(values.min()), float(values.max())) if len(values) else (axis.low, axis.high)


def shown_range(
    view: StudyView, axis: Axis, log: bool, shown: Numbers, beside: Sequence[float] = ()
) -> tuple[float, float]:
    """From where to where an axis is shown, by logarithm if it is drawn so: what is there and `beside` it, and a margin."""
    ends = [*bounds(view, axis, log, shown), *(drawn(axis, value, log) for value in beside)]
    low, high = min(ends), max(ends)
    if log:
        low, high = math.log10(max(low, 1e-300)), math.log10(max(high, 1e-300))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def shade(view: StudyView, axis: Axis, shown: Numbers, *, narrow: bool) -> Figure:
    low, high = bounds(view, axis, axis.log, view.measured if len(shown) == 0 else shown)
    places, words = quantities.ticks(axis.name, low, high, log=axis.log, unit=axis.unit)
    stride = max(1, -(-len(places) // 4)) if narrow else 1
    bar: dict[str, Any] = {
        "title": {"text": plain(view.title(axis.name)), "side": "right", "font": {"size": 12}},
        "tickvals": [logged(axis, x) for x in places][::stride],
        "ticktext": words[::stride],
        "thickness": 8,
        "len": 0.8,
        "outlinewidth": 0,
        "ticks": "",
    }
    if narrow:
        bar |= {"orientation": "h", "y": -0.3, "yanchor": "top", "len": 0.9}
        bar["title"] |= {"side": "top"}
    return {"colorscale": SCALE, "colorbar": bar}


def scale(
    view: StudyView, axis: Axis, log: bool, ends: tuple[float, float], *, sparse: bool = False
) -> Figure:
    low, high = (10**end for end in ends) if log else ends
    places, words = quantities.ticks(axis.name, low, high, log=log, unit=axis.unit)
    if not log and len(places) < 2:
        places, words = quantities.ticks(axis.name, axis.low, axis.high, log=False, unit=axis.unit)
    stride = max(1, -(-len(places) // 4)) if sparse else 1
    better = "higher is better" if axis.maximise else "lower is better"
    title = view.title(axis.name) if sparse else f"{view.title(axis.name)} · {better}"
    bare = {k: v for k, v in bare_axis(plain(title)).items() if k != "automargin"}
    return bare | {
        "type": "log" if log else "linear",
        "tickvals": places[::stride],
        "ticktext": words[::stride],
    }

"""What a picture of the front is made of: what is shown, what is sure of it, and the words of its marks."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dashboards import quantities, strips
from dashboards.charts import Figure, plain
from dashboards.choice import Choice
from dashboards.limits import Limit
from dashboards.view import Floats, Kind, Numbers, Point, StudyView, kind_of
from storage.glances import Glance

MANY = 5000
"""Beyond so many points those that are beaten are drawn by WebGL, without a word for each."""
SYMBOLS: dict[Kind, str] = {"found": "circle", "uniform": "square", "preset": "diamond"}
KIND_TITLES: dict[Kind, str] = {
    "found": "found by the search",
    "uniform": "one mixer throughout",
    "preset": "known model",
}
CROWD = "beaten"
_CHOICE = Choice()


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What further seeds say: an interval for each trained number, and how likely a layout is to stand on the front."""

    chances: Mapping[int, float] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[int, tuple[float, float]]] = field(default_factory=dict)
    """By axis and trial: from, to."""


NO_DOUBT = Doubt()


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn of a study, beyond its measured layouts."""

    choice: Choice = _CHOICE
    shown: Numbers | None = None
    """Measured trials that are drawn; all of them if None."""
    caught: Numbers | None = None
    """Those of them within the lasso; the others stand back."""
    running: Sequence[Glance] = ()
    limits: Sequence[Limit] = ()
    doubt: Doubt = NO_DOUBT
    narrow: bool = False
    """For a phone."""
    fresh: frozenset[int] | None = None
    """Of the crowd, only these trials: the reader has the others."""


NOTHING = Scene()


def parted(view: StudyView, shown: Numbers) -> tuple[Numbers, tuple[Point, ...]]:
    """Those drawn as a crowd, and those with a mark and words of their own."""
    if len(shown) <= MANY:
        return shown[:0], view.points_of(shown)
    own = np.zeros(len(view.glances), dtype=bool)
    own[view.front_numbers] = own[view.known] = True
    return shown[~own[shown]], view.points_of(shown[own[shown]])


def packed(values: Floats) -> Figure:
    """Numbers as Plotly reads them without a parser: a type and their bytes."""
    return {"dtype": "f4", "bdata": b64encode(values.astype("<f4").tobytes()).decode()}


def packed_numbers(values: Numbers) -> Figure:
    return {"dtype": "i4", "bdata": b64encode(values.astype("<i4").tobytes()).decode()}


def name_of(point: Point) -> str:
    """What a marked point is called in the picture: the preset's name, or the mixer that stands everywhere."""
    if point.kind == "preset":
        return point.origin
    mixers = {cell.label for cell in point.strip}
    return mixers.pop() if len(mixers) == 1 else point.text


def kind_name(kind: Kind, on_front: bool) -> str:
    return f"{KIND_TITLES[kind]}, {'on the front' if on_front else 'beaten'}"


def hover(view: StudyView, point: Point, doubt: Doubt = NO_DOUBT) -> str:
    """What a point says of itself when it is pointed at."""
    values = []
    for axis in view.axes:
        words = f"{view.title(axis.name)}  {quantities.value(axis.name, point.values[axis.name], axis.unit)}"
        known = doubt.intervals.get(axis.name, {}).get(point.number)
        if known:
            low, high = (quantities.value(axis.name, x, axis.unit) for x in known)
            words += f"  ({low} to {high})"
        values.append(words)
    if point.number in doubt.chances:
        values.append(f"on the front with a chance of {quantities.share(doubt.chances[point.number])}")
    costs = [
        f"{view.title(name)}  {quantities.value(name, x)}"
        for name, x in point.costs.items()
        if name not in point.values
    ]
    head = f"<b>{plain(point.text)}</b><br>{plain(strips.text(point.strip))}"
    tail = f"trial {point.number} · {plain(point.origin)}"
    return "<br>".join([head, *(plain(line) for line in (*values, *costs)), tail])


def kinds_of(view: StudyView) -> tuple[Kind, ...]:
    """The kinds of origin that a study has."""
    present = {kind_of(view.glance(int(n)).origin) for n in view.known} | {"found"}
    return tuple(kind for kind in SYMBOLS if kind in present)

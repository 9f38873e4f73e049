"""Which trials of a study a choice means, and in which order: numbers in, numbers out."""

import numpy as np
from numpy.typing import NDArray

from dashboards.choice import NUMBER, Choice, Vertices, choose_axes, scaled
from dashboards.memory import Snapshot
from dashboards.view import Floats, Numbers, kind_of
from storage.records import STATES

Flags = NDArray[np.bool_]


def _kept(snapshot: Snapshot, choice: Choice) -> Flags:
    """[T] what mixers, origin, rung and state leave."""
    kept = np.ones(len(snapshot.view.glances), dtype=bool)
    if choice.mixer:
        wanted = frozenset(choice.mixer)
        holds = np.array([wanted <= own for own in snapshot.mixer_sets] or [False])
        kept &= holds[snapshot.columns.mixers]
    if choice.origin:
        of_kind = np.array([kind_of(name) in choice.origin for name in snapshot.origins] or [False])
        kept &= of_kind[snapshot.columns.origins]
    if choice.rung:
        kept &= snapshot.columns.rungs >= choice.rung
    if choice.state:
        kept &= snapshot.columns.states == STATES.index(choice.state)
    return kept


def measured(snapshot: Snapshot, choice: Choice) -> Numbers:
    """Measured trials that the filters leave, the lasso aside, by number. ValueError as `Choice.vertices`."""
    if not (choice.mixer or choice.origin or choice.rung or choice.state):
        return snapshot.view.measured
    return snapshot.view.measured[_kept(snapshot, choice)[snapshot.view.measured]]


def caught(snapshot: Snapshot, choice: Choice, numbers: Numbers) -> Numbers:
    """Those of measured trials that lie within the lasso; all of them where there is none."""
    corners = choice.vertices()
    if not corners:
        return numbers
    across, up, _ = choose_axes(snapshot.view.axes, choice.x, choice.y, choice.third)
    columns = []
    for axis, scale in ((across, choice.x_scale), (up, choice.y_scale)):
        column = snapshot.view.column(axis.name)[numbers]
        columns.append(_log(column) if scaled(axis, scale) else column)
    drawn = np.array(corners, dtype=float)
    for place, (axis, scale) in enumerate(((across, choice.x_scale), (up, choice.y_scale))):
        if scaled(axis, scale):
            drawn[:, place] = _log(drawn[:, place])
    return numbers[inside(np.stack(columns, axis=1), tuple((float(a), float(b)) for a, b in drawn))]


def inside(points: Floats, corners: Vertices) -> Flags:
    """[N] which points [N, 2] a closed line goes around, by counting how often it crosses their horizontal."""
    within = np.zeros(len(points), dtype=bool)
    x, y = points[:, 0], points[:, 1]
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if y0 == y1:
            continue
        between = (y0 > y) != (y1 > y)
        within ^= between & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return within


def listed(snapshot: Snapshot, choice: Choice) -> Numbers:
    """Every trial of the table, ended or not, in its order: the newest first unless it is sorted otherwise."""
    if choice.area:
        numbers = caught(snapshot, choice, measured(snapshot, choice))
    elif choice.filters or choice.state:
        numbers = snapshot.numbers[_kept(snapshot, choice)[snapshot.numbers]]
    else:
        numbers = snapshot.numbers
    if not choice.sort:
        return numbers[::-1]
    return ordered(snapshot, choice, numbers)


def ordered(snapshot: Snapshot, choice: Choice, numbers: Numbers) -> Numbers:
    """Trials by an objective or by number; those without a value last. ValueError for another name."""
    names = [axis.name for axis in snapshot.view.axes]
    if choice.sort == NUMBER:
        return numbers[::-1] if choice.down else numbers
    if choice.sort not in names:
        raise ValueError(f"trials are sorted by {NUMBER} or {', '.join(names)}, not by {choice.sort!r}")
    values = snapshot.view.column(choice.sort)[numbers]
    order: Numbers = np.argsort(-values if choice.down else values, kind="stable")
    return numbers[order]


def best_first(snapshot: Snapshot, choice: Choice, numbers: Numbers, most: int = 200) -> Numbers:
    """Measured trials for the strips: as they are sorted, or else the front first, best on the first axis.

    Of those that are beaten `most` at most; of those that are sorted all.
    """
    if choice.sort:
        return ordered(snapshot, choice, numbers)
    own = np.zeros(len(snapshot.view.glances), dtype=bool)
    own[snapshot.view.front_numbers] = True
    on_front, beaten = numbers[own[numbers]], numbers[~own[numbers]]
    first = snapshot.view.directed[:, 0]
    if len(beaten) > most:
        # Of very many only the best are put in order.
        beaten = beaten[np.argpartition(first[beaten], most)[:most]]
    parts = [part[np.lexsort((part, first[part]))] for part in (on_front, beaten)]
    ordered_parts: Numbers = np.concatenate(parts)
    return ordered_parts


def _log(x: Floats) -> Floats:
    """The logarithm, for which what is not above 0 lies below everything."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(x > 0, np.log10(x), -1e300)
    return found

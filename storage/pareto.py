"""Fronts, ranks and hypervolumes: numbers in, indices and numbers out. Smaller is better, except in raw axis values."""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from storage.records import Axis


def losses(axes: Sequence[Axis], values: ArrayLike) -> NDArray[np.float64]:
    """Raw values [N, M] on the frozen scale of the axes: [N, M] in [0, 1], clipped, 0 is best.

    ValueError where a value is not finite or an axis has no scale.
    """
    raw = _points(values, columns=len(axes))
    scaled = np.empty_like(raw)
    for column, axis in enumerate(axes):
        if not (np.isfinite(axis.low) and np.isfinite(axis.high) and axis.low < axis.high):
            raise ValueError(
                f"axis {axis.name!r} runs from {axis.low} to {axis.high}: low must be below high"
            )
        if axis.log and axis.low <= 0:
            raise ValueError(f"axis {axis.name!r} is logarithmic from {axis.low}: low must be above 0")
        # Clipped before the logarithm: a layout without any cache has 0 bytes, which is simply the best.
        value = np.clip(raw[:, column], axis.low, axis.high)
        if axis.log:
            share = np.log(value / axis.low) / np.log(axis.high / axis.low)
        else:
            share = (value - axis.low) / (axis.high - axis.low)
        scaled[:, column] = 1.0 - share if axis.maximise else share
    clipped: NDArray[np.float64] = np.clip(scaled, 0.0, 1.0)
    return clipped


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices, ascending, of the points [N, M] that no other beats; equal points are all kept.

    Takes any finite numbers, not only those in [0, 1]. ValueError where one is not finite.
    """
    checked = _points(points)
    if checked.size == 0:
        return np.arange(len(checked), dtype=np.intp)
    return np.flatnonzero(moocore.is_nondominated(checked, keep_weakly=True))


def ranks(points: ArrayLike) -> NDArray[np.intp]:
    """The non-dominated rank of each point [N, M]: 0 on the front, 1 on the front of the rest, and so on."""
    checked = _points(points)
    if checked.size == 0:
        return np.zeros(len(checked), dtype=np.intp)
    return np.asarray(moocore.pareto_rank(checked), dtype=np.intp)


def hypervolume(points: ArrayLike) -> float:
    """The share of the unit box [0, 1]^M that the points beat; what lies outside the box is clipped to it."""
    checked = _points(points)
    if checked.size == 0:
        return 0.0
    return float(moocore.hypervolume(np.clip(checked, 0.0, 1.0), ref=1.0))


def beaten_by(points: ArrayLike, index: int) -> NDArray[np.intp]:
    """Indices, ascending, of the points that beat point `index`: nowhere worse, somewhere better."""
    checked = _points(points)
    point = checked[index]
    return np.flatnonzero((checked <= point).all(axis=1) & (checked < point).any(axis=1))


def _points(values: ArrayLike, columns: int | None = None) -> NDArray[np.float64]:
    points = np.array(values, dtype=np.float64)
    if points.size == 0 and points.ndim < 2:
        points = points.reshape(0, columns or 0)
    if points.ndim != 2 or (columns is not None and points.shape[1] != columns):
        raise ValueError(
            f"the points have shape {points.shape}: [N, {'M' if columns is None else columns}] is needed"
        )
    if not np.isfinite(points).all():
        row, column = np.argwhere(~np.isfinite(points))[0]
        raise ValueError(
            f"point {row} has {points[row, column]} on axis {column}: only finite numbers are compared"
        )
    return points

"""Fronts, ranks and hypervolumes against slow, obvious versions of themselves."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.pareto import beaten_by, front, hypervolume, losses, ranks
from storage.records import Axis

Points = list[list[float]]


def beats(a: list[float], b: list[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def slow_front(points: Points) -> list[int]:
    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def slow_ranks(points: Points) -> list[int]:
    found: dict[int, int] = {}
    rank = 0
    while len(found) < len(points):
        left = [i for i in range(len(points)) if i not in found]
        found |= {left[i]: rank for i in slow_front([points[i] for i in left])}
        rank += 1
    return [found[i] for i in range(len(points))]


def slow_hypervolume(points: Points) -> float:
    """By inclusion and exclusion of the boxes between each point and the corner at 1."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in combinations(points, size):
            total -= (-1) ** size * float(np.prod([1.0 - max(axis) for axis in zip(*some, strict=True)]))
    return total


def points_of(numbers: st.SearchStrategy[float], most: int) -> st.SearchStrategy[Points]:
    """Points on 1 to 4 axes; from a short list of numbers there are many ties and duplicates."""
    return st.integers(1, 4).flatmap(
        lambda axes: st.lists(st.lists(numbers, min_size=axes, max_size=axes), min_size=1, max_size=most)
    )


tied = st.sampled_from([0.0, 0.25, 0.5, 1.0])
raw = st.floats(-1e12, 1e12) | st.sampled_from([-0.0, 0.0, 5e-324, 1e-300])


@settings(deadline=None)
@given(points_of(tied, 16) | points_of(raw, 12))
def test_front_ranks_and_beaten_by_are_those_of_the_definition(points: Points) -> None:
    assert front(points).tolist() == slow_front(points)
    assert ranks(points).tolist() == slow_ranks(points)
    for index, point in enumerate(points):
        assert beaten_by(points, index).tolist() == [
            i for i, other in enumerate(points) if beats(other, point)
        ]


@settings(deadline=None)
@given(points_of(tied | st.floats(0.0, 1.0), 6))
def test_hypervolume_is_that_of_the_boxes(points: Points) -> None:
    assert hypervolume(points) == pytest.approx(slow_hypervolume(points), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3),
        min_size=1,
        max_size=40,
    )
)
def test_hypervolume_is_that_of_the_cells_of_a_grid(points: Points) -> None:
    cells = product([0.125, 0.375, 0.625, 0.875], repeat=3)
    covered = sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells
    )
    assert hypervolume(points) == pytest.approx(covered / 64)


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
def test_edges_of_the_unit_box(axes: int) -> None:
    assert hypervolume([[0.0] * axes]) == 1.0
    assert hypervolume([[1.0] * axes]) == 0.0
    assert hypervolume([[-3.0] * axes]) == 1.0
    assert hypervolume([[7.0] * axes, [0.5] * axes]) == pytest.approx(0.5**axes)


@pytest.mark.parametrize("none", [[], np.empty((0, 3)), np.empty((0, 0))])
def test_no_points_have_an_empty_front(none: object) -> None:
    assert front(none).tolist() == ranks(none).tolist() == []  # type: ignore[arg-type]
    assert front(none).dtype == ranks(none).dtype == np.intp  # type: ignore[arg-type]
    assert hypervolume(none) == 0.0  # type: ignore[arg-type]


def test_equal_points_are_all_on_the_front() -> None:
    assert front([[1, 2], [3, 0], [1, 2], [3, 1], [1, 2]]).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_points_are_refused(bad: float) -> None:
    points = [[0.0, 1.0], [bad, 0.0]]
    for function in (front, ranks, hypervolume):
        with pytest.raises(ValueError, match=r"point 1 has -?(nan|inf) on axis 0"):
            function(points)
    with pytest.raises(ValueError, match="point 1"):
        beaten_by(points, 0)
    with pytest.raises(ValueError, match="point 1"):
        losses((QUALITY, CACHE), points)


QUALITY = Axis(name="quality", maximise=True, low=0.0, high=0.5, log=False)
CACHE = Axis(name="kv_bytes", maximise=False, low=10.0, high=1000.0, log=True)
LATENCY = Axis(name="latency_ms", maximise=False, low=2.0, high=4.0, log=False)


def test_losses_are_clipped_and_zero_is_best() -> None:
    raw_values = [
        [0.5, 10.0, 2.0],
        [0.0, 1000.0, 4.0],
        [0.25, 100.0, 2.5],
        [9.0, 0.0, -1.0],
        [-9.0, 1e9, 1e9],
    ]
    expected = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.25], [0, 0, 0], [1, 1, 1]]
    np.testing.assert_allclose(losses((QUALITY, CACHE, LATENCY), raw_values), expected, atol=1e-15)
    assert losses((QUALITY,), np.empty((0, 1))).shape == (0, 1)
    assert losses((QUALITY, CACHE), []).shape == (0, 2)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=10),
    st.floats(1e-3, 1e3),
    st.floats(1.001, 1e6),
    st.booleans(),
    st.booleans(),
)
def test_losses_keep_the_order_and_stay_in_the_box(
    values: list[float], low: float, ratio: float, log: bool, maximise: bool
) -> None:
    axis = Axis(name="any", maximise=maximise, low=low, high=low * ratio, log=log)
    scaled = losses((axis,), np.array(values)[:, None])[:, 0]
    assert ((scaled >= 0) & (scaled <= 1)).all()
    order = np.argsort(values, kind="stable")
    steps = np.diff(scaled[order])
    assert ((-steps if maximise else steps) >= 0).all()


def test_an_axis_without_a_scale_and_points_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="low must be below high"):
        losses((Axis(name="flat", maximise=False, low=1.0, high=1.0, log=False),), [[1.0]])
    with pytest.raises(ValueError, match="low must be above 0"):
        losses((Axis(name="zero", maximise=False, low=0.0, high=1.0, log=True),), [[1.0]])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        losses((QUALITY,), [[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"\[N, M\] is needed"):
        front([1.0, 2.0])

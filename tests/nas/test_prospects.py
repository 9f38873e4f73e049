"""What was found before is an answer only where it would be found again, and who is beaten is counted right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.prospects import NEAREST, Front, Pairs, Prospects, beaten
from storage.records import Axis

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="recall", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=0.0, high=1.0, log=False),
)
SIGNS = np.array([-1.0, -1.0, 1.0])


def pairs_of(rows: dict[int, list[float]], learnt: tuple[int, ...]) -> Pairs:
    """Of trials [at rung, at end] by number; a second learnt objective is the first one turned."""
    table = np.array([rows[number] for number in sorted(rows)]).reshape(-1, 2)
    columns = [-table, -(1 - table)][: len(learnt)]
    at, end = (np.stack([column[:, place] for column in columns], axis=1) for place in (0, 1))
    return Pairs(numbers=tuple(sorted(rows)), at=at, end=end)


# Few different values, so that many are equally near.
SCORES = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.8])
TRIAL = st.tuples(st.integers(0, 400), SCORES, SCORES)
POINT = st.tuples(SCORES, SCORES, SCORES)


@given(
    learnt=st.sampled_from([(0,), (0, 1)]),
    first=st.lists(TRIAL, min_size=2, max_size=60, unique_by=lambda row: row[0]),
    then=st.lists(TRIAL, min_size=1, max_size=12),
    asked=st.lists(POINT, min_size=1, max_size=6),
    fronts=st.lists(POINT, min_size=1, max_size=3),
)
def test_what_is_kept_answers_as_one_that_knows_nothing(
    learnt: tuple[int, ...],
    first: list[tuple[int, float, float]],
    then: list[tuple[int, float, float]],
    asked: list[tuple[float, float, float]],
    fronts: list[tuple[float, float, float]],
) -> None:
    kept = Prospects(axes=AXES, learnt=learnt)
    rows = {number: [at, end] for number, at, end in first}
    points = np.array(asked) * SIGNS
    for step, (number, at, end) in enumerate(then):
        pairs = pairs_of(rows, learnt)
        front = Front.of(AXES, np.array(fronts[: 1 + step // 4]) * SIGNS, SIGNS)
        fresh = Prospects(axes=AXES, learnt=learnt)
        for got, wanted in zip(
            kept.of(0, points, pairs, front), fresh.of(0, points, pairs, front), strict=True
        ):
            assert got.tolist() == wanted.tolist()
        # A further pair, or, where the number is taken, one that was trained anew.
        rows[number] = [at, end]


def test_a_further_pair_costs_only_those_that_it_is_near_to(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {number: [number / 100, number / 80] for number in range(60)}
    kept = Prospects(axes=AXES, learnt=(0,))
    front = Front.of(AXES, np.array([[-0.9, 0.0, 0.1]]), SIGNS)
    points = np.array([[-place / 100, 0.0, 0.2] for place in range(0, 60, 2)])
    kept.of(0, points, pairs_of(rows, (0,)), front)
    found: list[int] = []
    find = Prospects._find

    def count(self, points, *others):
        found.append(len(points))
        return find(self, points, *others)

    monkeypatch.setattr(Prospects, "_find", count)
    kept.of(0, points, pairs_of(rows, (0,)), front)
    assert found == []
    kept.of(0, points, pairs_of(rows | {60: [2.0, 2.0]}, (0,)), front)
    assert found == []
    kept.of(0, points, pairs_of(rows | {60: [2.0, 2.0], 61: [0.0, 0.1]}, (0,)), front)
    assert 0 < sum(found) < len(points)
    assert len(rows) > NEAREST


@given(
    points=st.lists(st.lists(SCORES, min_size=4, max_size=4), min_size=1, max_size=4),
    others=st.lists(POINT, min_size=1, max_size=6),
    learnt=st.sampled_from([(0,), (2,), (0, 1), (0, 1, 2)]),
)
def test_who_is_beaten_is_whom_another_dominates(
    points: list[list[float]], others: list[tuple[float, ...]], learnt: tuple[int, ...]
) -> None:
    many = np.repeat(np.array(points)[:, None, :3], 4, axis=1)
    for place in learnt:
        many[:, :, place] = np.array(points)[:, ::-1]
    got = beaten(many, np.array(others), learnt)
    for row, own in zip(got.tolist(), many.tolist(), strict=True):
        for lost, point in zip(row, own, strict=True):
            assert lost == any(
                all(a <= b for a, b in zip(other, point, strict=True)) and list(other) != point
                for other in others
            )

"""What seeds say: intervals against textbook analysis of variance, chances against brute force and known answers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nas import noise
from nas.front import front
from nas.noise import chances, estimates
from storage.records import Axis, LayoutRecord, ResultRecord, TrialRecord

QUALITY = Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False)
RECALL = Axis(name="mqar", maximise=True, low=0.0, high=1.0, log=False)
CACHE = Axis(name="kv_bytes", maximise=False, low=1.0, high=1e9, log=True)
AXES = (QUALITY, CACHE)


def result(quality: float, seed: int = 0) -> ResultRecord:
    return ResultRecord(
        rung=0,
        quality=quality,
        scores={"mqar": quality / 2},
        details={},
        steps=1,
        tokens=1,
        train_s=1.0,
        worker_s=1.0,
        seed=seed,
    )


def trial(number: int, qualities: list[float], kv_bytes: float, **changes: Any) -> TrialRecord:
    first, *others = qualities
    made = TrialRecord(
        number=number,
        state="done",
        origin="search",
        layout=LayoutRecord(key=str(number), text=str(number), layers=()),
        params={},
        sampler_attrs={},
        costs={"kv_bytes": kv_bytes},
        layer_costs=(),
        evaluation_key="",
        attempts=1,
        why="",
        results=(result(first),),
        repeats=tuple(result(quality, seed) for seed, quality in enumerate(others, start=1)),
    )
    return replace(made, **changes)


def test_without_a_second_seed_nothing_is_claimed() -> None:
    trials = [trial(0, [0.5], 10), trial(1, [0.4], 5)]
    assert estimates(trials, QUALITY) == {} and chances(trials, AXES) == {}
    assert estimates([], QUALITY) == {} and chances([], AXES) == {}


def test_intervals_are_those_of_the_analysis_of_variance_while_few_seeds_are_borrowed() -> None:
    seeds = [[0.5, 0.54], [0.3, 0.36, 0.33], [0.42, 0.41], [0.6]]
    trials = [trial(number, values, 10.0) for number, values in enumerate(seeds)]
    found = estimates(trials, QUALITY)
    freedom = sum(len(values) - 1 for values in seeds)
    within = sum(np.var(values) * len(values) for values in seeds) / freedom
    for number, values in enumerate(seeds):
        error = math.sqrt(within / len(values))
        low, high = stats.t.interval(0.95, freedom, loc=np.mean(values), scale=error)
        assert found[number].error == pytest.approx(error)
        assert (found[number].low, found[number].high) == pytest.approx((low, high))
        assert (found[number].seeds, found[number].freedom) == (len(values), freedom)


def test_a_layout_with_many_seeds_of_its_own_stands_by_them() -> None:
    rng = np.random.default_rng(1)
    wild = list(0.5 + 0.1 * rng.standard_normal(60))
    calm = [list(0.5 + 0.001 * rng.standard_normal(6)) for _ in range(10)]
    trials = [trial(number, values, 10.0) for number, values in enumerate([wild, *calm])]
    found = estimates(trials, QUALITY)
    assert found[0].error == pytest.approx(np.std(wild, ddof=1) / math.sqrt(60), rel=0.1)
    assert found[0].freedom == 59 + noise.MOST_BORROWED


def test_scores_end_where_their_scale_ends_and_other_scores_have_their_own_spread() -> None:
    trials = [trial(0, [0.99, 0.95], 10), trial(1, [0.02, 0.0], 5)]
    found = estimates(trials, QUALITY)
    assert found[0].high == 1.0 and found[1].low == 0.0
    assert estimates(trials, RECALL)[0].error == pytest.approx(found[0].error / 2)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(7)
    held = asked = 0
    for _ in range(150):
        truth = rng.uniform(0.3, 0.7, size=6)
        seeds = [
            list(mean + 0.02 * rng.standard_normal(count))
            for mean, count in zip(truth, (3, 3, 2, 1, 1, 1), strict=True)
        ]
        found = estimates([trial(number, own, 10.0) for number, own in enumerate(seeds)], QUALITY)
        held += sum(found[number].low <= truth[number] <= found[number].high for number in range(6))
        asked += 6
    assert 0.93 <= held / asked <= 0.97


def test_chances_of_two_that_cost_the_same_are_those_of_their_difference() -> None:
    # One borrowed degree for each; both means are known alike, so the better one's chance is P(t1 - t2 < gap).
    trials = [trial(0, [0.50, 0.52], 10.0), trial(1, [0.49, 0.51], 10.0)]
    found, error = estimates(trials, QUALITY), estimates(trials, QUALITY)[0].error
    draws = np.random.default_rng(3).standard_t(found[0].freedom, size=(2, 400_000))
    expected = (0.51 + error * draws[0] > 0.50 + error * draws[1]).mean()
    chance = chances(trials, AXES)
    assert chance[0] == pytest.approx(expected, abs=0.03)
    assert chance[0] + chance[1] == pytest.approx(1.0)
    assert chances(trials, AXES) == chance


def test_the_cheapest_stands_on_the_front_whatever_its_seeds_say() -> None:
    trials = [trial(0, [0.1, 0.3], 1.0), trial(1, [0.9, 0.5], 2.0), trial(2, [0.05], 3.0)]
    chance = chances(trials, AXES)
    assert chance[0] == 1.0
    assert 0.9 < chance[1] <= 1.0 and chance[2] < 0.3


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=9)


@given(points)
def test_seeds_that_agree_leave_no_doubt(given_points: list[tuple[int, int, int]]) -> None:
    """Where nothing is unsure, a chance is the front itself: ties and equal layouts too."""
    trials = [
        trial(number, [quality / 8] * count, 10.0 + cost)
        for number, (quality, cost, count) in enumerate(given_points)
    ]
    found = chances(trials, AXES)
    on_front = {one.number for one in front(trials, AXES)}
    if all(count == 1 for _, _, count in given_points):
        assert found == {}
    else:
        assert found == {one.number: float(one.number in on_front) for one in trials}


@settings(max_examples=30)
@given(points, st.integers(0, 3))
def test_what_is_left_out_as_far_away_would_hardly_ever_have_stood_on_the_front(
    given_points: list[tuple[int, int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    trials = [
        trial(number, list(quality / 8 + 0.02 * rng.standard_normal(count + 1)), 10.0 + cost)
        for number, (quality, cost, count) in enumerate(given_points)
    ]
    found = chances(trials, AXES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "FAR", 1e9)
        whole = chances(trials, AXES)
    for number, chance in whole.items():
        # Student's t with few degrees of freedom has long tails.
        assert found[number] == pytest.approx(chance, abs=0.06)


def test_trials_that_did_not_end_well_are_not_asked() -> None:
    trials = [trial(0, [0.5, 0.6], 10.0), trial(1, [0.9, 0.8], 1.0, state="lost")]
    assert chances(trials, AXES) == {0: 1.0}
    assert set(estimates(trials, QUALITY)) == {0}

"""Fronts, what is beaten and by what, and the hypervolume: against definitions spelt out by brute force."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from nas.axes import cost_span
from nas.cli.picture import Seeds, beaten_lines, scatter
from nas.front import beaten, finished, front, hypervolume, row, trial_row, values_of
from nas.noise import Estimate
from storage.records import Axis, LayoutRecord, ResultRecord, State, TrialRecord

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=16.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=2.0**10, high=2.0**14, log=True, unit="bytes"),
)
Make = Callable[..., TrialRecord]


@pytest.fixture(scope="session")
def trial() -> Make:
    def make(
        number: int,
        quality: float | None,
        latency_ms: float,
        kv_bytes: int,
        origin: str = "search",
        state: State = "done",
    ) -> TrialRecord:
        result = None
        if quality is not None:
            result = ResultRecord(
                rung=0, quality=quality, scores={"mqar": quality}, details={}, steps=1, tokens=1,
                train_s=1.0, worker_s=1.0, seed=0,
            )  # fmt: skip
        return TrialRecord(
            number=number, state=state, origin=origin, params={}, sampler_attrs={}, layer_costs=(), attempts=1,
            layout=LayoutRecord(key=str(number), text=f"layout {number}", layers=()), evaluation_key="", why="",
            costs={"latency_ms": latency_ms, "kv_bytes": kv_bytes, "params": 7},
            results=(result,) if result else (),
        )  # fmt: skip

    return make


@pytest.fixture(params=range(5))
def crowd(request: pytest.FixtureRequest, trial: Make) -> list[TrialRecord]:
    """Thirty trials on a coarse grid, so that ties and equal points occur; some did not end well."""
    rng = random.Random(request.param)
    trials = []
    for number in range(30):
        state: State = rng.choice(("done", "done", "done", "unfit", "running"))
        quality = rng.randrange(5) / 4 if state == "done" else None
        origin = rng.choice(("search", "uniform", "mistral"))
        trials.append(
            trial(number, quality, 2.0 ** rng.randrange(5), 2 ** rng.randrange(10, 15), origin, state)
        )
    return trials


def losses(found: TrialRecord) -> tuple[float, ...]:
    quality, latency, cache = values_of(found, AXES)
    return (-quality, latency, cache)


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def test_the_front_is_what_no_other_beats_best_quality_first(crowd: list[TrialRecord]) -> None:
    done = [found for found in crowd if found.state == "done"]
    assert finished(crowd) == done
    expected = [one for one in done if not any(beats(losses(other), losses(one)) for other in done)]
    expected.sort(key=lambda found: (losses(found)[0], found.number))
    assert [found.number for found in front(crowd, AXES)] == [found.number for found in expected]


def test_the_hypervolume_is_the_share_of_the_box_that_is_beaten(crowd: list[TrialRecord]) -> None:
    # All values lie on a grid of quarters of the box, so that cells can be counted.
    scaled = []
    for found in finished(crowd):
        quality, latency, cache = values_of(found, AXES)
        scaled.append((round((1 - quality) * 4), int(latency).bit_length() - 1, int(cache).bit_length() - 11))
    cells = sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in scaled)
        for cell in product(range(4), repeat=3)
    )
    assert hypervolume(crowd, AXES) == pytest.approx(cells / 64)


def test_only_known_layouts_off_the_front_are_beaten_and_by_the_front(crowd: list[TrialRecord]) -> None:
    best = front(crowd, AXES)
    items = beaten(crowd, AXES)
    expected = [found for found in finished(crowd) if found.origin != "search" and found not in best]
    assert [item.trial.number for item in items] == [found.number for found in expected]
    for item in items:
        assert item.by in best
        assert beats(losses(item.by), losses(item.trial))
        loser, winner = values_of(item.trial, AXES), values_of(item.by, AXES)
        assert item.gains == pytest.approx({"quality": winner[0] - loser[0]})
        assert item.cost_ratios == pytest.approx(
            {"latency_ms": winner[1] / loser[1], "kv_bytes": winner[2] / loser[2]}
        )


def test_the_clearest_winner_is_named(trial: Make) -> None:
    loser = trial(0, 0.25, 8.0, 2**13, "uniform")
    a_little, by_far = trial(1, 0.3, 8.0, 2**13), trial(2, 0.25, 1.0, 2**10)
    assert [item.by.number for item in beaten([loser, a_little, by_far], AXES)] == [2]


def test_what_other_seeds_might_undo_is_said_so(trial: Make) -> None:
    loser, winner = trial(0, 0.50, 2.0, 10, "mamba-2"), trial(1, 0.53, 1.0, 10)
    items = beaten([loser, winner], AXES)
    far = Estimate(mean=0.5, error=0.02, freedom=3, seeds=2, low=0.47, high=0.53)
    near = replace(far, low=0.49, high=0.51)
    for estimates, doubted in (
        ({}, False),
        ({0: far, 1: far}, True),
        ({0: near, 1: near}, False),
        ({0: far}, False),
    ):
        (line,) = beaten_lines(items, Seeds(estimates={"quality": estimates}, chances={}))
        assert line.startswith('layout 0 (mamba-2) by "layout 1" (quality +0.030')
        assert ("+0.030 within the spread of seeds, " in line) == doubted


def test_nothing_finished_is_an_empty_front(trial: Make) -> None:
    trials = [trial(0, None, 2.0, 2048, state="unfit"), trial(1, None, 2.0, 2048, state="waiting")]
    assert front(trials, AXES) == [] and beaten(trials, AXES) == []
    assert hypervolume(trials, AXES) == 0.0


def test_better_than_the_box_counts_as_its_edge(trial: Make) -> None:
    assert hypervolume([trial(0, 1.0, 0.5, 1)], AXES) == pytest.approx(1.0)
    assert hypervolume([trial(0, 1.0, 99.0, 2048)], AXES) == 0.0


def test_rows_hold_plain_numbers(trial: Make) -> None:
    assert row(trial(3, 0.5, 2.0, 2048, "kimi-linear")) == {
        "trial": 3,
        "layout": "layout 3",
        "quality": 0.5,
        "latency_ms": 2.0,
        "kv_bytes": 2048,
        "params": 7,
        "scores": {"mqar": 0.5},
        "seeds": 1,
        "origin": "kimi-linear",
    }
    unfit = trial_row(trial(4, None, 2.0, 2048, state="unfit"))
    assert (unfit["state"], unfit["quality"], unfit["scores"], unfit["attempts"]) == ("unfit", None, {}, 1)


def test_the_picture_has_a_place_for_what_costs_nothing(trial: Make) -> None:
    lines = scatter(
        [trial(0, 0.1, 1.0, 0), trial(1, 0.9, 1.0, 4096)], [], ["a", "b"], "kv_bytes"
    ).splitlines()
    drawn = {mark: line.index(mark) for line in lines[1:-2] for mark in "ab" if mark in line}
    assert drawn["a"] < drawn["b"]
    assert lines[-1].strip().startswith("0 B ") and "4 KiB" in lines[-1]
    # Where nothing costs anything there is one place for all.
    assert "0 B" in scatter([trial(0, 0.1, 1.0, 0), trial(1, 0.9, 1.0, 0)], [], ["a", "b"], "kv_bytes")


@pytest.mark.parametrize(
    ("prices", "weights", "span"),
    [
        ([3.0, 5.0], [4, 4], (24.0, 40.0)),
        # A free layer may stand everywhere but in the rarest position.
        ([0.0, 3.0, 5.0], [4, 3], (9.0, 35.0)),
        ([0.0], [4, 4], (1.0, 1.0)),
    ],
)
def test_a_scale_of_costs_is_above_nothing(
    prices: list[float], weights: list[int], span: tuple[float, float]
) -> None:
    assert cost_span(prices, weights) == pytest.approx(span)

"""Who goes on from a rung: ranks, chance, the promise, trust, and what is expected of those that rest."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.prospects import NEAREST
from nas.rungs import TRUST_PAIRS, Ladder, Rules, Standing, crowding
from storage import pareto
from storage.records import Axis

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=1000.0, log=True),
)
RULES = Rules(rungs=2, keep=1 / 3, chance=0.0, trust=0.4, seed=0)


def stands(number: int, cost: float, *qualities: float, heading: int | None = None) -> Standing:
    """A trial that was scored at the first rungs, one after another."""
    values = {rung: (quality, cost) for rung, quality in enumerate(qualities)}
    return Standing(number=number, values=values, heading=heading)


def ladder(standings: Sequence[Standing], rules: Rules = RULES) -> Ladder:
    return Ladder(rules, AXES, [0], standings)


def paired(count: int, gain: float = 0.2, first: int = 100) -> list[Standing]:
    """Trials that went to the end and gained the same on the way, all of them dear."""
    return [
        stands(first + i, 900.0, 0.1 + 0.5 * i / count, 0.1 + 0.5 * i / count, gain + 0.1 + 0.5 * i / count)
        for i in range(count)
    ]


def test_the_best_third_by_rank_goes_on() -> None:
    """Without a promise it is plain successive halving: quality 0.9, 0.8, … at equal cost."""
    rules = replace(RULES, protect=False)
    resting = [stands(i, 10.0, 0.9 - i / 10) for i in range(9)]
    assert ladder(resting, rules).promotable() == [0, 1, 2]
    assert ladder(resting[:2], rules).promotable() == []
    assert ladder(resting[:3], rules).promotable() == [0]


def test_those_that_went_on_already_take_their_places() -> None:
    rules = replace(RULES, protect=False)
    resting = [stands(i, 10.0, 0.9 - i / 10) for i in range(9)]
    resting[0] = stands(0, 10.0, 0.9, 0.95)
    resting[1] = stands(1, 10.0, 0.8, heading=1)
    assert ladder(resting, rules).promotable() == [2]


def test_cost_counts_in_the_rank() -> None:
    rules = replace(RULES, protect=False)
    cheap = stands(7, 1.0, 0.2)
    dear = [stands(i, 100.0, 0.9 - i / 10) for i in range(5)]
    # Only the best of the dear ones and the cheap one are beaten by nobody.
    assert set(ladder([*dear, cheap], rules).promotable()) == {0, 7}


def test_higher_rungs_come_first() -> None:
    rules = replace(RULES, protect=False)
    low = [stands(i, 10.0, 0.9 - i / 10) for i in range(3)]
    high = [stands(10 + i, 10.0, 0.1, 0.5 - i / 10) for i in range(3)]
    assert ladder([*low, *high], rules).promotable() == [10, 0, 1]


def test_ties_are_spread() -> None:
    """Of five that nobody beats, the ends of the front come first, then the one with most room around it."""
    points = [(0.1, 1.0), (0.5, 30.0), (0.51, 31.0), (0.55, 40.0), (0.97, 900.0)]
    rules = replace(RULES, keep=0.6, protect=False)
    resting = [stands(i, cost, quality) for i, (quality, cost) in enumerate(points)]
    assert set(ladder(resting, rules).promotable()) == {0, 4, 3}
    room = crowding(np.array([[0.0, 1.0], [0.1, 0.9], [0.5, 0.5], [1.0, 0.0]]))
    assert room.tolist() == [math.inf, pytest.approx(1.0), pytest.approx(1.8), math.inf]


def test_chance_is_a_draw_by_seed_and_number_alone() -> None:
    drawn = [ladder([], replace(RULES, chance=0.1)).by_chance(number) for number in range(2000)]
    assert 150 < sum(drawn) < 250
    other = [ladder([], replace(RULES, chance=0.1, seed=1)).by_chance(number) for number in range(2000)]
    assert drawn != other
    lucky = drawn.index(True)
    rules = replace(RULES, chance=0.1, protect=False)
    assert ladder([], rules).goal(lucky, -1) == 2
    assert ladder([], rules).goal(drawn.index(False), -1) == 0
    # One that was not known to be lucky, as its study was made by hand, is not left behind.
    assert lucky in ladder([stands(lucky, 900.0, 0.01), *paired(9)], rules).promotable()


def test_until_there_are_pairs_the_first_go_to_the_end() -> None:
    """A promise of one in ten needs nine pairs; those on their way count."""
    resting = [stands(i, 10.0 + i, 0.5) for i in range(20)]
    assert ladder(resting).needed == 9
    assert set(ladder(resting).promotable()) == set(range(9))
    some = [replace(one, heading=2) if one.number < 4 else one for one in resting]
    assert set(ladder(some).promotable()) - {0, 1, 2, 3} >= set(range(4, 9))
    enough = [*paired(9), *(stands(i, 950.0, 0.01) for i in range(20))]
    assert ladder(enough).promotable() == []
    # One that gave no result is waited for no longer.
    failed = [replace(one, over=True) if one.number == 3 else one for one in resting]
    assert 9 in ladder(failed).promotable() and 3 not in ladder(failed).promotable()


def test_without_pairs_anybody_may_join_the_front() -> None:
    few = ladder([*paired(8), stands(0, 950.0, 0.01)])
    assert [part.tolist() for part in few.prospects(0, [(0.01, 950.0)])] == [[1.0], [1.0]]
    assert few.protected() == [0]
    assert ladder([*paired(9), stands(0, 950.0, 0.01)]).protected() == []


def test_a_chance_counts_which_of_the_nearest_gains_would_do() -> None:
    """Those near 0.1 gained from 0 to 0.38, those near 0.6 nothing; the front is one trial of 0.6 at cost 5."""
    gains = [stands(i, 900.0, 0.1, 0.1, 0.1 + i / 100) for i in range(NEAREST)]
    stays = [stands(50 + i, 900.0, 0.6, 0.6, 0.6) for i in range(NEAREST)]
    own = ladder([*gains, *stays, stands(99, 5.0, 0.6, 0.6, 0.6)])
    # At cost 5 it takes a gain of 0.295 or of 0.305; what is cheaper is on the front anyway.
    asked = [(0.305, 5.0), (0.295, 6.0), (0.0, 4.0), (0.55, 7.0), (0.605, 7.0)]
    counted = [9, 8, 39, 0, 39]
    assert own.prospects(0, asked)[0] == pytest.approx([(count + 1) / 40 for count in counted])
    # Nothing is better than the best there is, which equals what has it.
    best = ladder([*(stands(i, 9.0, 0.5, 0.5, 1.0) for i in range(NEAREST))])
    assert best.prospects(0, [(0.9, 9.0), (0.9, 9.1)])[0].tolist() == [1.0, 1 / 40]


def test_several_trained_objectives_gain_together() -> None:
    """One score rose where the other fell: nobody is expected to gain in both."""
    axes = tuple(replace(AXES[0], name=f"score{column}") for column in range(2))
    both = [
        Standing(number=i, values={0: (0.5, 0.5), 1: (0.5 + d, 0.5 - d)})
        for i, d in enumerate([0.3, -0.3] * 10)
    ]
    front = Standing(number=90, values={1: (0.7, 0.7)})
    own = Ladder(replace(RULES, rungs=1), axes, [0, 1], [*both, front])
    assert own.prospects(0, [(0.5, 0.5), (0.3, 0.3), (0.45, 0.75)])[0].tolist() == pytest.approx(
        [1.0, 1 / 21, 1.0]
    )


def test_what_a_trial_may_add_is_the_mean_of_what_the_nearest_gains_would() -> None:
    """The front is one trial of 0.6 at cost 10, which leaves two boxes of a unit square in scores and decades."""
    gains = [stands(i, 900.0, 0.1, 0.1, 0.1 + i / 100) for i in range(NEAREST)]
    own = ladder([*gains, stands(99, 10.0, 0.6, 0.6, 0.6)])
    asked = [(0.34, 10.0), (0.3, 100.0), (0.2, 1.0), (0.0, 900.0)]
    wanted = []
    for score, cost in asked:
        room = 1 - math.log10(cost) / 3
        ends = [score + i / 100 for i in range(NEAREST)]
        # Above the front as wide as its own cost leaves; where it is cheaper, all that it is cheaper by.
        above = [max(0.0, end - 0.6) * min(room, 2 / 3) for end in ends]
        beside = [end * max(0.0, room - 2 / 3) for end in ends]
        wanted.append(float(np.mean(np.add(above, beside))))
    assert own.prospects(0, asked)[1] == pytest.approx(wanted)
    assert wanted[3] == 0.0 < wanted[1]


def test_the_most_are_left_who_together_keep_the_promise() -> None:
    """All gain 0.2, and the best that was trained, at cost 900, ends at 0.69."""
    trained = paired(39)
    best = max(one.values[2][0] for one in trained)
    hopeless = [stands(i, 950.0, best - 0.21) for i in range(10)]
    sure = [stands(10 + i, 890.0, best - 0.1999) for i in range(3)]
    # Ten chances of 1/40 and one of 40/40 are more than one in ten, though what they would add is next to nothing.
    bold = replace(RULES, loss=1.0)
    assert ladder([*trained, *hopeless, *sure], bold).protected() == [10, 11, 12]
    assert ladder([*trained, *hopeless, *sure], replace(bold, risk=0.12)).protected() == [11, 12]
    assert ladder([*trained, *hopeless, *sure], replace(bold, risk=0.12, protect=False)).protected() == []
    # One of many that would add much is too much for the other half of the promise.
    many = [stands(100 + i, 950.0, best - 0.21) for i in range(200, 240)]
    much = stands(0, 1.0, best - 0.2)
    assert ladder([*trained, *many, much], replace(RULES, risk=0.2)).protected() == [0]
    assert ladder([*trained, *many, much], replace(bold, loss=1e9, risk=0.2)).protected() == []
    # Those at higher rungs go first, then who may add most.
    high = stands(90, 950.0, best - 0.19, best - 0.19)
    assert ladder([*trained, *sure, high]).protected()[0] == 90


@given(seed=st.integers(0, 10**6), gains=st.floats(0.05, 0.3), columns=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_the_promise_is_kept(seed: int, gains: float, columns: int) -> None:
    """Of those left behind that are like the pairs, one in ten joins the front, but for the luck of so few draws."""
    rng = np.random.default_rng(seed)
    axes = (*(replace(AXES[0], name=f"score{column}") for column in range(columns)), AXES[1])
    at = rng.uniform(0, 0.5, (500, columns))
    end = np.clip(at + rng.gamma(2.0, gains / 2, (500, columns)), 0, 1)
    cost = np.exp(rng.uniform(0, np.log(1000), (500, 1)))
    first, last = (np.concatenate([scores, cost], axis=1) for scores in (at, end))
    both = [Standing(number=i, values={0: first[i], 1: last[i]}) for i in range(200)]
    resting = [Standing(number=i, values={0: first[i]}) for i in range(200, 500)]
    own = Ladder(replace(RULES, rungs=1), axes, range(columns), [*both, *resting])
    signs = np.array([-1.0] * columns + [1.0])
    left = sorted({one.number for one in resting} - set(own.protected()))
    assert len(left) >= 30
    finals = last[:200] * signs
    joined = [not ((finals <= point).all(1) & (finals < point).any(1)).any() for point in last[left] * signs]
    assert np.mean(joined) <= 0.1 + 2.6 * math.sqrt(0.09 / len(left))


def test_a_rung_that_orders_otherwise_than_the_end_is_not_trusted() -> None:
    def trials(count: int, order: int) -> list[Standing]:
        return [stands(i, 10.0, 0.1 + i / 100, 0.2 + i / 100, 0.5 + order * i / 100) for i in range(count)]

    resting = [stands(90 + i, 950.0, 0.01) for i in range(3)]
    assert ladder([*trials(TRUST_PAIRS, 1), *resting]).trusted == (True, True)
    against = ladder([*trials(TRUST_PAIRS, -1), *resting])
    assert against.trusted == (False, False)
    assert set(against.promotable()) == {90, 91, 92} and against.goal(99, -1) == 2
    assert ladder([*trials(TRUST_PAIRS - 1, -1), *resting]).trusted == (True, True)
    # A rung where all are alike orders nothing.
    flat = [stands(i, 10.0, 0.1, 0.2 + i / 100, 0.5 + i / 100) for i in range(TRUST_PAIRS)]
    assert ladder(flat).trusted == (False, True)
    assert ladder(flat).goal(99, -1) == 1


def test_what_went_on_by_chance_judges_a_rung_where_it_is_enough() -> None:
    rules = replace(RULES, chance=0.5)
    lucky = [number for number in range(200) if ladder([], rules).by_chance(number)]
    others = [number for number in range(200) if number not in lucky]
    agree = [stands(i, 10.0, n / 100, n / 100, 0.5 + n / 1000) for n, i in enumerate(lucky[:TRUST_PAIRS])]
    against = [stands(i, 10.0, n / 100, n / 100, 0.5 - n / 1000) for n, i in enumerate(others[:60])]
    own = ladder([*agree, *against], rules)
    told = own.calibration(0)
    assert told.tau is not None and told.tau < 0 and told.tau_by_chance == 1.0
    assert (told.pairs, told.by_chance, told.trusted) == (TRUST_PAIRS + 60, TRUST_PAIRS, True)
    assert not ladder([*agree[1:], *against], rules).trusted[0]


def test_a_calibration_holds_its_interval() -> None:
    rng = np.random.default_rng(3)
    trials = [
        stands(i, 10.0, x, x, float(np.clip(x + rng.normal(0, 0.1), 0, 1)))
        for i, x in enumerate(rng.random(40))
    ]
    told = ladder(trials).calibration(0)
    assert told.tau is not None and told.low is not None and told.high is not None
    assert -1 <= told.low < told.tau < told.high <= 1 and told.high - told.low > 0.05
    assert told == ladder(trials[::-1]).calibration(0)
    empty = ladder([stands(0, 1.0, 0.3)]).calibration(0)
    assert (empty.pairs, empty.tau, empty.low, empty.trusted) == (0, None, None, True)


def test_what_is_expected_rises_with_the_rung() -> None:
    resting = [(0.05, 5.0), (0.3, 7.0), (0.9, 9.0)]
    assert ladder(paired(8)).expected(0, resting) == [list(values) for values in resting]
    told = ladder(paired(40, gain=0.3)).expected(0, resting)
    assert [cost for _, cost in told] == [5.0, 7.0, 9.0]
    assert told[1][0] == pytest.approx(0.6, abs=0.02)
    assert told[0][0] < told[1][0] < told[2][0] <= 1.0


NUMBERS = st.floats(0, 1, allow_nan=False)


@st.composite
def crowd(draw: st.DrawFn) -> list[Standing]:
    """Any trials at any rungs, some running, some that failed."""
    standings = []
    for number in range(draw(st.integers(0, 30))):
        qualities = draw(st.lists(NUMBERS, max_size=3))
        cost = draw(st.floats(1, 1000))
        one = stands(number, cost, *qualities)
        if len(qualities) < 3 and draw(st.booleans()):
            one = replace(one, heading=draw(st.integers(len(qualities), 2)))
        elif len(qualities) < 3 and draw(st.integers(0, 4)) == 0:
            one = replace(one, over=True)
        standings.append(one)
    return standings


@given(standings=crowd(), seed=st.integers(0, 99), chance=st.floats(0.1, 0.5))
@settings(max_examples=150, deadline=None)
def test_decisions_are_of_those_that_rest_and_of_nothing_but_the_trials(
    standings: list[Standing], seed: int, chance: float
) -> None:
    rules = replace(RULES, chance=chance, seed=seed)
    own = ladder(standings, rules)
    by_number = {one.number: one for one in standings}
    for chosen in (own.promotable(), own.protected()):
        assert len(set(chosen)) == len(chosen)
        rungs = [by_number[number].rung for number in chosen]
        assert rungs == sorted(rungs, reverse=True)
        for number in chosen:
            one = by_number[number]
            assert 0 <= one.rung < 2 and one.heading is None and not one.over
            assert one.rung < own.goal(number, one.rung) <= 2
    shuffled = standings.copy()
    random.Random(seed).shuffle(shuffled)
    again = ladder(shuffled, rules)
    assert (again.promotable(), again.protected()) == (own.promotable(), own.protected())


@given(data=st.data(), seed=st.integers(0, 10**6), noise=st.floats(0, 0.3))
@settings(max_examples=40, deadline=None)
def test_when_all_is_done_those_that_rest_keep_the_promise(
    data: st.DataObject, seed: int, noise: float
) -> None:
    """Whatever the order in which workers return, promotions end, and few of those that rest may join the front."""
    rng = random.Random(seed)
    rules = replace(RULES, chance=0.1, seed=seed)
    truth = [
        (
            rng.uniform(1, 1000),
            sorted(min(1.0, max(0.0, rng.random() + rng.gauss(0, noise))) for _ in range(3)),
        )
        for _ in range(data.draw(st.integers(1, 40)))
    ]
    standings: dict[int, Standing] = {}
    running: list[int] = []
    for _ in range(10_000):
        own = ladder(list(standings.values()), rules)
        chosen = own.promotable() or ([len(standings)] if len(standings) < len(truth) else own.protected())
        if chosen and len(running) < 3:
            number = chosen[0]
            one = standings.get(number, Standing(number=number, values={}))
            standings[number] = replace(one, heading=own.goal(number, one.rung))
            running.append(number)
        elif running:
            number = running.pop(rng.randrange(len(running)))
            one = standings[number]
            cost, curve = truth[number]
            assert one.heading is not None
            values = {rung: (curve[rung], cost) for rung in range(one.heading + 1)}
            standings[number] = Standing(number=number, values=values)
        else:
            break
    else:
        pytest.fail("promotions never end")
    assert len(standings) == len(truth)
    final = ladder(list(standings.values()), rules)
    assert final.promotable() == final.protected() == []
    resting = [one for one in standings.values() if one.rung < 2]
    prospects = [final.prospects(one.rung, [one.values[one.rung]]) for one in resting]
    ends = np.array([one.values[2] for one in standings.values() if one.rung == 2])
    volume = pareto.hypervolume(pareto.losses(AXES, ends)) if len(ends) else 0.0
    assert not resting or np.mean([chance for chance, _ in prospects]) <= rules.risk + 1e-9
    assert sum(float(gain[0]) for _, gain in prospects) <= rules.loss * volume + 1e-9
    assert not any(final.by_chance(one.number) for one in resting)

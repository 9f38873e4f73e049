"""Further seeds of layouts near the front: which, how many, and what becomes of every ending."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nas.cli.output import console
from nas.cli.progress import ProgressWatcher
from nas.config import resolve
from nas.front import front
from nas.plan import make_plan
from nas.prices import LatencyBook
from nas.repeats import Repeat, next_repeat
from nas.samplers.registry import make_sampler
from nas.samplers.sampler import Aim
from nas.search import Ending, Search
from storage.records import Axis, LayoutRecord, ResultRecord, TrialRecord
from storage.store import Store
from trainers.evaluate import Job
from trainers.outcome import Lost, Measured, Outcome, Unfit

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=1e6, log=True, unit="bytes"),
)


def trial(number: int, qualities: list[float], kv_bytes: float, first_seed: int = 0) -> TrialRecord:
    """Finished, with these qualities by seed."""
    results = [
        ResultRecord(
            rung=0,
            quality=quality,
            scores={"mqar": quality},
            details={},
            steps=1,
            tokens=1,
            train_s=1.0,
            worker_s=1.0,
            seed=first_seed + place,
        )
        for place, quality in enumerate(qualities)
    ]
    return TrialRecord(
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
        results=(results[0],),
        repeats=tuple(results[1:]),
    )


def scored(quality: float) -> Measured:
    return Measured(
        quality=quality,
        scores={"mqar": quality},
        metrics={},
        steps=2,
        tokens=128,
        train_s=0.9,
        worker_s=1.0,
    )


def by_seed(number: int, job: Job) -> Outcome:
    """The study's own seed tells by the trial's number; a further one by itself."""
    return scored(0.1 + number / 100 if number >= 0 else 0.3 + job.seed / 100)


@dataclass
class Script:
    """A pool that answers by a function instead of training."""

    answer: Callable[[int, Job], Outcome] = by_seed
    capacity: int = 1
    submitted: list[int] = field(default_factory=list)
    running: deque[tuple[int, Job]] = field(default_factory=deque)

    def submit(self, number: int, job: Job) -> None:
        assert len(self.running) < self.capacity
        assert number not in [other for other, _ in self.running]
        self.submitted.append(number)
        self.running.append((number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        del timeout_s
        outcome = self.answer(*self.running[0])
        return self.running.popleft()[0], outcome

    def stop(self) -> None:
        self.running.clear()


@dataclass
class House:
    """A store with studies, searched as often as a test likes."""

    store: Store
    tiny: Callable[..., dict[str, Any]]

    def search(self, pool: Script, changes: dict[str, Any] | None = None, name: str = "tiny") -> Ending:
        plan = make_plan(resolve(self.tiny(changes)))
        study = self.store.study(name) or self.store.create_study(
            name=name, config={}, config_hash=name, axes=AXES, families={}
        )
        sampler = make_sampler(plan.config.sampler, plan.space, Aim(axes=AXES), seed=0)
        with ProgressWatcher(console(to_stderr=True), total=plan.config.trials, done=0) as watcher:
            return Search(
                plan=plan,
                store=self.store,
                study=study,
                pool=pool,
                sampler=sampler,
                book=LatencyBook(store=self.store, machine=None, device="cpu"),
                watcher=watcher,
            ).run()

    def trials(self, name: str = "tiny") -> list[TrialRecord]:
        study = self.store.study(name)
        assert study is not None
        return self.store.trials(study)

    @property
    def states(self) -> Counter[str]:
        return Counter(one.state for one in self.trials())


@pytest.fixture
def house(url: str, tiny: Callable[..., dict[str, Any]]) -> Iterator[House]:
    with Store.open(url) as store:
        yield House(store, tiny)


def test_the_front_is_repeated_in_turn_until_the_spread_is_known() -> None:
    trials = [trial(0, [0.5], 10.0), trial(1, [0.7], 20.0), trial(2, [0.1], 30.0)]
    first = next_repeat(trials, AXES, most=9)
    assert first == Repeat(1, 1)
    second = next_repeat(trials, AXES, most=9, under_way=[Repeat(1, 1)])
    assert second == Repeat(0, 1)
    assert next_repeat(trials, AXES, most=9, under_way=[Repeat(1, 1), Repeat(0, 1)]) == Repeat(1, 2)
    assert next_repeat(trials, AXES, most=2, under_way=[Repeat(1, 1), Repeat(0, 1)]) is None
    assert next_repeat(trials, AXES, most=1, given_up=[Repeat(1, 1)]) is None
    assert next_repeat(trials, AXES, most=0) is None
    assert next_repeat([], AXES, most=9) is None


def test_then_those_whose_place_is_least_sure() -> None:
    sure = [trial(0, [0.90, 0.91, 0.90], 50.0), trial(1, [0.10, 0.11], 1.0)]
    close = [trial(2, [0.500, 0.505], 10.0), trial(3, [0.501], 10.0)]
    assert next_repeat([*sure, *close], AXES, most=20) == Repeat(3, 1)
    # It is off the front, and may stand on it all the same.
    behind = [trial(2, [0.510, 0.505], 10.0), trial(3, [0.500], 10.0)]
    assert 3 not in {one.number for one in front([*sure, *behind], AXES)}
    assert next_repeat([*sure, *behind], AXES, most=20) == Repeat(3, 1)


def test_a_seed_is_never_given_twice() -> None:
    alone = trial(0, [0.5, 0.6], 10.0)
    assert next_repeat([alone], AXES, most=9) == Repeat(0, 2)
    assert next_repeat([alone], AXES, most=9, under_way=[Repeat(0, 2)], given_up=[Repeat(0, 3)]) == Repeat(
        0, 4
    )
    last = trial(0, [0.5], 10.0, first_seed=2**63 - 1)
    assert next_repeat([last], AXES, most=9) == Repeat(0, 0)


def test_repeats_come_last_and_the_front_is_drawn_by_their_means(house: House) -> None:
    pool = Script(by_seed)
    house.search(pool, {"repeats": 3})
    assert pool.submitted[:6] == [0, 1, 2, 3, 4, 5] and all(number < 0 for number in pool.submitted[6:])
    assert house.states == {"done": 6}
    again = [(one.number, repeat) for one in house.trials() for repeat in one.repeats]
    assert len(again) == 3 and [repeat.seed for _, repeat in again][:1] == [1]
    for one in house.trials():
        seeds = [0.1 + one.number / 100, *(0.3 + repeat.seed / 100 for repeat in one.repeats)]
        assert one.value("quality") == pytest.approx(sum(seeds) / len(seeds))
        assert one.by_seed("quality") == pytest.approx(seeds)


def test_several_workers_share_them_and_never_train_one_twice(house: House) -> None:
    seen: list[tuple[str, int]] = []

    def answer(number: int, job: Job) -> Outcome:
        seen.append((str(job.layers), job.seed))
        return by_seed(number, job)

    house.search(Script(answer, capacity=3), {"repeats": 7})
    assert len(seen) == len(set(seen)) == 13
    assert sum(len(one.repeats) for one in house.trials()) == 7


def test_a_search_that_goes_on_adds_what_is_missing_and_nothing_else(house: House) -> None:
    house.search(Script(by_seed), {"repeats": 2})
    before = house.trials()
    none = Script(by_seed)
    house.search(none, {"repeats": 2})
    assert none.submitted == [] and house.trials() == before
    more = Script(by_seed)
    house.search(more, {"repeats": 5, "trials": 8})
    assert [number for number in more.submitted if number >= 0] == [6, 7]
    assert sum(len(one.repeats) for one in house.trials()) == 5


def test_what_another_study_trained_with_that_seed_is_taken_over(house: House) -> None:
    house.search(Script(), {"trials": 3, "repeats": 2})
    pool = Script()
    house.search(pool, {"trials": 3, "repeats": 2}, name="second")
    assert pool.submitted == []
    wanted = [[repeat.quality for repeat in one.repeats] for one in house.trials()]
    assert [[repeat.quality for repeat in one.repeats] for one in house.trials("second")] == wanted
    assert sum(map(len, wanted)) == 2
    assert all(repeat.details["new_steps"] == 0 for one in house.trials("second") for repeat in one.repeats)


def test_a_seed_that_diverges_scores_nothing(house: House) -> None:
    def answer(number: int, job: Job) -> Outcome:
        return by_seed(number, job) if number >= 0 else Unfit(why="loss is nan at step 7", diverged=True)

    house.search(Script(answer), {"trials": 3, "repeats": 1})
    one = next(one for one in house.trials() if one.repeats)
    assert one.repeats[0].quality == 0.0 and one.repeats[0].scores == {"mqar": 0.0}
    assert one.repeats[0].details == {"unfit": "loss is nan at step 7"}
    assert one.state == "done" and one.value("quality") == pytest.approx((0.1 + one.number / 100) / 2)


def test_a_seed_that_diverged_is_no_result_of_a_study_with_that_seed(house: House) -> None:
    def diverges(number: int, job: Job) -> Outcome:
        return Unfit(why="loss is nan", diverged=True) if job.seed == 1 else by_seed(number, job)

    house.search(Script(diverges), {"trials": 1, "repeats": 1})
    assert [repeat.quality for repeat in house.trials()[0].repeats] == [0.0]
    house.search(Script(diverges), {"trials": 1, "repeats": 0, "seed": 1}, name="second")
    assert [(one.state, one.why) for one in house.trials("second")] == [("unfit", "loss is nan")]


@pytest.mark.parametrize("ending", [Lost(why="the worker died"), Unfit(why="over its time limit")])
def test_a_seed_that_the_machine_lost_is_tried_again_and_then_left(house: House, ending: Outcome) -> None:
    tried: Counter[tuple[str, int]] = Counter()

    def answer(number: int, job: Job) -> Outcome:
        if number >= 0:
            return by_seed(number, job)
        tried[str(job.layers), job.seed] += 1
        return ending if job.seed == 1 else by_seed(number, job)

    house.search(Script(answer), {"trials": 3, "repeats": 2, "attempts": 3})
    assert set(tried.values()) <= {1, 3} and 3 in tried.values()
    assert house.states == {"done": 3}
    assert all(repeat.seed != 1 for one in house.trials() for repeat in one.repeats)


def test_an_interrupted_seed_is_simply_trained_later(house: House) -> None:
    def interrupt(number: int, job: Job) -> Outcome:
        if number < 0:
            raise KeyboardInterrupt
        return by_seed(number, job)

    assert house.search(Script(interrupt), {"repeats": 1}).interrupted
    assert house.states == {"done": 6} and not any(one.repeats for one in house.trials())
    house.search(Script(by_seed), {"repeats": 1})
    assert sum(len(one.repeats) for one in house.trials()) == 1


def test_the_front_is_printed_with_intervals_and_chances(
    run: Callable[..., Any], config_file: Callable[..., str], url: str
) -> None:
    path = config_file({"trials": 4, "repeats": 0})
    said = run("search", "--config", path, "--storage", url)
    assert said.code == 0 and "one seed each" in said.out and "95 % interval" not in said.out
    rows = run("front", "--study", "tiny", "--storage", url, "--json").json
    assert all(row["quality_interval"] is None and row["front_probability"] is None for row in rows)
    assert all(row["seeds"] == 1 for row in rows)
    said = run("search", "--config", path, "--storage", url, "--repeats", "3")
    assert said.code == 0 and "95 % interval" in said.out and "one seed each" not in said.out
    assert said.err.count("\nseed ") == 3 and "3 trainings with new seeds" in said.err
    rows = run("front", "--study", "tiny", "--storage", url, "--json").json
    assert all(0 <= row["front_probability"] <= 1 for row in rows)
    for row in rows:
        low, high = row["quality_interval"]
        assert low <= row["quality"] <= high
    trials = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert sum(one["seeds"] - 1 for one in trials) == 3
    repeated = next(one["trial"] for one in trials if one["seeds"] > 1)
    shown = run("show", repeated, "--study", "tiny", "--storage", url)
    assert "seeds: " in shown.out and "(seed 0)" in shown.out and "(seed 1)" in shown.out
    stored = run("show", repeated, "--study", "tiny", "--storage", url, "--json").json
    assert stored["repeats"][0]["seed"] == 1


def test_a_number_of_repeats_below_nought_is_refused(refused: Callable[..., str], url: str) -> None:
    assert "repeats" in refused("search", "--storage", url, "--repeats", "-1")

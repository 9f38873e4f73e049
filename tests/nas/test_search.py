"""The search loop: one writer, each layout trained once, every ending written down, and a search that can be cut anywhere."""

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from nas.cli.output import console
from nas.cli.progress import ProgressWatcher
from nas.config import hash_of, resolve
from nas.front import front
from nas.plan import make_plan
from nas.prices import LatencyBook
from nas.samplers.optuna_sampler import OptunaSampler
from nas.samplers.registry import make_sampler
from nas.samplers.sampler import Aim
from nas.search import Ending, Search
from nas.stopping import Stopped
from nas.workers.inline import InlinePool
from storage.records import Axis, TrialRecord
from storage.store import Store
from trainers.evaluate import Job
from trainers.outcome import Lost, Measured, Outcome, Unfit

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=20.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=1e3, high=1e6, log=True, unit="bytes"),
)
Answer = Callable[[int, Job], Outcome]


def measured(number: int, _job: Job) -> Outcome:
    return Measured(
        quality=0.1 + number / 100,
        scores={"mqar": 0.1 + number / 100},
        metrics={"mqar_accuracy_4": 0.2},
        steps=2,
        tokens=128,
        train_s=0.9,
        worker_s=1.0,
    )


@dataclass
class Script:
    """A pool that answers by a function instead of training."""

    answer: Answer = measured
    capacity: int = 1
    submitted: list[int] = field(default_factory=list)
    running: deque[tuple[int, Job]] = field(default_factory=deque)
    stopped: bool = False

    def submit(self, number: int, job: Job) -> None:
        assert len(self.running) < self.capacity
        self.submitted.append(number)
        self.running.append((number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        del timeout_s
        if not self.running:
            return None
        outcome = self.answer(*self.running[0])
        return self.running.popleft()[0], outcome

    def stop(self) -> None:
        self.running.clear()
        self.stopped = True


@dataclass
class House:
    """A store with one study, searched as often as a test likes."""

    store: Store
    tiny: Callable[..., dict[str, Any]]

    def search(self, pool: Script, changes: dict[str, Any] | None = None) -> Ending:
        plan = make_plan(resolve(self.tiny(changes)))
        study = self.store.study("tiny") or self.store.create_study(
            name="tiny", config={}, config_hash=hash_of({}), axes=AXES, families={}
        )
        sampler = make_sampler(plan.config.sampler, plan.space, Aim(axes=AXES), seed=0)
        with ProgressWatcher(console(to_stderr=True), total=plan.config.trials, done=0) as watcher:
            self.last = Search(
                plan=plan,
                store=self.store,
                study=study,
                pool=pool,
                sampler=sampler,
                book=LatencyBook(store=self.store, machine=None, device="cpu"),
                watcher=watcher,
            )
            return self.last.run()

    @property
    def trials(self) -> list[TrialRecord]:
        study = self.store.study("tiny")
        assert study is not None
        return self.store.trials(study)

    @property
    def states(self) -> Counter[str]:
        return Counter(trial.state for trial in self.trials)


@pytest.fixture
def house(url: str, tiny: Callable[..., dict[str, Any]]) -> Iterator[House]:
    with Store.open(url) as store:
        yield House(store, tiny)


def test_every_trial_is_run_once_and_written_down(house: House) -> None:
    pool = Script()
    ending = house.search(pool)
    assert ending == Ending(interrupted=False, exhausted=False, skipped=0)
    assert pool.submitted == [0, 1, 2, 3, 4, 5]
    assert [trial.state for trial in house.trials] == ["done"] * 6
    assert len({trial.layout.key for trial in house.trials}) == 6
    assert [trial.attempts for trial in house.trials] == [1] * 6
    for trial in house.trials:
        assert trial.result is not None
        assert trial.result.quality == pytest.approx(0.1 + trial.number / 100)
        assert trial.result.details["metrics"] == {"mqar_accuracy_4": 0.2}


def test_the_starts_know_their_origin_and_presets_are_every_fifth(house: House) -> None:
    house.search(Script(), {"trials": 14, "space": {"settings": {"full": {"kv_heads": [1, 2]}}}})
    origins = [trial.origin for trial in house.trials]
    texts = [trial.layout.text for trial in house.trials]
    assert texts[:3] == ["2*full", "2*window", "2*kda"] and origins[:3] == ["uniform"] * 3
    presets = [start.origin for start in house.last.plan.starts if start.origin != "uniform"]
    assert len(presets) > 2 and [origins[5], origins[10]] == presets[:2]
    assert {*origins[3:5], *origins[6:10], *origins[11:]} == {"search"}


def test_the_front_is_also_run_end_to_end(house: House, latencies: Any) -> None:
    house.search(Script())
    on_front = {trial.number for trial in front(house.trials, AXES)}
    for trial in house.trials:
        assert ("latency_ms_whole" in trial.costs) == (trial.number in on_front)
        if trial.number in on_front:
            assert trial.costs["latency_ms_whole"] == pytest.approx(1.1 * trial.costs["latency_ms"])
    measured_once = [text for text in latencies.asked if text.startswith("whole")]
    assert len(measured_once) == len(set(measured_once)) == len(on_front)


def test_as_many_run_together_as_the_pool_holds(house: House) -> None:
    most = 0

    def answer(number: int, job: Job) -> Outcome:
        nonlocal most
        most = max(most, len(pool.running))
        return measured(number, job)

    pool = Script(answer, capacity=3)
    house.search(pool)
    assert most == 3 and house.states == {"done": 6}


def test_going_on_trains_only_what_is_new(house: House) -> None:
    house.search(Script(), {"trials": 4})
    before = house.trials
    more = Script()
    house.search(more, {"trials": 7})
    assert more.submitted == [4, 5, 6]
    assert [trial.layout for trial in house.trials[:4]] == [trial.layout for trial in before]
    none = Script()
    house.search(none, {"trials": 7})
    assert none.submitted == []


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_search_in_two_parts_proposes_what_one_in_one_part_does(
    house: House, tiny: Callable[..., dict[str, Any]], sampler: str
) -> None:
    space = {"space": {"layers": 4}, "sampler": sampler}
    house.search(Script(), space | {"trials": 14})
    house.search(Script(), space | {"trials": 20})
    with Store.open("sqlite://") as other:
        whole = House(other, tiny)
        whole.search(Script(), space | {"trials": 20})
        assert [trial.layout.text for trial in whole.trials] == [trial.layout.text for trial in house.trials]


def test_fault_11_nan_loss_is_told_to_the_sampler_and_the_search_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int, job: Job) -> Outcome:
        return Unfit(why="the loss is nan at step 3") if number in (1, 4) else measured(number, job)

    told: list[tuple[int, bool]] = []
    real = OptunaSampler.tell

    def telling(sampler: OptunaSampler, token: int, values: list[float] | None) -> None:
        told.append((token, values is not None))
        real(sampler, token, values)

    monkeypatch.setattr(OptunaSampler, "tell", telling)
    house.search(Script(answer))
    tokens = house.last.memory.tokens
    assert told == [(tokens[number], number not in (1, 4)) for number in range(6)]
    assert house.states == {"done": 4, "unfit": 2}
    assert house.trials[1].why == "the loss is nan at step 3"
    assert house.trials[1].result is None and house.trials[1].attempts == 1
    assert not {1, 4} & {trial.number for trial in front(house.trials, AXES)}


def test_a_lost_trial_is_tried_again_and_counted_once(house: House) -> None:
    lost = Counter[int]()

    def answer(number: int, job: Job) -> Outcome:
        lost[number] += 1
        return Lost(why="the worker died") if number == 2 and lost[number] < 3 else measured(number, job)

    pool = Script(answer, capacity=2)
    house.search(pool)
    assert Counter(pool.submitted) == {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 1}
    assert house.states == {"done": 6}
    assert house.trials[2].attempts == 3 and len(house.trials[2].results) == 1


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_trial_that_is_always_lost_is_given_up_after_its_attempts(house: House, attempts: int) -> None:
    def answer(number: int, job: Job) -> Outcome:
        return Lost(why="the worker died: signal 11") if number == 1 else measured(number, job)

    pool = Script(answer)
    house.search(pool, {"attempts": attempts})
    assert pool.submitted.count(1) == attempts
    assert house.states == {"done": 5, "lost": 1}
    assert (house.trials[1].attempts, house.trials[1].why) == (attempts, "the worker died: signal 11")
    again = Script()
    house.search(again, {"attempts": attempts})
    assert again.submitted == []


def test_a_space_that_is_used_up_ends_the_search_and_says_so(house: House) -> None:
    ending = house.search(Script(), {"trials": 500})
    assert ending.exhausted and not ending.interrupted
    space = house.last.plan.space
    inside = [trial for trial in house.trials if space.params_of(_layout(trial)) is not None]
    assert len(inside) == house.last.plan.size.count
    assert len({trial.layout.key for trial in house.trials}) == len(house.trials)


def test_a_lost_trial_is_tried_again_even_when_the_space_is_used_up(house: House) -> None:
    tries = Counter[int]()

    def answer(number: int, job: Job) -> Outcome:
        tries[number] += 1
        # The last ones, which come back when nothing else is left to propose.
        return Lost(why="gone") if number >= 10 and tries[number] == 1 else measured(number, job)

    house.search(Script(answer, capacity=4), {"trials": 500})
    assert set(house.states) == {"done"}
    late = [count for number, count in tries.items() if number >= 10]
    # One whose proxy is that of another layout may find the answer there.
    assert late.count(2) >= 3 and set(late) <= {1, 2}


def _layout(trial: TrialRecord) -> Any:
    from search_space.layout import from_json

    return from_json(trial.layout.layers)


def test_proposals_against_the_constraints_are_skipped_not_trained(house: House) -> None:
    changes = {"trials": 12, "space": {"layers": 3, "constraints": ["full>=2", "window<=1"]}}
    ending = house.search(Script(), changes)
    assert ending.skipped > 0
    for trial in house.trials:
        assert house.last.plan.space.why_not(_layout(trial)) is None


def test_fault_16_a_result_of_another_study_is_taken_over_and_not_trained(house: House) -> None:
    house.search(Script())
    other = house.store.create_study(name="b", config={}, config_hash="", axes=AXES, families={})
    pool = Script()
    last = house.last
    sampler = make_sampler("random", last.plan.space, Aim(axes=AXES), seed=0)
    with ProgressWatcher(console(to_stderr=True), total=6, done=0) as watcher:
        Search(
            plan=last.plan, store=house.store, study=other, pool=pool, sampler=sampler, book=last.book,
            watcher=watcher,
        ).run()  # fmt: skip
    assert pool.submitted == []
    taken = house.store.trials(other)
    for trial, first in zip(taken, house.trials, strict=True):
        assert trial.result is not None and first.result is not None
        # The steps were trained there, and are counted there.
        details = {**first.result.details, "new_steps": 0}
        assert trial.result == replace(first.result, details=details)
    assert [trial.state for trial in taken] == ["done"] * 6


def test_a_bug_is_raised_and_its_trial_waits_for_the_next_run(house: House) -> None:
    def answer(number: int, job: Job) -> Outcome:
        if number == 2:
            raise ZeroDivisionError("a bug")
        return measured(number, job)

    with pytest.raises(ZeroDivisionError):
        house.search(Script(answer))
    assert house.states == {"done": 2, "running": 1}
    pool = Script()
    house.search(pool)
    assert pool.submitted == [2, 3, 4, 5] and house.states == {"done": 6}
    assert house.trials[2].attempts == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["quality", "scores", "train_s"])
def test_fault_12_infinite_objective_of_a_worker_is_rejected_before_the_commit(
    house: House, bad: float, part: str
) -> None:
    def answer(number: int, job: Job) -> Outcome:
        good = measured(number, job)
        assert isinstance(good, Measured)
        spoilt = {"scores": {"mqar": bad}} if part == "scores" else {part: bad}
        return Measured(**{**vars(good), **spoilt}) if number == 2 else good

    with pytest.raises(ValueError, match=rf"{part}.* is -?(nan|inf): only finite"):
        house.search(Script(answer))
    assert house.states == {"done": 2, "running": 1}
    assert {trial.number for trial in front(house.trials, AXES)} <= {0, 1}
    house.search(Script())
    assert house.states == {"done": 6} and house.trials[2].attempts == 2


def signals_at(number: int, *signals: signal.Signals) -> Answer:
    def answer(trial: int, job: Job) -> Outcome:
        if trial == number:
            for sent in signals:
                os.kill(os.getpid(), sent)
        return measured(trial, job)

    return answer


def test_the_first_interrupt_lets_what_runs_end(house: House) -> None:
    pool = Script(signals_at(2, signal.SIGINT), capacity=2)
    assert house.search(pool).interrupted
    assert not pool.stopped
    assert house.states == {"done": 4}
    rest = Script()
    house.search(rest)
    assert rest.submitted == [4, 5] and house.states == {"done": 6}


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_the_second_interrupt_or_a_termination_stops_at_once(
    house: House, signals: tuple[signal.Signals, ...]
) -> None:
    pool = Script(signals_at(2, *signals), capacity=2)
    assert house.search(pool).interrupted
    assert pool.stopped
    assert house.states == {"done": 2, "waiting": 2}
    rest = Script()
    house.search(rest)
    assert rest.submitted == [2, 3, 4, 5] and house.states == {"done": 6}


def test_a_termination_that_compiled_code_hides_stops_at_once_too(house: House) -> None:
    """Ray's wait makes a SystemError of what a signal raises in it; one that no signal asked for is a bug."""

    def hidden(number: int, job: Job) -> Outcome:
        try:
            return signals_at(2, signal.SIGTERM)(number, job)
        except Stopped:
            raise SystemError("returned a result with an exception set") from None

    pool = Script(hidden, capacity=2)
    assert house.search(pool).interrupted
    assert pool.stopped and house.states == {"done": 2, "waiting": 2}

    def broken(_number: int, _job: Job) -> Outcome:
        raise SystemError("of its own")

    with pytest.raises(SystemError, match="of its own"):
        house.search(Script(broken))


def test_further_signals_do_not_break_into_the_putting_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = Store.fail_trial

    def impatient(self: Store, *arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return put_back(self, *arguments)

    monkeypatch.setattr(Store, "fail_trial", impatient)
    pool = Script(signals_at(1, signal.SIGINT, signal.SIGINT), capacity=2)
    assert house.search(pool).interrupted
    assert house.states == {"done": 1, "waiting": 2}


def test_signals_are_the_callers_own_again_afterwards(house: House) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    house.search(Script(signals_at(1, signal.SIGINT)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_every_rung_on_the_way_is_written_down(house: House) -> None:
    rungs = {"shares": [0.25, 0.5], "keep": 1}
    house.search(InlinePool(), {"rungs": rungs, "trials": 2, "tasks": {"mqar": {"steps": 4, "batch": 4}}})
    for trial in house.trials:
        assert trial.state == "done" and trial.result is not None and trial.result.rung == 2
        assert [result.rung for result in trial.results] == [0, 1, 2]
        assert [result.steps for result in trial.results] == [1, 2, 4]
        assert all(0 <= result.quality <= 1 and result.details["metrics"] for result in trial.results)


def test_a_study_without_rungs_answers_one_that_has_them(house: House) -> None:
    house.search(Script(), {"trials": 3})
    study = house.store.study("tiny")
    assert study is not None
    first = house.trials[0]
    other = house.store.create_study(name="b", config={}, config_hash="b", axes=AXES, families={})
    plan = make_plan(resolve(house.tiny({"trials": 1, "rungs": {"shares": [0.5], "keep": 1}})))
    assert plan.evaluation_key(plan.starts[0].layout) == first.evaluation_key
    sampler = make_sampler("random", plan.space, Aim(axes=AXES), seed=0)
    pool = Script()
    with ProgressWatcher(console(to_stderr=True), total=1, done=0) as watcher:
        book = LatencyBook(store=house.store, machine=None, device="cpu")
        Search(
            plan=plan, store=house.store, study=other, pool=pool, sampler=sampler, book=book, watcher=watcher
        ).run()
    assert pool.submitted == []
    (reused,) = house.store.trials(other)
    assert first.result is not None
    details = {**first.result.details, "new_steps": 0}
    assert reused.state == "done" and reused.result == replace(first.result, rung=1, details=details)


def test_fault_27_a_clock_that_steps_back_makes_no_duration_negative(
    run: Callable[..., Any], config_file: Callable[..., str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = count()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(hours))
    assert run("search", "--config", config_file({"trials": 3}), "--storage", url).code == 0
    with Store.open(url, read_only=True) as store:
        (study,) = store.studies()
        for trial in store.trials(study):
            assert trial.result is not None
            assert 0 < trial.result.train_s <= trial.result.worker_s < 60
            assert trial.started_at is not None and trial.ended_at is not None
            assert (
                trial.created_at <= trial.started_at <= trial.ended_at
            )  # the database's clock, which stood still

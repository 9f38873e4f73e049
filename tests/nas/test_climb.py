"""Searches that stop trials at rungs: who rests, who goes on and from what, and that an interruption changes nothing."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nas.cli.output import console
from nas.cli.progress import ProgressWatcher
from nas.climb import Climb, climb_of, folder_of, ladder_of, rules_of
from nas.config import of_study, resolve
from nas.front import front
from nas.plan import make_plan
from nas.prices import LatencyBook
from nas.samplers.registry import SAMPLERS, make_sampler
from nas.samplers.sampler import Aim
from nas.search import Ending, Search
from nas.workers.inline import InlinePool
from search_space.layout import from_json
from storage.records import Axis, TrialRecord
from storage.store import Store
from trainers.evaluate import Job, evaluate
from trainers.outcome import Lost, Measured, Outcome, Unfit

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=20.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=1e3, high=1e6, log=True, unit="bytes"),
)
TRIALS = 40
RUNGS: dict[str, Any] = {
    "rungs": {"shares": [0.1, 0.4], "keep": 0.34},
    "space": {"layers": 3},
    "trials": TRIALS,
    "tasks": {"mqar": {"steps": 10, "batch": 4}},
}


def curve(job: Job, rung: int) -> float:
    """A made-up score that rises with the rung, more for layouts with much full attention."""
    layers = [branch["mixer"] for layer in job.layers for branch in layer["branches"]]
    level = 0.2 + 0.2 * layers.count("full") + 0.05 * layers.count("kda")
    return level * (0.3, 0.6, 1.0)[rung]


def score(job: Job, rung: int, first: int) -> Measured:
    steps = {-1: 0} | {place: job.budget.steps_at(job.budget.tasks[0], place) for place in range(3)}
    quality = curve(job, rung)
    return Measured(
        quality=quality,
        scores={"mqar": quality},
        metrics={},
        steps=steps[rung],
        tokens=64 * steps[rung],
        train_s=0.9,
        worker_s=1.0,
        rung=rung,
        trained_steps=steps[rung] - steps[first - 1],
    )


def answer(_number: int, job: Job) -> Outcome:
    """What a worker would return that has every checkpoint it needs."""
    first = 0 if job.start is None else job.start + 1
    whole = score(job, job.goal, first)
    return replace(whole, rungs=tuple(score(job, rung, first) for rung in range(first, job.goal)))


@dataclass
class Script:
    """A pool that answers by a function, the oldest job first, and writes down what it was asked."""

    answer: Callable[[int, Job], Outcome] = answer
    capacity: int = 1
    asked: list[tuple[int, int | None, int]] = field(default_factory=list)
    """Trial, the rung it went on from, and the rung it was sent to."""
    running: deque[tuple[int, Job]] = field(default_factory=deque)

    def submit(self, number: int, job: Job) -> None:
        assert number not in [other for other, _ in self.running]
        self.asked.append((number, job.start, job.goal))
        self.running.append((number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        del timeout_s
        if not self.running:
            return None
        outcome = self.answer(*self.running[0])
        return self.running.popleft()[0], outcome

    def stop(self) -> None:
        self.running.clear()


@dataclass
class House:
    """A database with one study, searched as often as a test likes."""

    url: str
    tiny: Callable[..., dict[str, Any]]
    store: Store

    def search(self, pool: Any, changes: dict[str, Any] | None = None) -> Ending:
        plan = make_plan(resolve(self.tiny(RUNGS), {"storage": self.url, **(changes or {})}))
        study = self.store.study("tiny") or self.store.create_study(
            name="tiny", config=plan.config.model_dump(mode="json"), config_hash="", axes=AXES, families={}
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
                climb=climb_of(plan, study),
            )
            return self.last.run()

    @property
    def climb(self) -> Climb:
        assert self.last.climb is not None
        return self.last.climb

    @property
    def trials(self) -> list[TrialRecord]:
        study = self.store.study("tiny")
        assert study is not None
        return self.store.trials(study)

    def facts(self) -> list[Any]:
        """What must not depend on how often a search was cut off."""
        return [
            (
                trial.number,
                trial.layout.text,
                trial.state,
                [(r.rung, r.quality, r.steps) for r in trial.results],
            )
            for trial in self.trials
        ]


@pytest.fixture
def make_house(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> Iterator[Callable[[str], House]]:
    stores = []

    def make(name: str) -> House:
        url = f"sqlite:///{tmp_path}/{name}.db"
        stores.append(Store.open(url))
        return House(url, tiny, stores[-1])

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def house(make_house: Callable[[str], House]) -> House:
    return make_house("one")


def test_some_rest_some_go_on_and_only_those_at_the_end_are_on_the_front(house: House) -> None:
    pool = Script()
    ending = house.search(pool)
    assert ending == Ending(interrupted=False, exhausted=False, skipped=0)
    trials = house.trials
    assert len(trials) == TRIALS and {trial.state for trial in trials} == {"done", "pruned"}
    stopped = [trial for trial in trials if trial.state == "pruned"]
    assert 5 <= len(stopped) <= 25
    for trial in trials:
        reached = trial.results[-1].rung
        assert (reached == 2) == (trial.state == "done")
        taken_over = trial.results[-1].details["new_steps"] == 0
        assert taken_over or [result.rung for result in trial.results] == list(range(reached + 1))
    assert {trial.state for trial in front(trials, AXES)} == {"done"}
    # Everybody begins at the beginning, and goes on from where it was.
    for number in range(TRIALS):
        steps = [(start, goal) for asked, start, goal in pool.asked if asked == number]
        assert not steps or steps[0][0] is None
        assert [start for start, _ in steps[1:]] == [goal for _, goal in steps[:-1]]


def test_whoever_would_be_on_the_front_got_to_its_end(house: House) -> None:
    """The made-up curves gain alike, so that the bound can be met exactly."""
    house.search(Script())
    truth = {
        trial.number: (
            -curve(house.last.plan.job(from_json(trial.layout.layers)), 2),
            trial.costs["latency_ms"],
            trial.costs["kv_bytes"],
        )
        for trial in house.trials
    }
    for trial in house.trials:
        beaten = [
            other
            for other in truth.values()
            if other != truth[trial.number]
            and all(one <= two for one, two in zip(other, truth[trial.number], strict=True))
        ]
        assert trial.state == "done" or beaten


def test_the_steps_are_counted_once(house: House) -> None:
    house.search(Script())
    for trial in house.trials:
        if trial.results[-1].details["new_steps"] == 0:
            continue
        # One, four and ten steps.
        expected = {1: [1], 2: [1, 3], 3: [1, 3, 6]}[len(trial.results)]
        assert [result.details["new_steps"] for result in trial.results] == expected
        assert [result.steps for result in trial.results] == [1, 4, 10][: len(trial.results)]


def test_those_that_chance_chose_go_to_the_end_at_once(house: House) -> None:
    pool = Script()
    house.search(pool, {"rungs": {"shares": [0.1, 0.4], "keep": 0.34, "chance": 0.5}})
    lucky = {number for number in range(TRIALS) if house.climb.ladder.by_chance(number)}
    assert len(lucky) > 8
    asked = [(start, goal) for number, start, goal in pool.asked if number in lucky]
    assert len(asked) > 5 and set(asked) == {(None, 2)}
    assert all(trial.state == "done" for trial in house.trials if trial.number in lucky)


@pytest.mark.parametrize(("sampler", "every"), [("random", 2), ("tpe", 7)])
def test_a_search_that_is_cut_off_again_and_again_decides_as_one_that_is_not(
    make_house: Callable[[str], House], sampler: str, every: int
) -> None:
    whole, parts = make_house("whole"), make_house("parts")
    changes = {"sampler": sampler, "trials": 20}
    steady = Script()
    whole.search(steady, changes)
    asked: list[Any] = []
    for _ in range(400):
        count = 0

        def cut(number: int, job: Job) -> Outcome:
            nonlocal count
            count += 1
            if count > every:
                raise KeyboardInterrupt
            return answer(number, job)

        pool = Script(cut)
        ending = parts.search(pool, changes)
        # What was cut off was asked in vain, and is asked again.
        asked += pool.asked[:-1] if ending.interrupted else pool.asked
        if not ending.interrupted:
            break
    else:
        pytest.fail("it never ended")
    assert asked == steady.asked
    assert parts.facts() == whole.facts()


def test_going_on_with_more_trials_may_bring_back_what_rests(house: House) -> None:
    house.search(Script())
    resting = {trial.number for trial in house.trials if trial.state == "pruned"}
    nothing = Script()
    house.search(nothing)
    assert nothing.asked == []
    more = Script()
    house.search(more, {"trials": 60})
    assert len(house.trials) == 60
    back = {number for number, start, _ in more.asked if number in resting and start is not None}
    assert all(trial.results[-1].rung >= 1 for trial in house.trials if trial.number in back)


def test_what_is_lost_at_a_higher_rung_goes_on_from_where_it_was(house: House) -> None:
    lost: list[int] = []

    def stumble(number: int, job: Job) -> Outcome:
        if job.start == 0 and number not in lost:
            lost.append(number)
            return Lost(why="the worker died")
        return answer(number, job)

    pool = Script(stumble, capacity=2)
    # One attempt at each rung is not enough, two are: what brought a result is not counted.
    house.search(pool, {"attempts": 2})
    assert lost and {trial.state for trial in house.trials} == {"done", "pruned"}
    for number in lost:
        assert [start for asked, start, _ in pool.asked if asked == number].count(0) == 2


def test_what_is_always_lost_there_is_given_up(house: House) -> None:
    def stumble(number: int, job: Job) -> Outcome:
        return Lost(why="signal 11") if number == 1 and job.start == 0 else answer(number, job)

    pool = Script(stumble)
    house.search(pool, {"attempts": 3})
    trial = house.trials[1]
    assert (trial.state, trial.why, len(trial.results)) == ("lost", "signal 11", 1)
    assert [start for asked, start, _ in pool.asked if asked == 1] == [None, 0, 0, 0]
    again = Script()
    house.search(again)
    assert again.asked == []


def test_what_is_unfit_at_a_higher_rung_is_over(house: House) -> None:
    def diverge(number: int, job: Job) -> Outcome:
        return Unfit(why="the loss is nan") if job.start is not None and number % 2 else answer(number, job)

    pool = Script(diverge, capacity=3)
    house.search(pool)
    unfit = [trial for trial in house.trials if trial.state == "unfit"]
    assert unfit and all(trial.results for trial in unfit)
    assert len(pool.asked) == len(set(pool.asked))


def test_the_sampler_is_told_what_is_expected_and_then_what_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, list[Any]] = {}
    from nas.samplers.optuna_sampler import OptunaSampler

    real = OptunaSampler.tell

    def watch(self: OptunaSampler, token: int, values: Any) -> None:
        told.setdefault(token, []).append(values)
        real(self, token, values)

    monkeypatch.setattr(OptunaSampler, "tell", watch)
    house.search(Script(), {"sampler": "tpe"})
    tokens = house.last.memory.tokens
    expected = house.climb.expected()
    for trial in house.trials:
        last = told[tokens[trial.number]][-1] if tokens[trial.number] >= 0 else None
        if last is None:
            continue
        if trial.state == "done":
            assert trial.result is not None
            assert last == [trial.result.quality, trial.costs["latency_ms"], trial.costs["kv_bytes"]]
        else:
            assert last[1:] == [trial.costs["latency_ms"], trial.costs["kv_bytes"]]
            # Once there are pairs, more is expected of it than it showed at its rung.
            assert trial.result is not None and trial.result.quality < expected[trial.number][0] <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_what_rests(house: House, name: str) -> None:
    # Optuna's Gaussian process takes seconds for a proposal with three objectives.
    count = 12 if name == "gp" else TRIALS
    house.search(Script(), {"sampler": name, "trials": count})
    assert len(house.trials) == count


def test_a_rung_that_says_nothing_stops_nobody_and_that_is_said(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    def upside_down(number: int, job: Job) -> Outcome:
        outcome = answer(number, job)
        assert isinstance(outcome, Measured)
        lower = tuple(
            replace(one, quality=1 - one.quality) if one.rung == 0 else one for one in outcome.rungs
        )
        turned = 1 - outcome.quality if outcome.rung == 0 else outcome.quality
        return replace(outcome, quality=turned, rungs=lower)

    house.search(Script(upside_down))
    assert not house.climb.ladder.trusted[0]
    assert all(trial.results[-1].rung >= 1 for trial in house.trials)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the rung at 10 % of the steps says too little of the end") == 1
    study = house.store.study("tiny")
    assert study is not None
    logged = [event for event in house.store.events(study=study) if event.kind == "rungs_calibrated"]
    assert len(logged) >= 2
    assert logged[-1].payload["rungs"][0]["trusted"] is False and logged[-1].payload["rungs"][0]["tau"] < 0
    house.search(Script(upside_down), {"trials": 32})
    assert "says too little" not in capsys.readouterr().err


REAL: dict[str, Any] = {"trials": 12}


def test_a_real_search_rests_in_checkpoints_and_leaves_none(house: House, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(InlinePool):
        def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
            seen.append(len(list(tmp_path.glob("one.db.checkpoints-tiny-*/*.safetensors"))))
            return super().next_done(timeout_s)

    house.search(Watched(), REAL)
    assert max(seen) >= 1
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir() if path.is_dir()) == []
    assert max(trial.attempts for trial in house.trials) == 3
    for trial in house.trials:
        assert not any("restarted" in result.details for result in trial.results)
        if trial.number % 3 and trial.state == "done":
            continue
        job = house.last.plan.job(from_json(trial.layout.layers))
        whole = evaluate(job)
        assert isinstance(whole, Measured)
        every = (*whole.rungs, whole)
        assert [result.quality for result in trial.results] == [every[r.rung].quality for r in trial.results]


def test_a_checkpoint_that_is_gone_costs_steps_and_changes_nothing(
    make_house: Callable[[str], House], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, bare = make_house("whole"), make_house("bare")
    whole.search(InlinePool(), REAL)

    class Careless(InlinePool):
        def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
            for path in tmp_path.glob("bare.db.checkpoints-*/*"):
                path.unlink()
            return super().next_done(timeout_s)

    capsys.readouterr()
    bare.search(Careless(), REAL)
    said = " ".join(capsys.readouterr().err.split())
    assert "there is no checkpoint" in said and "trained from the start" in said
    assert [fact[:3] for fact in bare.facts()] == [fact[:3] for fact in whole.facts()]
    assert bare.facts() == whole.facts()
    counted = [
        sum(result.details["new_steps"] for trial in own.trials for result in trial.results)
        for own in (whole, bare)
    ]
    assert counted[0] < counted[1]


def test_where_checkpoints_rest(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> None:
    def folder(**changes: Any) -> str:
        config = resolve(tiny(RUNGS), changes)
        return folder_of(config, config.study)

    beside = folder(storage=f"sqlite:///{tmp_path}/x.db", study="a study/../..")
    assert Path(beside).parent == tmp_path and Path(beside).name.startswith("x.db.checkpoints-a-study-")
    server = "postgresql://me:secret@host/db"
    cached = folder(storage=server)
    assert Path(cached).parent == Path("~/.cache/nas/checkpoints").expanduser() and "secret" not in cached
    assert folder(storage=server, study="b") != cached
    assert Path(folder(checkpoints=str(tmp_path / "c"), storage=server)).parent == tmp_path / "c"
    assert folder(storage="sqlite://") != folder(storage="sqlite:///nas.db")


def test_a_study_that_is_older_than_rungs_stops_nobody(tiny: Callable[..., dict[str, Any]]) -> None:
    stored = resolve(tiny()).model_dump(mode="json")
    del stored["rungs"]
    assert resolve(of_study(stored | {"data_sha256": None})).rungs.shares == ()
    kept = resolve(tiny(RUNGS)).model_dump(mode="json")
    assert resolve(of_study(kept)).rungs == resolve(tiny(RUNGS)).rungs


def test_rungs_that_keep_all_are_no_rungs_to_stop_at(tiny: Callable[..., dict[str, Any]]) -> None:
    assert rules_of(resolve(tiny({"rungs": {"shares": [0.3], "keep": 1}})).rungs, 0) is None
    assert rules_of(resolve(tiny({"rungs": {"shares": []}})).rungs, 0) is None
    rules = rules_of(resolve(tiny(RUNGS)).rungs, 0)
    assert rules is not None and (rules.rungs, rules.chance) == (2, 0.1)
    assert ladder_of(rules, AXES, []).promotable() == []


def test_the_command_line_says_what_the_rungs_did(
    config_file: Callable[..., str], run: Callable[..., Any], url: str
) -> None:
    changes = {**RUNGS, "trials": 20, "space": {"layers": 2}}
    said = run("search", "--config", config_file(changes), "--storage", url)
    assert said.code == 0, said.err
    assert "rungs at 10, 40 % of the steps; the best 34 % go on" in " ".join(said.err.split())
    assert "at most about" in said.err and "rests" in said.err
    rungs = said.out[said.out.index("Rungs: ") :].splitlines()
    assert "of 20 layouts were stopped early, and" in rungs[0]
    assert len(rungs) >= 3 and all("Kendall τ" in line for line in rungs[1:3])
    listed = run("trials", "--study", "tiny", "--storage", url)
    assert "of steps" in listed.out and "100 %" in listed.out and "pruned" in listed.out
    told = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert {row["rung"] for row in told} <= {0, 1, 2} and 2 in {row["rung"] for row in told}
    again = run("search", "--config", config_file(changes), "--storage", url, "--json")
    assert "nothing is left to train" in again.err
    assert again.json["rungs"]["stopped"] == again.json["trials"]["pruned"] > 0
    assert 0 < again.json["rungs"]["trained_share"] < 1
    assert [row["share"] for row in again.json["rungs"]["rungs"]] == [0.1, 0.4]
    stopped = next(row["trial"] for row in told if row["state"] == "pruned")
    shown = run("show", stopped, "--study", "tiny", "--storage", url)
    assert shown.code == 0 and "that came to this rung have a higher quality" in shown.out
    json.dumps(again.json, allow_nan=False)


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path,
    config_file: Callable[..., str],
    start: Callable[..., Any],
) -> None:
    """No file is left half-written and no result doubled, whenever the process dies."""
    # Latencies would differ between two measurements.
    config = config_file({**RUNGS, "trials": 14, "objectives": ["quality", "kv_bytes"]})

    def begin(name: str) -> Any:
        command = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"
        url = f"sqlite:///{tmp_path}/{name}.db"
        return start("-c", command, "search", "--config", config, "--storage", url)

    def facts(name: str) -> list[Any]:
        with Store.open(f"sqlite:///{tmp_path}/{name}.db", read_only=True) as store:
            study = store.study("tiny")
            assert study is not None
            return [
                (trial.layout.text, trial.state, [(r.rung, r.quality, r.steps) for r in trial.results])
                for trial in store.trials(study)
            ]

    assert begin("whole").wait(timeout=300) == 0
    killed = 0
    for after in (2, 9):
        process = begin("parts")
        for line in process.stderr:
            if f"[{after}/14]" in line:
                process.kill()
                killed += 1
                break
        process.wait(timeout=300)
    assert begin("parts").wait(timeout=300) == 0
    assert killed == 2 and facts("parts") == facts("whole")
    assert list(tmp_path.glob("*.checkpoints-*")) == []

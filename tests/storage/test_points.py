"""Points are what the records say, whatever happened to a trial; and a front is found without reading the others."""

import random
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from nas.front import front
from storage import trials
from storage.records import StudyRecord
from storage.store import Store


def expected(store: Store, study: StudyRecord) -> dict[int, list[float]]:
    """The same, slowly, from the records."""
    found = {}
    for trial in store.trials(study, states=["done"]):
        values = [trial.value(axis.name) for axis in study.axes]
        if None not in values:
            found[trial.number] = [float(value) for value in values if value is not None]
    return found


def best_of(store: Store, study: StudyRecord) -> set[int]:
    """The numbers of the front, from whole records."""
    whole = [trial for trial in store.trials(study) if trial.value("kv_bytes") is not None]
    return {trial.number for trial in front(whole, study.axes)}


def stored(store: Store, study: StudyRecord) -> dict[int, list[float]]:
    points = store.points(study)
    return dict(zip(points.numbers.tolist(), points.values.tolist(), strict=True))


def play(store: Store, study: StudyRecord, build, rng: random.Random, moves: int) -> None:
    """Trials that end in every way, are trained with further seeds, and get other costs afterwards."""
    for move in range(moves):
        costs = {"kv_bytes": rng.uniform(1e3, 1e9)} if rng.random() < 0.9 else {"params": 7.0}
        number = store.add_trial(study, build.trial(move, costs=costs)).number
        attempt = store.start_trial(study, number)
        result = build.result_of(rng.random(), rung=1)
        match rng.choice(("done", "done", "done", "pruned", "unfit", "running")):
            case "done":
                assert store.finish_trial(study, number, attempt, result)
                for seed in range(rng.randrange(3)):
                    assert store.add_repeat(
                        study,
                        number,
                        f"{number}/{seed}",
                        replace(result, quality=rng.random(), seed=5 + seed),
                    )
                if rng.random() < 0.3:
                    store.update_costs(study, number, {"kv_bytes": rng.uniform(1e3, 1e9)})
            case "pruned":
                assert store.finish_trial(study, number, attempt, replace(result, rung=0), state="pruned")
                if rng.random() < 0.5:
                    assert store.finish_trial(study, number, store.start_trial(study, number), result)
            case "unfit":
                assert store.fail_trial(study, number, attempt, "unfit", "it diverged")
            case _:
                store.update_costs(study, number, {"kv_bytes": 5.0})


@pytest.mark.parametrize("seed", range(3))
def test_points_are_what_the_records_say(store: Store, build, seed: int) -> None:
    study, other = build.study(store), build.study(store, "other")
    assert len(store.points(study)) == 0 and store.points(study).front.tolist() == []
    play(store, other, build, random.Random(seed + 100), 5)
    play(store, study, build, random.Random(seed), 40)
    assert stored(store, study) == expected(store, study)
    assert stored(store, other) == expected(store, other)
    best = best_of(store, study)
    assert set(store.points(study).front.tolist()) == best and best
    numbers = store.points(study).numbers
    assert (np.diff(numbers) > 0).all()


def test_a_result_that_comes_too_late_leaves_the_point_alone(store: Store, build) -> None:
    study = build.study(store)
    number = store.add_trial(study, build.trial()).number
    late = store.start_trial(study, number)
    assert store.fail_trial(study, number, late, "waiting", "it was silent")
    assert store.finish_trial(study, number, store.start_trial(study, number), build.result_of(0.25))
    assert not store.finish_trial(study, number, late, build.result_of(1.0))
    assert stored(store, study) == {0: [0.25, 4096.0]}


# Row 45 of what must be survived: a hundred thousand trials. How long it takes is told by benchmarks.orchestration; here
# it is asked what makes it short.


def test_fault_45_a_front_is_found_in_one_short_question_and_only_its_trials_are_decoded(
    shared_url: str, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(shared_url) as store:
        study = build.study(store)
        play(store, study, build, random.Random(0), 60)
        best = best_of(store, study)
    decoded: list[int] = []
    real = trials._trial
    monkeypatch.setattr(trials, "_trial", lambda row, *rest: decoded.append(row.number) or real(row, *rest))
    asked: list[str] = []

    @event.listens_for(Engine, "before_cursor_execute")
    def note(_connection, _cursor, statement: str, *_rest: object) -> None:
        asked.append(statement)

    try:
        with Store.open(shared_url, read_only=True) as store:
            study = store.studies()[0]
            asked.clear()
            points = store.points(study)
            assert [one for one in asked if "nas_trials" in one or "nas_results" in one] == []
            assert sum("nas_points" in one for one in asked) == 1 and len(asked) <= 5
            found = store.trials(study, numbers=points.front.tolist())
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(points) > 3 * len(best)
    assert decoded == sorted(best) == [trial.number for trial in found]


def test_fault_45_a_page_of_trials_decodes_that_page_alone(
    shared_url: str, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(shared_url) as store:
        study = build.study(store)
        play(store, study, build, random.Random(1), 30)
        decoded: list[int] = []
        real = trials._trial
        monkeypatch.setattr(
            trials, "_trial", lambda row, *rest: decoded.append(row.number) or real(row, *rest)
        )
        page = store.trials(study, offset=20, limit=5)
    assert [trial.number for trial in page] == decoded == list(range(20, 25))

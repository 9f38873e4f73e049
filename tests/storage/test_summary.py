"""A study in numbers: what is counted is what the trials say, at once and in steps, whatever the size of a portion."""

import random
from dataclasses import replace

import pytest

from storage import summary
from storage.records import STATES, StudyRecord
from storage.store import Store
from storage.summary import Summary


def expected(store: Store, study: StudyRecord) -> Summary:
    """The same, slowly, from the records."""
    trials = store.trials(study)
    events = store.events(study=study, limit=10**6)
    kinds = sorted({event.kind for event in events})
    told = {}
    for trial in trials:
        if trial.results:
            both = [*trial.results, *trial.repeats]
            values = [trial.value(axis.name) for axis in study.axes]
            told[trial.number] = summary.Told(
                work=summary.Work(
                    len(trial.results),
                    len(trial.repeats),
                    sum(one.steps for one in both),
                    sum(one.tokens for one in both),
                    pytest.approx(sum(one.train_s for one in both)),
                    pytest.approx(sum(one.worker_s for one in both)),
                ),
                values=pytest.approx(values) if trial.state == "done" and None not in values else None,
            )
    return Summary(
        trials=store.counts(study),
        events={kind: sum(event.kind == kind for event in events) for kind in kinds},
        last_event=events[-1].seq if events else 0,
        last_event_at=events[-1].at if events else None,
        now=0.0,
        told=told,
    )


def play(store: Store, study: StudyRecord, build, rng: random.Random, moves: int) -> None:
    """What a search may do, in any order."""
    for _ in range(moves):
        trials = store.trials(study)
        running = [trial for trial in trials if trial.state == "running"]
        ready = [trial for trial in trials if trial.state in ("waiting", "pruned")]
        done = [trial for trial in trials if trial.state == "done"]
        move = rng.choice(("add", "start", "start", "end", "end", "fail", "repeat", "late"))
        if move == "add":
            costs = {"kv_bytes": rng.uniform(1e3, 1e9)} if rng.random() < 0.9 else {"params": 7.0}
            store.add_trial(study, build.trial(len(trials) % 5, costs=costs))
        elif move == "start" and ready:
            store.start_trial(study, rng.choice(ready).number)
        elif move == "end" and running:
            trial = rng.choice(running)
            rung = len(trial.results)
            state = rng.choice(("done", "pruned"))
            result = replace(build.result_of(rng.random(), rung), worker_s=rng.uniform(1, 9))
            store.finish_trial(study, trial.number, trial.attempts, result, state=state)
        elif move == "fail" and running:
            trial = rng.choice(running)
            store.fail_trial(
                study, trial.number, trial.attempts, rng.choice(("unfit", "lost", "waiting")), "so"
            )
        elif move == "late" and running:
            assert not store.finish_trial(study, running[0].number, 99, build.result_of(0.5, 7))
        elif move == "repeat" and done:
            trial = rng.choice(done)
            seed = 1 + len(trial.repeats)
            store.add_repeat(
                study, trial.number, f"again{seed}", replace(build.result_of(rng.random()), seed=seed)
            )


@pytest.mark.parametrize("portion", [1, 3, 2000])
def test_it_says_what_the_trials_say(
    store: Store, build, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    monkeypatch.setattr(summary, "PORTION", portion)
    rng = random.Random(portion)
    study, other = build.study(store), build.study(store, "other")
    known: Summary | None = None
    for _ in range(6):
        play(store, study, build, rng, 15)
        play(store, other, build, rng, 5)
        known = store.summary(study, known)
        wanted = expected(store, study)
        for found in (known, store.summary(study)):
            assert replace(found, now=0.0) == wanted
            assert found.last_event_at is not None and 0 <= found.now - found.last_event_at < 600
    assert known is not None
    assert known.attempts == sum(trial.attempts for trial in store.trials(study))
    assert known.late_results == known.events["late_result_rejected"] > 0
    assert known.requeues == known.events.get("trial_requeued", 0)
    assert known.work.results == sum(len(trial.results) for trial in store.trials(study))
    assert len(known.points) == sum(one.values is not None for one in known.told.values())


def test_a_study_without_trials(store: Store, build) -> None:
    study = build.study(store)
    found = store.summary(study)
    assert found.trials == dict.fromkeys(STATES, 0)
    assert (found.events, found.last_event_at, found.told, found.points) == ({}, None, {}, [])
    assert found.work == (0, 0, 0, 0, 0.0, 0.0) and found.attempts == 0


def test_what_was_known_is_not_read_again(store: Store, build, monkeypatch: pytest.MonkeyPatch) -> None:
    study = build.study(store)
    for index in range(5):
        number = store.add_trial(study, build.trial(index)).number
        store.finish_trial(study, number, store.start_trial(study, number), build.result)
    known = store.summary(study)
    read: list[dict[int, object]] = []
    real = summary.told_of
    monkeypatch.setattr(summary, "told_of", lambda *given: read.append(real(*given)) or read[-1])
    assert store.summary(study, known).told == known.told and read == []
    store.add_repeat(study, 3, "again", replace(build.result_of(0.25), seed=1))
    newer = store.summary(study, known)
    assert [list(told) for told in read] == [[3]]
    assert newer.told[3].values == (0.5, 4096.0) and newer.work.repeats == 1


def test_another_database_under_the_same_name_begins_anew(store: Store, build) -> None:
    study = build.study(store)
    store.add_trial(study, build.trial())
    known = replace(store.summary(study), last_event=10**6, events={"trial_done": 999_999})
    assert store.summary(study, known).events == {"trial_waiting": 1}


def test_a_kept_database_has_a_version_and_a_summary(shared_url: str, build) -> None:
    with Store.open(shared_url) as store:
        build.study(store)
    with Store.open(shared_url, read_only=True) as reader:
        assert reader.schema_version() >= 2
        assert reader.summary(reader.studies()[0]).trials["done"] == 0

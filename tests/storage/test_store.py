"""What every store promises, whichever database lies under it."""

import time
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event

from storage.errors import StorageError
from storage.records import EventRecord, LatencyRecord, StudyRecord
from storage.store import Store
from storage.trials import number_with_layout

INFINITY, NAN = float("inf"), float("nan")
LATENCY = LatencyRecord(
    device="H100",
    frame="w64",
    subject="kda",
    phase="decode",
    whole=False,
    latency_ms=0.1,
    spread_ms=0.01,
    repetitions=20,
)


@pytest.fixture
def study(store: Store, build) -> StudyRecord:
    return build.study(store)


@pytest.fixture
def running(store: Store, study: StudyRecord, build) -> int:
    """The number of a trial in its first attempt."""
    number = store.add_trial(study, build.trial()).number
    assert store.start_trial(study, number) == 1
    return number


def kinds(store: Store, study: StudyRecord) -> list[str]:
    return [happened.kind for happened in store.events(study=study)]


def test_a_study_is_found_by_name_and_its_name_is_taken(store: Store, build) -> None:
    assert store.studies() == []
    assert store.study("first") is None
    first, second = build.study(store, "first"), build.study(store, "zweite Ω <b>")
    assert store.studies() == [first, second]
    assert store.study("zweite Ω <b>") == second
    assert abs(first.created_at - time.time()) < 3600
    with pytest.raises(StorageError, match="has a study 'first' already: resume"):
        build.study(store, "first")
    with pytest.raises(ValueError, match="name is empty"):
        build.study(store, " ")
    assert len(store.studies()) == 2


def test_numbers_count_from_zero_within_each_study(store: Store, build) -> None:
    first, second = build.study(store, "first"), build.study(store, "second")
    numbers = [
        store.add_trial(study, build.trial(index)).number for index, study in enumerate([first, second] * 3)
    ]
    assert numbers == [0, 0, 1, 1, 2, 2]
    assert [trial.number for trial in store.trials(first)] == [0, 1, 2]
    assert [trial.layout.key for trial in store.trials(second)] == ["key1", "key3", "key5"]


def test_a_trial_begins_waiting_with_all_that_was_said_of_it(store: Store, study: StudyRecord, build) -> None:
    new = build.trial()
    trial = store.add_trial(study, new)
    assert trial == store.trial(study, 0)
    assert (trial.state, trial.attempts, trial.why, trial.results, trial.result) == (
        "waiting",
        0,
        "",
        (),
        None,
    )
    assert (trial.layout, trial.origin, trial.params) == (new.layout, new.origin, new.params)
    assert (trial.costs, trial.layer_costs) == (new.costs, new.layer_costs)
    assert (trial.sampler_attrs, trial.evaluation_key) == (new.sampler_attrs, new.evaluation_key)
    assert (trial.started_at, trial.ended_at) == (None, None)
    assert store.trial(study, 1) is None
    assert kinds(store, study) == ["trial_waiting"]


def test_a_finished_trial_holds_its_result_and_merged_costs(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    assert store.finish_trial(study, running, 1, build.result, costs={"latency_ms": 2.5, "params": 8.0})
    trial = store.trial(study, running)
    assert trial is not None
    assert (trial.state, trial.results, trial.result) == ("done", (build.result,), build.result)
    assert trial.costs == {"kv_bytes": 4096.0, "params": 8.0, "latency_ms": 2.5}
    assert trial.started_at is not None
    assert trial.ended_at is not None
    assert trial.created_at <= trial.started_at <= trial.ended_at
    last = store.events(study=study)[-1]
    assert (last.kind, last.study) == ("trial_done", "first")
    assert last.payload == {"trial": 0, "attempt": 1, "rung": 0, "quality": 0.75}


def test_a_pruned_trial_keeps_its_result_but_answers_no_other(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    assert store.finish_trial(study, running, 1, build.result, state="pruned")
    assert store.trials(study, states={"pruned"})[0].result == build.result
    assert kinds(store, study)[-1] == "trial_pruned"
    assert store.find_result("evaluation0") is None


def test_fault_14_a_doubled_commit_changes_nothing(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    assert store.finish_trial(study, running, 1, build.result)
    before = store.trial(study, running)
    assert not store.finish_trial(study, running, 1, build.result_of(0.9, rung=1), costs={"params": 0.0})
    assert not store.fail_trial(study, running, 1, "lost", "too late")
    assert store.trial(study, running) == before
    assert kinds(store, study)[-2:] == ["late_result_rejected", "late_result_rejected"]


def test_a_result_after_the_trial_was_put_back_is_refused(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    assert store.requeue_abandoned(study) == [running]
    assert not store.finish_trial(study, running, 1, build.result)
    assert store.start_trial(study, running) == 2
    assert not store.finish_trial(study, running, 1, build.result)
    assert not store.fail_trial(study, running, 1, "unfit", "an old opinion")
    trial = store.trial(study, running)
    assert trial is not None
    assert (trial.state, trial.attempts, trial.results) == ("running", 2, ())
    assert store.finish_trial(study, running, 2, build.result_of(0.5))
    assert kinds(store, study).count("late_result_rejected") == 3
    assert kinds(store, study).count("trial_done") == 1


def test_a_failed_trial_says_why_or_waits_again(store: Store, study: StudyRecord, build) -> None:
    for index in range(3):
        store.add_trial(study, build.trial(index))
        store.start_trial(study, index)
    assert store.fail_trial(study, 0, 1, "unfit", "loss is NaN at step 7")
    assert store.fail_trial(study, 1, 1, "lost", "worker died: \0 \ud800")
    assert store.fail_trial(study, 2, 1, "waiting", "worker died")
    unfit, lost, waiting = store.trials(study)
    assert (unfit.state, unfit.why) == ("unfit", "loss is NaN at step 7")
    assert (lost.state, lost.why) == ("lost", "worker died: \\x00 \\ud800")
    assert (waiting.state, waiting.why, waiting.started_at, waiting.ended_at) == ("waiting", "", None, None)
    assert unfit.ended_at is not None
    assert kinds(store, study)[-3:] == ["trial_unfit", "trial_lost", "trial_requeued"]
    assert store.start_trial(study, 2) == 2


def test_only_a_waiting_trial_can_be_started(store: Store, study: StudyRecord, running: int, build) -> None:
    with pytest.raises(
        StorageError, match="trial 0 of study 'first' is running: only a waiting or pruned one"
    ):
        store.start_trial(study, running)
    store.finish_trial(study, running, 1, build.result)
    with pytest.raises(StorageError, match="is done"):
        store.start_trial(study, running)
    with pytest.raises(StorageError, match="has no trial 5"):
        store.start_trial(study, 5)
    with pytest.raises(StorageError, match="has no trial 5"):
        store.finish_trial(study, 5, 1, build.result)


def test_requeueing_touches_only_running_trials_of_the_study(store: Store, study: StudyRecord, build) -> None:
    other = build.study(store, "other")
    store.add_trial(other, build.trial())
    store.start_trial(other, 0)
    for index in range(4):
        store.add_trial(study, build.trial(index))
    for number in (3, 1, 0):
        store.start_trial(study, number)
    store.finish_trial(study, 0, 1, build.result)
    assert store.requeue_abandoned(study) == [1, 3]
    assert store.requeue_abandoned(study) == []
    assert [trial.state for trial in store.trials(study)] == ["done", "waiting", "waiting", "waiting"]
    assert store.counts(other)["running"] == 1


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_fault_12_infinite_objective_is_rejected_before_the_commit(
    store: Store, study: StudyRecord, running: int, build, bad: float
) -> None:
    before = (store.trial(study, running), store.events())
    with pytest.raises(ValueError, match=r"quality is -?(nan|inf): only finite"):
        store.finish_trial(study, running, 1, build.result_of(bad))
    with pytest.raises(ValueError, match=r"scores\['recall'\]"):
        store.finish_trial(study, running, 1, replace(build.result, scores={"recall": bad}))
    with pytest.raises(ValueError, match=r"costs\['latency_ms'\]"):
        store.finish_trial(study, running, 1, build.result, costs={"latency_ms": bad})
    with pytest.raises(ValueError, match="train_s"):
        store.finish_trial(study, running, 1, replace(build.result, train_s=bad))
    with pytest.raises(ValueError, match=r"costs\['kv_bytes'\]"):
        store.add_trial(study, build.trial(1, costs={"kv_bytes": bad}))
    with pytest.raises(ValueError, match="costs"):
        store.update_costs(study, running, {"latency_ms": bad})
    with pytest.raises(ValueError, match="latency_ms"):
        store.put_latency(replace(LATENCY, latency_ms=bad))
    assert (store.trial(study, running), store.events()) == before
    assert store.latencies() == []


def test_a_diverged_curve_in_the_details_becomes_none(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    curves = {"curves": {"0.1": [2.0, NAN, INFINITY]}}
    assert store.finish_trial(study, running, 1, replace(build.result, details=curves))
    trial = store.trial(study, running)
    assert trial is not None
    assert trial.result == replace(build.result, details={"curves": {"0.1": [2.0, None, None]}})


def test_what_is_no_plain_value_is_named(store: Store, study: StudyRecord, running: int, build) -> None:
    with pytest.raises(ValueError, match=r"details\['curve'\]\[0\] is a set"):
        store.finish_trial(study, running, 1, replace(build.result, details={"curve": [{1}]}))
    with pytest.raises(ValueError, match="has the key 1"):
        store.finish_trial(study, running, 1, replace(build.result, details={1: 2}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="seed is"):
        store.finish_trial(study, running, 1, replace(build.result, seed=2**64))
    with pytest.raises(ValueError, match="NUL"):
        store.add_trial(study, replace(build.trial(), origin="\0"))


def test_a_failure_in_the_middle_leaves_nothing(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    before = (store.trials(study), store.events(), store.latencies())

    def fail(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO nas_events"):  # the last statement of each of these
            raise RuntimeError("pulled the plug")

    engine = store._database._engine
    event.listen(engine, "before_cursor_execute", fail)
    for write in (
        lambda: store.finish_trial(study, running, 1, build.result, costs={"latency_ms": 1.0}),
        lambda: store.fail_trial(study, running, 1, "lost", "gone"),
        lambda: store.requeue_abandoned(study),
        lambda: store.add_trial(study, build.trial(1)),
    ):
        with pytest.raises(RuntimeError, match="pulled the plug"):
            write()
    event.remove(engine, "before_cursor_execute", fail)
    assert (store.trials(study), store.events(), store.latencies()) == before
    assert known(store, study, "key1") is None
    assert store.finish_trial(study, running, 1, build.result)


def known(store: Store, study: StudyRecord, key: str) -> int | None:
    with store._database.reading() as connection:
        return number_with_layout(connection, study, key)


def test_a_layout_is_known_within_its_study_only(store: Store, study: StudyRecord, build) -> None:
    other = build.study(store, "other")
    for index in (0, 1, 1):
        store.add_trial(study, build.trial(index))
    assert (known(store, study, "key1"), known(store, study, "key2")) == (1, None)
    assert known(store, other, "key1") is None
    renamed = replace(build.trial(1), layout=replace(build.trial(1).layout, text="mla"))
    with pytest.raises(StorageError, match=r"'key1' is that of '2\*kda full' here, not of 'mla'"):
        store.add_trial(other, renamed)
    assert store.trials(other) == []


def test_a_result_is_found_across_studies_once_it_is_done(store: Store, build) -> None:
    first, second = build.study(store, "first"), build.study(store, "second")
    for study in (first, second):
        store.add_trial(study, build.trial(evaluation_key="same"))
        store.start_trial(study, 0)
    assert store.find_result("same") is None
    store.fail_trial(first, 0, 1, "lost", "gone")
    assert store.find_result("same") is None
    store.finish_trial(second, 0, 1, build.result)
    assert store.find_result("same") == build.result
    assert store.find_result("other") is None


def test_costs_are_merged_in_any_state(store: Store, study: StudyRecord, running: int, build) -> None:
    store.finish_trial(study, running, 1, build.result)
    store.update_costs(study, running, {"latency_ms": 3.5, "kv_bytes": 1.0})
    trial = store.trial(study, running)
    assert trial is not None
    assert trial.costs == {"kv_bytes": 1.0, "params": 7, "latency_ms": 3.5}
    with pytest.raises(StorageError, match="has no trial 9"):
        store.update_costs(study, 9, {"latency_ms": 1.0})


def test_a_latency_replaces_an_older_one_of_the_same_thing(store: Store) -> None:
    others = [
        replace(LATENCY, whole=True),
        replace(LATENCY, phase="prefill"),
        replace(LATENCY, device="A100"),
    ]
    for record in [LATENCY, *others, replace(LATENCY, latency_ms=0.2)]:
        store.put_latency(record)
    key = {"device": "H100", "frame": "w64", "subject": "kda", "phase": "decode"}
    assert store.latency(**key, whole=False) == replace(LATENCY, latency_ms=0.2)
    assert store.latency(**key, whole=True) == others[0]
    assert store.latency(**{**key, "subject": "mla"}, whole=True) is None
    assert len(store.latencies()) == 4
    assert store.latencies(device="A100") == [others[2]]
    elsewhere = replace(LATENCY, frame="w128")
    store.put_latency(elsewhere)
    assert len(store.latencies()) == 5
    assert store.latencies(frames={"w128", "w256"}) == [elsewhere]
    assert store.latencies(device="A100", frames={"w64"}) == [others[2]]
    assert len(store.latencies(frames={"w64"})) == 4 and store.latencies(frames=()) == []


def test_events_are_read_on_from_the_last_one_seen(store: Store, study: StudyRecord, build) -> None:
    other = build.study(store, "other")
    numbers = [store.log(study if index % 2 else other, "tick", {"index": index}) for index in range(5)]
    numbers.append(store.log(None, "tock", {"loss": NAN}))
    assert numbers == sorted(set(numbers))
    assert [happened.seq for happened in store.events()] == numbers
    assert [happened.seq for happened in store.events(after=numbers[1], limit=2)] == numbers[2:4]
    assert [happened.payload["index"] for happened in store.events(study=study)] == [1, 3]
    last = store.events(after=numbers[4])
    assert last == [
        EventRecord(seq=numbers[5], at=last[0].at, study=None, kind="tock", payload={"loss": None})
    ]
    assert store.events(after=numbers[5]) == []


def test_an_unknown_study_is_refused(store: Store, study: StudyRecord, build) -> None:
    stranger = replace(study, id=99, name="stranger")
    with pytest.raises(StorageError, match="no study 'stranger'"):
        store.add_trial(stranger, build.trial())
    with pytest.raises(StorageError, match="breaks a rule of the tables"):
        store.log(stranger, "tick", {})


def test_a_closed_store_refuses(store: Store) -> None:
    store.close()
    with pytest.raises(StorageError, match="was closed: open it again"):
        store.studies()


def test_lower_rungs_are_committed_with_the_last_one(
    store: Store, study: StudyRecord, running: int, build
) -> None:
    lower = [build.result_of(0.2, rung=0), build.result_of(0.3, rung=1)]
    bad = replace(lower[1], quality=NAN)
    with pytest.raises(ValueError, match="quality"):
        store.finish_trial(study, running, 1, build.result_of(0.5, rung=2), passed=[lower[0], bad])
    assert not store.finish_trial(study, running, 2, build.result_of(0.5, rung=2), passed=lower)
    assert store.finish_trial(study, running, 1, build.result_of(0.5, rung=2), passed=lower)
    trial = store.trial(study, running)
    assert trial is not None and trial.result is not None
    assert [(result.rung, result.quality) for result in trial.results] == [(0, 0.2), (1, 0.3), (2, 0.5)]
    assert trial.result.rung == 2
    done = [event for event in store.events(study=study) if event.kind == "trial_done"]
    assert [event.payload["rung"] for event in done] == [2]


def test_a_pruned_trial_may_go_on(store: Store, study: StudyRecord, running: int, build) -> None:
    assert store.finish_trial(study, running, 1, build.result_of(0.2, rung=0), state="pruned")
    assert store.start_trial(study, running) == 2
    again = store.trial(study, running)
    assert again is not None and (again.state, again.ended_at) == ("running", None)
    assert not store.finish_trial(study, running, 1, build.result_of(0.9, rung=1))
    assert store.finish_trial(study, running, 2, build.result_of(0.4, rung=1))
    trial = store.trial(study, running)
    assert trial is not None and trial.state == "done"
    assert [result.quality for result in trial.results] == [0.2, 0.4]


@pytest.fixture
def done(store: Store, study: StudyRecord, running: int, build) -> int:
    """The number of a trial that is done with seed 0."""
    assert store.finish_trial(study, running, 1, build.result)
    return running


def test_a_further_seed_is_added_once_and_means_are_taken_over_all(
    store: Store, study: StudyRecord, done: int, build
) -> None:
    second, third = (replace(build.result_of(quality), seed=seed) for quality, seed in ((0.25, 9), (0.5, 4)))
    assert store.add_repeat(study, done, "with 9", second)
    assert store.add_repeat(study, done, "with 4", third)
    before = kinds(store, study)
    for taken in (replace(second, quality=0.9), replace(build.result_of(0.9), seed=build.result.seed)):
        assert not store.add_repeat(study, done, "another", taken)
    assert kinds(store, study) == before and before[-2:] == ["trial_repeated"] * 2
    assert store.events(study=study)[-1].payload == {"trial": done, "seed": 4, "quality": 0.5}
    trial = store.trial(study, done)
    assert trial is not None and [trial] == store.trials(study) == store.trials(study, limit=5)
    assert trial.repeats == (third, second)
    assert trial.result == build.result and trial.state == "done" and trial.attempts == 1
    assert trial.by_seed("quality") == (0.75, 0.5, 0.25) and trial.value("quality") == 0.5
    assert trial.value("recall") == build.result.scores["recall"]
    assert trial.value("kv_bytes") == 4096.0 and trial.value("unheard of") is None
    assert store.find_result("with 4") == third and store.find_result("another") is None
    assert store.counts(study)["done"] == 1


def test_only_what_is_done_gets_further_seeds(store: Store, study: StudyRecord, running: int, build) -> None:
    again = replace(build.result, seed=1)
    with pytest.raises(StorageError, match=r"trial 0 of study 'first' is running: only a done one"):
        store.add_repeat(study, running, "key", again)
    with pytest.raises(StorageError, match="has no trial 5"):
        store.add_repeat(study, 5, "key", again)
    for broken in (replace(again, quality=NAN), replace(again, scores={"recall": INFINITY})):
        with pytest.raises(ValueError, match=r"finite|nan|inf"):
            store.add_repeat(study, running, "key", broken)
    trial = store.trial(study, running)
    assert trial is not None and trial.repeats == ()

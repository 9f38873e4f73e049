"""What the server remembers is what a fresh reading gives, whatever happened in between."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from dashboards import memory
from dashboards.memory import Library
from dashboards.near import on_front, one_change
from dashboards.view import study_view
from storage.glances import glance_of
from storage.store import Store


def told(snapshot):
    view = snapshot.view
    return (
        list(view.points),
        [p.number for p in view.front],
        view.beaten,
        [step.hypervolume for step in view.progress],
    )


def anew(store):
    study = store.study("live")
    view = study_view(study, store.trials(study))
    return (
        list(view.points),
        [p.number for p in view.front],
        view.beaten,
        [step.hypervolume for step in view.progress],
    )


def test_what_is_remembered_is_what_a_fresh_reading_gives(live_url, measured):
    library, draw = Library(live_url), random.Random(4)
    for _ in range(12):
        measured(
            live_url, " ".join(draw.choice(["kda", "mla", "full", "window", "linear"]) for _ in range(4))
        )
        with Store.open(live_url, read_only=True) as store:
            snapshot = library.snapshot(store, store.study("live"))
            assert told(snapshot) == anew(store)
            assert snapshot.total == len(store.trials(store.study("live")))


def test_how_many_trials_there_are_to_be_is_what_the_last_search_said(live_url, measured):
    library = Library(live_url)

    def planned() -> int | None:
        with Store.open(live_url, read_only=True) as store:
            return library.snapshot(store, store.study("live")).planned

    def say(payload) -> None:
        with Store.open(live_url) as store:
            store.log(store.study("live"), "search_planned", payload)

    assert planned() is None
    say({"trials": 8})
    assert planned() == 8
    measured(live_url, "kda mla kda mla")
    say({"trials": 2})
    assert planned() == 2 == planned()
    for wrong in ({}, {"trials": "many"}, {"trials": True}):
        say(wrong)
        assert planned() is None


def test_only_what_changed_is_read_again(live_url, measured, monkeypatch):
    library, asked = Library(live_url), []
    real = Store.glances
    monkeypatch.setattr(
        Store, "glances", lambda self, study, numbers, layers: asked.append(list(numbers)) or real(self, study, numbers, layers)
    )  # fmt: skip
    with Store.open(live_url, read_only=True) as store:
        library.snapshot(store, store.study("live"))
    number = measured(live_url, "kda mla kda mla")
    with Store.open(live_url, read_only=True) as store:
        first = library.snapshot(store, store.study("live"))
        again = library.snapshot(store, store.study("live"))
    assert asked == [[0], [number]]
    assert again is first and number in first.view.measured


def test_a_snapshot_does_not_change_under_its_reader(live_url, measured):
    library = Library(live_url)
    with Store.open(live_url, read_only=True) as store:
        before = library.snapshot(store, store.study("live"))
        seen = told(before)
        measured(live_url, "kda mla kda mla")
        after = library.snapshot(store, store.study("live"))
    assert told(before) == seen and len(after.view.measured) == 2


def test_a_large_study_is_read_beside_the_first_page(live_url, measured, monkeypatch):
    monkeypatch.setattr(memory, "AT_ONCE", 3)
    monkeypatch.setattr(memory, "PORTION", 2)
    for mixers in ("kda mla kda mla", "full full kda kda", "mla mla kda kda", "kda kda kda mla"):
        measured(live_url, mixers)
    library = Library(live_url)
    with Store.open(live_url, read_only=True) as store:
        study = store.study("live")
        first = library.snapshot(store, study)
        assert first.unread == first.total == 5 and not len(first.view.measured)
        deadline = time.monotonic() + 30
        while library.snapshot(store, study).unread and time.monotonic() < deadline:
            time.sleep(0.02)
        assert told(library.snapshot(store, study)) == anew(store)


def test_a_value_that_is_measured_again_brings_back_what_it_had_beaten(store, monkeypatch):
    study = store.study("quick")
    records = {trial.number: trial for trial in store.trials(study)}
    library = Library(store.url)
    view = library.snapshot(store, study).view
    best = max(view.front, key=lambda p: p.values["quality"]).number
    trial = records[best]
    worse = replace(trial, repeats=(replace(trial.result, quality=0.0, seed=1),) * 9)
    monkeypatch.setattr(Store, "changed_trials", lambda *_: (10**9, [best]))
    monkeypatch.setattr(Store, "glances", lambda *_: [glance_of(worse)])
    after = library.snapshot(store, study).view
    expected = study_view(study, [*(t for n, t in records.items() if n != best), worse])
    assert [p.number for p in after.front] == [p.number for p in expected.front]
    assert best not in {p.number for p in after.front if p.values["quality"] > 0.5}


def test_glances_say_what_whole_records_say(store):
    study = store.study("quick")
    records = store.trials(study)
    glances = store.glances(study, range(len(records)), {})
    assert glances == [glance_of(record) for record in records]
    for seen, record in zip(glances, records, strict=True):
        for name in ("quality", "mqar", "kv_bytes", "nothing"):
            assert seen.value(name) == record.value(name)
            assert seen.by_seed(name) == record.by_seed(name)
    assert store.glances(study, [7, 3], {}) == [glances[3], glances[7]]


def test_equal_layers_are_one_object(store):
    study = store.study("quick")
    glances = store.glances(study, range(43), {})
    layers = [layer for seen in glances for layer in seen.layout.layers]
    assert len({id(layer) for layer in layers}) == len({repr(layer) for layer in layers}) < 20


def test_single_changes_differ_in_one_layer_and_say_what_it_did(store):
    study = store.study("quick")
    snapshot = Library(store.url).snapshot(store, study)
    view, found = snapshot.view, 0
    for number in view.measured.tolist():
        layers = view.glance(number).layout.layers
        changes = {change.number: change for change in one_change(snapshot, number)}
        texts = {}
        for other in view.measured.tolist():
            theirs = view.glance(other).layout.layers
            differing = [i for i, (a, b) in enumerate(zip(layers, theirs, strict=True)) if a != b]
            if len(differing) == 1:
                texts.setdefault(view.glance(other).layout.text, (other, differing[0]))
        assert {number: change.position for number, change in changes.items()} == dict(texts.values())
        found += len(changes)
    assert found > 5


def test_neighbours_stand_around_a_layout_on_the_front(store):
    view = Library(store.url).snapshot(store, store.study("quick")).view
    front = [p.number for p in view.front]
    assert on_front(view, front[0]) == (None, front[1])
    assert on_front(view, front[-1]) == (front[-2], None)
    assert on_front(view, front[1]) == (front[0], front[2])
    beaten = next(p for p in view.points if not p.on_front)
    before, after = on_front(view, beaten.number)
    quality = view.column("quality")
    assert before is None or quality[before] >= quality[beaten.number]
    assert after is None or quality[after] < quality[beaten.number]
    assert on_front(view, 41) == (None, None)


@pytest.mark.parametrize("name", ["quality", "latency_ms", "kv_bytes"])
def test_columns_are_the_values_of_the_points(store, name):
    view = Library(store.url).snapshot(store, store.study("quick")).view
    assert np.array_equal(view.column(name)[view.measured], [p.values[name] for p in view.points])

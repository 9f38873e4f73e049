"""A study's points, front, hypervolume and beaten layouts, without a database or a browser."""

import random
from dataclasses import replace

import pytest

from dashboards import strips
from dashboards.view import study_view
from storage.records import Axis, LayoutRecord, ResultRecord, StudyRecord, TrialRecord

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=1024.0, log=True, unit="B"),
)
STUDY = StudyRecord(
    id=1,
    name="s",
    config={"target": {"context": 8192}},
    config_hash="h",
    axes=AXES,
    families={"kda": "delta", "full": "attention", "mamba2": "state_space", "mla": "latent"},
    created_at=0.0,
)


def trial(number, quality, cache, *, origin="search", state="done", ended=None, mixer="kda"):
    result = ResultRecord(
        rung=0, quality=quality, scores={}, details={}, steps=1, tokens=1, train_s=1.0, worker_s=1.0, seed=0
    )
    layer = {
        "branches": [{"mixer": mixer, "settings": {"head_dim": 64}}],
        "channel": {"mixer": "swiglu", "settings": {}},
    }
    return TrialRecord(
        number=number,
        state=state,
        origin=origin,
        layout=LayoutRecord(key=str(number), text=f"{mixer} {number}", layers=(layer,)),
        params={},
        sampler_attrs={},
        costs={"kv_bytes": cache},
        layer_costs=({"kv_bytes": cache},),
        evaluation_key=str(number),
        attempts=1,
        why="",
        results=(result,),
        ended_at=float(number if ended is None else ended),
    )


def beats(a, b):
    better = a.values["quality"] >= b.values["quality"] and a.values["kv_bytes"] <= b.values["kv_bytes"]
    return better and a.values != b.values


def test_front_flags_agree_with_brute_force():
    draw = random.Random(3)
    view = study_view(STUDY, [trial(i, draw.random(), 2 ** draw.uniform(-3, 12)) for i in range(60)])
    for point in view.points:
        beaten = any(beats(other, point) for other in view.points)
        assert point.on_front is not beaten
        assert (point.rank == 0) is point.on_front
    assert [p.number for p in view.front] == [
        p.number for p in sorted(view.points, key=lambda p: -p.values["quality"]) if p.on_front
    ]


def test_only_done_trials_with_finite_values_are_points():
    missing = replace(trial(3, 0.5, 2.0), costs={})
    trials = [trial(0, 0.5, 2.0), trial(1, 0.5, 2.0, state="pruned"), trial(2, float("nan"), 2.0), missing]
    assert [p.number for p in study_view(STUDY, trials).points] == [0]


def test_a_layout_measured_twice_alike_stands_once_on_the_front():
    again = replace(trial(1, 0.5, 2.0), layout=trial(0, 0.5, 2.0).layout)
    view = study_view(STUDY, [trial(0, 0.5, 2.0), again])
    assert [p.on_front for p in view.points] == [True, True]
    assert [p.number for p in view.front] == [0]


def test_hypervolume_follows_the_order_of_ending():
    view = study_view(STUDY, [trial(0, 0.5, 32.0, ended=9), trial(1, 0.25, 32.0, ended=1)])
    assert [(step.measured, step.number) for step in view.progress] == [(1, 1), (2, 0)]
    assert [step.hypervolume for step in view.progress] == pytest.approx([0.125, 0.25])
    assert view.hypervolume == pytest.approx(0.25)


def test_an_axis_may_be_a_task():
    axis = Axis(name="recall", maximise=True, low=0.0, high=1.0, log=False)
    base = trial(0, 0.5, 2.0)
    scored = replace(base, results=(replace(base.results[0], scores={"recall": 0.75}),))
    view = study_view(replace(STUDY, axes=(axis, AXES[1])), [scored])
    assert view.points[0].values == {"recall": 0.75, "kv_bytes": 2.0}


def test_beaten_layouts_name_the_better_one_and_the_gain():
    trials = [
        trial(0, 0.90, 100.0, origin="uniform", mixer="mamba2"),
        trial(1, 0.95, 78.0),
        trial(2, 0.99, 500.0, origin="kimi-linear"),
        trial(3, 0.92, 50.0),
    ]
    (beaten,) = study_view(STUDY, trials).beaten
    assert (beaten.number, beaten.by_number, beaten.origin) == (0, 1, "uniform")
    assert beaten.changes == ("quality +.050", "cache at 8k −22 %")


def test_an_equal_layout_does_not_beat():
    assert study_view(STUDY, [trial(0, 0.9, 10.0, origin="uniform"), trial(1, 0.9, 10.0)]).beaten == ()


def test_an_empty_study_has_an_empty_view():
    view = study_view(STUDY, [])
    assert (view.points, view.front, view.progress, view.beaten, view.hypervolume) == ((), (), (), (), 0.0)


def test_marks_are_short_and_differ():
    found = strips.marks(["full", "mamba2", "mla", "gated_delta", "gated_linear", "kda", "k", "window"])
    assert len(set(found.values())) == len(found)
    assert max(map(len, found.values())) <= 2
    assert found["full"] == "F"
    assert found["gated_delta"] == "GD"


def test_strips_tell_settings_and_heads_side_by_side():
    layer = {
        "branches": [{"mixer": "full", "settings": {}}, {"mixer": "new", "settings": {"size": 4}}],
        "channel": {"mixer": "moe", "settings": {"experts": 8}},
    }
    record = LayoutRecord(key="k", text="full|new[size=4]/moe[experts=8]", layers=(layer,))
    (cell,) = strips.strip(record, STUDY.families, strips.marks(STUDY.families))
    assert cell.label == record.text
    assert [part.family for part in cell.parts] == ["attention", "unknown"]

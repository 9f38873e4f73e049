"""Figures are well-formed for Plotly, and hold the marks that tell layouts apart without colour."""

import base64
import json
import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects
import pytest

from dashboards import charts, front_chart, growth_chart, labels, scene, space_chart, trial_charts
from dashboards.limits import limits_of
from dashboards.scene import Doubt, Scene
from dashboards.strips import family_of, marks
from dashboards.view import kind_of, study_view
from storage.glances import glance_of


def well_formed(figure):
    json.dumps(figure, allow_nan=False)
    plotly.graph_objects.Figure(figure)
    return figure


def test_every_picture_is_well_formed(store, study, view):
    trial = store.trial(study, 12)
    figures = [
        front_chart.front(view),
        space_chart.front_3d(view),
        growth_chart.hypervolume(view),
        charts.layouts(view),
    ]
    figures += [trial_charts.layers(trial, study.families, view.marks), trial_charts.curves(trial)]
    for figure in figures:
        assert well_formed(figure)["data"]


@pytest.mark.parametrize("x", ["quality", "latency_ms", "kv_bytes"])
@pytest.mark.parametrize("y", ["quality", "latency_ms", "kv_bytes"])
def test_any_two_axes_make_a_front(view, x, y):
    if x == y:
        with pytest.raises(ValueError, match="two different"):
            front_chart.front(view, x, y)
        return
    figure = well_formed(front_chart.front(view, x, y))
    assert figure["layout"]["xaxis"]["type"] == ("linear" if x == "quality" else "log")
    stairs = figure["data"][0]
    sign = {"quality": -1}
    steps = [(sign.get(x, 1) * a, sign.get(y, 1) * b) for a, b in zip(stairs["x"], stairs["y"], strict=True)]
    points = [(sign.get(x, 1) * p.values[x], sign.get(y, 1) * p.values[y]) for p in view.points]
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(steps) == undominated


def test_an_unknown_axis_is_named(view):
    with pytest.raises(ValueError, match="no axis 'speed'"):
        front_chart.front(view, "speed")


def test_kinds_differ_by_symbol_and_presets_by_name(view):
    figure = front_chart.front(view)
    named = [t for t in figure["data"] if t["mode"] == "markers+text"]
    words = {word for t in named for word in t["text"]}
    assert {"kimi-linear", "samba", "kda", "full"} <= words
    symbols = {t["marker"]["symbol"] for t in figure["data"] if t["mode"] != "lines"}
    assert symbols == {"circle", "square", "diamond"}


def test_hover_has_notation_strip_and_units(view):
    hovers = {
        t["customdata"][i]: text
        for t in front_chart.front(view)["data"]
        if "customdata" in t
        for i, text in enumerate(t["hovertext"])
    }
    kimi = next(p for p in view.points if p.origin == "kimi-linear")
    assert set(hovers) == {p.number for p in view.points}
    for word in ("3*kda mla", "K K K Ml", "quality  .", " ms", "MiB", "194 M", "cache at 8k"):
        assert word in hovers[kimi.number]


def test_strips_have_a_mark_in_every_cell(view):
    figure = charts.layouts(view)
    cells = [text for trace in figure["data"] for text in trace["text"]]
    assert len(cells) == 4 * len(view.points)
    assert set(cells) == set(view.marks.values())
    assert {t["name"] for t in figure["data"]} == {family_of(f).title for f in view.families.values()}


def test_shares_of_the_layers_sum_to_the_whole(store, study):
    figure = trial_charts.layers(store.trial(study, 6), study.families, marks(study.families))
    assert len(figure["data"]) == 4
    assert [sum(t["x"][i] for t in figure["data"]) for i in range(3)] == pytest.approx([100, 100, 100])


def test_names_are_text_in_labels(store, study):
    hostile = '<a href="javascript:alert(1)">x</a>'
    trials = [
        replace(
            trial,
            layout=replace(trial.layout, text=hostile),
            origin="<b>preset" if kind_of(trial.origin) == "preset" else trial.origin,
        )
        for trial in store.trials(study)
    ]
    view = study_view(study, trials)
    for draw in (front_chart.front, space_chart.front_3d, charts.layouts):
        assert "<a " not in json.dumps(draw(view))
    assert "<b>preset" not in json.dumps(front_chart.front(view))


def test_two_axes_and_nothing_measured(study):
    two = study_view(replace(study, axes=study.axes[::2]), [])
    assert space_chart.front_3d(two)["data"] == []
    for figure in (front_chart.front(two), growth_chart.hypervolume(two), charts.layouts(two)):
        well_formed(figure)


def test_a_cost_of_zero_has_a_place_on_a_logarithmic_axis(store, study):
    trial = store.trial(study, 0)
    view = study_view(study, [replace(trial, costs=trial.costs | {"kv_bytes": 0.0})])
    figure = front_chart.front(view)
    assert figure["data"][0]["x"] == [view.axis("kv_bytes").low]
    assert "0 B" in figure["data"][1]["hovertext"][0]


def test_running_trials_are_rings_at_what_is_known_of_them(store, study, view):
    seen = [glance_of(trial) for trial in store.trials(study) if trial.state == "running"]
    figure = well_formed(front_chart.front(view, scene=Scene(running=seen)))
    (rings,) = (trace for trace in figure["data"] if trace["name"] == "in training")
    assert rings["customdata"] == [seen[0].number] and rings["marker"]["symbol"] == "circle-open"
    assert rings["x"] == [seen[0].costs["kv_bytes"]]
    assert rings["y"][0] == figure["layout"]["yaxis"]["range"][0], (
        "its quality is not known: it stands at the axis"
    )


def test_bounds_shade_what_they_exclude(view):
    limits = limits_of(
        {"space": {"constraints": ["kv_bytes<=1GiB", "full>=1", "full not first", "latency_ms<=2ms"]}}
    )
    assert [(limit.name, limit.bound) for limit in limits] == [
        ("kv_bytes", 2.0**30),
        ("full", 1.0),
        ("latency_ms", 2.0),
    ]
    figure = well_formed(front_chart.front(view, scene=Scene(limits=limits)))
    (shape,) = figure["layout"]["shapes"]
    low, high = figure["layout"]["xaxis"]["range"]
    assert shape["x0"] == pytest.approx((math.log10(2.0**30) - low) / (high - low)) and shape["x1"] == 1
    assert "1 GiB" in figure["layout"]["annotations"][0]["text"]


def test_intervals_are_bars_and_chances_are_told(view):
    number = view.front[0].number
    quality = view.front[0].values["quality"]
    doubt = Doubt(chances={number: 0.75}, intervals={"quality": {number: (quality - 0.1, quality + 0.05)}})
    figure = well_formed(front_chart.front(view, scene=Scene(doubt=doubt)))
    trace = next(t for t in figure["data"] if number in t.get("customdata", ()))
    at = trace["customdata"].index(number)
    assert trace["error_y"]["array"][at] == pytest.approx(0.05)
    assert trace["error_y"]["arrayminus"][at] == pytest.approx(0.1)
    assert "chance of 75 %" in trace["hovertext"][at] and "error_x" not in trace


def test_there_is_room_for_the_intervals_of_the_front_that_is_shown(view):
    best = max(view.front, key=lambda point: point.values["quality"])
    doubt = Doubt(intervals={"quality": {best.number: (0.0, 3.0)}})
    low, high = front_chart.front(view, scene=Scene(doubt=doubt))["layout"]["yaxis"]["range"]
    assert low <= 0 and high >= 3
    others = view.measured[view.measured != best.number]
    without = front_chart.front(view, scene=Scene(doubt=doubt, shown=others))["layout"]["yaxis"]["range"]
    assert without[1] < 3


def best_of(view):
    return view.front[0].number


def test_a_crowd_is_packed_and_leaves_out_who_has_a_mark(view, monkeypatch):
    monkeypatch.setattr(scene, "MANY", 10)
    figure = well_formed(front_chart.front(view))
    crowd = figure["data"][0]
    assert crowd["type"] == "scattergl"
    numbers = np.frombuffer(base64.b64decode(crowd["customdata"]["bdata"]), dtype="<i4").tolist()
    marked = {n for trace in figure["data"][1:] for n in trace.get("customdata", ())}
    assert marked == {p.number for p in view.points if p.on_front or p.kind != "found"}
    assert sorted(numbers) == sorted({p.number for p in view.points} - marked)
    heights = np.frombuffer(base64.b64decode(crowd["y"]["bdata"]), dtype="<f4")
    assert heights == pytest.approx([view.column("quality")[n] for n in numbers])
    assert crowd["meta"] == {"units": ["B", ""]}
    caught = np.array([*numbers[1:4], best_of(view)])
    parted = well_formed(front_chart.front(view, scene=Scene(caught=caught)))["data"][0]
    order = np.frombuffer(base64.b64decode(parted["customdata"]["bdata"]), dtype="<i4").tolist()
    assert order[-3:] == numbers[1:4] and sorted(order) == numbers and parted["meta"]["caught"] == 3
    fresh = front_chart.front(view, scene=Scene(fresh=frozenset(numbers[:2])))["data"][0]
    assert np.frombuffer(base64.b64decode(fresh["customdata"]["bdata"]), dtype="<i4").tolist() == numbers[:2]


def test_luck_is_a_band_that_ends_where_the_study_ends(view):
    luck = growth_chart.baseline(view)
    assert luck.measured[0] == 1 and luck.measured[-1] == len(view.points)
    assert luck.low[-1] == luck.high[-1] == pytest.approx(view.hypervolume)
    assert all(low <= mid <= high for low, mid, high in zip(luck.low, luck.middle, luck.high, strict=True))
    assert luck.low[0] < luck.high[0]
    names = [trace.get("name") for trace in well_formed(growth_chart.hypervolume(view, luck))["data"]]
    assert "this study" in names and "the same layouts in a random order" in names


def test_names_stand_where_there_is_room():
    alone = labels.places([labels.Spot(key=1, x=0.5, y=0.5, text="kda")], width=400, height=300)
    assert alone == {1: "top center"}
    crowded = [labels.Spot(key=n, x=0.5, y=0.5 + n / 60, text="kimi-linear") for n in range(4)]
    sides = labels.places(crowded, width=400, height=300)
    assert len(set(sides.values())) == len(sides), (
        "two names on one side of marks so close would lie over one another"
    )
    line = labels.places(
        [labels.Spot(key=1, x=0.5, y=0.5, text="kda")], width=400, height=300, lines=[(0.5, 0.5, 0.5, 1.0)]
    )
    assert line == {1: "bottom center"}, "a line runs upwards from the mark"
    same = [labels.Spot(key=n, x=0.5, y=0.5, text="x") for n in range(12)]
    sides = labels.places(same, width=400, height=300)
    assert len(sides) == len(set(sides.values())) == 8, "there are eight sides, and no name shares one"

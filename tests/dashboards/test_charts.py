"""Figures are well-formed for Plotly, and hold the marks that tell layouts apart without colour."""

import json
from dataclasses import replace

import plotly.graph_objects
import pytest

from dashboards import charts, trial_charts
from dashboards.strips import family_of, marks
from dashboards.view import study_view


@pytest.fixture
def study(store):
    return store.study("quick")


@pytest.fixture
def view(store, study):
    return study_view(study, store.trials(study))


def well_formed(figure):
    json.dumps(figure, allow_nan=False)
    plotly.graph_objects.Figure(figure)
    return figure


def test_every_picture_is_well_formed(store, study, view):
    trial = store.trial(study, 12)
    figures = [charts.front(view), charts.front_3d(view), charts.hypervolume(view), charts.layouts(view)]
    figures += [trial_charts.layers(trial, study.families, view.marks), trial_charts.curves(trial)]
    for figure in figures:
        assert well_formed(figure)["data"]


@pytest.mark.parametrize("x", ["quality", "latency_ms", "kv_bytes"])
@pytest.mark.parametrize("y", ["quality", "latency_ms", "kv_bytes"])
def test_any_two_axes_make_a_front(view, x, y):
    if x == y:
        with pytest.raises(ValueError, match="two different"):
            charts.front(view, x, y)
        return
    figure = well_formed(charts.front(view, x, y))
    assert figure["layout"]["xaxis"]["type"] == ("linear" if x == "quality" else "log")
    stairs = figure["data"][0]
    sign = {"quality": -1}
    steps = [(sign.get(x, 1) * a, sign.get(y, 1) * b) for a, b in zip(stairs["x"], stairs["y"], strict=True)]
    points = [(sign.get(x, 1) * p.values[x], sign.get(y, 1) * p.values[y]) for p in view.points]
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(steps) == undominated


def test_an_unknown_axis_is_named(view):
    with pytest.raises(ValueError, match="no axis 'speed'"):
        charts.front(view, "speed")


def test_kinds_differ_by_symbol_and_presets_by_name(view):
    figure = charts.front(view)
    named = [t for t in figure["data"] if t["mode"] == "markers+text"]
    words = {word for t in named for word in t["text"]}
    assert {"kimi-linear", "samba", "kda", "full"} <= words
    symbols = {t["marker"]["symbol"] for t in figure["data"] if t["mode"] != "lines"}
    assert symbols == {"circle", "square", "diamond"}


def test_hover_has_notation_strip_and_units(view):
    hovers = {
        t["customdata"][i]: text
        for t in charts.front(view)["data"]
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


def test_names_are_text_in_labels(view):
    hostile = '<a href="javascript:alert(1)">x</a>'
    points = tuple(
        replace(p, text=hostile, origin="<b>preset" if p.kind == "preset" else p.origin) for p in view.points
    )
    for draw in (charts.front, charts.front_3d, charts.layouts):
        assert "<a " not in json.dumps(draw(replace(view, points=points)))
    assert "<b>preset" not in json.dumps(charts.front(replace(view, points=points)))


def test_two_axes_and_nothing_measured(view):
    two = replace(view, axes=view.axes[::2], points=())
    assert charts.front_3d(two)["data"] == []
    for figure in (charts.front(two), charts.hypervolume(replace(two, progress=())), charts.layouts(two)):
        well_formed(figure)


def test_a_cost_of_zero_has_a_place_on_a_logarithmic_axis(view):
    first = replace(view.points[0], values=view.points[0].values | {"kv_bytes": 0.0})
    figure = charts.front(replace(view, points=(first,)))
    assert figure["data"][0]["x"] == [view.axis("kv_bytes").low]
    assert "0 B" in figure["data"][1]["hovertext"][0]

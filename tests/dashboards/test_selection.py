"""Which trials a choice means: filters, lasso, order; and the address says the same as the choice."""

import math
from urllib.parse import parse_qs

import numpy as np
import pytest

from dashboards import selection
from dashboards.choice import Choice, choose_axes
from dashboards.limits import limits_of
from dashboards.memory import Library


@pytest.fixture(scope="module")
def snapshot(url):
    from storage.store import Store

    with Store.open(url, read_only=True) as store:
        return Library(url).snapshot(store, store.study("quick"))


def shown(snapshot, **choice):
    return selection.measured(snapshot, Choice(**choice)).tolist()


def test_filters_leave_what_they_name(snapshot):
    view = snapshot.view
    holds = {
        n: {b["mixer"] for la in view.glance(n).layout.layers for b in la["branches"]}
        for n in view.measured.tolist()
    }
    assert shown(snapshot) == list(holds)
    assert shown(snapshot, mixer=["kda", "mla"]) == [n for n, own in holds.items() if {"kda", "mla"} <= own]
    assert shown(snapshot, mixer=["nothing"]) == []
    assert shown(snapshot, origin=["uniform"]) == [0, 1, 2, 3, 4, 5]
    assert shown(snapshot, origin=["uniform", "preset"]) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert shown(snapshot, rung=1) == []
    assert selection.listed(snapshot, Choice(state="unfit")).tolist() == [40]


def test_the_table_begins_with_the_newest_and_sorts_by_any_objective(snapshot):
    numbers = selection.listed(snapshot, Choice())
    assert numbers.tolist() == list(range(42, -1, -1))
    values = snapshot.view.column("latency_ms")
    for down in (False, True):
        ordered = selection.listed(snapshot, Choice(sort="latency_ms", down=down))
        known = [x for x in values[ordered] if not math.isnan(x)]
        assert known == sorted(known, reverse=down)
        assert np.isnan(values[ordered[-3:]]).all(), "what has no value stands last either way"
    assert selection.listed(snapshot, Choice(sort="number")).tolist() == list(range(43))
    with pytest.raises(ValueError, match="sorted by number or quality"):
        selection.listed(snapshot, Choice(sort="speed"))


def test_strips_begin_with_the_front(snapshot):
    view = snapshot.view
    first = selection.best_first(snapshot, Choice(), view.measured).tolist()
    front = set(view.front_numbers.tolist())
    assert set(first[: len(front)]) == front
    qualities = [view.column("quality")[n] for n in first[: len(front)]]
    assert qualities == sorted(qualities, reverse=True)


def test_a_lasso_catches_what_lies_within_it_as_drawn(snapshot):
    view = snapshot.view
    size, quality = view.column("kv_bytes"), view.column("quality")
    box = "5e6,0.2;5e8,0.2;5e8,0.7;5e6,0.7"
    wanted = [n for n in view.measured.tolist() if 5e6 < size[n] < 5e8 and 0.2 < quality[n] < 0.7]
    assert 0 < len(wanted) < len(view.measured)
    assert selection.caught(snapshot, Choice(area=box), view.measured).tolist() == wanted
    assert sorted(selection.listed(snapshot, Choice(area=box)).tolist()) == wanted
    # A slanted line is straight where it is drawn: on a logarithmic axis, between logarithms.
    corner = "1e6,0;1e10,0;1e10,1"
    slope = [n for n in view.measured.tolist() if quality[n] < (math.log10(size[n]) - 6) / 4]
    assert selection.caught(snapshot, Choice(area=corner), view.measured).tolist() == slope


def test_a_hollow_shape_leaves_its_hollow_out():
    corners = ((0.0, 0.0), (4.0, 0.0), (4.0, 4.0), (2.0, 1.0), (0.0, 4.0))
    points = np.array([[2.0, 0.5], [2.0, 2.0], [0.5, 2.0], [3.5, 2.0], [5.0, 1.0], [-1.0, 1.0]])
    assert selection.inside(points, corners).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize(
    "area", ["1,2", "1,2;3,4", "a,b;c,d;e,f", "1,2;3,4;5", "1,2;3,4;nan,6", "1,2;3,4;inf,1", ";;;"]
)
def test_what_is_no_lasso_is_told(area):
    with pytest.raises(ValueError, match="at least three corners"):
        Choice(area=area).vertices()


def test_an_address_says_its_choice_and_nothing_else():
    choice = Choice(
        x="latency_ms", mixer=["kda", "mla"], origin=["found"], sort="quality", down=True, pick=[3, 1], page=4
    )
    query = parse_qs(choice.query(page=4))
    said = {
        name: values if name in ("mixer", "origin", "pick") else values[0] for name, values in query.items()
    }
    assert Choice.model_validate(said) == choice
    assert Choice().query() == ""
    assert "page" not in choice.query(sort="number"), "another order begins at its first page"


def test_the_third_axis_is_what_is_left_or_nothing(snapshot):
    axes = snapshot.view.axes
    names = [axis and axis.name for axis in choose_axes(axes, "latency_ms", None, None)]
    assert names == ["latency_ms", "quality", "kv_bytes"]
    assert choose_axes(axes, None, None, "none")[2] is None
    assert choose_axes(axes, "kv_bytes", "quality", "kv_bytes")[2].name == "latency_ms"


def test_bounds_are_read_in_the_words_of_a_configuration():
    texts = [
        "kv_bytes@128k<=4GiB",
        "latency_ms >= 2ms",
        "full not last",
        "kda<=many",
        7,
        "kv_bytes<=" + "9" * 400,
    ]
    found = [(one.name, one.bound, one.upper) for one in limits_of({"space": {"constraints": texts}})]
    assert found == [("kv_bytes@131072", 4 * 2.0**30, True), ("latency_ms", 2.0, False)]
    assert limits_of({}) == limits_of({"space": None}) == ()

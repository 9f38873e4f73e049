"""The section that says why: every word is text, every picture is well-formed and has its numbers beside it."""

import json
from dataclasses import replace

import plotly.graph_objects
import pytest

from dashboards.reasons import (
    Effect,
    Effects,
    Importance,
    Ranking,
    Ratio,
    Reasons,
    Share,
    Trust,
    Weight,
)
from dashboards.report import write_report
from dashboards.why import why

FAMILIES = {"full": "attention", "kda": "delta"}
TRUST = Trust(trials=20, folds=5, rank_correlation=0.8, by_chance=0.4, error=0.03, spread=0.1)


def reasons(mixer="kda"):
    """Numbers as a search might give them, with a mixer of any name."""
    ranking = Ranking(
        weights=(Weight(name="1", share=0.7), Weight(name="0", share=0.2), Weight(name="all", share=0.1)),
        by_chance=0.4,
    )
    mixers = Ranking(weights=(Weight(name=mixer, share=1.0),), by_chance=0.5)
    importance = tuple(
        Importance(objective=name, trials=20, top=7, positions=ranking, mixers=mixers)
        for name in ("quality", "front")
    )
    cells = tuple(
        Effect(position=position, mixer=name, change=0.1, low=0.05 - 0.1 * position, high=0.15, seen=3)
        for position in (0, 1)
        for name in ("full", mixer)
    )
    shares = tuple(
        Share(position=position, mixer=name, front=n, front_of=4, rest=8, rest_of=16, chance=0.2)
        for position in (0, 1)
        for name, n in (("full", 1), (mixer, 3))
    )
    ratios = tuple(
        Ratio(
            name=mixer, family=family, layers=1, of=2, ratio="1:1", trials=3, on_front=1, mean=0.5, deviation=0.1,
            best=0.7, best_trial=2, best_layout=f"full {mixer}",
        )
        for family in (False, True)
    )  # fmt: skip
    return Reasons(
        study="quick", objective="quality", maximise=True, trials=21, inside=20, on_front=4, layers=2,
        importance=importance, shares=shares, ratios=ratios, progress=(), said=(f"{mixer} matters most.",),
        effects=Effects(objective="quality", trials=20, layouts=20, front_layouts=4, trust=TRUST, cells=cells),
    )  # fmt: skip


def test_every_picture_is_well_formed_and_has_its_numbers():
    made = why(reasons(), FAMILIES)
    assert [picture.key for picture in made.pictures] == [
        "why_importance",
        "why_effects",
        "why_shares",
        "why_ratios",
    ]
    for picture in made.pictures:
        json.dumps(picture.figure, allow_nan=False)
        plotly.graph_objects.Figure(picture.figure)
        assert picture.table.rows
        assert all(len(row.entries) == len(picture.table.columns) for row in picture.table.rows)
    assert "1 has mixers or sizes that the space does not offer" in made.lead


def test_bars_and_shares_hold_the_numbers():
    importance, effects, shares, ratios = why(reasons(), FAMILIES).pictures
    bars = importance.figure["data"][0]
    assert dict(zip(bars["y"], bars["x"], strict=True)) == {
        "layer 1": 20.0,
        "layer 2": 70.0,
        "shared settings": 10.0,
    }
    texts = [note["text"] for note in effects.figure["layout"]["annotations"]]
    assert texts == ["+.10 ± .05", "+.10 ± .05", "(+.10 ± .10)", "(+.10 ± .10)"]
    kda = next(trace for trace in shares.figure["data"] if trace["name"] == "K kda")
    assert dict(zip(kda["y"], kda["x"], strict=True))["layer 1, front"] == 75.0
    assert ratios.figure["data"][0]["y"] == [0.5] and len(ratios.table.rows) == 2


def test_the_letters_of_mixers_that_agree_stand_apart():
    (row, _) = reasons().ratios
    names = [f"m{letter}" for letter in "abcdefghijkl"]
    rows = [
        replace(row, name=name, layers=layers, of=3, mean=0.5 if layers == 1 else 0.05 * i)
        for i, name in enumerate(names)
        for layers in (1, 3)
    ]
    picture = why(replace(reasons(), ratios=tuple(rows)), dict.fromkeys(names, "delta")).pictures[-1]
    traces = picture.figure["data"]
    where = [
        (x, y, side)
        for trace in traces
        for x, y, text, side in zip(trace["x"], trace["y"], trace["text"], trace["textposition"], strict=True)
        if text
    ]
    assert len(where) == len(set(where)), "two letters on one side of one place"
    assert sum(x == 1 for x, *_ in where) < len(names), "there is no room for twelve"
    assert all(trace["text"][1] for trace in traces), "the ends, which are apart, all say whose they are"


@pytest.mark.parametrize("trust", [None, replace(TRUST, rank_correlation=0.1)])
def test_a_surrogate_that_foretells_nothing_has_no_picture(trust):
    found = reasons()
    made = why(replace(found, effects=replace(found.effects, trust=trust)), FAMILIES)
    assert "why_effects" not in [picture.key for picture in made.pictures]


def test_what_cannot_be_weighed_has_no_picture():
    found = reasons()
    none = tuple(replace(item, why_not="it is too early") for item in found.importance)
    made = why(replace(found, importance=none), FAMILIES)
    assert "why_importance" not in [picture.key for picture in made.pictures]


def test_hostile_names_are_text(store, hostile, tmp_path):
    study = store.study("quick")
    path = tmp_path / "report.html"
    write_report(store, study, path, reasons(hostile))
    text = path.read_text(encoding="utf-8")
    assert "Why these layers" in text and "&lt;img src=x onerror" in text
    assert "<img src=x" not in text and "<script>alert" not in text
    figures = [picture.figure for picture in why(reasons(hostile), FAMILIES).pictures]
    assert all("<img" not in json.dumps(figure) for figure in figures)


def test_a_report_without_reasons_has_no_section(store, tmp_path):
    path = tmp_path / "report.html"
    write_report(store, store.study("quick"), path)
    assert "Why these layers" not in path.read_text(encoding="utf-8")
    write_report(store, store.study("empty"), path, reasons())
    assert "Why these layers" not in path.read_text(encoding="utf-8")

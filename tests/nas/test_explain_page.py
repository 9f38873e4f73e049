"""`nas explain` as people and scripts meet it, and its section of the report."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.reasons import Effect, Ranking, Reasons, Share, Weight
from nas.cli.explain_page import bar, change, print_reasons, share_strip
from nas.explain.reasons import reasons
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord
from storage.store import Store

Run = Callable[..., Any]
TRIALS = 24


FAMILIES = {"full": "attention", "window": "sparse", "kda": "delta"}
PRICES = {"full": (3.0, 1000.0), "window": (2.0, 300.0), "kda": (1.0, 20.0)}


@pytest.fixture
def searched(url: str) -> str:
    """A study in which the first layer decides, with one preset from outside of the space."""
    rng = random.Random(3)
    axes = (
        Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
        Axis(name="latency_ms", maximise=False, low=1.0, high=16.0, log=True, unit="ms"),
        Axis(name="kv_bytes", maximise=False, low=1.0, high=2.0**16, log=True, unit="bytes"),
    )
    with Store.open(url) as store:
        config = {"target": {"context": 64}}
        study = store.create_study(name="tiny", config=config, config_hash="x", axes=axes, families=FAMILIES)
        for number in range(TRIALS):
            mixers = [rng.choice(list(PRICES)) for _ in range(2)]
            params: dict[str, Any] = {f"{p}.mixer": mixer for p, mixer in enumerate(mixers)}
            params |= {f"{p}.window.size": rng.choice((8, 16)) for p in (0, 1) if mixers[p] == "window"}
            trial = store.add_trial(
                study,
                NewTrial(
                    layout=LayoutRecord(
                        key=str(number),
                        text=" ".join(mixers),
                        layers=tuple(
                            {"branches": [{"mixer": m, "settings": {}}], "channel": {"mixer": "swiglu"}}
                            for m in mixers
                        ),
                    ),
                    origin="mistral" if number == 0 else "search",
                    params={} if number == 0 else params,
                    sampler_attrs={},
                    costs={
                        "latency_ms": sum(PRICES[m][0] for m in mixers),
                        "kv_bytes": sum(PRICES[m][1] for m in mixers),
                        "params": 7.0,
                    },
                    layer_costs=(),
                    evaluation_key=str(number),
                ),
            )
            quality = (0.8 if mixers[0] == "full" else 0.4) + rng.gauss(0, 0.02)
            attempt = store.start_trial(study, trial.number)
            done = ResultRecord(
                rung=0, quality=quality, scores={"mqar": quality}, details={}, steps=1, tokens=1, train_s=1.0,
                worker_s=1.0, seed=0,
            )  # fmt: skip
            assert store.finish_trial(study, trial.number, attempt, done)
    return url


@pytest.fixture
def found(searched: str) -> Reasons:
    with Store.open(searched, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        made = reasons(study, store.trials(study))
    assert made is not None
    return made


def test_it_answers_with_one_object(run: Run, searched: str) -> None:
    said = run("explain", "--study", "tiny", "--storage", searched, "--json")
    assert said.code == 0 and said.err == ""
    answer = said.json
    assert set(answer) == {field.name for field in fields(Reasons)}
    assert answer["study"] == "tiny" and answer["objective"] == "quality" and answer["maximise"] is True
    assert answer["trials"] == TRIALS and answer["layers"] == 2
    assert [item["objective"] for item in answer["importance"]] == ["quality", "front"]
    assert answer["inside"] == TRIALS - 1
    cells = {(cell["position"], cell["mixer"]) for cell in answer["effects"]["cells"]}
    assert cells == {(position, mixer) for position in (0, 1) for mixer in ("full", "kda", "window")}
    for cell in answer["effects"]["cells"]:
        assert cell["low"] <= cell["change"] <= cell["high"]
    assert len(answer["progress"]) == TRIALS
    front = run("front", "--study", "tiny", "--storage", searched, "--json").json
    assert answer["on_front"] == len(front)
    assert sum(row["front"] for row in answer["shares"] if row["position"] == 0) == len(front)
    assert json.loads(said.out, parse_constant=lambda name: pytest.fail(name)) == answer


def test_for_people_it_is_a_page_of_sentences_and_tables(run: Run, searched: str) -> None:
    said = run("explain", "--study", "tiny", "--storage", searched)
    assert said.code == 0 and said.err == ""
    answer = run("explain", "--study", "tiny", "--storage", searched, "--json").json
    first, *lines = said.out.splitlines()
    assert f"study 'tiny', quality · {TRIALS} trained layouts, {answer['on_front']} on the front" in first
    for line in answer["said"]:
        assert line in said.out
    assert re.search(r"Layer 1 matters most: full there is worth \+\.(3[5-9]|4[0-5]) ± ", said.out)
    assert "1 has mixers or sizes that the space does not offer" in said.out
    for title in ("What stands in each layer", "What quality is expected", "(PED-ANOVA)", "Hypervolume over"):
        assert title in said.out
    assert any("▞" in line and "kda" in line for line in lines), "a mark besides the colour"


def test_a_task_can_be_explained_and_a_cost_is_refused(run: Run, refused: Any, searched: str) -> None:
    place = ("--study", "tiny", "--storage", searched)
    assert run("explain", *place, "--objective", "mqar", "--json").json["objective"] == "mqar"
    assert "counted, not learnt" in refused("explain", *place, "--objective", "kv_bytes")
    assert "did you mean quality" in refused("explain", *place, "--objective", "qualty")


def test_few_trials_and_none(run: Run, config_file: Callable[..., str], url: str) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 2)
    said = run("explain", "--study", "tiny", "--storage", url)
    assert (
        said.code == 0 and "it is too early: 1 trained layout of" in said.out and "PED-ANOVA)" not in said.out
    )
    with Store.open(url) as store:
        study = store.study("tiny")
        assert study is not None
        store.create_study(
            name="bare", config=study.config, config_hash="x", axes=study.axes, families=study.families
        )
    said = run("explain", "--study", "bare", "--storage", url)
    assert said.code == 4 and said.out == "" and "no finished trial yet" in said.err
    said = run("explain", "--study", "bare", "--storage", url, "--json")
    assert said.code == 4 and said.json is None


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_it_fits_the_terminal(found: Reasons, width: int) -> None:
    stream = StringIO()
    out = Console(file=stream, width=width, force_terminal=True, color_system=None)
    print_reasons(found, FAMILIES, out)
    lines = stream.getvalue().splitlines()
    # Sentences are wrapped by the terminal itself.
    said = ("Why these", "What quality", "± holds", "  left out", "1 has mixers")
    assert [line for line in lines if len(line.rstrip()) > width and not line.startswith(said)] == []
    assert all(f"layer {layer}" in stream.getvalue() for layer in (1, 2))


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(0.5, 0.0, 10) == "█████·····"
    assert bar(0.5, 0.2, 10) == "██│██·····"
    assert bar(0.2, 0.5, 10) == "██···│····"
    assert bar(1.0, 1.0, 4) == "████" and bar(0.0, 0.0, 4) == "····"


def test_a_strip_shares_its_length() -> None:
    def item(mixer: str, front: int, rest: int) -> Share:
        return Share(position=0, mixer=mixer, front=front, front_of=4, rest=rest, rest_of=3, chance=1.0)

    items = [item("full", 1, 3), item("kda", 3, 0)]
    families = {"full": "attention", "kda": "delta"}
    assert share_strip(items, on_front=True, width=8, families=families).plain == "██▞▞▞▞▞▞"
    assert share_strip(items, on_front=False, width=8, families=families).plain == "████████"
    assert share_strip([item("kda", 0, 0)], on_front=True, width=8, families=families).plain == ""


@pytest.mark.parametrize(
    ("low", "x", "high", "seen", "text"),
    [
        (0.09, 0.12, 0.15, 3, "+.12 ± .03"),
        (-0.15, -0.12, -0.09, 3, "−.12 ± .03"),
        (-0.01, 0.02, 0.05, 3, "(+.02 ± .03)"),
        (0.09, 0.12, 0.15, 0, "+.12 ± .03?"),
        (0.002, 0.004, 0.006, 1, "+.004 ± .002"),
        (-0.05, 0.001, 0.052, 1, "(.00 ± .05)"),
        (1.0, 3.0, 5.0, 1, "+3.0 ± 2.0"),
    ],
)
def test_a_change_stands_with_its_doubt(low: float, x: float, high: float, seen: int, text: str) -> None:
    assert change(Effect(position=0, mixer="kda", change=x, low=low, high=high, seen=seen)) == text


def test_the_report_says_why(run: Run, searched: str, found: Reasons, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run("report", "--study", "tiny", "--storage", searched, "-o", page).code == 0
    text = page.read_text()
    assert "<h2>Why these layers</h2>" in text
    for key in ("why_importance", "why_effects", "why_shares", "why_ratios"):
        assert text.count(f'id="figure-{key}"') == text.count(f'data-inline="figure-{key}"') == 1
    from html import unescape

    words = unescape(re.sub(r"<[^>]+>", "", text))
    for line in found.said:
        assert line in words


def test_a_ranking_says_how_much_chance_gives() -> None:
    from nas.explain.words import heaviest

    weights = (Weight(name="2", share=0.6), Weight(name="0", share=0.4))
    assert heaviest(Ranking(weights=weights, by_chance=0.5)) == "2"
    assert heaviest(Ranking(weights=weights, by_chance=0.6)) is None
    assert heaviest(Ranking()) is None

"""A study that tried its whole space becomes a table that searches and stopping rules are replayed on."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import early_stopping, layout_table, search_problems, table_facts
from search_space.vocabulary import read
from storage.store import Store


def test_a_study_of_a_whole_space_becomes_a_table(
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = config_file(
        {
            "sampler": "grid",
            "trials": 40,
            "space": {
                "mixers": ["full", "shortconv"],
                "settings": {"full": {"kv_heads": [2]}, "shortconv": {"taps": [4]}},
                "channels": ["none"],
            },
            "rungs": {"shares": [0.5], "keep": 1},
        }
    )
    assert run("search", "--config", path, "--storage", url).code == 0
    output = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", ["layout_table", url, "--study", "tiny", "--output", str(output)])
    layout_table.main()
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["layout"] for row in rows}) == 4
    with Store.open(url, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        trials = {trial.layout.text: trial for trial in store.trials(study)}
    assert len(trials) > 4, "presets outside the space are tried too, and left out of the table"
    for row in rows:
        trial = trials[row["layout"]]
        assert float(row["quality@0.5"]) == pytest.approx(trial.results[0].quality, rel=1e-5)
        assert float(row["quality"]) == pytest.approx(trial.results[1].quality, rel=1e-5)
        assert float(row["mqar"]) == pytest.approx(trial.results[1].scores["mqar"], rel=1e-5)
        assert int(row["kv_bytes"]) == trial.costs["kv_bytes"] and int(row["params"]) == trial.costs["params"]
        assert float(row["latency_ms"]) == pytest.approx(trial.costs["latency_ms"], rel=1e-5)
        assert len(read(row["layout"]).layers) == 2
    assert (tmp_path / "table.json").read_text().startswith('{\n  "layouts": 4,\n  "seed": 0')
    # So few steps teach nothing, and a search needs something to find.
    for place, row in enumerate(rows):
        row["quality"] = str(place / 8)
    with output.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    problem = search_problems.layout_table(output, costs=("latency_ms", "kv_bytes"))
    assert problem.name == "table"
    curves = early_stopping.read_table(f"{output}:kv_bytes")
    assert curves.shares == (0.5, 1.0) and curves.costs == ("kv_bytes",) and curves.values.shape == (4, 2, 2)
    with pytest.raises(ValueError, match="has no cost watts: it has latency_ms, kv_bytes, params"):
        early_stopping.read_table(f"{output}:watts")


def test_the_table_of_hybrids_is_whole() -> None:
    """Every pattern of four layers over six mixers, once, with scores on the way that a rung could have seen."""
    problem = search_problems.problem_of("hybrids")
    assert problem.size == 6**4
    curves = early_stopping.read_table(early_stopping.HYBRIDS)
    assert curves.values.shape == (6**4, 3, 3) and curves.shares == (0.11, 0.33, 1.0)
    assert (curves.values[:, :, 0] >= 0).all() and (curves.values[:, :, 0] <= 1).all()
    # Costs are the pattern's own: latency adds up over layers, so that an exchange of two changes nothing.
    table = pd.read_csv(table_facts.TABLE)
    sorted_layers = table["layout"].map(lambda text: " ".join(sorted(map(str, read(text).layers))))
    for cost in ("latency_ms", "kv_bytes", "params"):
        spread = table.groupby(sorted_layers)[cost].agg(["min", "max"])
        assert np.allclose(spread["min"], spread["max"], rtol=1e-5)


def test_the_second_seed_of_the_hybrids_is_a_quarter_of_them_trained_anew() -> None:
    first, second = (pd.read_csv(path).set_index("layout") for path in (table_facts.TABLE, table_facts.AGAIN))
    assert second.index.is_unique and len(second) >= len(first) / 4
    same = first.loc[second.index]
    for cost in ("params", "kv_bytes"):
        assert (same[cost] == second[cost]).all()
    assert (same["quality"] != second["quality"]).mean() > 0.9
    # Drawn by chance: every mixer stands in every place, about as often as in the whole table.
    layers = pd.DataFrame([[str(layer) for layer in read(text).layers] for text in second.index])
    assert layers.apply(lambda column: column.value_counts(normalize=True)).min().min() > 0.1


def test_what_a_table_says_is_what_its_rows_say() -> None:
    layouts = ["2*full/none", "full/none shortconv/none", "shortconv/none full/none", "2*shortconv/none"]
    table = pd.DataFrame(
        {
            "layout": layouts,
            "quality@0.3": [0.1, 0.1, 0.1, 0.0],
            "quality": [0.9, 0.7, 0.3, 0.1],
            "latency_ms": [4.0, 3.0, 3.0, 2.0],
            "kv_bytes": [2, 1, 1, 0],
        }
    )
    assert table_facts.by_place(table) == {"quality": {"full": [0.8, 0.6], "shortconv": [0.2, 0.4]}}
    assert [row["layout"] for row in table_facts.front(table)] == [layouts[0], layouts[1], layouts[3]]
    again = table[:3].assign(quality=[0.5, 0.6, 0.4])
    told = table_facts.agreement(table, again)
    assert told["layouts"] == 3 and told["quality"]["mean_difference"] == pytest.approx(0.2)
    assert told["quality"]["kendall_tau"] == pytest.approx(1 / 3, abs=1e-3)

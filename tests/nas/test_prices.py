"""Prices: exact costs by name, and latencies that are measured once for a machine and then looked up."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas import prices
from nas.config import resolve
from nas.plan import Plan, make_plan
from nas.prices import LatencyBook, cost_json, open_machine_table, prefill_frame, price
from search_space.cost import at_depth, cache_bytes, layout_cost
from search_space.frame import Frame
from search_space.vocabulary import read
from storage.store import Store
from trainers.measure import Latency

FRAME = Frame(width=64, train_length=64, context=64)
LAYER = read("full").layers[0]


@pytest.fixture
def plan(tiny: Callable[..., dict[str, Any]]) -> Plan:
    return make_plan(resolve(tiny()))


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/machine.db") as opened:
        yield opened


def test_a_layer_is_looked_up_in_the_study_then_in_the_machine_then_measured(
    store: Store, machine: Store, latencies: Any, tmp_path: Path
) -> None:
    book = LatencyBook(store=store, machine=machine, device="cpu")
    assert book.unknown([LAYER], FRAME) == [LAYER]
    first = book.layer(LAYER, FRAME)
    assert latencies.asked == ["full"] and book.unknown([LAYER], FRAME) == []
    assert store.latencies() == machine.latencies() == [first]
    assert book.layer(LAYER, FRAME) == first
    with Store.open(f"sqlite:///{tmp_path}/other.db") as other:
        assert LatencyBook(store=other, machine=machine, device="cpu").layer(LAYER, FRAME) == first
        assert other.latencies() == [first]
    assert latencies.asked == ["full"]
    # What the study's own database says stands above the machine's table.
    store.put_latency(replace(first, latency_ms=77.0))
    assert book.layer(LAYER, FRAME).latency_ms == first.latency_ms  # one search goes by one number
    assert replace(book, seen={}).layer(LAYER, FRAME).latency_ms == 77.0
    assert machine.latencies() == [first]


def test_another_frame_or_phase_or_the_whole_is_another_measurement(store: Store, latencies: Any) -> None:
    book = LatencyBook(store=store, machine=None, device="cpu")
    book.layer(LAYER, FRAME)
    book.layer(LAYER, FRAME, "prefill")
    book.layer(LAYER, replace(FRAME, context=128))
    book.network(read("full"), FRAME)
    assert len(store.latencies()) == 4
    assert latencies.asked.count("whole full") == 1
    book.network(read("full"), FRAME)
    assert latencies.asked.count("whole full") == 1


def test_again_measures_what_is_known_and_replaces_it(
    store: Store, machine: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    LatencyBook(store=store, machine=machine, device="cpu").layer(LAYER, FRAME)
    slow = Latency(latency_ms=99.0, spread_ms=1.0, repetitions=7)
    monkeypatch.setattr(prices, "measure_layer", lambda *_args, **_options: slow)
    again = LatencyBook(store=store, machine=machine, device="cpu", again=True)
    assert again.layer(LAYER, FRAME).latency_ms == 99.0
    assert [record.latency_ms for record in machine.latencies()] == [99.0]
    assert [record.latency_ms for record in store.latencies()] == [99.0]


def test_a_known_latency_is_not_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    book = LatencyBook(store=store, machine=None, device="cpu")
    book.layer(LAYER, FRAME)
    monkeypatch.setattr(store, "put_latency", lambda _record: pytest.fail("written again"))
    book.layer(LAYER, FRAME)


def test_a_machine_table_that_cannot_be_used_is_said_and_done_without(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "text.db").write_text("no database, only words " * 100)
    assert open_machine_table(str(tmp_path / "text.db"), said.append) is None
    assert open_machine_table(str(tmp_path / "text.db" / "below.db"), said.append) is None
    assert len(said) == 2 and all("every latency is measured anew" in line for line in said)
    assert open_machine_table(None, said.append) is None
    opened = open_machine_table(str(tmp_path / "new" / "folder" / "latency.db"), said.append)
    assert opened is not None
    opened.close()
    assert len(said) == 2


def test_a_price_is_exact_and_its_latency_the_sum_over_the_network(plan: Plan, latencies: Any) -> None:
    pattern = read("full kda")
    found = price(plan, pattern, LatencyBook(store=None, machine=None, device="cpu"))
    network = at_depth(pattern, plan.target, "stack")
    assert len(network) == 4
    exact = layout_cost(network, plan.target)
    assert found.costs["params"] == exact.params
    assert found.costs["kv_bytes"] == exact.stored_bytes == cache_bytes(network, plan.target, 64)
    assert found.costs["read_bytes"] == exact.read_bytes
    for context in (32, 128):
        assert found.costs[f"kv_bytes@{context}"] == cache_bytes(network, plan.target, context)
    # Two bytes for each of keys and values, two layers of four are full attention.
    grown = found.costs["kv_bytes@128"] - found.costs["kv_bytes@32"]
    assert grown == 2 * (128 - 32) * 2 * plan.target.width * 2
    made = {
        text: latencies.layer(read(text).layers[0], FRAME, "", device="").latency_ms
        for text in ("full", "kda")
    }
    assert found.costs["latency_ms"] == pytest.approx(2 * made["full"] + 2 * made["kda"])
    assert [costs["latency_ms"] for costs in found.layer_costs] == [made["full"], made["kda"]]
    assert 2 * sum(costs["kv_bytes"] for costs in found.layer_costs) == found.costs["kv_bytes"]
    assert 2 * sum(costs["params"] for costs in found.layer_costs) == found.costs["params"]


def test_costs_as_json_add_up_by_layer_and_by_tensor() -> None:
    answer = cost_json(read("full window[size=16]"), replace(FRAME, depth=6), [8, 64], "stack")
    assert (answer["layers"], [entry["context"] for entry in answer["cache"]]) == (6, [8, 64])
    for entry in answer["cache"]:
        assert sum(item["stored_bytes"] for item in entry["by_layer"]) == entry["stored_bytes"]
        assert sum(item["read_bytes"] for item in entry["by_layer"]) == entry["read_bytes"]
        for item in entry["by_layer"]:
            assert sum(item["tensors"].values()) == item["stored_bytes"]
    assert sum(item["params"] for item in answer["cache"][0]["by_layer"]) == answer["params"]


def test_a_prompt_is_bounded_unless_it_is_asked_for() -> None:
    long = replace(FRAME, context=131072)
    assert prefill_frame(long).context == prices.PREFILL_TOKENS < 131072
    assert prefill_frame(FRAME).context == 64
    assert prefill_frame(long, 9000).context == 9000


def test_a_machine_table_of_an_older_release_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "latency.db"
    dump = Path(__file__).parents[1] / "storage" / "data" / "version_1.sql"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(dump.read_text())
    said: list[str] = []
    table = open_machine_table(str(path), said.append)
    assert table is not None and said == []
    with closing(table):
        assert len(table.latencies()) == 12
    assert [found.name for found in tmp_path.iterdir()] == ["latency.db"]  # nobody needs a copy of a cache

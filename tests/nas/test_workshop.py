"""What the dashboard asks of the upper floor: prices as `nas cost` has them, reasons, and what seeds say."""

import json
import os
import shlex
import signal
import threading
import time

import pytest
from fastapi.testclient import TestClient

from dashboards.app import create_app
from dashboards.desk import Missing
from nas.cli.main import main
from nas.config import resolve
from nas.objectives import Quantity
from nas.workshop import OwnProcess, doubt, prices
from search_space.cost import at_depth, layout_cost
from search_space.vocabulary import VOCABULARY, read
from storage.glances import Glance
from storage.records import Axis, LayoutRecord

CONFIG = {"target": {"width": 256, "depth": 10, "context": 8192, "vocabulary": 1000, "fill": "stack"}}
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=1024.0, log=True),
)


@pytest.mark.parametrize("fill", ["stack", "stretch"])
@pytest.mark.parametrize("layout", ["3*kda mla", "window[size=512] full mamba2/none"])
def test_a_price_is_what_its_command_prints(capsys, layout, fill):
    config = {"target": CONFIG["target"] | {"fill": fill}}
    found = prices(config, layout, [(8192, 1), (1024, 4)], None)
    assert [(one.context, one.batch) for one in found] == [(8192, 1), (1024, 4)]
    for one in found:
        words = one.command.replace(f"'{layout}'", "LAYOUT").split()
        assert main([*(layout if word == "LAYOUT" else word for word in words[1:]), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (one.params, one.stored_bytes, one.read_bytes) == (
            told["params"],
            told["cache"][0]["stored_bytes"],
            told["cache"][0]["read_bytes"],
        )
        assert sum(part.stored_bytes for part in one.by_layer) == one.stored_bytes
        assert sum(part.count for part in one.by_layer) == told["layers"] == 10
        stored = {}
        for part in told["cache"][0]["by_layer"]:
            stored[part["layer"]] = stored.get(part["layer"], 0) + part["stored_bytes"]
        ours = {}
        for part in one.by_layer:
            ours[part.layer] = ours.get(part.layer, 0) + part.stored_bytes
        assert ours == stored, "every layer of the network is gathered under its own of the pattern"


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_mixer_costs_what_it_was_searched_with_and_what_the_command_prints(capsys, name):
    target = {**CONFIG["target"], "depth": 2, "train_length": 512, "contexts": [1024, 16384]}
    config = resolve({"target": target}).target
    layout = f"2*{name}"  # alone, some are the names of presets too
    for context in (8192, 1024, 65536):
        (found,) = prices({"target": target}, layout, [(context, 1)], None)
        at = Quantity(base="kv_bytes", context=context).frame(config.frame())
        cost = layout_cost(at_depth(read(layout), at, config.fill), at)
        exact = (cost.params, cost.stored_bytes, cost.read_bytes)
        assert (found.params, found.stored_bytes, found.read_bytes) == exact
        assert main([*shlex.split(found.command)[1:], "--json"]) == 0
        (cache,) = (told := json.loads(capsys.readouterr().out))["cache"]
        assert (told["params"], cache["stored_bytes"], cache["read_bytes"]) == exact


def test_another_process_prices_and_says_what_it_cannot(tmp_path):
    own = OwnProcess(f"sqlite:///{tmp_path}/none.db")
    before = threading.active_count()
    try:
        assert own.price(CONFIG, "2*kda", [(1024, 1)]) == prices(CONFIG, "2*kda", [(1024, 1)], None)
        (wide,) = own.price(CONFIG, "2*kda", [(1024, 1)], width=512)
        assert "--width=512" in wide.command
        with pytest.raises(Missing, match="cannot be priced"):
            own.price(CONFIG, "2*kdaa", [(1024, 1)])
        with pytest.raises(Missing, match="cannot be priced"):
            own.price({"target": {"breadth": 3}}, "2*kda", [(1024, 1)])
        assert own.defaults()["target"]["width"] == 1024
        first = own._pool
        own.close()
        # Threads of the pool that outlive it race with the interpreter's end.
        assert threading.active_count() == before
        assert own.price(CONFIG, "kda", [(1024, 1)]) and own._pool is not first
    finally:
        own.close()


def test_a_process_that_died_is_started_anew(tmp_path):
    own = OwnProcess(f"sqlite:///{tmp_path}/none.db")
    try:
        assert own.price(CONFIG, "kda", [(1024, 1)])
        os.kill(own._pid.result(), signal.SIGKILL)
        with pytest.raises(Missing, match="ask again"):
            own.price(CONFIG, "kda", [(1024, 1)])
        assert own.price(CONFIG, "kda", [(1024, 1)])
    finally:
        own.close()


def test_a_process_that_is_still_starting_is_ended(tmp_path):
    own = OwnProcess(f"sqlite:///{tmp_path}/none.db")
    before = threading.active_count()
    told = []

    def ask():
        try:
            told.append(own.price(CONFIG, "kda", [(1024, 1)]))
        except Missing as refusal:
            told.append(str(refusal))

    asking = threading.Thread(target=ask)
    asking.start()
    while own._pid is None:
        time.sleep(0.001)
    own.close()
    asking.join(20)
    assert "has died" in told[0]
    assert threading.active_count() == before


def test_a_search_that_came_to_its_end_is_finished(run, config_file, url):
    client = TestClient(
        create_app(url, token="t"), base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"}
    )

    def told() -> tuple[str, int, int]:
        answer = client.get("/api/v1/studies/tiny").json()["study"]
        return answer["state"], sum(answer["counts"].values()), answer["planned"]

    search = (
        "search",
        "--config",
        config_file({"repeats": 0, "space": {"layers": 2, "mixers": ["full", "window"], "settings": {}}}),
        "--storage",
        url,
    )
    run(*search, "--trials", 2)
    assert told() == ("finished", 2, 2)
    run(*search, "--trials", 3)
    assert told() == ("finished", 3, 3)
    run(*search, "--trials", 10_000)
    state, there, planned = told()  # of a space that holds fewer
    assert state == "finished" and there == planned < 10_000


def test_reasons_come_when_they_are_worked_out(run, config_file, url):
    from storage.store import Store

    run("search", "--config", config_file(), "--storage", url, "--trials", 4)
    with Store.open(url, read_only=True) as store:
        study = store.studies()[0]
    own = OwnProcess(url)
    try:
        assert "being worked out" in own.reasons(study, 4)
        deadline = time.monotonic() + 120
        while isinstance(found := own.reasons(study, 4), str) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found.study == study.name and found.trials == 4
        # A newer state is worked out while the last reasons stand.
        assert own.reasons(study, 5).trials == 4
    finally:
        own.close()


def seen(number, *qualities, size=8.0):
    layout = LayoutRecord(key=str(number), text=f"layout {number}", layers=())
    return Glance(
        number, "done", "search", layout, {"kv_bytes": size}, 1, "", None, 1.0,
        ((0, qualities[0]),), {}, tuple((q, {}) for q in qualities[1:]),
    )  # fmt: skip


def test_seeds_give_intervals_and_chances():
    said = doubt(AXES, [seen(0, 0.50, 0.54, 0.52), seen(1, 0.51, 0.53), seen(2, 0.1, size=64.0)])
    low, high = said.intervals["quality"][0]
    assert low < 0.52 < high and set(said.intervals) == {"quality"}
    assert 0.2 < said.chances[0] < 0.8 and said.chances[2] < 0.01
    assert doubt(AXES, [seen(0, 0.5), seen(1, 0.6)]).chances == {}

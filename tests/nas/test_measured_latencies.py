"""Latencies at other contexts than the study's: the page says how to measure them, and shows them once they are."""

import html
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dashboards.app import create_app
from nas import prices as prices_module
from nas.workshop import OwnProcess
from search_space.frame import Frame
from search_space.layout import Layer
from storage.store import Store
from trainers.measure import Latency

Run = Callable[..., Any]


class Here(OwnProcess):
    """A workshop that works in this process, where latencies are made up."""

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


@pytest.fixture
def client(run: Run, config_file: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The pages of a study whose layers take as long as what they see, and as its width and batch say."""

    def layer(layer: Layer, frame: Frame, phase: str, *, device: str) -> Latency:
        del device
        scale = (frame.context if "full" in str(layer) else 8) * frame.batch * frame.width
        return Latency(latency_ms=scale / 1000 + (phase == "prefill"), spread_ms=0.1, repetitions=9)

    monkeypatch.setattr(prices_module, "measure_layer", layer)
    assert run("search", "--config", config_file(), "--storage", url, "--trials", 6).code == 0
    app = create_app(url, token="t", workshop=Here(url))
    return TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"})


def number_of(url: str, mixer: str) -> int:
    """A layout that holds a mixer."""
    with Store.open(url, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        return next(one.number for one in store.trials(study) if mixer in one.layout.text)


def timed(page: str) -> str:
    (found,) = re.findall(r'<div id="timed".*?</div>', page, re.DOTALL)
    return str(html.unescape(found))


def command_of(page: str) -> list[str]:
    (found,) = re.findall(r">(nas measure [^<]*)<", timed(page))
    return shlex.split(found)[1:]


def bars(client: TestClient, number: int, asked: str) -> list[str]:
    answer = client.get(f"/api/v1/studies/tiny/figure/layers?trial={number}{asked}").json()
    return [name for name in answer["data"][0]["y"] if "latency" in name]


# Below the study's own context, above it, and above all that it knew of.
@pytest.mark.parametrize("context", [16, 4096, 300_000])
def test_latency_by_layer_follows_the_context_once_it_is_measured_there(
    client: TestClient, run: Run, url: str, context: int
) -> None:
    number, asked = number_of(url, "full"), f"context={context}&batch=2"
    address = f"/studies/tiny/trials/{number}"
    searched = client.get(address).text
    assert "Decode latency as measured at" in timed(searched) and "nas measure" not in timed(searched)
    known = client.get(f"/api/v1{address}/price").json()
    trial = client.get(f"/api/v1{address}").json()
    assert known["latency"]["latency_ms"] == pytest.approx(trial["costs"]["latency_ms"])

    before = client.get(f"{address}?{asked}").text
    assert "it was not measured yet" in timed(before)
    assert client.get(f"/api/v1{address}/price?{asked}").json()["latency"] is None
    (bar,) = bars(client, number, f"&{asked}")
    assert bar.endswith(bars(client, number, "")[0].rpartition("<br>")[2]), "it says where it is from"
    tag = client.get(f"/api/v1/studies/tiny/figure/layers?trial={number}&{asked}").headers["etag"]

    said = run(*command_of(before), "--json")
    assert said.code == 0 and (said.json["context"], said.json["batch"]) == (context, 2)

    latency = client.get(f"/api/v1{address}/price?{asked}").json()["latency"]
    assert latency["latency_ms"] == pytest.approx(said.json["decode_ms"])
    assert sum(latency["by_layer_ms"]) == pytest.approx(latency["latency_ms"])
    assert latency["device"] == said.json["device"]
    assert latency["latency_ms"] != pytest.approx(known["latency"]["latency_ms"])
    after = client.get(f"{address}?{asked}").text
    assert f"on {latency['device']}" in timed(after) and "nas measure" not in timed(after)
    (bar,) = bars(client, number, f"&{asked}")
    assert "batch 2" in bar
    again = client.get(
        f"/api/v1/studies/tiny/figure/layers?trial={number}&{asked}", headers={"If-None-Match": tag}
    )
    assert again.status_code == 200, "who has an older picture is sent the new one"
    # What the trials were priced with stays as it is.
    assert client.get(f"/api/v1{address}/price").json() == known


def test_only_latencies_of_the_studys_own_device_are_shown(
    client: TestClient, run: Run, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = number_of(url, "full")
    address = f"/studies/tiny/trials/{number}?context=16"
    command = command_of(client.get(address).text)
    monkeypatch.setattr("trainers.measure.device_name", lambda _: "an abacus")
    monkeypatch.setattr(prices_module, "device_name", lambda _: "an abacus")
    said = run(*command)
    assert said.code == 0 and "its pages show that: this is an abacus" in said.err
    assert "it was not measured yet" in timed(client.get(address).text)


def test_a_study_is_measured_without_replacing_what_it_knows(
    run: Run, refused: Run, client: TestClient, url: str
) -> None:
    del client
    where = ("--study", "tiny", "--storage", url)
    assert "--again would replace" in refused("measure", "full", *where, "--again")
    assert "no study 'tinny'" in refused("measure", "full", "--study", "tinny", "--storage", url)
    with Store.open(url) as store:
        before = store.latencies()
        study = store.study("tiny")
        assert study is not None
        assert run("measure", "full", *where, "--json").json["layers"] == study.config["target"]["depth"]
        after = store.latencies()
        assert all(one in after for one in before) and len(after) > len(before)
        assert [one.kind for one in store.events()][-1] == "latency_measured"


def test_latencies_of_layouts_are_compared_at_the_contexts_that_were_measured(
    client: TestClient, run: Run, url: str
) -> None:
    one, other = number_of(url, "full"), number_of(url, "window")
    pair = f"pick={one}&pick={other}"
    page = client.get(f"/studies/tiny/compare?{pair}").text
    assert "Decode latency against context" in page and 'data-chart="latencies"' not in page
    told = {}
    for number in (one, other):
        command = command_of(client.get(f"/studies/tiny/trials/{number}?context=4096").text)
        told[number] = run(*command, "--json").json["decode_ms"]
    page = client.get(f"/studies/tiny/compare?{pair}").text
    assert 'data-chart="latencies"' in page
    drawn = client.get(f"/api/v1/studies/tiny/figure/latencies?{pair}").json()["data"]
    for trace, number in zip(drawn, (one, other), strict=True):
        searched = client.get(f"/api/v1/studies/tiny/trials/{number}").json()["costs"]["latency_ms"]
        assert trace["x"] == [64, 4096] and trace["y"] == pytest.approx([searched, told[number]])
    assert "take less time" not in page
    # A layer that sees all is made the cheaper one at a small context.
    with Store.open(url) as store:
        for record in store.latencies():
            if "context 64" in record.frame and "full" in record.subject:
                store.put_latency(replace(record, latency_ms=1e-6))
    page = client.get(f"/studies/tiny/compare?{pair}").text
    assert (
        f"Between 64 and 4k of context trial {other} comes to take less time a step than trial {one}." in page
    )

"""`--star`: a prefill by Star Attention, priced and measured, and refused where nothing would heed it."""

from collections.abc import Callable
from typing import Any

import pytest

from nas import prices
from search_space.frame import Frame
from search_space.layout import Layer
from trainers.measure import Latency

Run = Callable[..., Any]
CONTEXT, BLOCK = 32768, 2048


def test_cost_prices_the_prefill_alone_anew(run: Run) -> None:
    place = ("--width", 2048, "--context", "32k")
    answers = [run("cost", "2*full window", *place, *star, "--json").json for star in ((), ("--star", "2k"))]
    exact, star = answers
    assert (exact["star_block"], star["star_block"]) == (0, BLOCK)
    seen = sum(min(t // BLOCK, 1) * BLOCK + t % BLOCK + 1 for t in range(CONTEXT)) / CONTEXT
    saved = 2 * 4 * 2048 * ((CONTEXT + 1) / 2 - seen)
    flops, less = exact["flops_per_token"], star["flops_per_token"]
    assert flops["prefill"] - less["prefill"] == pytest.approx(saved)
    assert flops["decode"] == less["decode"]
    for entry, other in zip(exact["cache"], star["cache"], strict=True):
        assert entry["by_layer"] == other["by_layer"]
    said = run("cost", "full", *place, "--star", "2k").out
    assert "full attention is prefilled by Star Attention, in blocks of 2k" in said
    assert "Star" not in run("cost", "full", *place).out
    assert run("cost", "llama-3", "--star", "4k", "--json").json["star_block"] == 4096


def test_measure_runs_the_prefill_so_and_no_step(
    run: Run, config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def layer(layer: Layer, frame: Frame, phase: str, *, device: str) -> Latency:
        asked.add((str(layer), phase, frame.star_block, device))
        return Latency(latency_ms=1.0, spread_ms=0.1, repetitions=9)

    monkeypatch.setattr(prices, "measure_layer", layer)
    place = ("--config", config_file(), "--prompt", 64)
    said = run("measure", "full kda", *place, "--star", 16, "--json")
    assert said.code == 0 and (said.json["prompt"], said.json["star_block"]) == (64, 16)
    assert asked == {
        (name, *more, "cpu") for name in ("full", "kda") for more in (("decode", 0), ("prefill", 16))
    }
    assert "Star Attention, in blocks of 16" in run("measure", "full", *place, "--star", 16).out
    asked.clear()
    assert run("measure", "full", *place, "--json").json["star_block"] == 0
    assert {block for _, _, block, _ in asked} == {0}


@pytest.mark.parametrize("command", ["cost", "measure"])
def test_it_is_refused_where_it_means_nothing(refused: Callable[..., str], command: str) -> None:
    err = refused(command, "window kda|mla", "--star", "4k")
    assert "--star: there is no full attention in window kda|mla" in err and "leave it out" in err
    assert "--star: '0'" in refused(command, "full", "--star", 0)

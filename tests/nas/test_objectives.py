"""Objectives by name: each round-trips, says its way and its source, and a wrong one is refused with the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.config import meaning, resolve
from nas.objectives import (
    KINDS,
    Quantity,
    read_amount,
    read_objective,
    read_objectives,
    read_quantity_name,
    write_amount,
)
from search_space.frame import Frame

FRAME = Frame(width=64, context=1024, batch=2)
TASKS = ("mqar", "parity", "bytes")


@st.composite
def quantities(draw: st.DrawFn) -> Quantity:
    base = draw(st.sampled_from([*KINDS, *TASKS]))
    kind = Quantity(base=base).kind
    number = st.none() | st.integers(1, 2**21)
    batch = draw(number) if "batch" in kind.settings else None
    context = draw(number) if kind.contexts or "context" in kind.settings else None
    phase = draw(st.sampled_from(["decode", "prefill"])) if "phase" in kind.settings else "decode"
    return Quantity(base=base, batch=batch, context=context, phase=phase)  # type: ignore[arg-type]


@given(quantities())
def test_every_name_reads_as_what_it_was_written_from(quantity: Quantity) -> None:
    assert read_quantity_name(quantity.name, TASKS) == quantity
    again = quantity.at(FRAME)
    assert again.at(FRAME) == again and again.frame(FRAME) == quantity.frame(FRAME)


@given(quantities(), st.sampled_from(["", "min:", "max:"]))
def test_every_objective_has_a_way_and_reads_again(quantity: Quantity, way: str) -> None:
    kind = quantity.kind
    turned = way == ("min:" if kind.maximise else "max:")
    if turned and not kind.turns:
        with pytest.raises(ValueError, match="is better"):
            read_objective(way + quantity.name, TASKS, FRAME)
        return
    objective = read_objective(way + quantity.name, TASKS, FRAME)
    assert objective.maximise == (not kind.maximise if turned else kind.maximise)
    assert read_objective(objective.text, TASKS, FRAME) == objective


@pytest.mark.parametrize(
    ("text", "name", "maximise"),
    [
        ("quality", "quality", True),
        ("mqar", "mqar", True),
        ("max:params", "params", True),
        ("params", "params", False),
        ("flops", "flops_decode", False),
        ("kv_bytes@128k", "kv_bytes@131072", False),
        # What the target has anyway is not written.
        ("kv_bytes@1k", "kv_bytes", False),
        ("latency_ms[context=1024, batch=2]", "latency_ms", False),
        ("latency_ms@prefill", "latency_ms[phase=prefill]", False),
        ("latency_ms[context=4k,batch=8,phase=prefill]", "latency_ms[phase=prefill,batch=8,context=4096]", False),
        ("tokens_per_s[batch=8]", "tokens_per_s[batch=8]", True),
    ],
)  # fmt: skip
def test_names_are_canonical_at_the_target(text: str, name: str, maximise: bool) -> None:
    objective = read_objective(text, TASKS, FRAME)
    assert (objective.quantity.name, objective.maximise) == (name, maximise)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latncy_ms", "did you mean latency_ms"),
        ("mqarr", "did you mean mqar"),
        ("needle", "no objective 'needle'"),
        ("min:quality", "larger is better"),
        ("min:tokens_per_s", "larger is better"),
        ("max:latency_ms", "smaller is better"),
        ("most:params", "min: or max:"),
        ("params@128k", "not told at a context"),
        ("latency_ms@8k", r"latency_ms\[phase=prefill,context=4096\]"),
        ("latency_ms[batch=8,batch=9]", "each once"),
        ("latency_ms[size=8]", "not understood at 'size=8'"),
        ("latency_ms[phase=prefil]", "did you mean prefill"),
        ("latency_ms[]", "not understood"),
        ("latency_ms[batch=0]", "batch: '0' is not valid"),
        ("tokens_per_s[phase=prefill]", "not understood at 'phase=prefill'"),
        ("kv_bytes[context=8]", "write kv_bytes@131072"),
        ("kv_bytes@many", "context: 'many' is not a quantity"),
    ],
)
def test_a_wrong_name_is_refused_with_the_way_out(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_objective(text, TASKS, FRAME)


@pytest.mark.parametrize(
    "texts",
    [
        ["quality"], ["kv_bytes", "params"], ["quality", "mqar"], ["quality", "kv_bytes", "kv_bytes@1024"],
        ["quality", "latency_ms", "latency_ms[batch=2]"], ["quality", "params", "max:params"],
    ],
)  # fmt: skip
def test_a_study_needs_what_training_tells_and_a_cost_each_once(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="quality or a task, and at least one cost, each of them once"):
        read_objectives(texts, TASKS, FRAME)
    assert len(read_objectives(["mqar", "tokens_per_s"], TASKS, FRAME)) == 2


def test_a_study_means_the_same_however_its_objectives_are_written() -> None:
    first = resolve({"objectives": ["quality", "kv_bytes@128k", "min:params"]})
    again = resolve({"objectives": ["max:quality", "kv_bytes@131072", "params"]})
    other = resolve({"objectives": ["quality", "kv_bytes@64k", "params"]})
    assert meaning(first) == meaning(again) != meaning(other)


@given(
    st.sampled_from(["kv_bytes", "latency_ms", "params", "tokens_per_s"]),
    st.floats(1e-2, 1e13),
    st.booleans(),
)
def test_an_amount_that_is_printed_bounds_what_it_was_made_of(base: str, value: float, up: bool) -> None:
    quantity = Quantity(base=base)
    again = read_amount(write_amount(value, quantity, up=up), quantity)
    assert again >= value * (1 - 1e-9) if up else again <= value * (1 + 1e-9)
    assert again == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize(
    ("base", "text"),
    [("kv_bytes", "64ms"), ("latency_ms", "64MiB"), ("params", "64MiB"), ("params", "-3"), ("tokens_per_s", "")],
)  # fmt: skip
def test_an_amount_of_another_unit_is_refused(base: str, text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of"):
        read_amount(text, Quantity(base=base))


def test_batch_and_context_of_a_name_are_those_of_its_frame() -> None:
    quantity = read_quantity_name("latency_ms[batch=8,context=1M]", ())
    at = quantity.frame(Frame(width=64, context=1024, max_length=4096))
    assert (at.batch, at.context, at.max_length) == (8, 2**20, 2**20)
    speed = Quantity(base="tokens_per_s", batch=8)
    assert (
        speed.of_latency(4.0, FRAME) == 2000.0
        and Quantity(base="tokens_per_s").of_latency(4.0, FRAME) == 500.0
    )


Run = Callable[..., Any]


@pytest.fixture
def searched(run: Run, config_file: Callable[..., str], url: str) -> Run:
    path = config_file()

    def call(*arguments: object) -> Any:
        return run("search", "--config", path, "--storage", url, *arguments)

    return call


NAMED = ("mqar", "tokens_per_s", "kv_bytes@131072")


def test_a_search_toward_a_task_a_speed_and_a_far_cache(
    searched: Run, run: Run, url: str, tmp_path: Path
) -> None:
    chosen = [part for name in NAMED for part in ("--objective", name)]
    said = searched(*chosen, "--json")
    assert said.code == 0, said.err
    assert "highest mqar · highest tokens a second · lowest cache at 128k" in said.err
    place = ("--study", "tiny", "--storage", url)
    trials = {
        trial["trial"]: run("show", trial["trial"], *place, "--json").json for trial in said.json["front"]
    }
    for row in said.json["front"]:
        shown = trials[row["trial"]]
        assert row["tokens_per_s"] == pytest.approx(1000 / row["latency_ms"])
        assert row["kv_bytes@131072"] == shown["costs"]["kv_bytes@131072"] > row["kv_bytes"] - 1
    everything = [run("show", number, *place, "--json").json for number in range(6)]
    points = [(-one["scores"]["mqar"], -one["costs"]["tokens_per_s"], one["costs"]["kv_bytes@131072"]) for one in everything]  # fmt: skip
    best = {
        number
        for number, one in enumerate(points)
        if not any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in points)
    }
    assert {row["trial"] for row in said.json["front"]} == best
    shown = run("front", *place)
    assert (
        shown.code == 0 and "cache 128k" in shown.out and "tokens/s" in shown.out and "  mqar\n" in shown.out
    )
    assert "tokens a second" in run("show", 0, *place).out
    report = tmp_path / "report.html"
    assert run("report", *place, "-o", report).code == 0 and "tokens a second" in report.read_text()
    assert searched(*chosen, "--trials", 7).code == 0
    changed = searched("--objective", "mqar", "--objective", "kv_bytes", "--trials", 8)
    assert changed.code == 2 and "objectives" in changed.err


def test_a_prefill_of_a_batch_is_measured_as_such(searched: Run) -> None:
    said = searched("--objective", "quality", "--objective", "latency_ms[phase=prefill,batch=4,context=128]", "--json")  # fmt: skip
    assert said.code == 0 and "measuring the prefill latency of" in said.err
    assert all("latency_ms[phase=prefill,batch=4,context=128]" in row for row in said.json["front"])


def test_a_front_is_drawn_anew_by_what_is_stored(searched: Run, run: Run, url: str, refused: Any) -> None:
    searched()
    place = ("front", "--study", "tiny", "--storage", url)
    drawn = run(*place, "--objectives", "mqar,max:params", "--json").json
    params = {trial["trial"]: trial["params"] for trial in run("trials", *place[1:], "--json").json}
    scores = {trial["trial"]: trial["scores"]["mqar"] for trial in run("trials", *place[1:], "--json").json}
    for row in drawn:
        mine = (scores[row["trial"]], params[row["trial"]])
        others = [(scores[one], params[one]) for one in params]
        assert not any(one != mine and one[0] >= mine[0] and one[1] >= mine[1] for one in others)
    # Of equal scores those with the most parameters are left.
    assert drawn and max(params.values()) in [row["params"] for row in drawn]
    assert run(*place, "--objectives", "mqar,tokens_per_s").code == 0
    err = refused(*place, "--objectives", "mqar,latency_ms[phase=prefill,batch=4]")
    assert "hold no latency_ms[phase=prefill,batch=4]" in err and "they hold" in err

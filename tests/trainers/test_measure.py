"""Measuring: at the end of the context, on one thread, of what was asked for, and never more than the machine holds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from search_space.frame import Frame
from search_space.mixers.full import FullMixer
from search_space.state import KeyValue
from search_space.vocabulary import VOCABULARY, read
from trainers import measure
from trainers.measure import check_device, device_name, frame_text, measure_layer, measure_network
from trainers.model import Block, Stack

FRAME = Frame(width=32, train_length=32, context=48, batch=2, dtype="bfloat16")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURING_S", 0.0)


@pytest.mark.parametrize("text", list(VOCABULARY))
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_mixer_can_be_measured_in_both_phases(text: str, phase: Any) -> None:
    found = measure_layer(read(text).layers[0], FRAME, phase)
    assert found.latency_ms > 0 and found.spread_ms >= 0
    assert found.repetitions >= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_is_run_as_a_whole(dtype: str) -> None:
    frame = replace(FRAME, dtype=dtype)
    for phase in ("decode", "prefill"):
        assert measure_network(read("2*full kda mla/none"), frame, phase).latency_ms > 0  # type: ignore[arg-type]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the measured module was given, instead of a time."""
    seen: dict[str, Any] = {"threads": [], "modules": []}

    def look(run: Callable[[], Any], device: torch.device) -> Any:
        seen["result"], seen["device"] = run(), device
        seen["threads"].append(torch.get_num_threads())
        seen["grad"] = torch.is_grad_enabled()
        return measure.Latency(latency_ms=1.0, spread_ms=0.0, repetitions=1)

    monkeypatch.setattr(measure, "_repeat", look)
    return seen


def test_a_decode_step_is_the_last_one_of_the_context(watched: dict[str, Any]) -> None:
    measure_layer(read("full").layers[0], FRAME, "decode")
    y, state, _ = watched["result"]
    state = state.mixer
    assert y.shape == (2, 32) and y.dtype == torch.bfloat16
    assert isinstance(state, KeyValue)
    assert state.length == 48 and state.keys.shape[:2] == (2, 48) and state.keys.dtype == torch.bfloat16
    assert not watched["grad"]


def test_all_layers_of_a_network_stand_at_the_end(watched: dict[str, Any]) -> None:
    measure_network(read("full window[size=8] mla kda|full"), FRAME, "decode")
    _, states = watched["result"]
    states = [state.mixer for state in states]
    (ring,) = states[1]
    lengths = [state.length for state in (states[0], ring, states[2], states[3][1])]
    assert lengths == [48] * 4
    assert ring.keys.shape[1] == 8


def test_a_prefill_is_the_whole_context(watched: dict[str, Any]) -> None:
    measure_layer(read("kda").layers[0], FRAME, "prefill")
    y, _, _ = watched["result"]
    assert y.shape == (2, 48, 32)


@pytest.mark.usefixtures("watched")
def test_a_prefill_is_by_star_attention_where_the_frame_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []
    real = FullMixer.prefill_star

    def spy(mixer: FullMixer, x: torch.Tensor, state: Any, block: int) -> Any:
        blocks.append((block, state))
        return real(mixer, x, state, block)

    monkeypatch.setattr(FullMixer, "prefill_star", spy)
    star = replace(FRAME, star_block=16)
    for frame in (FRAME, star):
        measure_layer(read("full").layers[0], frame, "prefill")
        measure_network(read("2*full kda full|window"), frame, "prefill")
        measure_layer(read("full").layers[0], frame, "decode")
    assert blocks == [(16, None)] * 4
    assert frame_text(star, "prefill") == f"{frame_text(FRAME, 'prefill')}, star 16"
    assert frame_text(star, "decode") == frame_text(FRAME, "decode")


def test_measuring_is_on_one_thread_whatever_the_process_uses(watched: dict[str, Any]) -> None:
    torch.set_num_threads(2)
    try:
        measure_layer(read("full").layers[0], FRAME, "decode")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert watched["threads"] == [1]


def test_what_does_not_fit_the_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it was built")

    monkeypatch.setattr(measure, "Block", never)
    monkeypatch.setattr(measure, "Stack", never)
    huge = Frame(width=8192, context=2**40)
    with pytest.raises(
        ValueError, match=r"measuring needs [0-9.]+ GiB and [0-9.]+ GiB are free: use a shorter"
    ):
        measure_layer(read("full").layers[0], huge, "decode")
    with pytest.raises(ValueError, match="fewer layers"):
        measure_network(read("512*full"), replace(huge, context=2**36), "prefill")


def test_memory_counts_weights_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Frame(width=64, train_length=64, context=1024, batch=4)
    cache = 1024 * 4 * 2 * 64 * 2
    monkeypatch.setattr(measure, "_available_bytes", lambda: cache)
    with pytest.raises(ValueError, match="measuring needs"):
        measure_layer(read("full/none").layers[0], frame, "decode")
    weights = sum(weight.numel() for weight in Block(read("full/none").layers[0], frame).parameters())
    monkeypatch.setattr(measure, "_available_bytes", lambda: cache + 4 * weights)
    assert measure_layer(read("full/none").layers[0], frame, "decode").latency_ms > 0


def test_the_frame_text_tells_apart_what_matters_and_nothing_else() -> None:
    changes: list[dict[str, Any]] = [
        {"width": 64}, {"context": 64}, {"batch": 1}, {"dtype": "float32"}, {"train_length": 64},
    ]  # fmt: skip
    texts = [frame_text(FRAME, "decode"), frame_text(FRAME, "prefill")]
    texts += [frame_text(replace(FRAME, **change), "decode") for change in changes]
    assert len(set(texts)) == len(texts)
    same = replace(FRAME, vocabulary=99, rotary_base=5e5, depth=7)
    assert frame_text(same, "decode") == texts[0]


def test_devices_are_named_and_checked() -> None:
    assert device_name("cpu").startswith("cpu: ") and device_name("cpu").endswith("1 thread")
    check_device("cpu")
    for wrong in ("banana", "cuda:99", "meta", ""):
        with pytest.raises(ValueError, match="cannot be used here"):
            check_device(wrong)


def test_the_global_generator_decides_nothing_that_matters() -> None:
    assert isinstance(Stack(read("full"), FRAME), torch.nn.Module)

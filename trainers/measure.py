"""Latency at the target frame, with random weights on the real device: one layer at a time, or a whole network.

No training is needed for that: time does not depend on what the weights are.

Letters: B batch, T time, D width.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.spec import DTYPES
from search_space.state import advance
from trainers.model import Block, Stack

Phase = Literal["decode", "prefill"]
LEAST_REPETITIONS = 7
MOST_REPETITIONS = 50
MEASURING_S = 0.15
"""Repeat at least this long, unless the most repetitions are reached before."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one decode step or one prefill: the median, and half the distance of the quartiles."""

    latency_ms: float
    spread_ms: float
    repetitions: int


@lru_cache(maxsize=8)
def device_name(device: str) -> str:
    """What the latencies hold for: the kind of processor and the threads, or the GPU's name."""
    if device.startswith("cuda"):
        return f"cuda: {torch.cuda.get_device_name(torch.device(device))}"
    return f"cpu: {_processor()}, 1 thread"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def frame_text(frame: Frame, phase: Phase) -> str:
    """The sizes that a latency depends on, as a stable text; equal texts may share a measurement."""
    length = f"context {frame.context}" if phase == "decode" else f"prompt {frame.context}"
    return f"width {frame.width}, {length}, batch {frame.batch}, {frame.dtype}, train length {frame.train_length}"


def measure_layer(layer: Layer, frame: Frame, phase: Phase, *, device: str = "cpu") -> Latency:
    """Latency of one layer in the frame: a step at the end of the context, or the context as a prompt.

    Raises:
        ValueError: the machine has not enough memory for it.
    """
    _check_memory(Layout((layer,)), frame)
    return _measure(Block(layer, frame), frame, phase, device)


def measure_network(network: Layout, frame: Frame, phase: Phase, *, device: str = "cpu") -> Latency:
    """Latency of all layers run one after the other as one stack, every one with weights and cache of its own.

    Raises:
        ValueError: the machine has not enough memory for it.
    """
    _check_memory(network, frame)
    return _measure(Stack(network, frame), frame, phase, device)


def _measure(module: Block | Stack, frame: Frame, phase: Phase, device: str) -> Latency:
    place, dtype = torch.device(device), DTYPES[frame.dtype]
    module.to(device=place, dtype=dtype).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        if phase == "decode":
            state = advance(module.start(frame.batch, frame.context), frame.context - 1)
            x = torch.randn(frame.batch, frame.width, device=place, dtype=dtype)
            return _repeat(lambda: module.step(x, state), place)
        prompt = torch.randn(frame.batch, frame.context, frame.width, device=place, dtype=dtype)
        return _repeat(lambda: module(prompt), place)


def _repeat(run: Callable[[], object], device: torch.device) -> Latency:
    """Warm up, then repeat; the clock is read only when the device has finished."""
    times_ms: list[float] = []
    for _ in range(2):
        run()
    began = time.perf_counter()
    while len(times_ms) < LEAST_REPETITIONS or (
        time.perf_counter() - began < MEASURING_S and len(times_ms) < MOST_REPETITIONS
    ):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times_ms.append((time.perf_counter() - start) * 1e3)
    low, _, high = statistics.quantiles(times_ms, n=4)
    return Latency(
        latency_ms=statistics.median(times_ms), spread_ms=(high - low) / 2, repetitions=len(times_ms)
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_memory(network: Layout, frame: Frame) -> None:
    """Refuse what would bring the machine down: a latency from a swapping machine is worth nothing anyway."""
    cost = layout_cost(network, replace(frame, depth=None))
    # Weights are made in float32 and then converted.
    needed = cost.params * 4 + cost.stored_bytes
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise ValueError(
            f"measuring needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "use a shorter context, a smaller batch or fewer layers"
        )

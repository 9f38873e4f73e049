"""Latency at the target frame, with arbitrary weights on the real device: one layer at a time, or a whole network.

No training is needed for that: time does not depend on what the weights are.

Letters: B batch, T time, D width.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.spec import DTYPES, Stream
from search_space.state import advance
from trainers.graph import replayable
from trainers.model import Block, Stack

Phase = Literal["decode", "prefill"]
LEAST_REPETITIONS = 5
MOST_REPETITIONS = 50
MEASURING_S = 0.15
"""Repeat at least this long, unless the most repetitions are reached before."""
WEIGHT = 0.01
PERIOD = 65521
"""A prime, so that no width divides it."""
SLOW_S = 2.0
"""Stop repeating after so long, even before the least repetitions are reached."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one decode step or one prefill, and how far the repetitions spread.

    The lower quartile is taken rather than the median: what else runs on a machine only ever adds time.
    """

    latency_ms: float
    spread_ms: float
    repetitions: int


@lru_cache(maxsize=8)
def device_name(device: str) -> str:
    """What the latencies hold for: the kind of processor and the threads, or the GPU's name."""
    if device.startswith("cuda"):
        return f"cuda: {torch.cuda.get_device_name(torch.device(device))}"
    return f"cpu: {_processor()}, 1 thread"


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute there."""
    try:
        known = torch.device(device).type in ("cpu", "cuda")
        torch.zeros(1, device=device if known else "cpu")
    except (RuntimeError, AssertionError) as error:
        known, why = False, str(error).splitlines()[0]
    else:
        why = "only cpu and cuda are"
    if not known:
        raise ValueError(
            f"device {device!r} cannot be used here: {why}; use cpu, or cuda where there is a GPU"
        )


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
    sizes = f"width {frame.width}, {length}, batch {frame.batch}, {frame.dtype}"
    star = f", star {frame.star_block}" if phase == "prefill" and frame.star_block else ""
    return f"{sizes}, train length {frame.train_length}, longest {frame.longest}{star}"


def measure_layer(layer: Layer, frame: Frame, phase: Phase, *, device: str = "cpu") -> Latency:
    """Latency of one layer in the frame: a step at the end of the context, or the context as a prompt.

    On a GPU a step is replayed as one graph where it can be, as servers do.

    Raises:
        ValueError: the machine has not enough memory for it.
    """
    _check_memory(Layout((layer,)), frame)
    with torch.device("meta"):
        module = Block(layer, frame)
    return _measure(module, frame, phase, device)


def measure_network(network: Layout, frame: Frame, phase: Phase, *, device: str = "cpu") -> Latency:
    """Latency of all layers run one after the other as one stack, every one with weights and cache of its own.

    Raises:
        ValueError: the machine has not enough memory for it.
    """
    _check_memory(network, frame)
    with torch.device("meta"):
        module = Stack(network, frame)
    return _measure(module, frame, phase, device)


def _measure(module: Block | Stack, frame: Frame, phase: Phase, device: str) -> Latency:
    place, dtype = torch.device(device), DTYPES[frame.dtype]
    module.to(dtype=dtype).to_empty(device=place).eval()
    for tensor in (*module.parameters(), *module.buffers()):
        _fill(tensor.requires_grad_(False))
    with torch.inference_mode(), _one_thread():
        if phase == "decode":
            state = advance(module.start(frame.batch, frame.context), frame.context - 1)
            x = torch.randn(frame.batch, frame.width, device=place, dtype=dtype)
            if isinstance(module, Stack):
                return _repeat(replayable(lambda: module.step(x, state), place), place)
            return _repeat(replayable(lambda: module.step(x, state, Stream()), place), place)
        prompt = torch.randn(frame.batch, frame.context, frame.width, device=place, dtype=dtype)
        stream = Stream(star_block=frame.star_block)
        if isinstance(module, Stack):
            return _repeat(lambda: module.forward_with(prompt, None, stream), place)
        return _repeat(lambda: module(prompt, None, stream), place)


def _fill(tensor: Tensor) -> None:
    """Small numbers, the same few over and over: drawing them all would take longer than measuring.

    They differ from row to row, because a router whose rows are alike sends every token to the same experts.
    """
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        tensor.zero_()
        return
    few = torch.empty(PERIOD, device=tensor.device).normal_(std=WEIGHT).to(tensor.dtype)
    flat = tensor.view(-1)
    whole = flat.numel() // PERIOD * PERIOD
    flat[:whole].view(-1, PERIOD).copy_(few.expand(whole // PERIOD, PERIOD))
    flat[whole:].copy_(few[: flat.numel() - whole])


def _repeat(run: Callable[[], object], device: torch.device) -> Latency:
    """Warm up, then repeat; the clock is read only when the device has finished."""
    times_ms: list[float] = []
    began = time.perf_counter()
    run()
    _wait(device)
    if time.perf_counter() - began < SLOW_S:
        run()
    began = time.perf_counter()
    while _goes_on(len(times_ms), time.perf_counter() - began):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times_ms.append((time.perf_counter() - start) * 1e3)
    low, _, high = statistics.quantiles(times_ms, n=4) if len(times_ms) > 1 else times_ms * 3
    return Latency(latency_ms=max(low, min(times_ms)), spread_ms=(high - low) / 2, repetitions=len(times_ms))


def _goes_on(repetitions: int, seconds: float) -> bool:
    """Long enough for a quartile, but never minutes: a slow run is repeated only while its time allows."""
    if repetitions < LEAST_REPETITIONS:
        return repetitions == 0 or seconds < SLOW_S
    return repetitions < MOST_REPETITIONS and seconds < MEASURING_S


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the table promises one thread, whatever the process uses otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _available_bytes() -> int:
    """Memory that can be had without swapping: what is free, and the file cache that the system would give up."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(network: Layout, frame: Frame) -> None:
    """Refuse what would bring the machine down: a latency from a swapping machine is worth nothing anyway."""
    cost = layout_cost(network, replace(frame, depth=None))
    needed = cost.params * frame.dtype_bytes + cost.stored_bytes
    free = _available_bytes()
    if needed > free:
        raise ValueError(
            f"measuring needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "use a shorter context, a smaller batch or fewer layers"
        )

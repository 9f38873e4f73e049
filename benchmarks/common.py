"""What every measurement shares: repeated pairs, and results as JSON beside the machine they were taken on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.backend import Backend, Implementation, why_not_triton
from trainers.measure import device_name

RESULTS = Path(__file__).parent / "results"


def save(name: str, measured: dict[str, Any]) -> None:
    """Write a measurement and print it."""
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name("cpu"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2), flush=True)


def paired(first: Callable[[], object], second: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Median milliseconds of two things run in turn, and the median of their ratios pair by pair."""
    times: list[tuple[float, float]] = []
    first(), second()
    for _ in range(repetitions):
        pair = []
        for run in (first, second):
            began = time.perf_counter()
            run()
            pair.append((time.perf_counter() - began) * 1e3)
        times.append((pair[0], pair[1]))
    return {
        "first_ms": round(statistics.median(one for one, _ in times), 3),
        "second_ms": round(statistics.median(other for _, other in times), 3),
        "second_over_first": round(statistics.median(other / one for one, other in times), 3),
    }


@contextmanager
def forced(backend: Implementation) -> Iterator[None]:
    """Within it every operator answers with one implementation, where it has it."""
    modules = [
        import_module(f"kernels.{found.name}.ops") for found in iter_modules(kernels.__path__) if found.ispkg
    ]
    before = [vars(module)["resolve"] for module in modules]

    def choose(_: Backend, operator: str, *tensors: Tensor | None, **about: Any) -> Implementation:
        if backend == "triton" and why_not_triton(
            operator, tensors, about.get("widths") or {}, about.get("kernel", "forward")
        ):
            return "chunked"
        return backend

    for module in modules:
        vars(module)["resolve"] = choose
    try:
        yield
    finally:
        for module, resolve in zip(modules, before, strict=True):
            vars(module)["resolve"] = resolve

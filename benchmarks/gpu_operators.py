"""The operators' part of the GPU benchmark: ceilings of the device, correctness of every configuration, times by shape.

Letters: B batch, T time, H heads, D width of a head.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peers import peers_of
from kernels.backend import INTERPRETER, TRITON_DTYPES, Backend, architecture
from kernels.check import deviations
from kernels.compile import compile_calls
from kernels.configurations import ANY, find, table
from kernels.probe import Inputs, Probe, Sizes, cast, differentiable, fitting, token_of
from kernels.probes import PROBES
from kernels.tune import median_ms

SHAPES = {
    "proxy": Sizes(batch=8, time=256, heads=4, groups=4, key=32, value=32),
    "proxy 64": Sizes(batch=8, time=256, heads=4, groups=4, key=64, value=64),
    "training": Sizes(batch=4, time=2048, heads=16, groups=16, key=128, value=128),
    "long": Sizes(batch=1, time=8192, heads=64, groups=64, key=128, value=128),
}
DECODE = Sizes(batch=64, time=1, heads=16, groups=16, key=128, value=128)
TOY_SHAPES = {"toy": Sizes(batch=1, time=20, heads=2, groups=2, key=16, value=16)}
TOY_DECODE = Sizes(batch=1, time=1, heads=2, groups=2, key=16, value=16)
LEAST_WIDTHS = (64, 32, 16)
"""Tried in turn where an operator's table does not reach a shape's widths."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A probe at a shape: to be checked at it, or timed."""

    probe: Probe
    shape: str
    sizes: Sizes
    dtype: str
    timed: bool


def plan(operators: Sequence[str] | None, device: torch.device, *, toy: bool) -> list[Call]:
    """All calls: every probe at the widths of every row, checked; the first probe of each operator and what is to be measured, timed."""
    place = architecture(device) or INTERPRETER
    dtype = "float32" if place == INTERPRETER else "bfloat16"
    calls, seen = [], set()
    for probe in PROBES:
        if operators and probe.operator not in operators:
            continue
        bounds = {
            row.widths
            for row in table(probe.operator)
            if row.architecture in (ANY, place) and row.takes(dtype) and probe.asks(row.kernel)
        }
        for widths in sorted(bounds)[: 1 if toy else None]:
            sizes = TOY_SHAPES["toy"] if toy else replace(fitting(probe, widths), time=130)
            calls.append(
                Call(probe=probe, shape=f"widths {list(widths)}", sizes=sizes, dtype=dtype, timed=False)
            )
        if probe.operator in seen and not probe.measured:
            continue
        seen.add(probe.operator)
        shapes = TOY_SHAPES if toy else SHAPES
        for name, sizes in shapes.items():
            own = _served(probe, sizes, dtype, place)
            if own is not None:
                calls.append(Call(probe=probe, shape=name, sizes=own, dtype=dtype, timed=True))
        own = _served(probe, TOY_DECODE if toy else DECODE, dtype, place)
        if probe.step is not None and own is not None:
            calls.append(Call(probe=probe, shape="decode", sizes=own, dtype=dtype, timed=True))
    return calls


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device can do at best: bytes copied a second (read and written), and bfloat16 products."""
    source = torch.randn(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device)
    return {
        "copy_tb_per_s": round(2 * source.nbytes / copy_ms / 1e9, 3),
        "bfloat16_tflop_per_s": round(2 * size**3 / product_ms / 1e9, 1),
    }


def precompile(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds to compile all kernels side by side, without the device."""
    place = architecture(device)
    assert place is not None
    processes = max(1, min(16, os.cpu_count() or 1))
    return round(compile_calls([(c.probe, c.sizes, c.dtype) for c in calls], place, processes), 1)


def check(calls: Sequence[Call], device: torch.device, left_s: Callable[[], float]) -> list[dict[str, Any]]:
    """Every probe at every row's widths against its reference; the largest error over its bound, and where."""
    rows = []
    for call in calls:
        if call.timed:
            continue
        row: dict[str, Any] = {"probe": call.probe.id, "widths": call.shape, "dtype": call.dtype}
        if left_s() < 0:
            row |= {"ok": False, "why": "no time was left"}
        else:
            try:
                found = deviations(call.probe, call.sizes, _dtype(call), device)
            except (RuntimeError, ValueError) as error:
                row |= {"ok": False, "why": str(error).splitlines()[0][:200]}
            else:
                worst = max(found, key=lambda one: one.error / one.bound)
                row |= {"ok": all(one.ok for one in found), "worst": asdict(worst)}
        rows.append(row)
    return rows


def times(
    calls: Sequence[Call],
    good: set[str],
    device: torch.device,
    left_s: Callable[[], float],
    limits: dict[str, float] | None,
) -> list[dict[str, Any]]:
    """Milliseconds of the calls whose kernels were right, beside the chunk form and the peers that are installed."""
    rows = []
    for call in calls:
        if not call.timed or call.probe.id not in good or left_s() < 0:
            continue
        rows += _decode(call, device, limits) if call.shape == "decode" else _train(call, device)
    return rows


def _train(call: Call, device: torch.device) -> list[dict[str, Any]]:
    drawn = cast(
        call.probe, call.probe.draw(call.sizes, torch.Generator().manual_seed(0)), _dtype(call), device
    )
    rows = []
    for phase in ("forward", "forward and backward") if call.probe.backward else ("forward",):
        gradients = phase != "forward"
        leaves = {
            name: x.detach().requires_grad_(gradients and differentiable(x)) for name, x in drawn.items()
        }
        row: dict[str, Any] = {
            "operator": call.probe.operator,
            "probe": call.probe.name,
            "shape": call.shape,
            "sizes": asdict(call.sizes),
            "phase": phase,
        }
        runs = {
            "triton": _through(call.probe, "triton", leaves),
            "chunked": _through(call.probe, "chunked", leaves),
        }
        runs |= peers_of(call.probe, leaves)
        for name, run in runs.items():
            whole = _with_backward(run, leaves) if gradients else run
            row[name] = _times_ms(whole, device)
        rows.append(row)
    return rows


def _decode(call: Call, device: torch.device, limits: dict[str, float] | None) -> list[dict[str, Any]]:
    step = call.probe.step
    assert step is not None
    drawn = cast(
        call.probe, call.probe.draw(call.sizes, torch.Generator().manual_seed(0)), _dtype(call), device
    )
    token = token_of(call.probe, drawn)
    row: dict[str, Any] = {
        "operator": call.probe.operator,
        "probe": call.probe.name,
        "shape": "decode",
        "sizes": asdict(call.sizes),
        "phase": "step",
    }
    with torch.no_grad():
        written = [x for x in step("triton", token) if isinstance(x, Tensor)]
        moved = sum(x.nbytes for x in token.values()) + sum(x.nbytes for x in written)
        for name in ("triton", "chunked"):
            backend: Backend = "triton" if name == "triton" else "chunked"
            row[name] = _times_ms(partial(step, backend, token), device)
    row["bytes"] = moved
    best = row["triton"].get("replayed_ms") or row["triton"].get("eager_ms")
    if limits and best:
        row["share_of_copy"] = round(moved / best / 1e9 / limits["copy_tb_per_s"], 3)
    return [row]


def _through(probe: Probe, backend: Backend, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: probe.call(backend, inputs)


def _with_backward(run: Callable[[], tuple[Tensor, ...]], leaves: Inputs) -> Callable[[], object]:
    asked = [x for x in leaves.values() if x.requires_grad]

    def both() -> object:
        outputs = [x for x in run() if x.requires_grad]
        return torch.autograd.grad(outputs, asked, [torch.ones_like(x) for x in outputs], allow_unused=True)

    return both


def _times_ms(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds launched one by one, and replayed as one graph where that can be."""
    try:
        found: dict[str, Any] = {"eager_ms": round(median_ms(run, device), 4)}
    except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
        return {"failed": str(error).splitlines()[0][:160]}
    if device.type != "cuda":
        return found
    try:
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found["replayed_ms"] = round(median_ms(graph.replay, device), 4)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        found["not_replayed"] = str(error).splitlines()[0][:160]
    return found


def _served(probe: Probe, sizes: Sizes, dtype: str, place: str) -> Sizes | None:
    """The sizes, or narrower ones where the table does not reach so far; None where it serves none of them."""
    for width in (None, *LEAST_WIDTHS):
        own = (
            sizes
            if width is None
            else replace(sizes, key=min(sizes.key, width), value=min(sizes.value, width))
        )
        if find(probe.operator, probe.leading, probe.widths(own), dtype, place):
            return own
    return None


def _dtype(call: Call) -> torch.dtype:
    return {name: dtype for dtype, name in TRITON_DTYPES.items()}[call.dtype]


def print_tables(measured: dict[str, Any]) -> None:
    """What was measured, for people: what failed first."""
    if "ceilings" in measured:
        print(f"{measured['device']}: {measured['ceilings']}, compiled in {measured['compile_s']} s")
    for row in measured["checks"]:
        if not row["ok"]:
            print(f"WRONG {row['probe']} {row['widths']}: {row.get('why') or row['worst']}")
    right = sum(row["ok"] for row in measured["checks"])
    print(f"{right} of {len(measured['checks'])} checks right")
    for row in measured["times"]:
        cells = [
            f"{name} {_cell(value)}"
            for name, value in row.items()
            if isinstance(value, dict) and name != "sizes"
        ]
        share = f"  {row['share_of_copy']:.0%} of copy" if "share_of_copy" in row else ""
        what = f"{row['operator']}: {row['probe']}"
        print(f"{what:<42} {row['shape']:<9} {row['phase']:<21} {' · '.join(cells)}{share}")
    for row in measured["training"]:
        print(
            f"{row['task']:<8} {row['layout']:<24} {row['mode']:<28} {row.get('tokens_per_s', row.get('why'))}"
        )


def _cell(value: dict[str, Any]) -> str:
    if "failed" in value:
        return f"failed ({value['failed'][:40]})"
    replayed = f" / {value['replayed_ms']:.3f}" if "replayed_ms" in value else ""
    return f"{value['eager_ms']:.3f}{replayed} ms"

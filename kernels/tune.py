"""Choose how each kernel is launched on the present GPU, by trying neighbours of its row, and write what won.

`python -m kernels.tune [--operator NAME] [--dtype bfloat16] [--output FOLDER]`. A candidate is timed only after its
outputs and gradients have been found right in the same run; a kernel that has no better row keeps the one it has.
Never called by a trial: a search that ranks layouts needs kernels that round alike from first to last.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from kernels.backend import INTERPRETER, TRITON_DTYPES, architecture
from kernels.check import deviations
from kernels.configurations import ANY, Configuration, path_of, read, table, trying, write
from kernels.probe import Probe, Sizes, cast, differentiable, fitting, token_of
from kernels.probes import probes_of

FIXED = ("CHUNK",)
"""Block sizes that several kernels of an operator must agree on: the backward pass reads what the forward left."""
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
LEAST_BLOCK, MOST_BLOCK = 16, 256
DTYPES = {name: dtype for dtype, name in TRITON_DTYPES.items()}
BETTER = 0.97
"""A candidate must take at most this share of the time of the row it replaces; less is noise."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found for one row: the best candidate, its time and the old one's, and how many were tried or wrong."""

    operator: str
    before: Configuration
    best: Configuration
    before_ms: float
    best_ms: float
    tried: int
    wrong: int
    unfit: int


def candidates(row: Configuration) -> Iterator[Configuration]:
    """The row itself, then all warps and stages with every block halved, kept or doubled."""
    yield row
    free = [name for name in row.blocks if name not in FIXED]
    sizes = [
        [size for size in (row.blocks[name] // 2, row.blocks[name], 2 * row.blocks[name]) if _in_range(size)]
        for name in free
    ]
    for warps, stages, *blocks in product(WARPS, STAGES, *sizes):
        changed = {**row.blocks, **dict(zip(free, blocks, strict=True))}
        candidate = replace(row, num_warps=warps, num_stages=stages, blocks=changed)
        if candidate != row:
            yield candidate


def tune_row(
    operator: str,
    row: Configuration,
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: Callable[[Probe, Configuration], Sizes],
    most: int,
) -> Tuned:
    """Try at most `most` candidates of one row on the probes of its operator."""
    probe = next(one for one in probes_of(operator) if one.asks(row.kernel))
    own = replace(row, architecture=architecture(device) or INTERPRETER, dtype=TRITON_DTYPES[dtype])
    best, best_ms, before_ms, wrong, unfit, tried = own, float("inf"), float("inf"), 0, 0, 0
    for candidate in list(candidates(own))[:most]:
        tried += 1
        with trying(operator, [candidate]):
            try:
                right = all(one.ok for one in deviations(probe, small(probe, row), dtype, device))
                milliseconds = _time_ms(probe, row.kernel, shape(probe, row), dtype, device) if right else 0.0
            except (RuntimeError, ValueError):
                # Too much shared memory, or a tile that the hardware refuses.
                unfit += 1
                continue
        if not right:
            wrong += 1
            continue
        if candidate == own:
            before_ms = best_ms = milliseconds
        elif milliseconds < min(best_ms, BETTER * before_ms):
            best, best_ms = candidate, milliseconds
    return Tuned(
        operator=operator,
        before=own,
        best=best,
        before_ms=before_ms,
        best_ms=best_ms,
        tried=tried,
        wrong=wrong,
        unfit=unfit,
    )


def small(probe: Probe, row: Configuration) -> Sizes:
    """A shape for checks: several chunks and an odd end, at the row's widths."""
    return replace(fitting(probe, row.widths), time=130, batch=1, heads=2)


def large(probe: Probe, row: Configuration) -> Sizes:
    """A shape that fills a GPU."""
    return replace(fitting(probe, row.widths), time=2048, batch=4, heads=16, groups=16)


def _in_range(size: int) -> bool:
    return LEAST_BLOCK <= size <= MOST_BLOCK


def _time_ms(probe: Probe, kernel: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """Median milliseconds of what the kernel is part of: a step, a forward pass, or one with its backward."""
    drawn = cast(probe, probe.draw(sizes, torch.Generator().manual_seed(0)), dtype, device)
    if kernel.startswith("step") and probe.step is not None:
        token, step = token_of(probe, drawn), probe.step
        return median_ms(lambda: step("triton", token), device)
    if not kernel.startswith("backward"):
        return median_ms(lambda: probe.call("triton", drawn), device)
    leaves = {name: x.requires_grad_() if differentiable(x) else x for name, x in drawn.items()}

    def both() -> None:
        outputs = [x for x in probe.call("triton", leaves) if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    return median_ms(both, device)


def median_ms(run: Callable[[], object], device: torch.device, repetitions: int = 20) -> float:
    """Median milliseconds by the device's own clock, after a warm-up; by the host's on a CPU."""
    run()
    times = []
    for _ in range(repetitions if device.type == "cuda" else 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)))
        else:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return sorted(times)[len(times) // 2]


def tune(
    operators: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    toy: bool,
    most: int,
    say: Callable[[str], None],
) -> dict[str, list[Configuration]]:
    """The rows that won, by operator; `toy` times small shapes, to try the tuner itself."""
    won: dict[str, list[Configuration]] = {}
    for operator in operators:
        for row in table(operator):
            if row.architecture not in (ANY, architecture(device)) or not row.takes(TRITON_DTYPES[dtype]):
                continue
            found = tune_row(operator, row, dtype, device, shape=small if toy else large, most=most)
            say(
                f"{operator} {row.kernel} {list(row.widths)}: {found.before_ms:.3f} → {found.best_ms:.3f} ms, "
                f"{found.tried} tried, {found.wrong} wrong, {found.unfit} do not fit"
            )
            if found.best != found.before:
                won.setdefault(operator, []).append(found.best)
    return won


def merged(old: Sequence[Configuration], new: Sequence[Configuration]) -> list[Configuration]:
    """The old rows with the new ones in the place of those for the same kernel, widths, type and architecture."""

    def key(row: Configuration) -> tuple[str, tuple[int, ...], str, str]:
        return row.kernel, row.widths, row.dtype, row.architecture

    return list({**{key(row): row for row in old}, **{key(row): row for row in new}}.values())


def save(won: dict[str, list[Configuration]], output: Path | None) -> list[Path]:
    """Write the tables with the rows that won: in place, or into a folder by operator."""
    written = []
    for operator, rows in won.items():
        path = path_of(operator) if output is None else output / f"{operator}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = read(path) if path.exists() else table(operator)
        write(path, merged(old, rows))
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune the operators named, or all."""
    from kernels.probes import PROBES

    parser = argparse.ArgumentParser(description=__doc__)
    known = sorted({probe.operator for probe in PROBES})
    parser.add_argument("--operator", action="append", choices=known, help="all of them if left out")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=int, default=48, help="candidates for each row")
    parser.add_argument("--toy", action="store_true", help="small shapes, to try the tuner itself")
    parser.add_argument(
        "--output", type=Path, help="a folder for the tables; they are changed in place if left out"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if architecture(device) is None:
        parser.error(f"no kernel runs on {options.device} here; tune on a GPU")
    won = tune(
        options.operator or known,
        DTYPES[options.dtype],
        device,
        toy=options.toy,
        most=options.most,
        say=lambda line: print(line, flush=True),
    )
    for path in save(won, options.output):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

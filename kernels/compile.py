"""Compile every configuration of the table for an architecture, without a GPU, and tell what it takes of one.

`python -m kernels.compile --architecture sm_90 [--operator NAME]` prints one line of JSON a kernel: shared memory,
registers and bytes spilled; with `--shipped` every row in the types and for the architectures that would find it
first. Must run without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from kernels.backend import INTERPRETER, TARGET, TRITON_DTYPES
from kernels.configurations import Configuration, find, table
from kernels.launch import Compiled, dry_run
from kernels.probe import Probe, Sizes, cast, differentiable, fitting, token_of
from kernels.probes import PROBES

ARCHITECTURES = ("sm_80", "sm_90")
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""What one block may take of an A100 and of an H100 (CUDA C++ programming guide, technical specifications)."""
DTYPES = {name: dtype for dtype, name in TRITON_DTYPES.items()}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one compiled kernel takes of a GPU."""

    operator: str
    kernel: str
    architecture: str
    dtype: str
    widths: tuple[int, ...]
    num_warps: int
    shared_bytes: int
    registers: int
    spilled_bytes: int


def shipped(operator: str) -> list[Footprint]:
    """Every row of an operator for all architectures that find it: in half precision, or in float32 if it has no other.

    What serves both is compiled in float32 too, for the first architecture alone: such products take twice as long to
    compile, and fill an A100's registers no less than an H100's.
    """
    found = [
        one for architecture in ARCHITECTURES for one in footprints(operator, architecture, ["bfloat16"])
    ]
    done: list[Configuration] = []
    for architecture in ARCHITECTURES:
        found += footprints(operator, architecture, ["float32"], without=done)
        done += [row for row in _found(operator, architecture, "float32") if row.dtype != "float32"]
    return found


def footprints(
    operator: str,
    architecture: str,
    dtypes: Sequence[str],
    *,
    every: bool = False,
    without: Sequence[Configuration] = (),
) -> list[Footprint]:
    """Every kernel of an operator, compiled in each of these types at the widths of every row that serves it.

    With the options of the first probe that launches it, or with those of `every` probe; `without` some rows.
    """
    seen: dict[str, Footprint] = {}
    done: set[tuple[str, tuple[int, ...], str]] = set()
    for probe, sizes, dtype, kernels in _calls(operator, architecture, dtypes, without):
        if not every and all((kernel, probe.widths(sizes), dtype) in done for kernel in kernels):
            continue

        def own(
            row: Configuration, probe: Probe = probe, widths: tuple[int, ...] = probe.widths(sizes)
        ) -> bool:
            """Kernels whose rows have other bounds are compiled at these."""
            return row not in without and (not probe.asks(row.kernel) or row.widths == widths)

        with dry_run(architecture, own) as compiled:
            exercise(probe, sizes, DTYPES[dtype])
            done |= {(one.configuration.kernel, probe.widths(sizes), dtype) for one in compiled}
            for one in compiled:
                if one.binary.hash not in seen:
                    seen[one.binary.hash] = _footprint(one)
    return list(seen.values())


def _calls(
    operator: str, architecture: str, dtypes: Sequence[str], without: Sequence[Configuration]
) -> Iterator[tuple[Probe, Sizes, str, tuple[str, ...]]]:
    """Every type, the widths of every row that is found for both, and the kernels that have such a row.

    A row that is hidden by one of that type is left out.
    """
    for probe in PROBES:
        if probe.operator != operator:
            continue
        own: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for dtype in dtypes:
            for row in _found(operator, architecture, dtype):
                if probe.asks(row.kernel) and row not in without:
                    own.setdefault((row.widths, dtype), []).append(row.kernel)
        for (widths, dtype), kernels in sorted(own.items()):
            yield probe, fitting(probe, widths), dtype, tuple(kernels)


def _found(operator: str, architecture: str, dtype: str) -> list[Configuration]:
    """The rows that some call in this type on this architecture is launched with."""
    return [
        row for row in table(operator) if find(operator, row.kernel, row.widths, dtype, architecture) is row
    ]


def exercise(probe: Probe, sizes: Sizes, dtype: torch.dtype) -> None:
    """Forward, backward and step of a probe through Triton; within a dry run this compiles its kernels.

    Where a step is served at more widths than a whole call, it is taken alone.
    """
    drawn = cast(probe, probe.draw(sizes, torch.Generator().manual_seed(0)), dtype)
    inputs = {name: x.requires_grad_(probe.backward) if differentiable(x) else x for name, x in drawn.items()}
    name, place = TRITON_DTYPES[dtype], TARGET.get() or INTERPRETER
    served = find(probe.operator, probe.leading, probe.widths(sizes), name, place) is not None
    outputs = probe.call("triton", inputs) if served or probe.step is None else ()
    if probe.backward and outputs:
        asked = [x for x in outputs if x.requires_grad]
        leaves = [x for x in inputs.values() if x.requires_grad]
        torch.autograd.grad(asked, leaves, [torch.zeros_like(x) for x in asked], allow_unused=True)
    if probe.step is not None:
        with torch.no_grad():
            probe.step("triton", token_of(probe, inputs))


def _footprint(one: Compiled) -> Footprint:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(one.binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(TOOL), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}
    return Footprint(
        operator=one.operator,
        kernel=one.configuration.kernel,
        architecture=one.architecture,
        dtype=one.dtype,
        widths=one.configuration.widths,
        num_warps=one.configuration.num_warps,
        shared_bytes=one.binary.metadata.shared,
        registers=found["REG"],
        spilled_bytes=found["STACK"],
    )


def compile_calls(calls: Sequence[tuple[Probe, Sizes, str]], architecture: str, processes: int) -> float:
    """Seconds to compile the kernels of many calls side by side, into Triton's cache on this node's disk.

    A later launch of the same kernels for the same architecture finds them there.
    """
    began = time.perf_counter()
    jobs = [(PROBES.index(probe), sizes, dtype, architecture) for probe, sizes, dtype in calls]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_call, jobs))
    return time.perf_counter() - began


def _compile_call(job: tuple[int, Sizes, str, str]) -> None:
    place, sizes, dtype, architecture = job
    torch.set_num_threads(1)
    with dry_run(architecture):
        # No kernel is compiled by the length or the batch.
        exercise(PROBES[place], replace(sizes, batch=1, time=64), DTYPES[dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line of JSON for every kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES)
    parser.add_argument("--operator", action="append", help="all of them if left out")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="bfloat16 if left out")
    parser.add_argument("--every", action="store_true", help="with the options of every probe")
    parser.add_argument("--shipped", action="store_true", help="every row as it would be found first")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    operators = options.operator or sorted({probe.operator for probe in PROBES})
    jobs = (
        [partial(shipped, name) for name in operators]
        if options.shipped
        else [
            partial(footprints, name, place, options.dtype or ["bfloat16"], every=options.every)
            for name in operators
            for place in options.architecture or ARCHITECTURES
        ]
    )
    for found in _side_by_side(jobs, options.processes):
        for footprint in found:
            print(json.dumps(asdict(footprint)), flush=True)
    return 0


def _side_by_side(jobs: Sequence[Callable[[], list[Footprint]]], processes: int) -> Iterator[list[Footprint]]:
    if processes == 1:
        yield from (job() for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from (future.result() for future in [pool.submit(job) for job in jobs])


if __name__ == "__main__":
    sys.exit(main())

"""`nas warm`: compile the kernels of a search space before its first trial."""

import os
from typing import Annotated

import typer

from nas.cli.options import ConfigOption, JsonOption, SetOption, SpaceOption, given_layers, words

NAME = "warm"


def command(
    space: SpaceOption = None,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="sm_90 and the like; that of the GPU which is here if left out."),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Side by side; all cores if left out.")] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Compile the Triton kernels that a space needs into this node's cache, so that no trial waits for them."""
    import time
    from dataclasses import asdict

    from kernels.cache import keep_cache_local
    from nas.cli.output import print_json, say
    from nas.config import resolve
    from nas.errors import reading_input
    from nas.plan import make_plan
    from nas.warm import chosen_architecture, distinct_jobs, warm_all

    with reading_input():
        place = chosen_architecture(architecture)
        flags = {"space": {"mixers": words(space)}}
        plan = make_plan(resolve(given_layers(config, assignments, flags)))
    jobs, cache = distinct_jobs(plan), str(keep_cache_local())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    say(f"{len(jobs)} layers for {place}, into {cache}")
    began = time.perf_counter()
    done = warm_all(
        jobs,
        place,
        min(processes or cores, len(jobs)),
        lambda one: say(f"{one.kernels:>4} kernels {one.seconds:6.1f} s  {one.layout}"),
    )
    seconds = time.perf_counter() - began
    if json:
        print_json(
            {"architecture": place, "seconds": seconds, "cache": cache, "layers": [*map(asdict, done)]}
        )
    else:
        total = sum(one.kernels for one in done)
        print(f"{total} kernels of {len(done)} layers compiled for {place} in {seconds:.0f} s")
    return 0

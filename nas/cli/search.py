"""`nas search`: sample layouts, train each one briefly, price it at the target, keep the front."""

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    SpaceOption,
    StorageEnvOption,
    StorageOption,
    StudyOption,
    given_layers,
    storage_of,
    words,
)

NAME = "search"


def command(
    study: StudyOption = None,
    storage: StorageOption = None,
    storage_env: StorageEnvOption = None,
    trials: Annotated[int | None, typer.Option(help="Trials that the study shall have in all.")] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Trainings with new seeds near the front, in all; one for four trials if left out."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Trials at the same time, one core each.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="layout, evolution, grid, random, tpe, nsga2, nsga3 or gp."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler, the weights and the data.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Text file or folder for the language-modelling task.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="inline, ray, or auto: inline for one worker and Ray for more.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster that is there.")
    ] = None,
    space: SpaceOption = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="full>=1, full not first, kv_bytes<=64MiB, latency_ms<=12, params=1.3B+-5%. May be repeated.",
        ),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="quality, a task, latency_ms, tokens_per_s, kv_bytes@128k, params, … May be repeated.",
        ),
    ] = None,
    log_file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Log of JSON lines; beside a SQLite file if left out."),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(metavar="LEVEL", help="debug, info, warning or error: the least that is logged."),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Search for layouts; the same command goes on where a study stopped."""
    import sys

    from nas.cli.output import say

    if sys.stderr.isatty():
        # The libraries take seconds to load, and a silent terminal looks broken.
        say("nas: loading torch and the vocabulary …")
    from nas.cli.session import run_search
    from nas.config import resolve
    from nas.errors import reading_input
    from nas.plan import make_plan
    from storage.place import is_missing

    flags = {
        "study": study,
        "storage": storage_of(storage, storage_env),
        "trials": trials,
        "repeats": repeats,
        "workers": workers,
        "sampler": sampler,
        "seed": seed,
        "data": None
        if data is None
        else str(data)
        if str(data) == "stdlib"
        else str(data.expanduser().absolute()),
        "objectives": tuple(objective) if objective else None,
        "pool": pool,
        "log_file": None if log_file is None else str(log_file.expanduser().absolute()),
        "log_level": log_level,
        "ray_address": ray_address,
        "space": {"mixers": words(space), "constraints": tuple(constraint) if constraint else None},
    }
    with reading_input():
        given = given_layers(config, assignments, flags)
        first = resolve(given)
        if is_missing(first.storage):
            # What cannot be searched leaves no database behind; what is read here is not read twice.
            make_plan(first)
    return run_search(given, json_output=json)

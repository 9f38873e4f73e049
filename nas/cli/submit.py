"""`nas submit`: a search as a job of a Ray cluster, with the code, the configuration and the text that it needs."""

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import AddressOption, JsonOption, SetOption, StorageEnvOption, StorageOption, StudyOption

NAME = "submit"


def command(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the search, as for nas search --config.")
    ],
    address: AddressOption = None,
    study: StudyOption = None,
    storage: StorageOption = None,
    storage_env: StorageEnvOption = None,
    trials: Annotated[int | None, typer.Option(help="Trials that the study shall have in all.")] = None,
    workers: Annotated[int | None, typer.Option(help="Trials at the same time.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Text file or folder here, which travels with the job."),
    ] = None,
    assignments: SetOption = None,
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run the nas of this wheel instead of the one here.")
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the nas of the cluster's image; no code travels.")
    ] = False,
    share_password: Annotated[
        bool,
        typer.Option(
            "--share-password",
            help="Send a URL with its password, which Ray keeps in the job's details and in a log of the head.",
        ),
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Also to a cluster elsewhere that takes jobs from everybody."),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also when the same job has succeeded already.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Run a search on a Ray cluster; the same command again finds the same job, or goes on where a failed one ended."""
    from importlib.metadata import version

    from nas.cli.options import given_layers
    from nas.cli.output import print_json, say
    from nas.config import check
    from nas.errors import reading_input
    from nas.jobs.address import find_head, refuse_open
    from nas.jobs.cluster import Cluster
    from nas.jobs.submission import database_of, prepare, submit
    from nas.samplers.registry import check_sampler

    flags = {
        "study": study,
        "trials": trials,
        "workers": workers,
        "data": None if data is None else str(data.expanduser()),
    }
    with reading_input():
        given = given_layers(config, assignments, flags)
        url = storage if storage is not None or storage_env is not None else given.get("storage")
        database = database_of(url, storage_env, share_password=share_password)
        wanted, notes = prepare(given, database, wheel=wheel, installed=installed)
        check(wanted.config)
        check_sampler(wanted.config.sampler)
    head = find_head(address)
    refuse_open(head, insecure=insecure)
    done = submit(wanted, Cluster(head), version=version("nas-hybrid-layouts"), again=again)
    for note in notes if done.fresh else ():
        say(f"note: {note}")
    if done.beside:
        say(f"note: {', '.join(done.beside)} works on study {wanted.config.study!r} too")
    if json:
        print_json(
            {
                "job": done.id,
                "address": head.address,
                "fresh": done.fresh,
                "status": done.status,
                "study": wanted.config.study,
                "storage": database.shown,
                "packed_bytes": done.size,
            }
        )
        return 0
    print(done.id)
    if done.fresh:
        say(f"submitted with {done.size / 2**20:.1f} MiB of code and data")
    elif done.status == "succeeded":
        say("the same job was there and has succeeded; --again starts another one")
    else:
        say(f"the same job was there already: {done.status}")
    say(f"Next:  nas logs -f {done.id} --address {head.address}")
    say(f"       nas cancel {done.id} --address {head.address}")
    return 0

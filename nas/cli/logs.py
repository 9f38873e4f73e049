"""`nas logs`: what a job has written, and what it writes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import AddressOption, JobArgument, JsonOption

if TYPE_CHECKING:
    from nas.jobs.cluster import Cluster

NAME = "logs"


def command(
    job: JobArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    json: JsonOption = False,
) -> int:
    """Print a job's log. With -f and --json every line is a JSON value of its own."""
    import sys
    from json import dumps

    from nas.cli.output import print_json, say
    from nas.jobs.address import find_head
    from nas.jobs.cluster import Cluster

    def show(text: str) -> None:
        if json:
            for line in text.splitlines():
                print(dumps({"line": line}), flush=True)
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    cluster = Cluster(find_head(address))
    if not follow:
        if json:
            print_json({"job": job, "status": cluster.job(job).status, "log": cluster.log(job)})
        else:
            show(cluster.log(job))
        return 0
    try:
        _follow(cluster, job, show)
    except KeyboardInterrupt:
        say(f"the job goes on; nas cancel {job} ends it")
        raise
    ended = cluster.job(job)
    if json:
        print(dumps({"job": job, "status": ended.status, "exit_code": ended.exit_code}), flush=True)
    else:
        say(f"job {job}: {ended.status}")
    return 0


def _follow(cluster: "Cluster", job: str, show: Callable[[str], None]) -> None:
    """Show a log as it grows, until the job ends."""
    import asyncio

    from nas.errors import EXIT_INTERNAL, Refused

    lines = cluster.follow(job)

    async def read() -> None:
        async for text in lines:
            show(text)

    try:
        asyncio.run(read())
    except (OSError, RuntimeError) as error:
        # The stream of a head that goes away, or of a tunnel that closes.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(
            f"the log's stream from {cluster.head.address} broke off: {reason}\n"
            f"the job may well go on; the same command follows it again",
            EXIT_INTERNAL,
        ) from error

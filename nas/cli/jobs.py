"""`nas jobs`: the searches that a Ray cluster knows as jobs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.options import AddressOption, JsonOption

if TYPE_CHECKING:
    from nas.jobs.cluster import JobRecord

NAME = "jobs"
ENDINGS = {
    0: "done",
    1: "internal error",
    2: "refused: usage or configuration",
    3: "refused: storage",
    4: "no valid trial",
    5: "interrupted; goes on",
}
"""What a search's exit code says."""


def command(
    address: AddressOption = None,
    all_jobs: Annotated[bool, typer.Option("--all", help="Also jobs that nas submit has not made.")] = False,
    json: JsonOption = False,
) -> int:
    """List a cluster's searches. What they have found, their database knows: nas front --storage URL."""
    from rich.table import Table
    from rich.text import Text

    from nas.cli.output import console, print_json
    from nas.jobs.address import find_head
    from nas.jobs.cluster import Cluster

    found = [job for job in Cluster(find_head(address)).jobs() if all_jobs or job.ours]
    if json:
        print_json([job_row(job) for job in found])
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("job", "status", "study", "storage", "started", "took", "ended"):
        table.add_column(title, justify="right" if title == "took" else "left", no_wrap=title == "job")
    for job in found:
        table.add_row(
            Text(job.id),
            job.status,
            Text(job.metadata.get("study", "")),
            Text(job.metadata.get("storage", "")),
            _moment(job.started_ms),
            _took(job),
            Text(_ended(job)),
        )
    console().print(table)
    return 0


def job_row(job: "JobRecord") -> dict[str, Any]:
    """A job as plain values."""
    return {
        "job": job.id,
        "status": job.status,
        "study": job.metadata.get("study"),
        "storage": job.metadata.get("storage"),
        "started_unix_s": None if job.started_ms is None else job.started_ms / 1000,
        "ended_unix_s": None if job.ended_ms is None else job.ended_ms / 1000,
        "exit_code": job.exit_code,
        "message": job.message,
    }


def _moment(unix_ms: int | None) -> str:
    from datetime import datetime

    return "" if unix_ms is None else datetime.fromtimestamp(unix_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")


def _took(job: "JobRecord") -> str:
    import time

    from dashboards import quantities

    if job.started_ms is None:
        return ""
    until_ms = job.ended_ms or round(time.time() * 1000)
    # A clock elsewhere may go before ours.
    return quantities.duration(max(0.0, (until_ms - job.started_ms) / 1000))


def _ended(job: "JobRecord") -> str:
    """How a job ended, in words: by its exit code where it had one."""
    if not job.over or job.status == "succeeded":
        return ""
    if job.status == "failed" and job.exit_code is not None:
        return (
            f"{job.exit_code}: {ENDINGS.get(job.exit_code, 'killed' if job.exit_code < 0 else job.message)}"
        )
    return job.message

"""`nas trials`: every trial of a study, and how it ended."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import JsonOption, StorageOption, StudyOption

if TYPE_CHECKING:
    from storage.records import ResultRecord

NAME = "trials"
PAGE_ROWS = 100


def command(
    study: StudyOption = None,
    storage: StorageOption = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="Only those: done, pruned (stopped at a rung), unfit, lost, quarantined, running, waiting."
        ),
    ] = None,
    page: Annotated[
        int | None,
        typer.Option(min=1, help=f"Only {PAGE_ROWS} of them, by number: 1 for the first, 2 for those after."),
    ] = None,
    json: JsonOption = False,
) -> int:
    """List a study's trials."""
    from rich.table import Table
    from rich.text import Text

    from dashboards import quantities
    from nas.cli.output import console, print_json
    from nas.cli.picture import strip
    from nas.errors import Refused
    from nas.front import trial_row
    from nas.open_study import open_study
    from search_space.notation import nearest
    from storage.records import STATES

    for name in state or []:
        if name not in STATES:
            raise Refused(f"no state {name!r}{nearest(name, STATES)} (there are {', '.join(STATES)})")
    with open_study(storage, study) as (store, record):
        wanted = [known for known in STATES if known in state] if state else None
        if page is None:
            trials = store.trials(record, states=wanted)
        else:
            trials = store.trials(record, states=wanted, offset=(page - 1) * PAGE_ROWS, limit=PAGE_ROWS)
    if json:
        print_json([trial_row(trial) for trial in trials])
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shares = record.config.get("rungs", {}).get("shares", ())
    for title in ("trial", "state", "layout", "strip", "quality", "decode", "cache", "origin", "why"):
        table.add_column(
            title, justify="right" if title in ("trial", "quality", "decode", "cache") else "left"
        )
        if title == "quality" and shares:
            table.add_column("of steps", justify="right")
    for trial in trials:
        table.add_row(
            str(trial.number),
            trial.state,
            Text(trial.layout.text),
            strip(trial.layout.layers, record.families),
            f"{trial.result.quality:.3f}" if trial.result else "",
            *([_reached(trial.result, shares)] if shares else []),
            quantities.milliseconds(trial.costs["latency_ms"]),
            quantities.size(trial.costs["kv_bytes"]),
            trial.origin,
            Text(trial.why),
        )
    console().print(table)
    return 0


def _reached(result: "ResultRecord | None", shares: Sequence[float]) -> str:
    """The share of the steps after which the trial was scored last."""
    if result is None:
        return ""
    return f"{[*shares, 1.0][min(result.rung, len(shares))] * 100:.0f} %"

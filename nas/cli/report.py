"""`nas report`: a study as one HTML file that needs nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import StorageOption, StudyOption

NAME = "report"


def command(
    study: StudyOption = None,
    storage: StorageOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write.")] = Path(
        "report.html"
    ),
) -> int:
    """Write a self-contained HTML report of a study."""
    from dashboards.report import write_report
    from nas.cli.output import say
    from nas.errors import Refused
    from nas.explain.reasons import reasons
    from nas.open_study import open_study

    with open_study(storage, study) as (store, record):
        try:
            found = reasons(record, store.trials(record, states=["done"]))
            write_report(store, record, output, found)
        except OSError as error:
            if error.errno is None:
                raise
            raise Refused(f"{output} cannot be written: {error.strerror}") from error
    say(f"wrote {output}")
    return 0

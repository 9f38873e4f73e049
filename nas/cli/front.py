"""`nas front`: the layouts that nothing in the study beats."""

from typing import Annotated

import typer

from nas.cli.options import JsonOption, StorageOption, StudyOption

NAME = "front"


def command(
    study: StudyOption = None,
    storage: StorageOption = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Draw the front by these instead, such as mqar,kv_bytes@128k, as far as stored.",
        ),
    ] = None,
    json: JsonOption = False,
) -> int:
    """Show a study's Pareto front."""
    from nas.cli.front_page import drawn_axes, front_rows, read_standing, show_front, standing_of
    from nas.cli.output import console, print_json, say
    from nas.errors import EXIT_NOTHING, reading_input
    from nas.front import front
    from nas.open_study import open_study

    with open_study(storage, study) as (store, record):
        if objectives is None:
            found = read_standing(store, record)
        else:
            trials = store.trials(record)
            with reading_input():
                found = standing_of(record, trials, drawn_axes(objectives, record, trials))
    if json:
        print_json(front_rows(found.trials, found.axes))
    else:
        show_front(found, console())
    if not front(found.trials, found.axes):
        say(f"study {record.name!r} has no finished trial yet")
        return EXIT_NOTHING
    return 0

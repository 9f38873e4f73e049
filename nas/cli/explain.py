"""`nas explain`: why the layers of a study's best layouts stand where they stand."""

from typing import Annotated

import typer

from nas.cli.options import JsonOption, StorageOption, StudyOption

NAME = "explain"


def command(
    study: StudyOption = None,
    storage: StorageOption = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What is explained: an objective that is learnt, such as quality, or a task's score.",
        ),
    ] = None,
    json: JsonOption = False,
) -> int:
    """Explain a study: which layers and mixers matter, and how sure that is."""
    from nas.cli.explain_page import print_reasons
    from nas.cli.output import console, print_json, say
    from nas.errors import EXIT_NOTHING, reading_input
    from nas.explain.reasons import reasons, reasons_json
    from nas.open_study import open_study

    with open_study(storage, study) as (store, record):
        trials = store.trials(record, states=["done"])
    with reading_input():
        found = reasons(record, trials, objective)
    if found is None:
        if json:
            print_json(None)
        say(f"study {record.name!r} has no finished trial yet")
        return EXIT_NOTHING
    if json:
        print_json(reasons_json(found))
    else:
        print_reasons(found, record.families, console())
    return 0

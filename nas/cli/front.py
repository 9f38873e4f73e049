"""`nas front`: the layouts that nothing in the study beats."""

from nas.cli.options import JsonOption, StorageOption, StudyOption

NAME = "front"


def command(study: StudyOption = None, storage: StorageOption = None, json: JsonOption = False) -> int:
    """Show a study's Pareto front."""
    from nas.cli.output import console, print_json, say
    from nas.cli.session import show_front
    from nas.errors import EXIT_NOTHING
    from nas.front import front, row
    from nas.open_study import open_study

    with open_study(storage, study) as (store, record):
        trials = store.trials(record)
    best = front(trials, record.axes)
    if json:
        print_json([row(trial) for trial in best])
    else:
        show_front(trials, record, console())
    if not best:
        say(f"study {record.name!r} has no finished trial yet")
        return EXIT_NOTHING
    return 0

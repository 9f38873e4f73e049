"""`nas show`: one trial, layer by layer."""

from typing import Annotated

import typer

from nas.cli.options import JsonOption, StorageOption, StudyOption

NAME = "show"


def command(
    trial: Annotated[int, typer.Argument(help="Number of the trial.")],
    study: StudyOption = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> int:
    """Show one trial: its layout, costs by layer, scores, and where its time went."""
    from nas.cli.output import console, print_json
    from nas.cli.trial_page import print_trial
    from nas.errors import Refused
    from nas.front import front, trial_row
    from nas.open_study import open_study

    with open_study(storage, study) as (store, record):
        found = store.trial(record, trial)
        if found is None:
            count = sum(store.counts(record).values())
            raise Refused(f"study {record.name!r} has no trial {trial}: it has {count}, counted from 0")
        trials = store.trials(record)
        url = store.shown_url
    on_front = any(other.number == trial for other in front(trials, record.axes))
    if json:
        result = found.result
        print_json(
            trial_row(found)
            | {
                "on_front": on_front,
                "costs": dict(found.costs),
                "layer_costs": [dict(costs) for costs in found.layer_costs],
                "details": dict(result.details) if result else {},
                "repeats": [
                    {"seed": one.seed, "quality": one.quality, "scores": dict(one.scores)}
                    for one in found.repeats
                ],
            }
        )
        return 0
    print_trial(found, record, url, on_front=on_front, trials=trials, out=console())
    return 0

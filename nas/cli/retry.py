"""`nas retry`: trials that ended without a result wait for another attempt."""

import shlex
from typing import Annotated

import typer

from nas.cli.options import JsonOption, StorageOption, StudyOption

NAME = "retry"


def command(
    numbers: Annotated[
        list[int] | None, typer.Argument(min=0, metavar="[TRIAL]…", help="Numbers, as nas trials shows them.")
    ] = None,
    study: StudyOption = None,
    storage: StorageOption = None,
    state: Annotated[
        list[str] | None, typer.Option(help="All that are lost, unfit or quarantined, in place of numbers.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Let trials that ended without a result wait for another attempt; the next search runs them first."""
    from nas.cli.output import print_json, say
    from nas.errors import Refused
    from nas.open_study import open_study, storage_url
    from search_space.notation import nearest
    from storage.attempts import RETRIED
    from storage.store import Store

    for name in state or []:
        if name not in RETRIED:
            raise Refused(
                f"state {name!r}{nearest(name, RETRIED)}: what can be tried again is {', '.join(RETRIED)}"
            )
    if bool(numbers) == bool(state):
        raise Refused("name either trials, such as `nas retry 12 17`, or a state, such as --state lost")
    with open_study(storage, study) as (reader, record):  # a database that is not there is not made
        ended = [known for known in RETRIED if known in (state or [])]
        chosen = numbers or [trial.number for trial in reader.trials(record, states=ended)]
    with Store.open(storage_url(storage)) as store, store.writer(record):
        retried = store.retry_trials(record, chosen)
        shown_url = store.shown_url
    if json:
        print_json({"study": record.name, "retried": retried})
        return 0
    if not retried:
        say(f"study {record.name!r} has no trial that is {' or '.join(state or [])}")
        return 0
    where = f"--study {shlex.quote(record.name)} --storage {shlex.quote(shown_url)}"
    what = "1 trial waits" if len(retried) == 1 else f"{len(retried)} trials wait"
    say(f"{what} for another attempt: {', '.join(map(str, retried))}. To run: nas search {where}")
    return 0

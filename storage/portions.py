"""All trials of a study in many short transactions: whoever reads a SQLite file holds up its writer meanwhile."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from storage.records import State, StudyRecord, TrialRecord
from storage.trials import count_numbers, read_trials

PORTION = 500


def read_in_portions(
    reading: Callable[[], AbstractContextManager[Connection]],
    study: StudyRecord,
    states: Collection[State] | None,
    has_repeats: Callable[[Connection], bool],
) -> list[TrialRecord]:
    """Trials with their results, by number, each portion as it is at one moment."""
    with reading() as connection:
        count = count_numbers(connection, study)
    found: list[TrialRecord] = []
    for first in range(0, count, PORTION):
        with reading() as connection:
            found += read_trials(
                connection,
                study,
                states=states,
                numbers=range(first, min(first + PORTION, count)),
                repeats=has_repeats(connection),
            )
    return found

"""Attempts at trials: taken by one driver, committed once, given back or given up.

An attempt's number is its fence: whoever ends one that is no longer the running one changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, insert, or_, select, update

from storage import points
from storage.errors import StorageError
from storage.events import add_events
from storage.plain import printable
from storage.records import State, StudyRecord
from storage.tables import AnyRow, DriverRow, ResultRow, StudyRow, TrialRow, epoch_now

_SELECT = select(
    TrialRow.id, TrialRow.number, TrialRow.state, TrialRow.attempts, TrialRow.failures, TrialRow.costs
)
_OPEN = ("waiting", "pruned")
RETRIED: tuple[State, ...] = ("unfit", "lost", "quarantined")
"""Endings without a result, after which a trial may be tried again on demand."""


def start(connection: Connection, study: StudyRecord, number: int, driver_id: int | None = None) -> int:
    """Takes a waiting or pruned trial for its next attempt; returns the attempt's number. StorageError for another."""
    row = held(connection, study, number)
    if row.state not in _OPEN:
        raise StorageError(
            f"trial {number} of study {study.name!r} is {row.state}: only a waiting or pruned one can be started"
        )
    return _take(connection, study, row, driver_id)


def claim(connection: Connection, study: StudyRecord, number: int, driver_id: int) -> int | None:
    """As `start`; None where another driver was quicker."""
    row = held(connection, study, number)
    return _take(connection, study, row, driver_id) if row.state in _OPEN else None


def claim_waiting(connection: Connection, study: StudyRecord, driver_id: int) -> tuple[int, int] | None:
    """Takes the first waiting trial that nobody else is taking at this moment: its number and the attempt's."""
    first = (
        _SELECT.where(TrialRow.study_id == study.id, TrialRow.state == "waiting")
        .order_by(TrialRow.number)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True)
    )
    row = connection.execute(first).first()
    return None if row is None else (row.number, _take(connection, study, row, driver_id))


def _take(connection: Connection, study: StudyRecord, row: AnyRow, driver_id: int | None) -> int:
    attempt: int = row.attempts + 1
    connection.execute(
        update(TrialRow)
        .where(TrialRow.id == row.id)
        .values(state="running", attempts=attempt, driver_id=driver_id, started_at=epoch_now(), ended_at=None)
    )
    add_events(connection, study.id, "trial_running", [{"trial": row.number, "attempt": attempt}])
    return attempt


def finish(
    connection: Connection,
    study: StudyRecord,
    number: int,
    attempt: int,
    *,
    results: Sequence[Mapping[str, Any]],
    state: State,
    costs: Mapping[str, float],
) -> bool:
    """Commits results, the last of which is the attempt's own, if it is the one that runs; else notes that it is late."""
    row = held(connection, study, number)
    if not _is_running(connection, study, row, attempt, state):
        return False
    connection.execute(insert(ResultRow), [{**result, "trial_id": row.id} for result in results])
    result, costs = results[-1], {**row.costs, **costs}
    connection.execute(
        update(TrialRow)
        .where(TrialRow.id == row.id)
        .values(state=state, costs=costs, failures=0, ended_at=epoch_now())
    )
    if state == "done":
        points.put(connection, study, number, costs, [(result["quality"], result["scores"])])
    payload = {"trial": number, "attempt": attempt, "rung": result["rung"], "quality": result["quality"]}
    add_events(connection, study.id, f"trial_{state}", [payload])
    return True


def fail(
    connection: Connection, study: StudyRecord, number: int, attempt: int, *, state: State, why: str
) -> bool:
    """Ends the running attempt without a result, or puts the trial back; otherwise notes that it came too late."""
    row = held(connection, study, number)
    if not _is_running(connection, study, row, attempt, state):
        return False
    _end(connection, study, row, state, why)
    return True


def lose(
    connection: Connection,
    study: StudyRecord,
    number: int,
    attempt: int,
    *,
    last: Literal["lost", "quarantined"],
    why: str,
    attempts: int,
) -> State | None:
    """Puts a trial back whose attempt failed; the one that makes it so many in a row ends it as `last` says.

    Returns the state that it has then; None, and nothing changed, where the attempt came too late.
    """
    row = held(connection, study, number)
    failures = row.failures + 1
    state: State = "waiting" if failures < attempts else last
    if not _is_running(connection, study, row, attempt, state):
        return None
    _end(connection, study, row, state, why, failures=failures)
    return state


def _end(
    connection: Connection,
    study: StudyRecord,
    row: AnyRow,
    state: State,
    why: str,
    failures: int | None = None,
) -> None:
    why = printable(why)
    put_back = state == "waiting"
    values: dict[str, Any] = {"state": state, "why": "" if put_back else why, "driver_id": None}
    values |= {"started_at": None} if put_back else {"ended_at": epoch_now()}
    if failures is not None:
        values["failures"] = failures
    connection.execute(update(TrialRow).where(TrialRow.id == row.id).values(**values))
    kind = "trial_requeued" if put_back else f"trial_{state}"
    add_events(connection, study.id, kind, [{"trial": row.number, "attempt": row.attempts, "why": why}])


def requeue_abandoned(connection: Connection, study: StudyRecord) -> list[int]:
    """Puts back every running trial whose driver is gone; returns their numbers in order. It is no failure of theirs."""
    abandoned = (
        _SELECT.outerjoin(DriverRow, TrialRow.driver_id == DriverRow.id)
        .where(TrialRow.study_id == study.id, TrialRow.state == "running")
        .where(or_(TrialRow.driver_id.is_(None), DriverRow.ended_at.is_not(None)))
        .order_by(TrialRow.number)
        .with_for_update(key_share=True, skip_locked=True, of=TrialRow)
    )
    rows = connection.execute(abandoned).all()
    for row in rows:
        _end(connection, study, row, "waiting", "resumed")
    return [row.number for row in rows]


def retry(connection: Connection, study: StudyRecord, numbers: Sequence[int]) -> list[int]:
    """Lets trials that ended without a result wait for another attempt, as if none had failed. StorageError for others."""
    held_study = select(StudyRow.id).where(StudyRow.id == study.id).with_for_update(key_share=True)
    connection.execute(held_study)
    rows = [held(connection, study, number) for number in sorted(set(numbers))]
    for row in rows:
        if row.state not in RETRIED:
            raise StorageError(
                f"trial {row.number} of study {study.name!r} is {row.state}: "
                f"only one that is {', '.join(RETRIED[:-1])} or {RETRIED[-1]} can be tried again"
            )
    for row in rows:
        connection.execute(
            update(TrialRow)
            .where(TrialRow.id == row.id)
            .values(state="waiting", why="", failures=0, started_at=None, ended_at=None)
        )
    if rows:
        payloads = [{"trial": row.number, "was": row.state} for row in rows]
        add_events(connection, study.id, "trial_retried", payloads)
    return [row.number for row in rows]


def held(connection: Connection, study: StudyRecord, number: int) -> AnyRow:
    """The trial's row, which nobody else may change before the commit. StorageError where there is none."""
    wanted = _SELECT.where(TrialRow.study_id == study.id, TrialRow.number == number)
    row = connection.execute(wanted.with_for_update(key_share=True)).first()
    if row is None:
        raise StorageError(f"study {study.name!r} has no trial {number}: see its numbers with nas trials")
    return row


def _is_running(
    connection: Connection, study: StudyRecord, row: AnyRow, attempt: int, offered: State
) -> bool:
    if row.state == "running" and row.attempts == attempt:
        return True
    payload = {
        "trial": row.number,
        "attempt": attempt,
        "offered": offered,
        "state": row.state,
        "attempts": row.attempts,
    }
    add_events(connection, study.id, "late_result_rejected", [payload])
    return False

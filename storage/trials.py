"""Rows of trials, their layouts and results: counting, fencing, and reading many in two queries."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from storage.errors import StorageError
from storage.events import add_events
from storage.plain import numbers, plain, printable, storable
from storage.records import STATES, LayoutRecord, NewTrial, ResultRecord, State, StudyRecord, TrialRecord
from storage.repeats import read_repeat, read_repeats
from storage.results import RESULT_COLUMNS, result_of
from storage.tables import AnyRow, LayoutRow, ResultRow, StudyRow, TrialRow, epoch_now

_SELECT = select(
    TrialRow.id,
    TrialRow.number,
    TrialRow.state,
    TrialRow.origin,
    TrialRow.params,
    TrialRow.sampler_attrs,
    TrialRow.costs,
    TrialRow.layer_costs,
    TrialRow.evaluation_key,
    TrialRow.attempts,
    TrialRow.why,
    TrialRow.created_at,
    TrialRow.started_at,
    TrialRow.ended_at,
    LayoutRow.key.label("layout_key"),
    LayoutRow.text.label("layout_text"),
    LayoutRow.layers.label("layout_layers"),
).join(LayoutRow, TrialRow.layout_key == LayoutRow.key)

_SELECT_RESULTS = select(ResultRow.trial_id, *(getattr(ResultRow, name) for name in RESULT_COLUMNS))


def trial_values(new: NewTrial) -> dict[str, Any]:
    """The values of a new row, checked. ValueError names what cannot be stored."""
    return {
        "origin": storable(new.origin, "origin"),
        "params": plain(new.params, "params"),
        "sampler_attrs": plain(new.sampler_attrs, "sampler_attrs"),
        "costs": numbers(new.costs, "costs"),
        "layer_costs": [
            numbers(costs, f"layer_costs[{index}]") for index, costs in enumerate(new.layer_costs)
        ],
        "evaluation_key": storable(new.evaluation_key, "evaluation_key"),
    }


def layout_values(layout: LayoutRecord) -> dict[str, Any]:
    """The values of a layout's row, checked. ValueError names what cannot be stored."""
    return {
        "key": storable(layout.key, "layout.key"),
        "text": storable(layout.text, "layout.text"),
        "layers": plain(layout.layers, "layout.layers"),
    }


def insert_trial(
    connection: Connection, study: StudyRecord, layout: Mapping[str, Any], trial: Mapping[str, Any]
) -> TrialRecord:
    """Adds a waiting trial under the study's next number. StorageError where the study or the layout is not its own."""
    # The study's row is held until the commit, so that two writers cannot count to the same number. Not FOR UPDATE:
    # that would also stop an event that only refers to the study, and the two could wait for each other for ever.
    held = select(StudyRow.id).where(StudyRow.id == study.id).with_for_update(key_share=True)
    if connection.execute(held).scalar() is None:
        raise StorageError(f"there is no study {study.name!r} here: make it first")
    _insert_layout(connection, layout)
    number = count_numbers(connection, study)
    connection.execute(
        insert(TrialRow).values(
            **trial,
            study_id=study.id,
            number=number,
            state="waiting",
            layout_key=layout["key"],
            attempts=0,
            why="",
            created_at=epoch_now(),
        )
    )
    add_events(connection, study.id, "trial_waiting", [{"trial": number, "layout": layout["text"]}])
    return read_trials(connection, study, number=number)[0]


def _insert_layout(connection: Connection, layout: Mapping[str, Any]) -> None:
    dialect_insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(dialect_insert(LayoutRow).values(**layout).on_conflict_do_nothing())
    known = connection.execute(select(LayoutRow.text).where(LayoutRow.key == layout["key"])).scalar_one()
    if known != layout["text"]:
        raise StorageError(
            f"the layout key {layout['key']!r} is that of {known!r} here, not of {layout['text']!r}:"
            " a key names one layout; use a new database if the notation has changed"
        )


def start(connection: Connection, study: StudyRecord, number: int) -> int:
    """Takes a waiting or pruned trial for its next attempt; returns the attempt's number. StorageError for another."""
    row = _held(connection, study, number)
    if row.state not in ("waiting", "pruned"):
        raise StorageError(
            f"trial {number} of study {study.name!r} is {row.state}: only a waiting or pruned one can be started"
        )
    attempt: int = row.attempts + 1
    connection.execute(
        update(TrialRow)
        .where(TrialRow.id == row.id)
        .values(state="running", attempts=attempt, started_at=epoch_now(), ended_at=None)
    )
    add_events(connection, study.id, "trial_running", [{"trial": number, "attempt": attempt}])
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
    row = _held(connection, study, number)
    if not _is_running(connection, study, row, attempt, state):
        return False
    connection.execute(insert(ResultRow), [{**result, "trial_id": row.id} for result in results])
    result = results[-1]
    connection.execute(
        update(TrialRow)
        .where(TrialRow.id == row.id)
        .values(state=state, costs={**row.costs, **costs}, ended_at=epoch_now())
    )
    payload = {"trial": number, "attempt": attempt, "rung": result["rung"], "quality": result["quality"]}
    add_events(connection, study.id, f"trial_{state}", [payload])
    return True


def fail(
    connection: Connection, study: StudyRecord, number: int, attempt: int, *, state: State, why: str
) -> bool:
    """Ends the running attempt without a result, or puts the trial back; otherwise notes that it came too late."""
    row = _held(connection, study, number)
    if not _is_running(connection, study, row, attempt, state):
        return False
    why = printable(why)
    put_back = state == "waiting"
    connection.execute(
        update(TrialRow)
        .where(TrialRow.id == row.id)
        .values(
            state=state, why="" if put_back else why, **_TIMES_WHEN_WAITING if put_back else _TIMES_WHEN_ENDED
        )
    )
    kind = "trial_requeued" if put_back else f"trial_{state}"
    add_events(connection, study.id, kind, [{"trial": number, "attempt": attempt, "why": why}])
    return True


_TIMES_WHEN_WAITING: dict[str, Any] = {"started_at": None}
_TIMES_WHEN_ENDED: dict[str, Any] = {"ended_at": epoch_now()}


def requeue_running(connection: Connection, study: StudyRecord) -> list[int]:
    """Puts every running trial back, as its writer is gone; returns their numbers in order."""
    requeued = connection.execute(
        update(TrialRow)
        .where(TrialRow.study_id == study.id, TrialRow.state == "running")
        .values(state="waiting", **_TIMES_WHEN_WAITING)
        .returning(TrialRow.number, TrialRow.attempts)
    ).all()
    requeued = sorted(requeued)
    payloads = [{"trial": number, "attempt": attempt, "why": "resumed"} for number, attempt in requeued]
    if payloads:
        add_events(connection, study.id, "trial_requeued", payloads)
    return [number for number, _attempt in requeued]


def merge_costs(connection: Connection, study: StudyRecord, number: int, costs: Mapping[str, float]) -> None:
    """Adds to a trial's costs, or replaces those of the same name."""
    row = _held(connection, study, number)
    connection.execute(update(TrialRow).where(TrialRow.id == row.id).values(costs={**row.costs, **costs}))


def read_trials(
    connection: Connection,
    study: StudyRecord,
    *,
    states: Collection[State] | None = None,
    number: int | None = None,
    numbers: range | None = None,
    offset: int = 0,
    limit: int | None = None,
    repeats: bool = True,
) -> list[TrialRecord]:
    """Trials with their results, by number: three queries, however many they are; two without `repeats`."""
    wanted = [TrialRow.study_id == study.id]
    if states is not None:
        wanted.append(TrialRow.state.in_(sorted(states)))
    if number is not None:
        wanted.append(TrialRow.number == number)
    if numbers is not None:
        wanted.append(TrialRow.number.between(numbers.start, numbers.stop - 1))
    # A page is found in the index alone, so that what is skipped is not read.
    page = select(TrialRow.id).where(*wanted).order_by(TrialRow.number).offset(offset or None).limit(limit)
    ids = select(page.subquery().c.id)
    paged = bool(offset) or limit is not None
    trials = _SELECT.where(TrialRow.id.in_(ids)) if paged else _SELECT.where(*wanted)
    rows = connection.execute(trials.order_by(TrialRow.number)).all()
    if not rows:
        return []
    results: dict[int, list[ResultRecord]] = {}
    of_these = _SELECT_RESULTS.where(ResultRow.trial_id.in_(ids))
    for row in connection.execute(of_these.order_by(ResultRow.trial_id, ResultRow.rung)):
        results.setdefault(row.trial_id, []).append(result_of(row))
    again = read_repeats(connection, ids) if repeats else {}
    return [_trial(row, tuple(results.get(row.id, ())), tuple(again.get(row.id, ()))) for row in rows]


def count_numbers(connection: Connection, study: StudyRecord) -> int:
    """The next trial's number."""
    highest = select(func.max(TrialRow.number)).where(TrialRow.study_id == study.id)
    found = connection.execute(highest).scalar()
    return 0 if found is None else found + 1


def count_states(connection: Connection, study: StudyRecord) -> dict[State, int]:
    """How many trials stand in each state, zeros included."""
    counted = connection.execute(
        select(TrialRow.state, func.count()).where(TrialRow.study_id == study.id).group_by(TrialRow.state)
    )
    found = {state: count for state, count in counted}  # noqa: C416 - a Row is not typed as a pair
    return {state: found.get(state, 0) for state in STATES}


def number_with_layout(connection: Connection, study: StudyRecord, key: str) -> int | None:
    """The lowest number of a trial with this layout, whatever became of it."""
    wanted = select(func.min(TrialRow.number)).where(
        TrialRow.study_id == study.id, TrialRow.layout_key == key
    )
    return connection.execute(wanted).scalar()


def read_result(connection: Connection, evaluation_key: str, *, repeats: bool = True) -> ResultRecord | None:
    """The last result of the first trial done under this key, in any study, or else of a repeat."""
    wanted = (
        _SELECT_RESULTS.join(TrialRow, ResultRow.trial_id == TrialRow.id)
        .where(TrialRow.evaluation_key == evaluation_key, TrialRow.state == "done")
        .order_by(TrialRow.id, ResultRow.rung.desc())
        .limit(1)
    )
    row = connection.execute(wanted).first()
    if row is not None:
        return result_of(row)
    return read_repeat(connection, evaluation_key) if repeats else None


def _held(connection: Connection, study: StudyRecord, number: int) -> AnyRow:
    """The trial's row, which nobody else may change before the commit."""
    wanted = select(TrialRow.id, TrialRow.number, TrialRow.state, TrialRow.attempts, TrialRow.costs).where(
        TrialRow.study_id == study.id, TrialRow.number == number
    )
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


def _trial(row: AnyRow, results: tuple[ResultRecord, ...], repeats: tuple[ResultRecord, ...]) -> TrialRecord:
    return TrialRecord(
        number=row.number,
        state=cast(State, row.state),
        origin=row.origin,
        layout=LayoutRecord(key=row.layout_key, text=row.layout_text, layers=tuple(row.layout_layers)),
        params=row.params,
        sampler_attrs=row.sampler_attrs,
        costs=row.costs,
        layer_costs=tuple(row.layer_costs),
        evaluation_key=row.evaluation_key,
        attempts=row.attempts,
        why=row.why,
        results=results,
        repeats=repeats,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )

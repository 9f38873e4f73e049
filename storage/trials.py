"""Rows of trials, their layouts and results: adding, counting, and reading many in a few queries."""

from collections.abc import Collection, Mapping
from typing import Any, cast

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from storage import points
from storage.attempts import held, start
from storage.errors import StorageError
from storage.events import add_events
from storage.plain import numbers, plain, storable
from storage.records import STATES, LayoutRecord, NewTrial, ResultRecord, State, StudyRecord, TrialRecord
from storage.repeats import read_repeat, read_repeats
from storage.results import RESULT_COLUMNS, result_of
from storage.tables import AnyRow, EventRow, LayoutRow, ResultRow, StudyRow, TrialRow, epoch_now

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
    number = _insert(connection, study, layout, trial, _next_number(connection, study))
    return read_trials(connection, study, number=number)[0]


def open_trial(
    connection: Connection,
    study: StudyRecord,
    layout: Mapping[str, Any],
    trial: Mapping[str, Any],
    *,
    driver_id: int,
    most: int,
) -> tuple[TrialRecord, int] | None:
    """As `insert_trial`, and takes it at once: the trial as it waited, and the attempt's number.

    None where the study has so many trials already, or one of this layout: another driver was quicker.
    """
    number = _next_number(connection, study)
    if number >= most or number_with_layout(connection, study, layout["key"]) is not None:
        return None
    _insert(connection, study, layout, trial, number)
    opened = read_trials(connection, study, number=number)[0]
    return opened, start(connection, study, number, driver_id)


def _next_number(connection: Connection, study: StudyRecord) -> int:
    # The study's row is held until the commit, so that two writers cannot count to the same number. Not FOR UPDATE:
    # that would also stop an event that only refers to the study, and the two could wait for each other for ever.
    held_study = select(StudyRow.id).where(StudyRow.id == study.id).with_for_update(key_share=True)
    if connection.execute(held_study).scalar() is None:
        raise StorageError(f"there is no study {study.name!r} here: make it first")
    return count_numbers(connection, study)


def _insert(
    connection: Connection,
    study: StudyRecord,
    layout: Mapping[str, Any],
    trial: Mapping[str, Any],
    number: int,
) -> int:
    _insert_layout(connection, layout)
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
    return number


def _insert_layout(connection: Connection, layout: Mapping[str, Any]) -> None:
    dialect_insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(dialect_insert(LayoutRow).values(**layout).on_conflict_do_nothing())
    known = connection.execute(select(LayoutRow.text).where(LayoutRow.key == layout["key"])).scalar_one()
    if known != layout["text"]:
        raise StorageError(
            f"the layout key {layout['key']!r} is that of {known!r} here, not of {layout['text']!r}:"
            " a key names one layout; use a new database if the notation has changed"
        )


def merge_costs(connection: Connection, study: StudyRecord, number: int, costs: Mapping[str, float]) -> None:
    """Adds to a trial's costs, or replaces those of the same name."""
    row = held(connection, study, number)
    connection.execute(update(TrialRow).where(TrialRow.id == row.id).values(costs={**row.costs, **costs}))
    points.renew(connection, study, row.id, number)


def read_trials(
    connection: Connection,
    study: StudyRecord,
    *,
    states: Collection[State] | None = None,
    number: int | None = None,
    numbers: Collection[int] | None = None,
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
        within = isinstance(numbers, range) and numbers.step == 1
        wanted.append(
            TrialRow.number.between(min(numbers, default=0), max(numbers, default=-1))
            if within
            else TrialRow.number.in_(numbers)
        )
    if states is None and numbers is None and number is None:
        # Numbers have no gaps, so that a page of all trials is known without counting those before it.
        wanted.append(TrialRow.number >= offset)
        offset = 0
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


def read_set_aside(connection: Connection, evaluation_key: str) -> tuple[str, int, str] | None:
    """Study, number and reason of the first quarantined trial under this key."""
    wanted = (
        select(StudyRow.name, TrialRow.number, TrialRow.why)
        .join(StudyRow, TrialRow.study_id == StudyRow.id)
        .where(TrialRow.evaluation_key == evaluation_key, TrialRow.state == "quarantined")
        .order_by(TrialRow.id)
        .limit(1)
    )
    row = connection.execute(wanted).first()
    return None if row is None else (row.name, row.number, row.why)


def read_changed(connection: Connection, study: StudyRecord, after: int | None) -> tuple[int, list[int]]:
    """The number of the study's last event, 0 if there is none, and the trials that events after a number tell of."""
    if after is None:
        last = select(func.max(EventRow.seq)).where(EventRow.study_id == study.id)
        return connection.execute(last).scalar() or 0, []
    wanted = select(EventRow.seq, EventRow.payload).where(EventRow.study_id == study.id, EventRow.seq > after)
    rows = connection.execute(wanted.order_by(EventRow.seq)).all()
    numbers_of = {row.payload["trial"] for row in rows if "trial" in row.payload}
    return (rows[-1].seq if rows else after), sorted(numbers_of)


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

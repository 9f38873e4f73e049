"""Whether a database is sound: the file itself, its tables, and what must hold among its rows. Nothing is changed."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Text, cast, func, select

from storage import schema
from storage.engine import Database
from storage.locks import writer_of
from storage.migrations.compare import differences
from storage.place import place_of
from storage.plain import finite, numbers
from storage.points import unpacked
from storage.records import STATES, StudyRecord
from storage.studies import read_studies
from storage.summary import told_of
from storage.tables import (
    SCHEMA_VERSION,
    AnyRow,
    LatencyRow,
    LayoutRow,
    PointRow,
    RepeatRow,
    ResultRow,
    StudyRow,
    TrialRow,
)
from storage.trials import count_numbers
from storage.upkeep import lost_references

ReadLayout = Callable[[list[Any]], tuple[str, str]]
"""From a layout's stored layers to its key and its text; ValueError where they are no layout."""

PORTION = 1000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it must be."""

    check: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was looked at, and what was found there."""

    storage: str
    version: int
    newest: int
    findings: tuple[Finding, ...]
    whole: bool
    """False where what was found keeps the rest from being read."""


def check(url: str, read_layout: ReadLayout) -> Checked:
    """Looks at everything, at a moment for each check. StorageError where there is no database that is known here."""
    with closing(Database(place_of(url), read_only=True)) as database:
        version = schema.require(database)
        findings: list[Finding] = []
        whole = True
        for name, look in _checks(database, version, read_layout):
            if name == "points" and any(one.check in ("results", "numbers") for one in findings):
                continue  # points are compared with those
            # A transaction for each: a writer to a SQLite file waits until the one that reads has ended.
            with database.reading() as connection:
                lines = list(look(connection.execution_options(yield_per=PORTION)))
            findings += [Finding(check=name, said=line) for line in lines]
            if findings and name in ("file", "tables"):  # the rows are read through them
                whole = False
                break
        return Checked(
            storage=database.place.shown,
            version=version,
            newest=SCHEMA_VERSION,
            findings=tuple(findings),
            whole=whole,
        )


def _checks(
    database: Database, version: int, read_layout: ReadLayout
) -> Iterator[tuple[str, Callable[[Connection], Iterable[str]]]]:
    """In the order in which one that fails explains those after it."""
    repeats = version >= 2
    yield "file", _file
    if version == SCHEMA_VERSION:  # the tables of the versions before are not described anywhere
        yield "tables", differences
    yield "references", lost_references
    yield "trials", _trials
    free = _without_writer(database)
    yield "writers", lambda connection: _writers(database, connection, free)
    yield "results", lambda connection: _results(connection, repeats=repeats)
    yield "numbers", lambda connection: _numbers(connection, repeats=repeats)
    if version >= 4:
        yield "points", _points
    yield "layouts", lambda connection: _layouts(connection, read_layout)


def _file(connection: Connection) -> Iterator[str]:
    if connection.dialect.name == "sqlite":
        for said in connection.exec_driver_sql("PRAGMA integrity_check").scalars():
            if said != "ok":
                yield from said.splitlines()


def _trials(connection: Connection) -> Iterator[str]:
    counted = (
        select(
            StudyRow.name,
            func.count().label("trials"),
            func.count(TrialRow.number.distinct()).label("numbers"),
            func.min(TrialRow.number).label("first"),
            func.max(TrialRow.number).label("last"),
        )
        .join(TrialRow, TrialRow.study_id == StudyRow.id)
        .group_by(StudyRow.id, StudyRow.name)
        .order_by(StudyRow.id)
    )
    for row in connection.execute(counted):
        if (row.first, row.last, row.numbers) != (0, row.trials - 1, row.trials):
            yield (
                f"study {row.name!r}: {row.trials} trials have {row.numbers} numbers from {row.first} to {row.last},"
                f" instead of 0 to {row.trials - 1}"
            )
    wrong = _named(select(TrialRow.state)).where(TrialRow.state.not_in(STATES))
    for row in connection.execute(wrong):
        yield f"{_trial(row)} has the state {row.state!r}, which is none of {', '.join(STATES)}"


def _without_writer(database: Database) -> list[StudyRecord]:
    with database.reading() as connection:
        return [study for study in read_studies(connection) if writer_of(database, connection, study) is None]


def _writers(database: Database, connection: Connection, free: list[StudyRecord]) -> Iterator[str]:
    """Asks for the writer before the trials and after them: one that ends or begins meanwhile is no finding."""
    running: dict[str, list[int]] = {}
    for row in connection.execute(_named(select(TrialRow.state)).where(TrialRow.state == "running")):
        running.setdefault(row.study, []).append(row.number)
    for study in free:
        if study.name in running and writer_of(database, connection, study) is None:
            yield (
                f"study {study.name!r}: {_listed(running[study.name])} running, but no process writes the study:"
                " nas search with the same study runs what was cut off again"
            )


def _results(connection: Connection, *, repeats: bool) -> Iterator[str]:
    without = (
        _named(select(TrialRow.state))
        .where(TrialRow.state.in_(("done", "pruned")))
        .where(~select(ResultRow.trial_id).where(ResultRow.trial_id == TrialRow.id).exists())
    )
    for row in connection.execute(without):
        yield f"{_trial(row)} is {row.state} and has no result"
    twice = (
        _named(select(ResultRow.rung, func.count().label("results")))
        .join(ResultRow, ResultRow.trial_id == TrialRow.id)
        .group_by(StudyRow.id, StudyRow.name, TrialRow.number, ResultRow.rung)
        .having(func.count() > 1)
    )
    for row in connection.execute(twice):
        yield f"{_trial(row)} has {row.results} results at rung {row.rung} instead of one"
    never = (
        _named(select(TrialRow.state).distinct())
        .join(ResultRow, ResultRow.trial_id == TrialRow.id)
        .where(TrialRow.attempts == 0)
    )
    for row in connection.execute(never):
        yield f"{_trial(row)} was never started and has a result"
    if repeats:
        early = (
            _named(select(TrialRow.state).distinct())
            .join(RepeatRow, RepeatRow.trial_id == TrialRow.id)
            .where(TrialRow.state != "done")
        )
        for row in connection.execute(early):
            yield f"{_trial(row)} is {row.state} and was trained with further seeds, as only a done one is"


def _numbers(connection: Connection, *, repeats: bool) -> Iterator[str]:
    priced = _named(select(_json(TrialRow.costs, "costs"), _json(TrialRow.layer_costs, "layer_costs")))
    for row in connection.execute(priced):
        for wrong in _wrong_numbers(row, (), ("costs", "layer_costs")):
            yield f"{_trial(row)}: {wrong}"
    tables: list[type[ResultRow] | type[RepeatRow]] = [ResultRow, *([RepeatRow] if repeats else [])]
    for table in tables:
        which = table.rung if table is ResultRow else table.seed
        measured = _named(
            select(
                which.label("which"),
                table.quality,
                table.train_s,
                table.worker_s,
                _json(table.scores, "scores"),
            )
        ).join(table, table.trial_id == TrialRow.id)
        for row in connection.execute(measured):
            for wrong in _wrong_numbers(row, ("quality", "train_s", "worker_s"), ("scores",)):
                yield f"{_trial(row)}, {which.key} {row.which}: {wrong}"
    timed = select(LatencyRow.subject, LatencyRow.phase, LatencyRow.latency_ms, LatencyRow.spread_ms)
    for row in connection.execute(timed):
        for wrong in _wrong_numbers(row, ("latency_ms", "spread_ms"), ()):
            yield f"latency of {row.subject} in {row.phase}: {wrong}"


def _points(connection: Connection) -> Iterator[str]:
    """Trials whose point is not what their costs and results say."""
    for study in read_studies(connection):
        stored = select(PointRow.number, PointRow.packed).where(PointRow.study_id == study.id)
        there = {row.number: unpacked(row.packed) for row in connection.execute(stored)}
        for first in range(0, count_numbers(connection, study), PORTION):
            wanted = TrialRow.number.between(first, first + PORTION - 1)
            for number, told in told_of(connection, study, wanted, repeats=True).items():
                point = there.pop(number, None)
                wanted_point = None if told.values is None else (number, *told.values)
                if not _alike(point, wanted_point):
                    yield (
                        f"study {study.name!r}, trial {number}: its point is {_shown(point)}"
                        f" and must be {_shown(wanted_point)}"
                    )
        if there:
            yield f"study {study.name!r}: {_listed(sorted(there))} not done, and yet there are points of them"


def _alike(point: Sequence[float] | None, told: Sequence[float] | None) -> bool:
    if point is None or told is None:
        return point is told
    # A sum of seeds, and a number read from JSON, may differ in their last bit from one database to the other.
    return len(point) == len(told) and all(map(math.isclose, point, told))


def _shown(point: Sequence[float] | None) -> str:
    return "none" if point is None else f"({', '.join(f'{value:g}' for value in point)})"


def _wrong_numbers(row: AnyRow, columns: tuple[str, ...], texts: tuple[str, ...]) -> Iterator[str]:
    """Each column that holds a number, or JSON text of names and numbers, and is not finite throughout."""
    for name in columns:
        try:
            finite(getattr(row, name), name)
        except ValueError as error:
            yield str(error)
    for name in texts:
        try:
            value = json.loads(getattr(row, name))
            for index, one in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(one, dict):
                    raise ValueError(f"{name} is no mapping of names to numbers")
                numbers(one, f"{name}[{index}]" if isinstance(value, list) else name)
        except ValueError as error:
            yield f"{name} is no JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def _layouts(connection: Connection, read_layout: ReadLayout) -> Iterator[str]:
    stored = select(LayoutRow.key, LayoutRow.text, _json(LayoutRow.layers, "layers")).order_by(LayoutRow.key)
    for row in connection.execute(stored):
        try:
            key, text = read_layout(json.loads(row.layers))
        except ValueError as error:
            yield f"layout {row.key!r} ({row.text}) cannot be read: {error}"
            continue
        if (key, text) != (row.key, row.text):
            yield f"layout {row.key!r} is {row.text!r}, but its layers are {text!r}, whose key is {key!r}"


def _named(wanted: Any) -> Any:
    """The question with the study's name and the trial's number beside, in their order."""
    return (
        wanted.add_columns(StudyRow.name.label("study"), TrialRow.number)
        .select_from(TrialRow)
        .join(StudyRow, TrialRow.study_id == StudyRow.id)
        .order_by(StudyRow.name, TrialRow.number)
    )


def _trial(row: AnyRow) -> str:
    return f"study {row.study!r}, trial {row.number}"


def _json(column: Any, name: str) -> Any:
    """The column as text: read as JSON, a damaged one would end the check instead of being found."""
    return cast(column, Text).label(name)


def _listed(trials: list[int]) -> str:
    shown = ", ".join(str(number) for number in trials[:6]) + (", …" if len(trials) > 6 else "")
    return f"trials {shown} are" if len(trials) > 1 else f"trial {shown} is"

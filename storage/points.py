"""Points: what every done trial has on its study's axes, in a few bytes a trial, so that a front is found without the rest."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BindParameter, Connection, bindparam, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite

from storage import pareto
from storage.records import Axis, StudyRecord, TrialRecord
from storage.tables import PointRow, RepeatRow, ResultRow, TrialRow

Scores: TypeAlias = tuple[float, Mapping[str, float]]
"""The quality and the scores by task that one seed gave."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Letters: N done trials, M axes."""

    axes: tuple[Axis, ...]
    numbers: NDArray[np.int64]
    """[N], rising."""
    values: NDArray[np.float64]
    """[N, M], as they are, in the order of the axes."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def minimised(self) -> NDArray[np.float64]:
        """[N, M], turned so that smaller is better."""
        signs = np.array([-1.0 if axis.maximise else 1.0 for axis in self.axes])
        turned: NDArray[np.float64] = self.values * signs
        return turned

    @property
    def front(self) -> NDArray[np.int64]:
        """The numbers, rising, of the trials that no other beats."""
        return self.numbers[pareto.front(self.minimised)]

    @property
    def hypervolume(self) -> float:
        """The share of the study's frozen box that they beat."""
        on_front = self.values[pareto.front(self.minimised)]
        return pareto.hypervolume(pareto.losses(self.axes, on_front))


def put(
    connection: Connection,
    study: StudyRecord,
    number: int,
    costs: Mapping[str, float],
    seeds: Sequence[Scores],
) -> None:
    """Writes the point of a done trial, in the place of an older one; one that lacks a value on an axis has none."""
    packed = packed_of(study.axes, number, costs, seeds)
    if packed is None:
        return
    dialect_insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    added = dialect_insert(PointRow).values(study_id=study.id, number=number, packed=packed)
    key = [PointRow.study_id, PointRow.number]
    connection.execute(added.on_conflict_do_update(index_elements=key, set_={"packed": packed}))


def renew(connection: Connection, study: StudyRecord, trial_id: int, number: int) -> None:
    """Writes the point of a trial anew, as its rows now stand."""
    row = connection.execute(_TRIAL, {"wanted": trial_id}).one()
    if row.state == "done":
        seeds = [
            *connection.execute(_LAST, {"wanted": trial_id}),
            *connection.execute(_AGAIN, {"wanted": trial_id}),
        ]
        put(connection, study, number, row.costs, [(seed.quality, seed.scores) for seed in seeds])


def packed_of(
    axes: Sequence[Axis], number: int, costs: Mapping[str, float], seeds: Sequence[Scores]
) -> bytes | None:
    """The number and the values of one point as it is stored; None where the trial lacks a value."""
    values = _values(axes, costs, seeds)
    return None if values is None else struct.pack(f"<{1 + len(values)}d", number, *values)


def unpacked(packed: bytes) -> tuple[float, ...]:
    """The number and the values of one point."""
    return struct.unpack(f"<{len(packed) // 8}d", packed)


_WANTED: BindParameter[int] = bindparam("wanted")
_TRIAL = select(TrialRow.state, TrialRow.costs).where(TrialRow.id == _WANTED)
_LAST = (
    select(ResultRow.quality, ResultRow.scores)
    .where(ResultRow.trial_id == _WANTED)
    .order_by(ResultRow.rung.desc())
    .limit(1)
)
_AGAIN = (
    select(RepeatRow.quality, RepeatRow.scores).where(RepeatRow.trial_id == _WANTED).order_by(RepeatRow.seed)
)


def read(connection: Connection, study: StudyRecord) -> Points:
    """Every point of a study, put together by the database: one row, however many they are."""
    mine = select(_joined(connection)).where(PointRow.study_id == study.id)
    joined = connection.execute(mine).scalar()
    # SQLite joins texts alone.
    joined = bytes.fromhex(joined) if isinstance(joined, str) else bytes(joined or b"")
    rows = np.frombuffer(joined, dtype="<f8").reshape(-1, 1 + len(study.axes))
    # An aggregate has no order of its own, so each row brings its number.
    rows = rows[np.argsort(rows[:, 0])]
    return Points(axes=study.axes, numbers=rows[:, 0].astype(np.int64), values=rows[:, 1:].astype(np.float64))


def _joined(connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        return func.string_agg(PointRow.packed, literal(b""))
    return func.group_concat(func.hex(PointRow.packed), "")


def notable(connection: Connection, study: StudyRecord, *, repeats: bool) -> tuple[list[int], list[int]]:
    """The numbers of done trials that no search found, and of those that were trained with further seeds."""
    done = select(TrialRow.number).where(TrialRow.study_id == study.id, TrialRow.state == "done")
    given = connection.execute(done.where(TrialRow.origin != "search").order_by(TrialRow.number))
    if not repeats:
        return list(given.scalars()), []
    again = select(RepeatRow.trial_id).distinct()
    return list(given.scalars()), sorted(connection.execute(done.where(TrialRow.id.in_(again))).scalars())


def of_trials(study: StudyRecord, trials: Sequence[TrialRecord]) -> Points:
    """The same from whole records, for a database whose version knows no points."""
    numbers, rows = [], []
    for trial in trials:
        values = [trial.value(axis.name) for axis in study.axes]
        if trial.state == "done" and trial.result is not None and None not in values:
            numbers.append(trial.number)
            rows.append(values)
    return Points(
        axes=study.axes,
        numbers=np.array(numbers, dtype=np.int64),
        values=np.array(rows, dtype=np.float64).reshape(-1, len(study.axes)),
    )


def _values(axes: Sequence[Axis], costs: Mapping[str, float], seeds: Sequence[Scores]) -> list[float] | None:
    """As `TrialRecord.value` has it: a cost of the layout, or the mean over those seeds that have a score."""
    values = []
    for axis in axes:
        if axis.name != "quality" and axis.name in costs:
            values.append(float(costs[axis.name]))
            continue
        own = [quality if axis.name == "quality" else scores.get(axis.name) for quality, scores in seeds]
        there = [value for value in own if value is not None]
        if not there:
            return None
        values.append(sum(there) / len(there))
    return values

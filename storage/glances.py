"""Trials at a glance: what pictures and lists show of very many, without what only a trial's own page needs."""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import ColumnElement, Connection, Text, select
from sqlalchemy import cast as sql_cast

from storage.records import LayoutRecord, State, StudyRecord, TrialRecord
from storage.tables import LayoutRow, RepeatRow, ResultRow, TrialRow

PORTION = 500
"""So many are read in one transaction: whoever reads a SQLite file holds up its writer meanwhile."""
Reading = Callable[[], AbstractContextManager[Connection]]
Layers = dict[str, Mapping[str, Any]]
"""Layers that were read before, by their JSON: layouts are many, the layers that they are made of are few."""
_JOINT = ', {"branches"'


@dataclass(frozen=True, slots=True)
class Glance:
    """A trial without its parameters, its costs by layer, and the details of its results."""

    number: int
    state: State
    origin: str
    layout: LayoutRecord
    costs: Mapping[str, float]
    attempts: int
    why: str
    started_at: float | None
    ended_at: float | None
    rungs: tuple[tuple[int, float], ...] = ()
    """Rung and quality of every result, the lowest rung first."""
    scores: Mapping[str, float] | None = None
    """Those of the highest rung; None where there is no result."""
    repeats: tuple[tuple[float, Mapping[str, float]], ...] = ()
    """Quality and scores of further seeds."""

    def by_seed(self, name: str) -> tuple[float, ...]:
        """As `TrialRecord.by_seed`."""
        if not self.rungs:
            return ()
        own: tuple[float, Mapping[str, float]] = (self.rungs[-1][1], self.scores or {})
        seeds = (own, *self.repeats)
        values = [quality if name == "quality" else scores.get(name) for quality, scores in seeds]
        return tuple(value for value in values if value is not None)

    def value(self, name: str) -> float | None:
        """As `TrialRecord.value`."""
        if name != "quality" and name in self.costs:
            return self.costs[name]
        values = self.by_seed(name)
        return sum(values) / len(values) if values else None


def glance_of(trial: TrialRecord) -> Glance:
    """A whole record at a glance."""
    last = trial.result
    return Glance(
        number=trial.number,
        state=trial.state,
        origin=trial.origin,
        layout=trial.layout,
        costs=trial.costs,
        attempts=trial.attempts,
        why=trial.why,
        started_at=trial.started_at,
        ended_at=trial.ended_at,
        rungs=tuple((one.rung, one.quality) for one in sorted(trial.results, key=lambda one: one.rung)),
        scores=None if last is None else last.scores,
        repeats=tuple((one.quality, one.scores) for one in trial.repeats),
    )


def read_glances(
    reading: Reading,
    study: StudyRecord,
    numbers: Collection[int],
    has_repeats: Callable[[Connection], bool],
    layers: Layers,
) -> list[Glance]:
    """The trials of these numbers, in short transactions; a range is asked for by its ends.

    Equal layers are one object among all that were read with the same `layers`.
    """
    found: list[Glance] = []
    ordered = numbers if isinstance(numbers, range) else sorted(numbers)
    for first in range(0, len(ordered), PORTION):
        part = ordered[first : first + PORTION]
        wanted = (
            TrialRow.number.between(part[0], part[-1])
            if isinstance(part, range)
            else TrialRow.number.in_(part)
        )
        with reading() as connection:
            found += _read(connection, study, wanted, has_repeats(connection), layers)
    return found


def _read(
    connection: Connection, study: StudyRecord, wanted: ColumnElement[bool], repeats: bool, layers: Layers
) -> list[Glance]:
    mine = (TrialRow.study_id == study.id, wanted)
    rows = connection.execute(
        select(
            TrialRow.id,
            TrialRow.number,
            TrialRow.state,
            TrialRow.origin,
            TrialRow.costs,
            TrialRow.attempts,
            TrialRow.why,
            TrialRow.started_at,
            TrialRow.ended_at,
            LayoutRow.key,
            LayoutRow.text,
            sql_cast(LayoutRow.layers, Text).label("layers"),
        )
        .join(LayoutRow, TrialRow.layout_key == LayoutRow.key)
        .where(*mine)
        .order_by(TrialRow.number)
    ).all()
    ids = select(TrialRow.id).where(*mine)
    results = _by_trial(connection, ResultRow, ids, ResultRow.rung)
    again = _by_trial(connection, RepeatRow, ids, RepeatRow.seed) if repeats else {}
    return [
        Glance(
            number=row.number,
            state=cast(State, row.state),
            origin=row.origin,
            layout=LayoutRecord(key=row.key, text=row.text, layers=_layers(row.layers, layers)),
            costs=row.costs,
            attempts=row.attempts,
            why=row.why,
            started_at=row.started_at,
            ended_at=row.ended_at,
            rungs=tuple((rung, quality) for rung, quality, _ in results.get(row.id, ())),
            scores=results[row.id][-1][2] if row.id in results else None,
            repeats=tuple((quality, scores) for _, quality, scores in again.get(row.id, ())),
        )
        for row in rows
    ]


def _layers(text: str, known: Layers) -> tuple[Mapping[str, Any], ...]:
    """The layers of a stored layout. Its JSON is cut between them, so that each is decoded once however often it stands."""
    first, *others = text[1:-1].split(_JOINT)
    try:
        # Within a JSON string a quote is escaped, so that no name can hold the joint.
        return tuple(_layer(piece, known) for piece in (first, *(_JOINT[2:] + rest for rest in others)))
    except json.JSONDecodeError:
        # Written with other blanks or in another order.
        return tuple(_layer(json.dumps(layer), known) for layer in json.loads(text))


def _layer(piece: str, known: Layers) -> Mapping[str, Any]:
    found = known.get(piece)
    if found is None:
        found = known[piece] = json.loads(piece)
    return found


def _by_trial(
    connection: Connection, table: Any, ids: Any, order: Any
) -> dict[int, list[tuple[int, float, dict[str, float]]]]:
    wanted = select(table.trial_id, table.rung, table.quality, table.scores).where(table.trial_id.in_(ids))
    found: dict[int, list[tuple[int, float, dict[str, float]]]] = {}
    for key, rung, quality, scores in connection.execute(wanted.order_by(table.trial_id, order)):
        found.setdefault(key, []).append((rung, quality, scores))
    return found

"""Version 4: what every done trial has on its study's axes lies beside the trials, packed, so that a front is soon found.

The columns are written out and not taken from the tables of today, which later versions may change.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from alembic.operations import Operations
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    func,
    insert,
    select,
)

PORTION = 2000
_WHOLE = BigInteger().with_variant(Integer(), "sqlite")
_TABLES = MetaData()
_STUDIES = Table("nas_studies", _TABLES, Column("id", _WHOLE), Column("axes", JSON()))
_TRIALS = Table(
    "nas_trials",
    _TABLES,
    Column("id", _WHOLE),
    Column("study_id", _WHOLE),
    Column("number", _WHOLE),
    Column("state", Text()),
    Column("costs", JSON()),
)
_RESULTS, _REPEATS = (
    Table(
        name,
        _TABLES,
        Column("trial_id", _WHOLE),
        Column(order, _WHOLE),
        Column("quality", Double()),
        Column("scores", JSON()),
    )
    for name, order in (("nas_results", "rung"), ("nas_repeats", "seed"))
)
_POINTS = Table(
    "nas_points",
    _TABLES,
    Column("study_id", _WHOLE),
    Column("number", _WHOLE),
    Column("packed", LargeBinary()),
)


def upgrade(operations: Operations) -> None:
    """From version 3; nothing that is there changes."""
    operations.create_table(
        "nas_points",
        Column("study_id", _WHOLE, ForeignKey("nas_studies.id"), primary_key=True),
        Column("number", _WHOLE, primary_key=True, autoincrement=False),
        Column("packed", LargeBinary(), nullable=False),
    )
    connection = operations.get_bind()
    axes = {row.id: row.axes for row in connection.execute(select(_STUDIES.c.id, _STUDIES.c.axes)).all()}
    last = connection.execute(select(func.max(_TRIALS.c.id))).scalar() or 0
    for first in range(1, last + 1, PORTION):
        _fill(connection, axes, first, min(first + PORTION - 1, last))


def _fill(connection: Connection, axes: Mapping[int, Any], first: int, last: int) -> None:
    results: dict[int, list[tuple[float, Any]]] = {}
    for row in connection.execute(
        select(_RESULTS).where(_RESULTS.c.trial_id.between(first, last)).order_by(_RESULTS.c.rung)
    ):
        results[row.trial_id] = [(row.quality, row.scores)]  # the last rung counts
    for row in connection.execute(
        select(_REPEATS).where(_REPEATS.c.trial_id.between(first, last)).order_by(_REPEATS.c.seed)
    ):
        results.setdefault(row.trial_id, []).append((row.quality, row.scores))
    rows = []
    done = select(_TRIALS).where(_TRIALS.c.id.between(first, last), _TRIALS.c.state == "done")
    for row in connection.execute(done):
        names = [axis["name"] for axis in axes[row.study_id]]
        values = [_value(name, row.costs, results.get(row.id, [])) for name in names]
        if None not in values:
            packed = struct.pack(f"<{1 + len(values)}d", row.number, *values)
            rows.append({"study_id": row.study_id, "number": row.number, "packed": packed})
    if rows:
        connection.execute(insert(_POINTS), rows)


def _value(name: str, costs: Mapping[str, float], seeds: Sequence[tuple[float, Any]]) -> float | None:
    if name != "quality" and name in costs:
        return float(costs[name])
    own = [quality if name == "quality" else scores.get(name) for quality, scores in seeds]
    there = [value for value in own if value is not None]
    return sum(there) / len(there) if there else None

"""Rows of studies: made once, never changed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, insert, select

from storage.plain import plain, storable
from storage.records import Axis, StudyRecord
from storage.tables import AnyRow, StudyRow, epoch_now

_SELECT = select(
    StudyRow.id,
    StudyRow.name,
    StudyRow.config,
    StudyRow.config_hash,
    StudyRow.axes,
    StudyRow.families,
    StudyRow.created_at,
)


def study_values(
    name: str, config: Mapping[str, Any], config_hash: str, axes: Sequence[Axis], families: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a new row, checked. ValueError names what cannot be stored."""
    if not name.strip():
        raise ValueError("a study's name is empty: give it one")
    return {
        "name": storable(name, "the study's name"),
        "config": plain(config, "config"),
        "config_hash": storable(config_hash, "config_hash"),
        "axes": plain([asdict(axis) for axis in axes], "axes"),
        "families": plain(families, "families"),
    }


def insert_study(connection: Connection, values: Mapping[str, Any]) -> StudyRecord:
    """Inserts a study; the name's uniqueness is the table's."""
    study_id = connection.execute(
        insert(StudyRow).values(**values, created_at=epoch_now()).returning(StudyRow.id)
    ).scalar_one()
    return _study(connection.execute(_SELECT.where(StudyRow.id == study_id)).one())


def read_studies(connection: Connection, name: str | None = None) -> list[StudyRecord]:
    """Every study in the order of making, or the one of this name."""
    wanted = _SELECT if name is None else _SELECT.where(StudyRow.name == name)
    return [_study(row) for row in connection.execute(wanted.order_by(StudyRow.id))]


def _study(row: AnyRow) -> StudyRecord:
    return StudyRecord(
        id=row.id,
        name=row.name,
        config=row.config,
        config_hash=row.config_hash,
        axes=tuple(Axis(**axis) for axis in row.axes),
        families=row.families,
        created_at=row.created_at,
    )

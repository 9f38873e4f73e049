"""Rows of drivers: who works on a study, and until when that is believed. All times are the database's own."""

from sqlalchemy import Connection, delete, insert, select, update

from storage.events import add_events
from storage.plain import storable
from storage.process import is_gone
from storage.records import StudyRecord
from storage.tables import DriverRow, RepeatClaimRow, epoch_now


def begin(connection: Connection, study: StudyRecord, *, name: str, lease_s: float) -> int:
    """Adds a driver that is believed for so many seconds; returns its number."""
    driver_id: int = connection.execute(
        insert(DriverRow)
        .values(
            study_id=study.id,
            name=storable(name, "the driver's name"),
            started_at=epoch_now(),
            lease_until=epoch_now() + lease_s,
        )
        .returning(DriverRow.id)
    ).scalar_one()
    add_events(connection, study.id, "driver_started", [{"driver": driver_id, "name": name}])
    return driver_id


def renew(connection: Connection, driver_id: int, lease_s: float) -> bool:
    """Believes a driver for so many seconds more; False where it was given up meanwhile."""
    renewed = (
        update(DriverRow)
        .where(DriverRow.id == driver_id, DriverRow.ended_at.is_(None))
        .values(lease_until=epoch_now() + lease_s)
        .returning(DriverRow.id)
    )
    return connection.execute(renewed).first() is not None


def end(connection: Connection, study: StudyRecord, driver_id: int) -> None:
    """A driver ends in order."""
    _give_up(connection, study, [driver_id], "driver_ended")


def end_silent(connection: Connection, study: StudyRecord) -> None:
    """Gives up every driver whose lease has run out."""
    silent = select(DriverRow.id).where(
        DriverRow.study_id == study.id, DriverRow.ended_at.is_(None), DriverRow.lease_until < epoch_now()
    )
    _give_up(connection, study, list(connection.execute(silent).scalars()), "driver_silent")


def end_gone(connection: Connection, study: StudyRecord) -> None:
    """Gives up every driver whose process ran on this machine and does no more: its lease need not run out."""
    there = select(DriverRow.id, DriverRow.name).where(
        DriverRow.study_id == study.id, DriverRow.ended_at.is_(None)
    )
    gone = [row.id for row in connection.execute(there) if is_gone(row.name)]
    _give_up(connection, study, gone, "driver_gone")


def end_all(connection: Connection, study: StudyRecord) -> None:
    """Gives up every driver of a study, where a lock says that none can be alive."""
    there = select(DriverRow.id).where(DriverRow.study_id == study.id, DriverRow.ended_at.is_(None))
    _give_up(connection, study, list(connection.execute(there).scalars()), "driver_gone")


def _give_up(connection: Connection, study: StudyRecord, drivers: list[int], kind: str) -> None:
    if not drivers:
        return
    ended = connection.execute(
        update(DriverRow)
        .where(DriverRow.id.in_(drivers), DriverRow.ended_at.is_(None))
        .values(ended_at=epoch_now())
        .returning(DriverRow.id, DriverRow.name)
    ).all()
    connection.execute(delete(RepeatClaimRow).where(RepeatClaimRow.driver_id.in_([row.id for row in ended])))
    payloads = [{"driver": row.id, "name": row.name} for row in sorted(ended)]
    if payloads:
        add_events(connection, study.id, kind, payloads)

"""Rows of measured latencies: one for each device, frame, subject, phase and way of measuring."""

from collections.abc import Collection
from typing import Any, Literal, cast

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from storage.plain import finite, storable, whole
from storage.records import LatencyRecord
from storage.tables import AnyRow, LatencyRow

_SELECT = select(
    LatencyRow.device,
    LatencyRow.frame,
    LatencyRow.subject,
    LatencyRow.phase,
    LatencyRow.whole,
    LatencyRow.latency_ms,
    LatencyRow.spread_ms,
    LatencyRow.repetitions,
)


def latency_values(record: LatencyRecord) -> dict[str, Any]:
    """The values of a row, checked. ValueError names what cannot be stored."""
    return {
        "device": storable(record.device, "device"),
        "frame": storable(record.frame, "frame"),
        "subject": storable(record.subject, "subject"),
        "phase": storable(record.phase, "phase"),
        "whole": record.whole,
        "latency_ms": finite(record.latency_ms, "latency_ms"),
        "spread_ms": finite(record.spread_ms, "spread_ms"),
        "repetitions": whole(record.repetitions, "repetitions"),
    }


def replace_latency(connection: Connection, values: dict[str, Any]) -> None:
    """Puts a measurement in the place of an older one of the same thing."""
    dialect_insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    key = ("device", "frame", "subject", "phase", "whole")
    measured = {name: value for name, value in values.items() if name not in key}
    connection.execute(
        dialect_insert(LatencyRow)
        .values(**values)
        .on_conflict_do_update(index_elements=list(key), set_=measured)
    )


def read_latency(
    connection: Connection, *, device: str, frame: str, subject: str, phase: str, whole: bool
) -> LatencyRecord | None:
    """The measurement of exactly this, if there is one."""
    wanted = _SELECT.where(
        LatencyRow.device == device,
        LatencyRow.frame == frame,
        LatencyRow.subject == subject,
        LatencyRow.phase == phase,
        LatencyRow.whole == whole,
    )
    row = connection.execute(wanted).first()
    return None if row is None else _latency(row)


def read_latencies(
    connection: Connection, device: str, frames: Collection[str] | None
) -> list[LatencyRecord]:
    """Every measurement, or those of one device, or in some frames, in a fixed order."""
    wanted = _SELECT.where(LatencyRow.device == device) if device else _SELECT
    if frames is not None:
        wanted = wanted.where(LatencyRow.frame.in_(sorted(frames)))
    order = (LatencyRow.device, LatencyRow.frame, LatencyRow.subject, LatencyRow.phase, LatencyRow.whole)
    return [_latency(row) for row in connection.execute(wanted.order_by(*order))]


def _latency(row: AnyRow) -> LatencyRecord:
    return LatencyRecord(
        device=row.device,
        frame=row.frame,
        subject=row.subject,
        phase=cast(Literal["decode", "prefill"], row.phase),
        whole=row.whole,
        latency_ms=row.latency_ms,
        spread_ms=row.spread_ms,
        repetitions=row.repetitions,
    )

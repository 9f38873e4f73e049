"""Rows of events: what happened, in an order that a reader can resume from."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, insert, select, text

from storage.engine import ADVISORY_SPACE, EVENTS_LOCK
from storage.plain import plain, storable
from storage.records import EventRecord
from storage.tables import EventRow, StudyRow, epoch_now

PLANNED = "search_planned"
"""The kind of event with which a search says how many trials it is to make, and on which device latencies are measured."""
MEASURED = "latency_measured"
"""The kind of event that tells of latencies which were measured beside a search, at a context and a batch."""
_EVENTS = select(
    EventRow.seq, EventRow.at, StudyRow.name.label("study"), EventRow.kind, EventRow.payload
).join(StudyRow, EventRow.study_id == StudyRow.id, isouter=True)


def add_events(
    connection: Connection, study_id: int | None, kind: str, payloads: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Appends events and returns their numbers; to be called last in a transaction."""
    if connection.dialect.name == "postgresql":
        # A number is drawn before it can be seen. Without taking turns until the commit, a reader that has seen 8
        # would resume after it and never see a 7 that was committed later.
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:space, :events)"),
            {"space": ADVISORY_SPACE, "events": EVENTS_LOCK},
        )
    return [
        connection.execute(
            insert(EventRow)
            .values(
                at=epoch_now(),
                study_id=study_id,
                kind=storable(kind, "the event's kind"),
                payload=plain(payload, "the event's payload", non_finite_as_none=True),
            )
            .returning(EventRow.seq)
        ).scalar_one()
        for payload in payloads
    ]


def read_events(connection: Connection, study_id: int | None, after: int, limit: int) -> list[EventRecord]:
    """Events in order, after a number, of one study or of all."""
    wanted = _EVENTS.where(EventRow.seq > after).order_by(EventRow.seq).limit(limit)
    if study_id is not None:
        wanted = wanted.where(EventRow.study_id == study_id)
    return _records(connection, wanted)


def read_last_events(
    connection: Connection, study_id: int, kinds: Collection[str], after: int, most: int
) -> list[EventRecord]:
    """The last events of some kinds, in order, of those after a number."""
    wanted = (
        _EVENTS.where(EventRow.study_id == study_id, EventRow.seq > after, EventRow.kind.in_(kinds))
        .order_by(EventRow.seq.desc())
        .limit(most)
    )
    return _records(connection, wanted)[::-1]


def _records(connection: Connection, wanted: Select[Any]) -> list[EventRecord]:
    return [
        EventRecord(seq=row.seq, at=row.at, study=row.study, kind=row.kind, payload=row.payload)
        for row in connection.execute(wanted)
    ]

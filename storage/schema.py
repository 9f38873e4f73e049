"""The schema's version: tables are made where there are none, older ones brought up to date, newer ones refused."""

from sqlalchemy import Connection, insert, inspect, select, text, update

from storage.engine import ADVISORY_SPACE, SCHEMA_LOCK, Database
from storage.errors import StorageError
from storage.tables import SCHEMA_VERSION, Base, SchemaRow

OLDEST = 1
"""The oldest version that is read, and brought up to date by a writer."""


def require(database: Database) -> None:
    """For a reader: the tables are there, in this version. StorageError otherwise; nothing is made."""
    place = database.place
    if place.kind == "memory":
        raise StorageError("a memory database is empty when opened, so there is nothing to read: name a file")
    if place.path is not None and not place.path.exists():
        raise StorageError(f"no database at {place.shown}; nas search makes one")
    with database.reading(patience_s=0.0) as connection:
        if not inspect(connection).has_table(SchemaRow.__tablename__):
            raise StorageError(f"{place.shown} holds no studies yet; nas search makes them")
        versions = connection.execute(select(SchemaRow.version)).scalars().all()
    _refuse_other(place.shown, list(versions))


def has_repeats(connection: Connection) -> bool:
    """Whether the tables that are read hold repeats: only a writer brings an older version up to date."""
    return connection.execute(select(SchemaRow.version)).scalar_one() >= 2


def make_or_require(database: Database) -> None:
    """For a writer: makes the tables in an empty database, checks the version, and checks that it can write."""
    place = database.place
    if place.path is not None:
        if not place.path.parent.is_dir():
            raise StorageError(f"{place.shown}: there is no directory {place.path.parent}; make it first")
        database.leave_wal()
    with database.writing(patience_s=0.0) as connection:
        if place.kind == "server":  # two processes may open a new database at the same moment
            keys = {"space": ADVISORY_SPACE, "schema": SCHEMA_LOCK}
            connection.execute(text("SELECT pg_advisory_xact_lock(:space, :schema)"), keys)
        if not inspect(connection).has_table(SchemaRow.__tablename__):
            Base.metadata.create_all(connection)
            connection.execute(insert(SchemaRow).values(version=SCHEMA_VERSION))
        versions = list(connection.execute(select(SchemaRow.version)).scalars())
        _refuse_other(place.shown, versions)
        if versions[0] < SCHEMA_VERSION:
            # What is new since version 1 is a table, so nothing that is there changes.
            Base.metadata.create_all(connection)
        # A true write of nothing new: a read-only file or server shows itself now and not at the first result.
        connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))


def _refuse_other(shown_url: str, versions: list[int]) -> None:
    if len(versions) == 1 and OLDEST <= versions[0] <= SCHEMA_VERSION:
        return
    if len(versions) != 1:
        raise StorageError(
            f"{shown_url}: its table of versions has {len(versions)} rows instead of 1: it is damaged"
        )
    if versions[0] > SCHEMA_VERSION:
        raise StorageError(
            f"{shown_url} has schema {versions[0]}, newer than {SCHEMA_VERSION}, the newest known here:"
            " install the release that wrote it"
        )
    raise StorageError(
        f"{shown_url} has schema {versions[0]}, older than {OLDEST}, the oldest that can be brought up to date:"
        " use the release that wrote it, or name a new database"
    )

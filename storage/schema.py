"""The schema's version: tables are made where there are none, older ones only read, newer ones refused."""

import shlex

from sqlalchemy import Connection, insert, inspect, select, text, update

from storage.engine import ADVISORY_SPACE, SCHEMA_LOCK, Database
from storage.errors import Outdated, StorageError
from storage.tables import SCHEMA_VERSION, Base, SchemaRow

OLDEST = 1
"""The oldest version that is read and can be brought up to date."""


def require(database: Database, newest: int = SCHEMA_VERSION) -> int:
    """For a reader: the version, which is one that is known. StorageError otherwise; nothing is made."""
    place = database.place
    if place.kind == "memory":
        raise StorageError("a memory database is empty when opened, so there is nothing to read: name a file")
    if place.path is not None and not place.path.exists():
        raise StorageError(f"no database at {place.shown}; nas search makes one")
    with database.reading(patience_s=0.0) as connection:
        version = version_in(connection, place.shown, newest)
    if version is None:
        raise StorageError(f"{place.shown} holds no studies yet; nas search makes them")
    return version


def has_repeats(connection: Connection) -> bool:
    """Whether the tables that are read hold repeats: an older version stays as it is until it is upgraded."""
    return connection.execute(select(SchemaRow.version)).scalar_one() >= 2


def has_points(connection: Connection) -> bool:
    """Whether the tables that are read hold points."""
    return connection.execute(select(SchemaRow.version)).scalar_one() >= 4


def make_or_require(database: Database) -> None:
    """For a writer: makes the tables in an empty database, checks the version, and checks that it can write."""
    place = database.place
    if place.path is not None:
        if not place.path.parent.is_dir():
            raise StorageError(f"{place.shown}: there is no directory {place.path.parent}; make it first")
        with database.reading() as connection:  # what is refused keeps even the journal that it has
            _newest_or_none(connection, place.shown)
        database.leave_wal()
    with database.writing(patience_s=0.0) as connection:
        take_turn(connection)
        if _newest_or_none(connection, place.shown) is None:
            Base.metadata.create_all(connection)
            connection.execute(insert(SchemaRow).values(version=SCHEMA_VERSION))
        # A true write of nothing new: a read-only file or server shows itself now and not at the first result.
        connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))


def require_newest(database: Database) -> None:
    """For a writer that opened the database a while ago. StorageError where it was upgraded meanwhile."""
    with database.reading() as connection:
        _newest_or_none(connection, database.place.shown)


def take_turn(connection: Connection) -> None:
    """Until the transaction ends, nobody else makes or changes tables; a file's write transaction is enough for that."""
    if connection.dialect.name == "postgresql":
        keys = {"space": ADVISORY_SPACE, "schema": SCHEMA_LOCK}
        connection.execute(text("SELECT pg_advisory_xact_lock(:space, :schema)"), keys)


def version_in(connection: Connection, shown_url: str, newest: int = SCHEMA_VERSION) -> int | None:
    """The version of the tables, None where there are none. StorageError where it is not known here."""
    if not inspect(connection).has_table(SchemaRow.__tablename__):
        return None
    versions = connection.execute(select(SchemaRow.version)).scalars().all()
    if len(versions) != 1:
        raise StorageError(
            f"{shown_url}: its table of versions has {len(versions)} rows instead of 1: it is damaged"
        )
    [version] = versions
    if version > newest:
        raise StorageError(
            f"{shown_url} has schema {version}, newer than {newest}, the newest known here:"
            " install the release that wrote it"
        )
    if version < OLDEST:
        raise StorageError(
            f"{shown_url} has schema {version}, older than {OLDEST}, the oldest that can be brought up to date:"
            " use the release that wrote it, or name a new database"
        )
    return version


def upgrade_command(shown_url: str) -> str:
    """What to type to bring a database up to date; a password is left for the person to fill in."""
    return f"nas db upgrade --storage {shlex.quote(shown_url)}"


def _newest_or_none(connection: Connection, shown_url: str) -> int | None:
    version = version_in(connection, shown_url)
    if version is not None and version < SCHEMA_VERSION:
        raise Outdated(
            f"{shown_url} has schema {version}, which is read but no longer written, as {SCHEMA_VERSION} is:"
            f" run {upgrade_command(shown_url)}"
        )
    return version

"""What `nas db` asks: which version a database has, and to bring it up to the newest in one transaction."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect

from storage import schema
from storage.copies import copy_beside
from storage.engine import Database
from storage.errors import StorageError
from storage.locks import keep_writers_out
from storage.migrations.versions import STEPS, Step, migrate
from storage.place import place_of
from storage.records import State
from storage.studies import read_studies
from storage.tables import SCHEMA_VERSION, Base
from storage.trials import count_states


@dataclass(frozen=True, kw_only=True)
class Status:
    """A database's version beside the newest one, and its studies with their trials by state."""

    storage: str
    version: int
    newest: int
    studies: Mapping[str, Mapping[State, int]]

    @property
    def to_do(self) -> str | None:
        """The command that brings it up to date; None where it is."""
        return schema.upgrade_command(self.storage) if self.version < self.newest else None


@dataclass(frozen=True, kw_only=True)
class Upgraded:
    """From which version to which; the same where there was nothing to do."""

    storage: str
    before: int
    after: int
    copy: Path | None
    """The file as it was before, if it was one and a copy was wanted."""


def status(url: str) -> Status:
    """How a database stands; it is only read. StorageError where there is none, or none that is known here."""
    with closing(Database(place_of(url), read_only=True)) as database:
        version = schema.require(database)
        with database.reading() as connection:
            studies = {study.name: count_states(connection, study) for study in read_studies(connection)}
        return Status(storage=database.place.shown, version=version, newest=SCHEMA_VERSION, studies=studies)


def upgrade(url: str, *, copy: bool = True, steps: Mapping[int, Step] = STEPS) -> Upgraded:
    """Brings the tables to the newest version, or leaves all as it was; a file is copied first.

    StorageError where a study is being written, or the version is not known here.
    """
    place, newest = place_of(url), max(steps)
    with closing(Database(place, read_only=True)) as database:
        before = schema.require(database, newest)
    if before == newest:
        return Upgraded(storage=place.shown, before=before, after=before, copy=None)
    with closing(Database(place, read_only=False)) as database:
        if place.path is not None:
            database.leave_wal()
        # The writers' places are given back after the commit, so the stack stands outside the transaction.
        with ExitStack() as held, database.altering() as connection:
            schema.take_turn(connection)
            before = schema.version_in(connection, place.shown, newest) or before
            if before == newest:  # another process was quicker
                return Upgraded(storage=place.shown, before=before, after=before, copy=None)
            keep_writers_out(database, connection, read_studies(connection), held)
            copied = copy_beside(place.path, before) if copy and place.path is not None else None
            after = migrate(connection, before, steps)
            _refuse_lost_references(connection, place.shown)
    return Upgraded(storage=place.shown, before=before, after=after, copy=copied)


def lost_references(connection: Connection) -> list[str]:
    """Rows that refer to rows which are not there, by table; only SQLite lets that happen."""
    if connection.dialect.name != "sqlite":
        return []
    lines = []
    there = set(inspect(connection).get_table_names())
    for table in (table for table in Base.metadata.sorted_tables if table.name in there):
        broken = connection.exec_driver_sql(f"PRAGMA foreign_key_check({table.name})").all()
        for referred in sorted({row[2] for row in broken}):
            rows = [row[1] for row in broken if row[2] == referred]
            lines.append(
                f"{table.name}: {len(rows)} rows refer to rows of {referred} that are not there, such as row {rows[0]}"
            )
    return lines


def _refuse_lost_references(connection: Connection, shown_url: str) -> None:
    lost = lost_references(connection)
    if lost:
        raise StorageError(
            f"{shown_url} is damaged, so nothing was changed: {lost[0]}\n"
            f"nas db check shows all of it; restore a copy"
        )

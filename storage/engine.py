"""Connections and transactions: one way to read, one way to write, and every database error made a StorageError."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool, StaticPool

from storage.errors import StorageError, storage_error
from storage.place import Place

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5
RECONNECT_S = 15.0
"""How long a server that was there before may take to come back before a transaction gives up."""

ADVISORY_SPACE = 0x6E6173
"""The first key of all our PostgreSQL advisory locks ("nas" in ASCII); the second says what is locked."""
EVENTS_LOCK, SCHEMA_LOCK = 0, -1  # a study's own lock is its id, which counts from 1


class Database:
    """An engine with its rules: `reading` sees one moment, `writing` is all or nothing."""

    def __init__(self, place: Place, *, read_only: bool) -> None:
        self.place = place
        self.read_only = read_only
        self.closed = False
        self.before_writing: list[Callable[[], None]] = []
        """Asked before each transaction that writes: a writer's lock on a server may have died with its connection."""
        engine = (
            _server_engine(place) if place.kind == "server" else _sqlite_engine(place, read_only=read_only)
        )
        self._engine = engine
        self._reader: Engine
        self._writer: Engine
        if place.kind == "server":
            self._reader = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            self._writer = engine
        else:
            self._reader, self._writer = engine, engine.execution_options(begin=("BEGIN IMMEDIATE",))
        self._turn: AbstractContextManager[Any] = nullcontext()
        if place.kind == "memory":
            # One connection for all threads, so its transactions take turns.
            self._turn = threading.Lock()
        elif place.path is not None and read_only:
            self._turn = readers_turn(place.path)

    @contextmanager
    def reading(self, *, patience_s: float | None = None) -> Iterator[Connection]:
        """A transaction that sees one moment of the database and blocks no writer for longer than it lasts."""
        connected = self._connected(self._reader, patience_s)
        with self._named_errors(), self._turn, connected as connection, connection.begin():
            if self.read_only and self.place.kind == "file":
                self._mend_if_torn(connection)
            yield connection

    @contextmanager
    def writing(self, *, patience_s: float | None = None) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block, or leaves no trace. StorageError if read-only."""
        if self.read_only:
            raise StorageError(f"{self.place.shown} was opened for reading only: this would write to it")
        with self._named_errors():
            for ask in self.before_writing:
                ask()
            with self._turn, self._connected(self._writer, patience_s) as connection, connection.begin():
                yield connection

    @contextmanager
    def altering(self) -> Iterator[Connection]:
        """As `writing`, for changes of tables: the caller checks references in SQLite at the end.

        SQLite alters a table by making another in its place, and would follow references when it drops the first;
        it can be told not to only outside of a transaction.
        """
        engine = self._writer
        if self.place.kind != "server":
            engine = engine.execution_options(begin=("PRAGMA foreign_keys = OFF", "BEGIN IMMEDIATE"))
        with self._named_errors(), self._connected(engine, None) as connection:
            connection.detach()  # nobody shall write without checked references afterwards
            with connection.begin():
                yield connection

    @contextmanager
    def session_of_its_own(self) -> Iterator[Connection]:
        """A server connection outside the pool and outside any transaction, for a lock that lives as long as it."""
        with self._named_errors(), self._connected(self._engine, None) as connection:
            own = connection.execution_options(isolation_level="AUTOCOMMIT")
            own.detach()
            yield own

    def leave_wal(self) -> None:
        """Turns a SQLite file to a rollback journal: before 3.51.3 a write-ahead log can lose data with two writers."""
        with (
            self._named_errors(),
            self._connected(self._engine.execution_options(begin=()), None) as connection,
        ):
            connection.exec_driver_sql("PRAGMA journal_mode = DELETE")

    def close(self) -> None:
        """Closes every connection; the database refuses to be used afterwards."""
        self.closed = True
        self._engine.dispose()

    @contextmanager
    def _connected(self, engine: Engine, patience_s: float | None) -> Iterator[Connection]:
        if self.closed:
            raise StorageError(f"{self.place.shown} was closed: open it again")
        patience_s = RECONNECT_S if patience_s is None else patience_s
        deadline = time.monotonic() + (patience_s if self.place.kind == "server" else 0.0)
        while True:
            try:
                connection = engine.connect()
                break
            except OperationalError:  # nothing was sent yet, so trying again repeats nothing
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)
        with connection:
            yield connection

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        failure: StorageError
        cause: BaseException | None = None
        try:
            yield
            return
        except (DBAPIError, PoolTimeout) as error:
            failure = storage_error(error, self.place.shown, self.place.secrets)
            # What the program did wrong is worth a traceback; what a connection said may repeat a part of the URL.
            if isinstance(error, IntegrityError | ProgrammingError | DataError):
                cause = error
        raise failure from cause

    def _mend_if_torn(self, connection: Connection) -> None:
        """A writer killed in mid-commit leaves a journal that `mode=ro` may not roll back: let SQLite do it once."""
        probe = text("SELECT 1 FROM sqlite_schema LIMIT 1")
        try:
            connection.execute(probe)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorname", "") != "SQLITE_READONLY_ROLLBACK":
                raise
        assert self.place.path is not None
        try:
            mender = sqlite3.connect(sqlite_uri(self.place.path, "rw"), uri=True, timeout=BUSY_TIMEOUT_S)
            try:
                mender.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
            finally:
                mender.close()
        except sqlite3.Error as error:
            raise StorageError(
                f"{self.place.shown}: a writer died in mid-commit and its journal cannot be rolled back from here"
                f" ({error}); run once as a user who may write the file"
            ) from None
        connection.execute(probe)


@cache
def readers_turn(_path: Path) -> AbstractContextManager[Any]:
    """What the reading threads of this process take turns by, at one file.

    SQLite lets a thread in at once where another one of its process reads already, past a writer that waits for all
    readers to leave: two threads that always overlap would keep the writer out for ever.
    """
    return threading.RLock()


def sqlite_uri(path: Path, mode: str) -> str:
    """A file's name and how it is opened (ro, rw, rwc), as SQLite reads it."""
    return f"file:{quote(str(path))}?mode={mode}"


def _sqlite_engine(place: Place, *, read_only: bool) -> Engine:
    def connect() -> sqlite3.Connection:
        target = ":memory:" if place.path is None else sqlite_uri(place.path, "ro" if read_only else "rwc")
        # No isolation level: the driver begins nothing by itself, the hook below does.
        return sqlite3.connect(
            target, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    engine = create_engine(
        place.url,
        creator=connect,
        poolclass=StaticPool if place.path is None else QueuePool,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def set_rules(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        if not read_only:  # it reads the file, which a reader may have to mend before (`_mend_if_torn`)
            connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: one that began by reading could not wait for another writer, only fail.
        for statement in connection.get_execution_options().get("begin", ("BEGIN",)):
            connection.exec_driver_sql(statement)

    return engine


def _server_engine(place: Place) -> Engine:
    settings: dict[str, Any] = {
        "client_encoding": "utf8",
        "keepalives_idle": 30,
        "connect_timeout": CONNECT_TIMEOUT_S,
    }
    unset = {name: value for name, value in settings.items() if name not in place.url.query}
    engine = create_engine(place.url, connect_args=unset, pool_pre_ping=True, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def set_rules(connection: Any, _record: object) -> None:
        before = connection.autocommit
        connection.autocommit = True  # a setting made inside a transaction is lost if that one is rolled back
        connection.execute(f"SET lock_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        connection.autocommit = before

    return engine

"""Who may write a study: one process where the database is a file, any number on a server, nobody during an upgrade.

The locks die with their holders: of a file beside SQLite, of a session in the server.
"""

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from storage.engine import ADVISORY_SPACE, Database
from storage.errors import StorageError
from storage.records import StudyRecord

_HOLDER_PREFIX = "nas writer, pid "


@contextmanager
def writer_lock(database: Database, study: StudyRecord, back: Callable[[], None]) -> Iterator[None]:
    """Holds a writer's place in the study. StorageError where another process writes a file, or upgrades a server.

    `back` is asked whenever the place was lost with the server's connection and taken again.
    """
    if database.read_only:
        raise StorageError(f"{database.place.shown} was opened for reading only: it has no writer")
    if database.place.kind == "server":
        with _server_lock(database, study, back):
            yield
    elif database.place.path is not None:
        with _file_lock(database.place.path, study):
            yield
    else:
        yield  # nobody else can see a memory database


def keep_writers_out(
    database: Database, connection: Connection, studies: Sequence[StudyRecord], held: ExitStack
) -> None:
    """Takes the place of every study's writer, until the stack and the transaction end. StorageError where one writes."""
    for study in studies:
        if database.place.path is not None:
            held.enter_context(_file_lock(database.place.path, study))
        elif database.place.kind == "server":
            take = text("SELECT pg_try_advisory_xact_lock(:space, :study)")
            keys = {"space": ADVISORY_SPACE, "study": study.id}
            if not connection.execute(take, keys).scalar_one():
                raise _taken(study, _server_holder(connection, study) or "")


def writer_of(database: Database, connection: Connection, study: StudyRecord) -> str | None:
    """Who writes the study at this moment, as far as it can be told; None where nobody does."""
    if database.place.kind == "server":
        return _server_holder(connection, study)
    return None if database.place.path is None else _file_holder(_lock_path(database.place.path, study))


def _file_holder(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # a writer that ended in order took the file away
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
    return None


def _taken(study: StudyRecord, holder: str) -> StorageError:
    known = f" ({holder})" if holder else ""
    return StorageError(
        f"study {study.name!r} is being written by another process{known}: end it, or wait until it has finished"
    )


@contextmanager
def _file_lock(database_path: Path, study: StudyRecord) -> Iterator[None]:
    path = _lock_path(database_path, study)
    descriptor = _locked_file(path, study)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        # Removed while still locked: whoever opened it meanwhile sees that the name is gone and opens a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_path(database_path: Path, study: StudyRecord) -> Path:
    return database_path.with_name(f"{database_path.name}.study{study.id}.lock")


def _locked_file(path: Path, study: StudyRecord) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(
                f"the lock file {path} cannot be opened ({error.strerror}): check its rights"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_named(descriptor, path):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise _taken(study, holder) from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"the file system of {path} locks no files ({error.strerror}): put the database on a local disk"
            ) from None
        os.close(descriptor)


def _is_still_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _server_lock(database: Database, study: StudyRecord, back: Callable[[], None]) -> Iterator[None]:
    with ExitStack() as sessions:
        place = _ServerPlace(database, study, sessions, back)
        place.make_sure()
        database.before_writing.append(place.make_sure)
        try:
            yield
        finally:
            database.before_writing.remove(place.make_sure)


class _ServerPlace:
    """A writer's place in a server, held by a session. A server that restarts forgets it, so each write asks first."""

    def __init__(
        self, database: Database, study: StudyRecord, sessions: ExitStack, back: Callable[[], None]
    ) -> None:
        self._database, self._study, self._sessions, self._back = database, study, sessions, back
        self._session: Connection | None = None
        self._was_lost = False
        self._turn = threading.Lock()

    def make_sure(self) -> None:
        """Holds the lock afterwards. StorageError while the database is upgraded, or where it was meanwhile."""
        with self._turn:
            if self._session is not None and not _answers(self._session):
                self._sessions.close()
                self._session, self._was_lost = None, True
            if self._session is None:
                session = self._sessions.enter_context(self._database.session_of_its_own())
                try:
                    _take(session, self._study)
                except StorageError:
                    self._sessions.close()
                    raise
                self._session = session
            if self._was_lost:
                self._back()
                self._was_lost = False


def _answers(session: Connection) -> bool:
    try:
        session.execute(text("SELECT 1"))
    except DBAPIError:
        return False
    return True


def _take(session: Connection, study: StudyRecord) -> None:
    keys = {"space": ADVISORY_SPACE, "study": study.id}
    name = f"{_HOLDER_PREFIX}{os.getpid()} on {socket.gethostname()}"[:63]  # the server keeps 63 bytes
    session.execute(text("SELECT set_config('application_name', :name, false)"), {"name": name})
    if not session.execute(text("SELECT pg_try_advisory_lock_shared(:space, :study)"), keys).scalar_one():
        raise StorageError(
            f"study {study.name!r} is in a database that is being upgraded: wait until nas db upgrade has ended"
        )


def _server_holder(connection: Connection, study: StudyRecord) -> str | None:
    """The name that the study's writer gave its session; None where the lock is free."""
    holder: str | None = connection.execute(
        text(
            "SELECT activity.application_name FROM pg_locks AS locks JOIN pg_stat_activity AS activity USING (pid)"
            " WHERE locks.locktype = 'advisory' AND locks.granted AND locks.classid = :space AND locks.objid = :study"
            " AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ),
        {"space": ADVISORY_SPACE, "study": study.id},
    ).scalar()
    return None if holder is None else holder.removeprefix("nas writer, ")

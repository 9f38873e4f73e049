"""A study's log: one JSON object a line, in a file that is rotated by size. It never stands in a search's way."""

import fcntl
import hashlib
import json
import logging
import logging.handlers
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, get_args

from nas.redaction import Redactor
from storage.place import place_of

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
MOST_BYTES = 10 * 1024 * 1024
"""At which the file is set aside as FILE.1, the one before as FILE.2, and so on."""
OLDER_FILES = 3
CACHE = "~/.cache/nas/logs"


def log_path(given: str | None, storage: str, study: str) -> Path:
    """Where a study's log lies: where it was said, beside a database that is a file, or else in the user's cache."""
    if given is not None:
        return Path(given).expanduser()
    place = place_of(storage)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", study)[:40].strip("-")
    if place.path is not None:
        # A name that had to be changed carries a hash, so that two studies never share a file.
        own = name if name == study else f"{name}-{_digest(study)}"
        return place.path.with_name(f"{place.path.name}.{own}.log.jsonl")
    return Path(CACHE).expanduser() / f"{name}-{_digest(f'{place.shown} {study}')}.log.jsonl"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


class StudyLog:
    """Writes lines of at least one level. What keeps it from writing is said once, by `warn`, and raises nothing."""

    def __init__(
        self, path: Path, level: Level, *, study: str, redactor: Redactor, warn: Callable[[str], None]
    ) -> None:
        self.path = path
        self._handler = _Patient(path, warn)
        self._handler.setFormatter(JsonLines(study, redactor))
        # Not from logging.getLogger: nothing outside of this object shall know of it or change it.
        self._logger = logging.Logger("nas.study", level.upper())
        self._logger.addHandler(self._handler)

    def write(
        self, level: Level, event: str, fields: Mapping[str, Any], error: BaseException | None = None
    ) -> None:
        """One line; with an error its traceback too."""
        self._logger.log(
            logging.getLevelNamesMapping()[level.upper()], event, extra={"fields": fields}, exc_info=error
        )

    def close(self) -> None:
        """Lets the file go."""
        with suppress(OSError):
            self._handler.close()


@contextmanager
def open_log(
    path: Path,
    level: Level,
    *,
    study: str,
    storage: str,
    warn: Callable[[str], None],
) -> Iterator[StudyLog]:
    """The log of a study in a database, which knows the secrets of its address and those of the environment."""
    redactor = Redactor.of(os.environ, [storage, *sys.argv[1:]])
    log = StudyLog(path, level, study=study, redactor=redactor, warn=warn)
    try:
        yield log
    finally:
        log.close()


class JsonLines(logging.Formatter):
    """Records as one JSON object a line: when, how grave, of which study, what, and its fields."""

    def __init__(self, study: str, redactor: Redactor) -> None:
        super().__init__()
        self._study, self._redactor = study, redactor

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; every text in it is cleaned."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "study": self._study,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_plain(self._redactor.value(line)), allow_nan=False)


class RedactedLines(logging.Formatter):
    """Records of other people's code as lines for a terminal, tracebacks included, without secrets."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(levelname)s: %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines, cleaned."""
        return self._redactor.text(super().format(record))


def _plain(value: Any) -> Any:
    """What JSON can say of a value: a number that is not finite is null, and a stranger is its text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class _Patient(logging.handlers.RotatingFileHandler):
    """A file that rotates. A full disk costs lines, and one message; once there is room it goes on."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__(
            path,
            maxBytes=MOST_BYTES,
            backupCount=OLDER_FILES,
            encoding="utf-8",
            errors="backslashreplace",
            delay=True,
        )
        self._path, self._warn, self._warned = path, warn, False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line where the name now leads: another search of the study may have set the file aside."""
        try:
            if self.stream is not None and not _is_named(self.stream.fileno(), self._path):
                self._reopen()
        except OSError:
            self.handleError(record)
        super().emit(record)

    def doRollover(self) -> None:  # noqa: N802, RUF100 - the library's name
        """Sets the file aside, unless another search is at it, or was; nobody is waited for."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._reopen()
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own = self.stream
            if own is not None and all(_is_named(one, self._path) for one in (descriptor, own.fileno())):
                super().doRollover()
            else:
                self._reopen()
        except BlockingIOError:
            pass  # it grows by a line meanwhile
        finally:
            os.close(descriptor)

    def _reopen(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self._open()

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802, RUF100 - the library's name
        """Says it once; what the broken file still held back is dropped, or it would be written at any later time."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError | TypeError | LookupError):
            # A signal may come while a line is written, and its exception is not ours to swallow.
            raise
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
        if not self._warned:
            self._warned = True
            reason = getattr(error, "strerror", None) or str(error)
            self._warn(f"the log {self._path} cannot be written ({reason}); the search goes on without it")

    def _open(self) -> TextIOWrapper:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        stream = super()._open()
        if self._path.is_file() and _is_torn(self._path):
            # A process that was killed, or a disk that was full, left half a line: the next one begins anew.
            stream.write("\n")
        return stream


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

"""Where a database lies: the user's URL, read once, refused with advice where it cannot be meant."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from storage.errors import StorageError, is_secret, redacted

_SQLITE = ("sqlite", "sqlite+pysqlite")
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_EXAMPLES = "write sqlite:///nas.db or postgresql://user@host/database"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A database's address, with a form of it that may be shown."""

    kind: Literal["file", "memory", "server"]
    shown: str
    url: URL = field(repr=False)
    path: Path | None
    """The SQLite file, absolute and with links resolved, so that two spellings share one lock."""
    secrets: tuple[str, ...] = field(repr=False)
    """What must be masked wherever a driver repeats it."""


def place_of(url: str) -> Place:
    """Reads a database URL. StorageError where it is a plain path, malformed, or of a database we do not speak."""
    shown = redacted(url)
    if "://" not in url:
        if "@" in url or not url.strip():
            raise StorageError(f"{shown!r} is not a database URL: {_EXAMPLES}")
        raise StorageError(f"{shown!r} is a path, not a database URL: write sqlite:///{shown}")
    scheme = url.partition("://")[0]
    if scheme not in _SQLITE + _POSTGRESQL:
        raise StorageError(f"{shown!r} names no database that is spoken here: {_EXAMPLES}")
    return _sqlite_place(url, shown) if scheme in _SQLITE else _server_place(url, shown)


def is_missing(url: str) -> bool:
    """Whether a database is a file that is not there yet; StorageError as `place_of`."""
    path = place_of(url).path
    return path is not None and not path.exists()


def _sqlite_place(url: str, shown: str) -> Place:
    # Read by hand: make_url would take a "?" or a "%" in a file's name for something else.
    after = url.partition("://")[2]
    if after in ("", "/", "/:memory:"):
        return Place(kind="memory", shown="sqlite://", url=URL.create("sqlite"), path=None, secrets=())
    if not after.startswith("/"):
        raise StorageError(
            f"{shown!r} has two slashes: write sqlite:///{redacted(after)} for a file in this directory"
        )
    name = after[1:]
    if name.startswith("file:") or "?" in name or "\0" in name:
        raise StorageError(
            f"{shown!r}: a SQLite URL is a plain file name here, without file: and without ?settings"
        )
    path = Path(name).resolve()
    return Place(
        kind="file", shown=shown, url=URL.create("sqlite", database=str(path)), path=path, secrets=()
    )


def _server_place(url: str, shown: str) -> Place:
    user_info = re.match(r"[^:]+://[^:/@?]*:(.*)@", url, re.DOTALL)
    if user_info and re.search(r"[@/?#]", user_info.group(1)):
        # Guessing where such a password ends would put a part of it into the host's name, hence into messages.
        raise StorageError(f"{shown!r}: in a password write @ as %40, / as %2F, ? as %3F and # as %23")
    parsed: URL | None
    try:
        parsed = make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None:  # raised out here, so that the error carries no cause that repeats the URL
        raise StorageError(f"{shown!r} is malformed: {_EXAMPLES}")
    in_query = parsed.query.get("password")
    if isinstance(in_query, str):
        parsed = parsed.set(password=in_query).difference_update_query(["password"])
    secrets = [str(parsed.password or "")]
    for key, value in parsed.query.items():
        if is_secret(key):
            secrets += [value] if isinstance(value, str) else list(value)
    longest_first = tuple(sorted({secret for secret in secrets if secret}, key=len, reverse=True))
    return Place(kind="server", shown=shown, url=parsed, path=None, secrets=longest_first)

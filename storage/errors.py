"""How storage says no: one error, with the value, the rule and the way out, and never a password."""

import re
import sqlite3
from urllib.parse import unquote

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

_SECRET_KEY = re.compile(r"pass|pwd|secret|token", re.IGNORECASE)
_QUERY_ITEM = re.compile(r"([?&;])([^=&;?]*)=([^&;]*)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"[^:/?#\s]*")


class StorageError(Exception):
    """The database refused or cannot be reached; the message is one or two lines, safe to print."""


class ConnectionLost(StorageError):
    """The server went away in the middle of a transaction: whether it was committed must be asked."""


class Outdated(StorageError):
    """The tables are of an older version, which is read but not written: `storage.upkeep` brings them up to date."""


class Taken(StorageError):
    """A row with this key is already there."""


def is_secret(key: str) -> bool:
    """True where a URL's query parameter of this (decoded) name holds something not to be shown."""
    return _SECRET_KEY.search(key) is not None


def redacted(url: str) -> str:
    """The URL with `user:password@` and `?password=` masked; malformed ones are masked rather too much."""

    def mask_item(match: re.Match[str]) -> str:
        mark, key, value = match.groups()
        return f"{mark}{key}={'***' if is_secret(unquote(key)) else value}"

    # The query goes first: an unescaped "@" in a ?password= would otherwise pass for the end of user:password.
    shown = _QUERY_ITEM.sub(mask_item, url)
    # Only what begins the text is a scheme: a password may hold "://" as well.
    scheme = _SCHEME.match(shown)
    start = scheme.group() if scheme else ""
    head, at, tail = shown.removeprefix(start).rpartition("@")
    user, colon, _ = head.partition(":")
    if not (at and colon):
        return shown
    return f"{start}{user}:***@{tail}" if _USER.fullmatch(user) else f"***@{tail}"


def scrubbed(message: str, secrets: tuple[str, ...]) -> str:
    """The first line of a driver's message, with every secret masked."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    for secret in secrets:
        line = line.replace(secret, "***")
    return line


def storage_error(error: DBAPIError | PoolTimeout, shown_url: str, secrets: tuple[str, ...]) -> StorageError:
    """What a database error means to the user: the reason in the driver's words, and what to do about it."""
    if isinstance(error, PoolTimeout):
        return StorageError(
            f"{shown_url}: every connection is busy; ask fewer things at once, then try again"
        )
    reason = scrubbed(str(error.orig), secrets)
    if isinstance(error.orig, sqlite3.Error):
        code = str(getattr(error.orig, "sqlite_errorname", ""))
        hint = _hint(_SQLITE_HINTS, code, "nothing was written")
    elif error.connection_invalidated:
        return ConnectionLost(
            f"{shown_url}: the connection was lost ({reason}); resume once the server is back"
        )
    else:
        code = str(getattr(error.orig, "sqlstate", None) or "unreachable")
        hint = _hint(_POSTGRESQL_HINTS, code, "nothing was written")
    kind = Taken if code in _TAKEN else StorageError
    return kind(f"{shown_url}: {reason}; {hint}")


_TAKEN = ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", "23505")

_SQLITE_HINTS = {
    "SQLITE_FULL": "nothing of this step was written: free some disk space, then resume",
    "SQLITE_BUSY": "another process kept it locked too long: find and end that process, then resume",
    "SQLITE_LOCKED": "another connection kept it locked too long: try again",
    "SQLITE_READONLY": "it cannot be written: check the permissions of the file and of its directory",
    "SQLITE_CANTOPEN": "check that the directory exists and that you may read and write in it",
    "SQLITE_PERM": "check the permissions of the file and of its directory",
    "SQLITE_NOTADB": "the file is no SQLite database: name another file",
    "SQLITE_CORRUPT": "the file is damaged: restore a copy, or look at it with PRAGMA integrity_check",
    "SQLITE_IOERR": "the disk failed to read or write: check it, then resume",
    "SQLITE_CONSTRAINT": "nothing was written: the value breaks a rule of the tables",
}

_POSTGRESQL_HINTS = {
    "unreachable": "check that the server runs and that host, port, user, password and database are right",
    "25006": "it takes no writes (a replica, or default_transaction_read_only): name the primary server",
    "28": "check the user and the password",
    "3D": "make it with createdb, or name another one",
    "42501": "the user lacks a right here: grant it, or name another user",
    "53100": "nothing of this step was written: free some disk space on the server, then resume",
    "53300": "the server has no connection left: raise max_connections or close some",
    "55P03": "another transaction kept the row locked too long: find and end it, then resume",
    "57P": "the server is stopping or starting: try again once it is back",
    "23": "nothing was written: the value breaks a rule of the tables",
    "22": "nothing was written: the value does not fit its column",
}


def _hint(hints: dict[str, str], code: str, otherwise: str) -> str:
    return next((hint for prefix, hint in hints.items() if code.startswith(prefix)), otherwise)

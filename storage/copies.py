"""A copy of a SQLite file beside it, made before its tables change."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

from storage.engine import sqlite_uri
from storage.errors import StorageError


def copy_beside(path: Path, version: int) -> Path:
    """Copies a file whose lock the caller holds to FILE.version-N.bak; an older copy is never overwritten.

    StorageError where there is no room for it or no right to make it.
    """
    part = path.with_name(f"{path.name}.version-{version}.part")
    try:
        _remove(part)  # left by a copying that was killed
        # With the rights of the file from the first byte: what only its owner may read stays so.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IMODE(path.stat().st_mode)))
        with (
            closing(sqlite3.connect(sqlite_uri(path, "ro"), uri=True)) as source,
            closing(sqlite3.connect(part)) as target,
        ):
            source.backup(target)
        copied = next(name for name in _names(path, version) if not name.exists())
        part.rename(copied)
    except (OSError, sqlite3.Error) as error:
        _remove(part)
        raise StorageError(
            f"{path} cannot be copied to a file beside it ({error}), so nothing was changed: make room for it,"
            " or copy it yourself and leave this copy out with --no-copy"
        ) from None
    return copied


def _remove(part: Path) -> None:
    for path in (part, part.with_name(f"{part.name}-journal")):
        path.unlink(missing_ok=True)


def _names(path: Path, version: int) -> Iterator[Path]:
    first = path.with_name(f"{path.name}.version-{version}.bak")
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}.{number}")

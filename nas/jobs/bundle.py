"""What a job brings along: our packages, its configuration and its text, in one archive with the same bytes each time."""

import hashlib
import importlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import Refused

PACKAGES = ("nas", "search_space", "kernels", "trainers", "storage", "dashboards")
CONFIGURATION = "nas-job.yaml"
DATA = "nas-job-data"
MOST_BYTES = 100 * 1024 * 1024
"""What Ray's job server takes in one piece."""
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The same time for every file, so that the same files are the same archive and are sent once."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An archive that was written, and the hash of what is not code in it."""

    path: Path
    size: int
    data_hash: str | None


def package_folders() -> list[Path]:
    """Where our packages lie here."""
    return [Path(next(iter(importlib.import_module(name).__path__))) for name in PACKAGES]


def code_files(wheel: Path | None) -> Iterator[tuple[str, bytes]]:
    """Our packages as they are installed here, or as a wheel holds them; raises Refused if it is no wheel of ours."""
    if wheel is not None:
        yield from _wheel_files(wheel)
        return
    for root in package_folders():
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{root.name}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _wheel_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(wheel) as opened:
            names = sorted(name for name in opened.namelist() if not name.endswith("/"))
            if not {f"{package}/__init__.py" for package in PACKAGES} <= set(names):
                raise Refused(f"--wheel {wheel} is not a wheel of nas: make one with python -m build --wheel")
            for name in names:
                yield name, opened.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no archive"
        raise Refused(f"--wheel {wheel} cannot be read: {reason}") from error


def data_files(source: Path) -> Iterator[tuple[str, Path]]:
    """The files of a text or of a folder of texts, by the names that they will have in the archive.

    The folder's own name stays, since a single file and the files of a folder are split by their names.
    """
    root = f"{DATA}/{source.resolve().name}"
    if source.is_file():
        yield root, source
        return
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") for part in inner.parts):
            yield f"{root}/{inner.as_posix()}", path


def pack(
    folder: Path, configuration: Mapping[str, Any], data: Path | None, *, wheel: Path | None, installed: bool
) -> Bundle:
    """Write the archive of a job into a folder.

    Raises:
        Refused: it is larger than the job server takes, or a file cannot be read.
    """
    path = folder / "nas-job.zip"
    digest = hashlib.sha256() if data is not None else None
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, content: bytes) -> None:
            entry = zipfile.ZipInfo(name, date_time=_LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)

        # YAML reads JSON; so every name and number comes back as what it is.
        add(CONFIGURATION, json.dumps(configuration, indent=1, sort_keys=True).encode())
        if not installed:
            for name, content in code_files(wheel):
                add(name, content)
        for name, source in data_files(data) if data is not None else ():
            assert digest is not None
            try:
                content = source.read_bytes()
            except OSError as error:
                raise Refused(f"data: {source} cannot be read: {error.strerror}") from error
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
            add(name, content)
            _check_size(path.stat().st_size, data)
    size = path.stat().st_size
    _check_size(size, data)
    return Bundle(path=path, size=size, data_hash=digest.hexdigest()[:16] if digest else None)


def _check_size(size: int, data: Path | None) -> None:
    if size > MOST_BYTES:
        raise Refused(
            f"data: {data} is too large to travel with a job: the archive is at most {MOST_BYTES >> 20} MiB, packed;\n"
            "put the text where every node sees it and name that place with --set data=/the/place"
        )

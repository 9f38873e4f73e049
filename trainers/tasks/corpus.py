"""Text for byte-level language modelling: any file or folder, split by file, known by its SHA-256.

The default is always at hand: the running Python's own standard library.
"""

import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

MOST_BYTES = 64 * 1024 * 1024
LEAST_BYTES = 1024
STDLIB = "stdlib"
_HELD_OUT_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out bytes, the hash of both, and where they came from."""

    train: bytes
    held_out: bytes
    sha256: str
    source: str
    files: int

    @cached_property
    def unigram_bits(self) -> float:
        """Bits a byte of the held-out text under the byte frequencies of the training text, one added to each."""
        counts = np.bincount(np.frombuffer(self.train, dtype=np.uint8), minlength=256) + 1
        seen = np.bincount(np.frombuffer(self.held_out, dtype=np.uint8), minlength=256)
        return float(-(seen * np.log2(counts / counts.sum())).sum() / seen.sum())

    @cached_property
    def zlib_bits(self) -> float:
        """Bits a byte to which zlib packs the first MiB of the held-out text."""
        shown = self.held_out[: 1 << 20]
        return 8 * len(zlib.compress(shown, 9)) / len(shown)


_kept: dict[str, Corpus] = {}


def keep(source: str, corpus: Corpus) -> None:
    """Let `load` answer with a text that another process has read, where its files may not lie."""
    _kept[source] = corpus


@lru_cache(maxsize=4)
def load(source: str) -> Corpus:
    """Read a file (.txt, .jsonl with a "text" field, .bin, or any text), a folder of them, or "stdlib".

    One file in ten, by the hash of its path, is held out; a single file gives its last tenth. At most 64 MiB are read.

    Raises:
        ValueError: the path is missing, holds too little, or holds bytes that are not text where text is required.
    """
    if source in _kept:
        return _kept[source]
    pieces = list(_limited(_stdlib() if source == STDLIB else _user_files(Path(source))))
    size = sum(len(data) for _, data in pieces)
    if size < LEAST_BYTES:
        raise ValueError(f"data: {source} holds {size} bytes of text; at least {LEAST_BYTES} are needed")
    held = [_held_out(name) for name, _ in pieces]
    train = b"".join(data for (_, data), out in zip(pieces, held, strict=True) if not out)
    held_out = b"".join(data for (_, data), out in zip(pieces, held, strict=True) if out)
    if min(len(train), len(held_out)) < LEAST_BYTES // 8:
        # Too few files to split by file.
        whole = train + held_out
        cut = len(whole) - len(whole) // _HELD_OUT_SHARE
        train, held_out = whole[:cut], whole[cut:]
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return Corpus(train=train, held_out=held_out, sha256=digest.hexdigest(), source=source, files=len(pieces))


def _limited(pieces: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    left = MOST_BYTES
    for name, data in pieces:
        if left <= 0:
            return
        yield name, data[:left]
        left -= len(data)


def _held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _stdlib() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/", "test/", "idlelib/", "lib2to3/")):
            continue
        data = path.read_bytes()
        if _text_error(data) is None:
            yield name, data


def _user_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.exists():
        raise ValueError(
            f"data: there is no file or folder {path}; give --data a path that exists, or leave it out"
        )
    if path.is_file():
        yield path.name, _read(path)
        return
    files = sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item.relative_to(path)))
    if not files:
        raise ValueError(f"data: the folder {path} is empty; put .txt, .jsonl or other text files into it")
    for item in files:
        yield item.relative_to(path).as_posix(), _read(item)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error.strerror}") from None
    if path.suffix == ".bin":
        return data
    wrong = _text_error(data)
    if wrong is not None:
        line = data.count(b"\n", 0, wrong) + 1
        raise ValueError(
            f"data: {path}:{line} is not UTF-8 text (byte {wrong}); convert it, or name it .bin to take its bytes as they are"
        )
    return _json_texts(path, data) if path.suffix == ".jsonl" else data


def _text_error(data: bytes) -> int | None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _json_texts(path: Path, data: bytes) -> bytes:
    texts = []
    # Not splitlines: JSON may hold U+2028 and its like inside a line.
    for number, line in enumerate(data.decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'data: {path}:{number} is no JSON object with a "text" field') from None
        if not isinstance(text, str):
            raise ValueError(f'data: {path}:{number} has a "text" that is no string')
        try:
            texts.append(text.encode())
        except UnicodeEncodeError:
            raise ValueError(f'data: {path}:{number} has half a surrogate pair in its "text"') from None
    return b"\n".join(texts)

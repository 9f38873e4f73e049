"""How each Triton kernel is launched: a table as data, one file an operator, looked up by widths, type and architecture.

Letters: K key, V value and whatever else an operator calls its widths. Never by T or B, so that a kernel rounds
alike at every length, and nothing is tuned while a trial runs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ANY = "any"
HALF = "half"
HALVES = ("bfloat16", "float16")
"""The types that a row for `half` serves: it is for kernels that take float32 at other blocks, or not so wide."""
FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row: for widths up to these, in this type (or half, or any) on this architecture (or any), its launch.

    So many warps, stages and block sizes.

    Raises:
        ValueError: a number is no power of two where it must be, or not positive.
    """

    kernel: str
    widths: tuple[int, ...]
    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]
    dtype: str = ANY
    architecture: str = ANY

    def __post_init__(self) -> None:
        for name, number in (("num_warps", self.num_warps), *self.blocks.items()):
            if number < 1 or number & (number - 1):
                raise ValueError(
                    f"{self.kernel}: {name}={number} is not valid; it must be a power of two, at least 1"
                )
        if self.num_stages < 1:
            raise ValueError(f"{self.kernel}: num_stages={self.num_stages} must be at least 1")

    def serves(self, kernel: str, widths: Sequence[int], dtype: str, architecture: str) -> bool:
        """Whether this row may be used for such a call."""
        return (
            self.kernel == kernel
            and len(widths) == len(self.widths)
            and all(width <= bound for width, bound in zip(widths, self.widths, strict=True))
            and self.takes(dtype)
            and self.architecture in (ANY, architecture)
        )

    def takes(self, dtype: str) -> bool:
        """Whether this row may be used in that type."""
        return self.dtype in (ANY, dtype) or (self.dtype == HALF and dtype in HALVES)

    def rank(self) -> tuple[bool, int, tuple[int, ...]]:
        """Of several rows that serve a call the one of the least rank is taken: it was written for fewer calls."""
        return self.architecture == ANY, {ANY: 2, HALF: 1}.get(self.dtype, 0), self.widths

    def json(self) -> dict[str, Any]:
        """The row as it stands in a file."""
        return {
            "kernel": self.kernel,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "widths": list(self.widths),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "blocks": dict(self.blocks),
        }


def path_of(operator: str) -> Path:
    """The file that holds an operator's rows."""
    return FOLDER / operator / "configurations.json"


def read(path: Path) -> tuple[Configuration, ...]:
    """The rows of a file; ValueError where it is not such a table."""
    try:
        rows = json.loads(path.read_text())
        return tuple(
            Configuration(**{**row, "widths": tuple(row["widths"]), "blocks": dict(row["blocks"])})
            for row in rows
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of configurations: {error}; run `nas tune` anew") from None


def write(path: Path, rows: Iterable[Configuration]) -> None:
    """Write rows in a stable order, one a line."""
    ordered = sorted(rows, key=lambda row: (row.kernel, row.architecture, row.dtype, row.widths))
    lines = ",\n".join("  " + json.dumps(row.json()) for row in ordered)
    path.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()
    _closest.cache_clear()


@cache
def table(operator: str) -> tuple[Configuration, ...]:
    """An operator's rows; none where it has no Triton kernel."""
    path = path_of(operator)
    return read(path) if path.exists() else ()


def find(
    operator: str, kernel: str, widths: tuple[int, ...], dtype: str, architecture: str
) -> Configuration | None:
    """The row that fits closest: of this architecture and type before any, then of the least widths."""
    for row in _tried.get(operator, ()):
        if row.serves(kernel, widths, dtype, architecture):
            return row
    return _closest(operator, kernel, widths, dtype, architecture)


@cache
def _closest(
    operator: str, kernel: str, widths: tuple[int, ...], dtype: str, architecture: str
) -> Configuration | None:
    fitting = [row for row in table(operator) if row.serves(kernel, widths, dtype, architecture)]
    return min(fitting, key=Configuration.rank, default=None)


_tried: dict[str, tuple[Configuration, ...]] = {}


@contextmanager
def trying(operator: str, rows: Sequence[Configuration]) -> Iterator[None]:
    """Within it these rows stand above the operator's table, in every thread: a GPU's backward pass has its own."""
    _tried[operator] = tuple(rows)
    try:
        yield
    finally:
        del _tried[operator]


def widest(operator: str, kernel: str, dtype: str | None = None) -> tuple[int, ...] | None:
    """The largest widths that any row of a kernel serves, in one type if it is given; None where it has no row."""
    rows = [
        row.widths for row in table(operator) if row.kernel == kernel and (dtype is None or row.takes(dtype))
    ]
    return tuple(max(column) for column in zip(*rows, strict=True)) if rows else None

"""Trials as files for other programs: CSV and JSON a portion at a time, and Parquet where pyarrow is installed."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dashboards.answers import Line

MEDIA = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
}
PORTION = 1000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Unsupported(Exception):
    """A format that needs a library which is not installed; the message says which."""


def flat(line: Line) -> dict[str, Any]:
    """A trial as one row: costs and scores have columns of their own."""
    row = {key: value for key, value in asdict(line).items() if not isinstance(value, Mapping)}
    named = {f"score.{name}": value for name, value in line.scores.items()}
    return row | dict(line.values) | dict(line.costs) | named


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column that some row has, in the order of meeting."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows with a heading; text that a spreadsheet would run as a formula begins with an apostrophe."""
    names = columns_of(rows)
    for start in range(0, max(1, len(rows)), PORTION):
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        if start == 0:
            writer.writeheader()
        for row in rows[start : start + PORTION]:
            writer.writerow({name: _safe(value) for name, value in row.items()})
        yield text.getvalue()


def as_json(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One list of objects."""
    yield "["
    for start in range(0, len(rows), PORTION):
        part = rows[start : start + PORTION]
        yield (",\n" if start else "") + ",\n".join(json.dumps(row, allow_nan=False) for row in part)
    yield "]\n"


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One table; Unsupported where pyarrow is not installed."""
    import pandas  # takes most of a second, which nothing else here needs

    sink = io.BytesIO()
    try:
        pandas.DataFrame(list(rows), columns=columns_of(rows)).to_parquet(sink, index=False)
    except ImportError:
        raise Unsupported(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or take csv"
        ) from None
    return sink.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

"""Writes version_N.sql and version_N.postgresql.sql here: a database of today's version, kept for the releases to come.

    python tests/storage/data/make.py nas.db postgresql://user:password@host/empty "how nas.db was made"

The second holds the same rows, in tables that today's code made on a server; pg_dump is needed.
"""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy import Integer, create_engine, insert, select, text

from storage.store import Store
from storage.tables import SCHEMA_VERSION, Base

HERE = Path(__file__).parent


def main(path: str, url: str, note: str) -> None:
    """Dumps a SQLite file, and the same rows from a server's empty database."""
    name = f"version_{SCHEMA_VERSION}"
    head = "".join(f"-- {line}\n" for line in [f"A database of version {SCHEMA_VERSION}.", note])
    with closing(sqlite3.connect(path)) as file:
        (HERE / f"{name}.sql").write_text(head + "\n".join(file.iterdump()) + "\n")
    Store.open(url).close()
    _copy_rows(path, url.replace("postgresql:", "postgresql+psycopg:", 1))
    options = ["--inserts", "--no-owner", "--no-privileges", "--schema=public", f"--dbname={url}"]
    done = subprocess.run(["pg_dump", *options], check=True, capture_output=True, text=True)
    kept = [
        line
        for line in done.stdout.splitlines()
        if line
        and not line.startswith(
            ("--", "SET ", "\\", "CREATE SCHEMA", "COMMENT ON", "SELECT pg_catalog.set_config")
        )
    ]
    (HERE / f"{name}.postgresql.sql").write_text(head + "\n".join(kept) + "\n")


def _copy_rows(path: str, url: str) -> None:
    source, target = create_engine(f"sqlite:///{path}"), create_engine(url)
    with source.connect() as reading, target.begin() as writing:
        for table in Base.metadata.sorted_tables:
            writing.execute(table.delete())
            rows = [dict(row._mapping) for row in reading.execute(select(table))]
            if rows:
                writing.execute(insert(table), rows)
            counted = table.autoincrement_column
            if rows and counted is not None and isinstance(counted.type, Integer):
                last = max(row[counted.name] for row in rows)
                sequence = f"pg_get_serial_sequence('{table.name}', '{counted.name}')"
                writing.execute(text(f"SELECT setval({sequence}, {last})"))
    source.dispose()
    target.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])

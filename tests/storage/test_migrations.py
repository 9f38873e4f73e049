"""Databases of every version that was released: read as they are, upgraded whole or not at all, refused when newer."""

import os
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Column, Connection, Text, inspect, select, text, update

from nas.cli.main import main
from storage import copies, schema, upkeep
from storage.engine import Database
from storage.errors import Outdated, StorageError
from storage.migrations.compare import differences
from storage.migrations.versions import STEPS
from storage.place import place_of
from storage.store import Store
from storage.tables import SCHEMA_VERSION, Base, SchemaRow

DATA = Path(__file__).with_name("data")
VERSIONS = range(schema.OLDEST, SCHEMA_VERSION + 1)
OLDER = VERSIONS[:-1]


@pytest.fixture
def kept(shared_url: str) -> Callable[[int], str]:
    """A database of each kind as the release of a version left it."""

    def load(version: int) -> str:
        if shared_url.startswith("postgresql"):
            with psycopg.connect(shared_url) as connection:
                connection.execute((DATA / f"version_{version}.postgresql.sql").read_bytes())
        else:
            with closing(sqlite3.connect(file_of(shared_url))) as connection:
                connection.executescript((DATA / f"version_{version}.sql").read_text())
        return shared_url

    return load


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def contents(url: str) -> Any:
    """What a reader sees of a database: studies, trials, latencies and events."""
    with Store.open(url, read_only=True) as store:
        studies = store.studies()
        return [(study, store.trials(study)) for study in studies], store.latencies(), store.events()


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection beside the store, whatever the version."""
    with closing(Database(place_of(url), read_only=False)) as database, database.writing() as connection:
        yield connection


def version(url: str) -> int:
    with connected(url) as connection:
        return connection.execute(select(SchemaRow.version)).scalar_one()


def shape(url: str) -> dict[str, Any]:
    """Everything that the database itself says of our tables, in an order of its own."""
    with connected(url) as connection:
        there = inspect(connection)
        described: dict[str, Any] = {}
        for name in sorted(table for table in there.get_table_names() if table.startswith("nas_")):
            parts: list[Any] = [
                there.get_columns(name),
                there.get_indexes(name),
                there.get_unique_constraints(name),
                there.get_foreign_keys(name),
                there.get_check_constraints(name),
                [there.get_pk_constraint(name)],
                [there.get_table_options(name)],
            ]
            described[name] = [sorted(map(repr, part)) for part in parts]
        return described


def test_a_database_of_every_version_is_kept_on_both_kinds() -> None:
    names = {f"version_{number}{kind}.sql" for number in VERSIONS for kind in ("", ".postgresql")}
    assert {path.name for path in DATA.glob("*.sql")} == names, (
        "make the missing ones with make.py beside them"
    )
    assert sorted(STEPS) == list(range(schema.OLDEST + 1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("number", VERSIONS)
def test_a_kept_database_is_read_upgraded_and_written_to(
    kept: Callable[[int], str], build, number: int
) -> None:
    url = kept(number)
    before = contents(url)
    assert before[0] and all(trials for _study, trials in before[0])
    done = upkeep.upgrade(url)
    assert (done.before, done.after) == (number, SCHEMA_VERSION)
    assert contents(url) == before
    with Store.open(url) as store:
        study = store.studies()[0]
        trials = len(store.trials(study))
        with store.writer(study):
            assert store.add_trial(study, build.trial()).number == trials
            assert store.add_repeat(study, 0, "evaluation", build.result_of(0.5)) is False  # it has that seed
    again = upkeep.upgrade(url)
    assert (again.before, again.after, again.copy) == (SCHEMA_VERSION, SCHEMA_VERSION, None)


@pytest.mark.parametrize("number", VERSIONS)
def test_an_upgraded_database_is_what_a_fresh_one_is(
    kept: Callable[[int], str], request: pytest.FixtureRequest, tmp_path: Path, number: int
) -> None:
    url = kept(number)
    upkeep.upgrade(url)
    if url.startswith("postgresql"):
        fresh = request.getfixturevalue("server").new_database()
    else:
        fresh = f"sqlite:///{tmp_path}/fresh.db"
    Store.open(fresh).close()
    assert shape(url) == shape(fresh)
    assert set(shape(url)) == set(Base.metadata.tables)
    for one in (url, fresh):
        with connected(one) as connection:
            assert differences(connection) == []


CHANGES = {
    "DROP TABLE nas_repeats": ["table nas_repeats is missing"],
    "DROP INDEX nas_trials_by_state": ["index nas_trials_by_state of table nas_trials is missing"],
    "CREATE INDEX extra ON nas_trials (state)": ["index extra of table nas_trials is not known here"],
    "CREATE UNIQUE INDEX once ON nas_trials (layout_key)": [
        "index once of table nas_trials is not known here"
    ],
    "ALTER TABLE nas_trials ADD COLUMN extra TEXT": ["column nas_trials.extra is not known here"],
    "ALTER TABLE nas_latencies RENAME COLUMN spread_ms TO spread": [
        "column nas_latencies.spread_ms is missing",
        "column nas_latencies.spread is not known here",
    ],
    "CREATE TABLE stranger (id INTEGER)": [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_from_the_models_is_named(shared_url: str, change: str) -> None:
    Store.open(shared_url).close()
    with connected(shared_url) as connection:
        connection.execute(text(change))
        assert sorted(differences(connection)) == sorted(CHANGES[change])


def test_what_alembic_does_not_compare_is_compared_too(shared_url: str) -> None:
    Store.open(shared_url).close()
    with connected(shared_url) as connection:
        connection.execute(text("DROP TABLE nas_repeats"))
        connection.execute(text("DROP TABLE nas_repeat_claims"))
        connection.execute(text("DROP TABLE nas_results"))
        connection.execute(text("DROP TABLE nas_trials"))
        connection.execute(text("CREATE TABLE nas_trials (id BIGINT, study_id TEXT NOT NULL)"))
        found = differences(connection)
    assert "table nas_trials has the primary key nothing instead of id" in found
    assert "check nas_trial_state of table nas_trials is missing" in found
    whole = "BIGINT" if shared_url.startswith("postgresql") else "INTEGER"
    assert f"column nas_trials.study_id has the type TEXT instead of {whole}" in found
    assert "column nas_trials.id may be empty" in found
    assert any(
        line.startswith("foreign key") and line.endswith("of table nas_trials is missing") for line in found
    )
    assert "unique constraint over study_id, number of table nas_trials is missing" in found


# Row 28 of what must be survived: an old schema.


@pytest.mark.parametrize("number", OLDER)
def test_fault_28_old_schema_gets_a_hint_to_upgrade_and_no_damage(
    kept: Callable[[int], str], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    url = kept(number)
    before, tables = contents(url), shape(url)
    bytes_before = None if url.startswith("postgresql") else file_of(url).read_bytes()
    with pytest.raises(Outdated, match=f"has schema {number}, which is read but no longer written") as caught:
        Store.open(url)
    assert main(["search", "--storage", url, "--study", before[0][0][0].name]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.strip() == f"nas: {caught.value}"
    assert "run nas db upgrade --storage" in said.err and "canary" not in said.err
    assert (contents(url), shape(url), version(url)) == (before, tables, number)
    if bytes_before is not None:
        assert file_of(url).read_bytes() == bytes_before
    # Those who only read need no upgrade, and the hint helps.
    assert main(["trials", "--storage", url, "--study", before[0][0][0].name, "--json"]) == 0
    assert main(["db", "upgrade", "--storage", url]) == 0
    assert f"from schema {number} to {SCHEMA_VERSION}" in capsys.readouterr().out
    with Store.open(url) as store, store.writer(store.studies()[0]):
        assert version(url) == SCHEMA_VERSION


# Row 29: a newer schema.


def test_fault_29_newer_schema_is_refused_and_left_alone(
    kept: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = kept(SCHEMA_VERSION)
    with connected(url) as connection:
        connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION + 1))
    is_file = not url.startswith("postgresql")
    if is_file:  # a newer release may have chosen another journal, too
        with closing(sqlite3.connect(file_of(url))) as file:
            file.execute("PRAGMA journal_mode = WAL")
    bytes_before = file_of(url).read_bytes() if is_file else None
    commands = [["search"], ["trials"], ["front"], ["db", "status"], ["db", "upgrade"], ["db", "check"]]
    for command in commands:
        assert main([*command, "--storage", url]) == 3, command
        said = capsys.readouterr()
        newer = f"has schema {SCHEMA_VERSION + 1}, newer than {SCHEMA_VERSION}, the newest known here"
        assert said.out == "" and newer in said.err and "install the release that wrote it" in said.err
        assert len(said.err.splitlines()) == 1 and "canary" not in said.err
    if is_file:
        assert file_of(url).read_bytes() == bytes_before
        assert not list(file_of(url).parent.glob("*.version-*"))


def test_a_writer_asks_for_the_version_again_when_it_begins(shared_url: str, build) -> None:
    with Store.open(shared_url) as store:
        study = build.study(store)
        with connected(shared_url) as connection:  # as a newer release would, in between
            connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION + 1))
        with pytest.raises(StorageError, match="newer than"), store.writer(study):
            pass


# Row 30: an upgrade that is killed midway.

UPGRADE_AND_STAND = """
import sys
from sqlalchemy import Engine, event
from storage.upkeep import upgrade
url, place = sys.argv[1:]
seen = []
def stand():
    print("midway", flush=True)
    input()
@event.listens_for(Engine, "before_cursor_execute")
def before(connection, cursor, statement, *rest):
    seen.append(statement.split(" nas_")[0].strip())
    if seen[-1].startswith(place):
        stand()
@event.listens_for(Engine, "commit")
def commit(connection):
    if place == "commit" and "UPDATE" in seen:
        stand()
upgrade(url)
"""


@pytest.mark.parametrize("place", ["CREATE TABLE", "CREATE INDEX", "UPDATE", "commit"])
def test_fault_30_upgrade_killed_midway_rolls_back_and_a_rerun_completes(
    kept: Callable[[int], str], child, place: str
) -> None:
    url = kept(1)
    before = contents(url)
    upgrading = child(UPGRADE_AND_STAND, url, place)
    assert upgrading.line() == "midway"
    if not (
        url.startswith("postgresql") and place == "commit"
    ):  # a server keeps readers from a table that is altered
        assert contents(url) == before  # who reads sees nothing of it
    os.kill(upgrading.process.pid, signal.SIGKILL)
    upgrading.process.wait()
    assert contents(url) == before
    assert upkeep.status(url).version == 1
    assert "nas_repeats" not in shape(url)
    done = upkeep.upgrade(url)
    assert (done.before, done.after, version(url)) == (1, SCHEMA_VERSION, SCHEMA_VERSION)
    assert contents(url) == before
    with connected(url) as connection:
        assert differences(connection) == []
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"


REBUILD = """
import sys
from sqlalchemy import Column, Text
from storage.migrations.versions import STEPS
from storage.upkeep import upgrade

def step(operations):
    connection = operations.get_bind()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA cache_size = 1")  # so that pages reach the file before the commit
    with operations.batch_alter_table("nas_trials", recreate="auto") as batch:
        batch.add_column(Column("mood", Text(), nullable=False, server_default="calm"))
        batch.alter_column("why", new_column_name="reason")
    if sys.argv[2] == "stand":
        print("midway", flush=True)
        input()

after = upgrade(sys.argv[1], steps={**STEPS, max(STEPS) + 1: step}).after
print(after, flush=True)
"""


def test_fault_30_upgrade_killed_midway_while_a_table_is_rebuilt(kept: Callable[[int], str], child) -> None:
    url = kept(SCHEMA_VERSION)
    before, tables = contents(url), shape(url)
    upgrading = child(REBUILD, url, "stand")
    assert upgrading.line() == "midway"
    if not url.startswith("postgresql"):
        assert file_of(f"{url}-journal").stat().st_size > 0
    os.kill(upgrading.process.pid, signal.SIGKILL)
    upgrading.process.wait()
    assert (contents(url), shape(url), version(url)) == (before, tables, SCHEMA_VERSION)
    assert child(REBUILD, url, "go").line() == str(SCHEMA_VERSION + 1)
    after = shape(url)
    assert {name: after[name] for name in after if name != "nas_trials"} == {
        name: tables[name] for name in tables if name != "nas_trials"
    }
    for part, was in zip(after["nas_trials"][1:], tables["nas_trials"][1:], strict=True):
        assert part == was  # indexes, constraints and references of the rebuilt table
    count = sum(len(trials) for _study, trials in before[0])
    with connected(url) as connection:
        assert (
            connection.execute(text("SELECT count(*) FROM nas_trials WHERE mood = 'calm'")).scalar() == count
        )
        assert upkeep.lost_references(connection) == []


def test_an_upgrade_that_would_lose_references_is_rolled_back(kept: Callable[[int], str]) -> None:
    url = kept(SCHEMA_VERSION)
    before = contents(url)

    def careless(operations: Any) -> None:
        operations.execute("DELETE FROM nas_layouts")

    with pytest.raises(StorageError, match=r"nas_layouts"):
        upkeep.upgrade(url, steps={**STEPS, SCHEMA_VERSION + 1: careless})
    assert contents(url) == before and version(url) == SCHEMA_VERSION


# The lock, and the copy.


def test_an_upgrade_waits_for_no_search_but_refuses_beside_one(kept: Callable[[int], str], child) -> None:
    url = kept(1)
    code = """
import sys
from storage.engine import Database
from storage.locks import writer_lock
from storage.place import place_of
from storage.store import Store
with Store.open(sys.argv[1], read_only=True) as store:
    study = store.studies()[0]
with writer_lock(Database(place_of(sys.argv[1]), read_only=False), study, lambda: None):
    print("writing", flush=True)
    input()
"""
    other = child(code, url)
    assert other.line() == "writing"
    with pytest.raises(
        StorageError, match=r"is being written by another process \(pid \d+ on .*end it, or wait"
    ):
        upkeep.upgrade(url)
    assert version(url) == 1
    other.go_on()
    other.process.wait()
    assert upkeep.upgrade(url).after == SCHEMA_VERSION
    if not url.startswith("postgresql"):
        names = {path.name for path in file_of(url).parent.iterdir()}
        assert names == {"nas.db", "nas.db.version-1.bak"}


def test_two_upgrades_at_once_are_one(kept: Callable[[int], str], child) -> None:
    url = kept(1)
    code = """
import sys
from storage.upkeep import upgrade
print("ready", flush=True)
input()
done = upgrade(sys.argv[1])
print(done.before, done.after, flush=True)
"""
    both = [child(code, url) for _ in range(2)]
    assert [one.line() for one in both] == ["ready", "ready"]
    for one in both:
        one.go_on()
    newest = SCHEMA_VERSION
    assert sorted(one.line() for one in both) == [f"1 {newest}", f"{newest} {newest}"]
    with connected(url) as connection:
        assert differences(connection) == []


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((DATA / "version_1.sql").read_text())
    return path


def test_a_file_is_copied_before_it_changes(old_file: Path) -> None:
    old_file.chmod(0o600)
    for name in ("old.db.version-1.part", "old.db.version-1.part-journal"):
        old_file.with_name(name).write_text("of a copying that was killed")
    old_file.with_name("old.db.version-1.bak").write_text("an older copy")
    before = contents(f"sqlite:///{old_file}")
    done = upkeep.upgrade(f"sqlite:///{old_file}")
    assert done.copy == old_file.with_name("old.db.version-1.bak.2")
    assert stat.S_IMODE(done.copy.stat().st_mode) == 0o600
    assert contents(f"sqlite:///{done.copy}") == before and version(f"sqlite:///{done.copy}") == 1
    assert old_file.with_name("old.db.version-1.bak").read_text() == "an older copy"
    assert not list(old_file.parent.glob("*.part*"))


def test_no_copy_is_made_where_none_is_wanted(old_file: Path) -> None:
    assert upkeep.upgrade(f"sqlite:///{old_file}", copy=False).copy is None
    assert [path.name for path in old_file.parent.iterdir()] == ["old.db"]


def test_without_room_for_a_copy_nothing_changes(old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies.Path, "rename", full)
    before = old_file.read_bytes()
    with pytest.raises(StorageError, match=r"No space left on device.*nothing was changed.*--no-copy"):
        upkeep.upgrade(f"sqlite:///{old_file}")
    assert old_file.read_bytes() == before
    assert [path.name for path in old_file.parent.iterdir()] == ["old.db"]


def test_a_damaged_file_is_not_upgraded(old_file: Path) -> None:
    with closing(sqlite3.connect(old_file)) as connection:
        connection.execute("UPDATE nas_results SET trial_id = 77 WHERE trial_id = 2")
        connection.commit()
    with pytest.raises(
        StorageError, match="nas_results: 1 rows refer to rows of nas_trials that are not there"
    ):
        upkeep.upgrade(f"sqlite:///{old_file}")
    assert version(f"sqlite:///{old_file}") == 1


def test_a_column_that_a_step_adds_in_a_batch_is_seen_by_the_comparison(kept: Callable[[int], str]) -> None:
    url = kept(SCHEMA_VERSION)

    def step(operations: Any) -> None:
        with operations.batch_alter_table("nas_studies") as batch:
            batch.add_column(Column("note", Text(), nullable=True))

    assert upkeep.upgrade(url, steps={**STEPS, SCHEMA_VERSION + 1: step}).after == SCHEMA_VERSION + 1
    with connected(url) as connection:
        assert differences(connection) == ["column nas_studies.note is not known here"]

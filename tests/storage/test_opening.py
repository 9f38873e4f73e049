"""A database that cannot be used is refused at once, with the value, the rule, the way out, and no password."""

import os
import shutil
import socket
import sqlite3
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import update

from storage import engine, place, schema
from storage.errors import StorageError, redacted
from storage.store import Store
from storage.tables import SCHEMA_VERSION, SchemaRow

CANARY = "canary-7f3e"


@pytest.fixture
def file_url(tmp_path: Path, build) -> str:
    """A SQLite file with one study of one trial."""
    url = f"sqlite:///{tmp_path}/nas.db"
    with Store.open(url) as store:
        store.add_trial(build.study(store), build.trial())
    return url


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that an ordinary user can reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="nas-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nas.db", r"'nas.db' is a path, not a database URL: write sqlite:///nas.db$"),
        ("/data/nas.db", r"write sqlite:////data/nas.db$"),
        ("", r"'' is not a database URL"),
        ("sqlite://nas.db", r"has two slashes: write sqlite:///nas.db "),
        ("sqlite:///nas.db?mode=ro", r"a plain file name"),
        ("sqlite:///file:nas.db", r"a plain file name"),
        (
            "mysql://user@host/nas",
            r"names no database that is spoken here: write sqlite:///nas.db or postgresql://",
        ),
        ("://", r"names no database"),
        ("postgresql://user@host:port/nas", r"is malformed"),
        ("postgresql://user:a@b@host/nas", r"write @ as %40"),
    ],
)
def test_a_malformed_url_is_answered_with_a_good_one(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        Store.open(url)


def test_a_bare_postgresql_url_means_psycopg() -> None:
    for scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        assert place.place_of(f"{scheme}://user@host/nas").url.drivername == "postgresql+psycopg"


def test_a_missing_file_or_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no database at sqlite:///.*none.db; nas search makes one"):
        Store.open(f"sqlite:///{tmp_path}/none.db", read_only=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"there is no directory .*/none; make it first"):
        Store.open(f"sqlite:///{tmp_path}/none/nas.db")
    with pytest.raises(StorageError, match=r"unable to open database file; check that the directory exists"):
        Store.open(f"sqlite:///{tmp_path}")


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, and long enough not to be taken for an empty database\n" * 20)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(
            StorageError, match="file is not a database; the file is no SQLite database: name another"
        ):
            Store.open(f"sqlite:///{path}", read_only=read_only)
    assert path.read_bytes() == before


def test_a_reader_makes_nothing(shared_url: str, build) -> None:
    if shared_url.startswith("sqlite"):
        Path(shared_url.removeprefix("sqlite:///")).touch()
    with pytest.raises(StorageError, match="holds no studies yet; nas search makes them"):
        Store.open(shared_url, read_only=True)
    with Store.open(shared_url) as writer, Store.open(shared_url, read_only=True) as reader:
        study = build.study(writer)
        assert reader.studies() == [study]
        for write in (
            lambda: reader.add_trial(study, build.trial()),
            lambda: reader.log(None, "tick", {}),
            lambda: build.study(reader, "second"),
        ):
            with pytest.raises(StorageError, match="opened for reading only"):
                write()
        with pytest.raises(StorageError, match="it has no writer"), reader.writer(study):
            pass
        assert reader.events() == []


def test_a_memory_database_has_nothing_to_read() -> None:
    with pytest.raises(StorageError, match="a memory database is empty"):
        Store.open("sqlite://", read_only=True)


@pytest.mark.parametrize("name", ["a b#c.db", "ünï.db", "100%.db"])
def test_a_file_may_have_any_name_but_a_question_mark(tmp_path: Path, name: str, build) -> None:
    with Store.open(f"sqlite:///{tmp_path}/{name}") as store:
        build.study(store)
    with Store.open(f"sqlite:///{tmp_path}/{name}", read_only=True) as store:
        assert len(store.studies()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("locked", ["file", "directory"])
def test_a_database_that_cannot_be_written_is_refused_but_can_be_read(
    open_directory: Path, build, child, locked: str
) -> None:
    path = open_directory / "nas.db"
    with Store.open(f"sqlite:///{path}") as store:
        build.study(store)
    path.chmod(0o444 if locked == "file" else 0o666)
    open_directory.chmod(0o777 if locked == "file" else 0o555)
    code = """
import os, sys
from storage.errors import StorageError
from storage.store import Store
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write anything
with Store.open(sys.argv[1], read_only=True) as store:
    print(len(store.studies()), flush=True)
try:
    Store.open(sys.argv[1])
except StorageError as error:
    print(error, flush=True)
"""
    other = child(code, f"sqlite:///{path}")
    assert other.line() == "1"
    refusal = other.line()
    assert "cannot be written" in refusal or "you may read and write in it" in refusal


def test_fault_25_a_server_that_takes_no_writes_is_refused_but_can_be_read(server) -> None:
    url = server.new_database()
    Store.open(url).close()
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
    with pytest.raises(StorageError, match="it takes no writes"):
        Store.open(url)
    with Store.open(url, read_only=True) as reader:
        assert reader.studies() == []


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for url in (
            f"postgresql://user:{CANARY}@{address}/nas",
            f"postgresql://user@{address}/nas?password={CANARY}",
        ):
            with pytest.raises(StorageError, match="check that the server runs") as caught:
                Store.open(url)
            assert address in str(caught.value)
            assert "\n" not in str(caught.value)
            assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_no_message_or_repr_shows_the_password(server, build) -> None:
    plain = server.new_database()
    in_query = plain.replace(f":{CANARY}@", "@") + f"?password={CANARY}"
    for url in (plain, in_query, in_query.replace("password", "p%61ssword")):
        assert CANARY in url
        shown: list[str] = []
        with Store.open(url) as store:
            study = store.study("first") or build.study(store)
            shown += [repr(store), str(store), store.shown_url, repr(store._database.place)]
            shown += [repr(store._database._engine), repr(study)]
            with pytest.raises(StorageError) as caught:
                build.study(store)
            shown += traceback.format_exception(caught.value)
        for wrong in (
            url.replace("/nas", "/missing"),
            url.replace(CANARY, f"wrong-{CANARY}"),
            url.replace("//nas", "//other"),
            url + ("&" if "?" in url else "?") + "nonsense=1",
        ):
            with pytest.raises(StorageError) as caught:
                Store.open(wrong)
            shown += [repr(caught.value), *traceback.format_exception(caught.value)]
        assert CANARY not in "\n".join(shown)


secrets = st.text("abcXYZ019-_.%!$/@?#&:=", max_size=12).map(lambda text: f"{CANARY}{text}{CANARY}")


@example(f"{CANARY}://{CANARY}", "postgresql//user:{}@host")
@example(f"{CANARY}://b:{CANARY}", "postgresql//user:{}@host")
@given(
    secrets,
    st.sampled_from(
        [
            "postgresql://user:{}@host/nas",
            "postgresql://:{}@host/nas",
            "postgresql:/user:{}@host",
            "postgresql//user:{}@host",
            "user:{}@host/nas",
            "mysql://user:{}@host",
            "sqlite://user:{}@host",
            "postgresql://user:{}@host:port/nas",
        ],
    ),
)
def test_user_and_password_are_masked_however_odd(secret: str, form: str) -> None:
    url = form.format(secret)
    assert CANARY not in redacted(url)
    if "host:port" in form or not url.startswith("postgresql://"):
        with pytest.raises(StorageError) as caught:
            Store.open(url)
        assert CANARY not in repr(caught.value)


@given(st.text("abcXYZ019-_.%!$/@?#:", max_size=12).map(lambda text: f"{CANARY}{text}"))
def test_a_password_in_the_query_is_masked_however_odd(secret: str) -> None:
    for key in ("password", "PASSWORD", "p%61ssword", "sslpassword"):
        for url in (
            f"postgresql://host:5432/nas?{key}={secret}",
            f"postgresql://u@h/nas?sslmode=off&{key}={secret}&a=b",
        ):
            assert CANARY not in redacted(url)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            SCHEMA_VERSION + 1,
            f"newer than {SCHEMA_VERSION}, the newest known here: install the release that wrote it",
        ),
        (schema.OLDEST - 1, "older than 1, the oldest that can be brought up to date"),
    ],
)
def test_another_schema_is_refused_and_left_alone(shared_url: str, build, version: int, message: str) -> None:
    with Store.open(shared_url) as store:
        study = build.study(store)
        with store._database.writing() as connection:
            connection.execute(update(SchemaRow).values(version=version))
    for read_only in (False, True):
        with pytest.raises(StorageError, match=f"has schema {version}, {message}"):
            Store.open(shared_url, read_only=read_only)
    database = engine.Database(place.place_of(shared_url), read_only=False)
    with database.writing() as connection:
        connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))
    database.close()
    with Store.open(shared_url) as store:
        assert store.studies() == [study]


def test_a_stranger_beside_us_keeps_its_tables(tmp_path: Path, build) -> None:
    path = tmp_path / "optuna.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE studies (study_id INTEGER)")
    with Store.open(f"sqlite:///{path}") as store:
        build.study(store)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM studies").fetchall() == [(0,)]


def test_a_write_ahead_log_is_left(file_url: str) -> None:
    path = file_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode = WAL").fetchall() == [("wal",)]
    Store.open(file_url).close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("delete",)]


def test_the_rules_of_every_sqlite_connection(file_url: str) -> None:
    with Store.open(file_url) as store, store._database.reading() as connection:
        rules = ("foreign_keys", "synchronous", "busy_timeout", "journal_mode")
        values = [connection.exec_driver_sql(f"PRAGMA {rule}").scalar_one() for rule in rules]
    assert values == [1, 2, 30_000, "delete"]


def test_fault_19_a_full_disk_is_an_error_and_no_damage(file_url: str) -> None:
    with Store.open(file_url) as store:
        study = store.studies()[0]
        with store._database.reading() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # of this one pooled connection
        before = (store.trials(study), store.events())
        with pytest.raises(
            StorageError, match="full; nothing of this step was written: free some disk space"
        ):
            store.log(study, "large", {"text": "x" * 100_000})
        assert (store.trials(study), store.events()) == before
        assert store.start_trial(study, 0) == 1
        with store._database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"


def test_fault_17_a_lock_held_too_long_is_named(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.2)
    path = file_url.removeprefix("sqlite:///")
    with Store.open(file_url) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        study = store.studies()[0]
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="database is locked; another process kept it locked too long"):
            store.start_trial(study, 0)
        assert len(store.trials(study)) == 1  # reading goes on
        other.execute("ROLLBACK")
        assert store.start_trial(study, 0) == 1


def test_fault_17_a_row_held_too_long_in_a_server_is_named(
    server, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.2)
    url = server.new_database()
    with Store.open(url) as store, psycopg.connect(url) as other:
        study = build.study(store)
        store.add_trial(study, build.trial())
        other.execute("SELECT * FROM nas_trials FOR UPDATE")
        with pytest.raises(StorageError, match="another transaction kept the row locked too long"):
            store.start_trial(study, 0)
        other.rollback()
        assert store.start_trial(study, 0) == 1


def test_a_store_that_failed_to_open_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Store.open(f"sqlite:///{tmp_path}/none/nas.db")
    assert os.listdir(tmp_path) == []

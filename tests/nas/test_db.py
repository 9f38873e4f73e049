"""`nas db` as people and scripts meet it: what it prints, its exit codes, and that it only prints."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from storage.tables import SCHEMA_VERSION

Run = Callable[..., Any]
Refused = Callable[..., str]
DATA = Path(__file__).parents[1] / "storage" / "data"


@pytest.fixture
def load(tmp_path: Path) -> Callable[[int], str]:
    """A file as the release of a version left it."""

    def make(version: int) -> str:
        path = tmp_path / "kept.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript((DATA / f"version_{version}.sql").read_text())
        return f"sqlite:///{path}"

    return make


def test_status_says_what_is_to_be_done(run: Run, load: Callable[[int], str]) -> None:
    url = load(1)
    said = run("db", "status", "--storage", url)
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines() == [
        f"{url}  schema 1, older than {SCHEMA_VERSION}, the newest",
        f"to do    nas db upgrade --storage {url}",
        "studies  1",
        "  old: 4 done",
    ]
    found = run("db", "status", "--storage", url, "--json").json
    counts = {"waiting": 0, "running": 0, "done": 4, "pruned": 0, "unfit": 0, "lost": 0, "quarantined": 0}
    assert found == {
        "storage": url,
        "version": 1,
        "newest": SCHEMA_VERSION,
        "to_do": f"nas db upgrade --storage {url}",
        "studies": [{"study": "old", "trials": counts}],
    }


def test_status_of_a_current_database(run: Run, load: Callable[[int], str]) -> None:
    url = load(SCHEMA_VERSION)
    said = run("db", "status", "--storage", url)
    assert said.out.splitlines()[:2] == [f"{url}  schema {SCHEMA_VERSION}, the newest", "to do    nothing"]
    assert "2 waiting, 8 done, 1 pruned, 1 unfit, 1 lost, 1 quarantined" in said.out
    assert run("db", "status", "--storage", url, "--json").json["to_do"] is None


def test_upgrade_says_from_where_to_where_and_where_the_copy_is(run: Run, load: Callable[[int], str]) -> None:
    url = load(1)
    path = Path(url.removeprefix("sqlite:///"))
    said = run("db", "upgrade", "--storage", url)
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines() == [
        f"{url} went from schema 1 to {SCHEMA_VERSION}",
        f"as it was before: {path}.version-1.bak",
    ]
    again = run("db", "upgrade", "--storage", url)
    assert again.code == 0 and again.out == f"{url} has schema {SCHEMA_VERSION}, the newest: nothing to do\n"
    found = run("db", "upgrade", "--storage", f"{url}.version-1.bak", "--no-copy", "--json").json
    assert found == {"storage": f"{url}.version-1.bak", "from": 1, "to": SCHEMA_VERSION, "copy": None}
    assert sorted(one.name for one in path.parent.iterdir()) == ["kept.db", "kept.db.version-1.bak"]


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_check_of_a_kept_database_is_clean(run: Run, load: Callable[[int], str], version: int) -> None:
    url = load(version)
    said = run("db", "check", "--storage", url)
    assert (said.code, said.out) == (0, f"{url} is sound\n")
    assert ("its tables were not compared" in said.err) is (version < SCHEMA_VERSION)
    found = run("db", "check", "--storage", url, "--json").json
    assert found == {
        "storage": url, "version": version, "newest": SCHEMA_VERSION, "whole": True, "findings": [],
    }  # fmt: skip


def test_check_prints_a_line_a_finding_and_fails(run: Run, load: Callable[[int], str]) -> None:
    url = load(SCHEMA_VERSION)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM nas_results WHERE trial_id = 3")
        connection.execute("""UPDATE nas_layouts SET text = '9*full' WHERE text = '2*full'""")
        connection.execute("""UPDATE nas_layouts SET layers = '[{"mixer": 3}]' WHERE text = '2*window'""")
        connection.commit()
    said = run("db", "check", "--storage", url)
    assert said.code == 3 and said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == "results    study 'tiny', trial 2 is done and has no result"
    assert {line.split()[0] for line in lines} == {"results", "layouts"} and len(lines) == 3
    assert any("is '9*full', but its layers are '2*full'" in line for line in lines)
    assert any(
        "(2*window) cannot be read: its layers are not those of a layout (KeyError" in line for line in lines
    )
    found = run("db", "check", "--storage", url, "--json")
    assert found.code == 3 and [one["check"] for one in found.json["findings"]] == [
        "results",
        "layouts",
        "layouts",
    ]


def test_a_table_that_is_missing_ends_the_check_in_a_line(run: Run, load: Callable[[int], str]) -> None:
    url = load(SCHEMA_VERSION)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DROP TABLE nas_results")
    said = run("db", "check", "--storage", url)
    assert said.code == 3 and said.out == "tables     table nas_results is missing\n"
    assert "nothing else was looked at" in said.err


@pytest.mark.parametrize("command", ["status", "upgrade", "check"])
@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nas.db", "is a path, not a database URL: write sqlite:///nas.db"),
        ("sqlite://", "a memory database is empty when opened"),
        ("sqlite:///none/nas.db", "no database at sqlite:///none/nas.db; nas search makes one"),
        ("postgresql://me:canary7f3e@127.0.0.1:9/nas", "check that the server runs"),
    ],
)
def test_what_is_no_database_is_refused(refused: Refused, command: str, storage: str, said: str) -> None:
    err = refused("db", command, "--storage", storage, code=3)
    assert said in err and "canary7f3e" not in err


def test_an_empty_file_is_refused_and_stays_empty(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    for command in ("status", "upgrade", "check"):
        assert "holds no studies yet" in refused("db", command, "--storage", f"sqlite:///{path}", code=3)
    assert path.read_bytes() == b"" and [found.name for found in tmp_path.iterdir()] == ["empty.db"]


def test_a_command_that_there_is_not(refused: Refused) -> None:
    assert "Did you mean 'status'?" in refused("db", "statu")


def test_the_doctor_sees_a_database_that_a_search_would_not_write(
    run: Run, load: Callable[[int], str]
) -> None:
    url = load(1)
    said = run("doctor", "--storage", url, "--json")
    assert said.code == 1
    [found] = [check for check in said.json if not check["ok"]]
    assert found["check"] == "storage" and f"nas db upgrade --storage {url}" in found["said"]

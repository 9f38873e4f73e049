"""A password in a database's address, followed through every command, file, page and table: nobody gets to read it."""

import json
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from fastapi.testclient import TestClient

from dashboards.app import create_app
from nas.cli import db
from nas.cli.main import app, main
from storage.store import Store

CANARY = "canary-7f3e"  # the server's password, see conftest
TOKEN = "token-of-the-pages"
TINY: dict[str, Any] = {
    "study": "tiny",
    "workers": 1,
    "trials": 2,
    "repeats": 0,
    "sampler": "random",
    "rungs": {"shares": []},
    "latency_cache": None,
    "target": {
        "width": 64,
        "depth": 2,
        "train_length": 64,
        "context": 64,
        "contexts": [32, 128],
        "vocabulary": 64,
    },
    "proxy": {"width": 16, "length": 16},
    "space": {"layers": 2, "mixers": ["full", "kda"], "settings": {}},
    "tasks": {"mqar": {"steps": 2, "batch": 4, "learning_rates": [0.01]}},
}
WITHOUT_STORAGE = ("cost", "mixers", "space", "tune", "warm", "evaluate")
"""Commands that take no --storage, or use it for nothing but latencies."""
OF_A_CLUSTER = ("submit", "jobs", "logs", "cancel")
"""Commands that ask a cluster; a password is followed through them beside their own tests."""
READING: dict[str, tuple[str, ...]] = {
    "front": (),
    "trials": (),
    "show": ("0",),
    "retry": ("--state", "lost"),
    "explain": (),
    "measure": ("full", "--depth", "1", "--prompt", "8", "--no-whole"),
    "report": (),
    "dashboard": ("--study", "nobody's"),
    "doctor": (),
    "db status": (),
    "db upgrade": (),
    "db check": (),
}
"""Commands that read a database, with what else they need; the dashboard with a study that it refuses."""


@dataclass
class Seen:
    """Runs commands and keeps whatever they wrote."""

    capsys: pytest.CaptureFixture[str]
    codes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def run(self, *arguments: object) -> str:
        self.capsys.readouterr()
        self.codes.append(main([str(argument) for argument in arguments]))
        written = self.capsys.readouterr()
        self.texts.append(f"{arguments[:2]}: {written.out}{written.err}".replace(repr(arguments[:2]), ""))
        return written.out + written.err

    def check(self, *more: str) -> None:
        for text in (*self.texts, *more):
            assert CANARY not in text, text[max(0, text.index(CANARY) - 300) :][:600]


@pytest.fixture
def seen(capsys: pytest.CaptureFixture[str]) -> Seen:
    return Seen(capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, so that what is kept there is seen too."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture(params=["user info", "query", "escaped query", "environment", "file"])
def address(
    request: pytest.FixtureRequest, server: Any, config: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, ...]]:
    """The options that name an empty database of the server, in every way that a password can be given."""
    url = server.new_database()
    bare = url.replace(f":{CANARY}@", "@")
    match request.param:
        case "user info":
            yield ("--storage", url)
        case "query":
            yield ("--storage", f"{bare}?password={CANARY}")
        case "escaped query":
            yield ("--storage", f"{bare}?p%61ssword={CANARY}")
        case "environment":
            monkeypatch.setenv("PGPASSWORD", CANARY)
            yield ("--storage", bare)
        case "file":
            monkeypatch.setenv("PGPASSWORD", CANARY)
            Path(config).write_text(yaml.safe_dump({**TINY, "storage": url}))
            yield ("--storage", bare)


def files_under(*folders: Path) -> str:
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return "\n".join(
        f"{path}: {path.read_bytes().decode('latin-1')}" for path in found if path.name != "tiny.yaml"
    )


def rows_of(url: str) -> str:
    """Every value of every table."""
    with Store.open(url) as store, store._database.reading() as connection:
        names = [f"nas_{name}" for name in ("studies", "layouts", "trials", "results", "latencies", "events")]
        return "\n".join(str(connection.exec_driver_sql(f"SELECT * FROM {name}").all()) for name in names)


def pages_of(url: str) -> str:
    """Every page, answer and metric, and what the server says of a database that it cannot reach."""
    texts = []
    for place in (url, url.replace("/nas", "/missing")):
        client = TestClient(
            create_app(place, token=TOKEN),
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {TOKEN}", "Accept": "text/html"},
            raise_server_exceptions=False,
        )
        paths = ["/", "/studies/tiny", "/studies/tiny/trials/0", "/studies/nobody", "/metrics", "/docs"]
        api = "/api/v1/studies"
        paths += [api, f"{api}/tiny", f"{api}/tiny/front", f"{api}/tiny/trials", f"{api}/tiny/events"]
        paths += [f"{api}/tiny/figure/{chart}" for chart in ("front", "layers", "nothing")]
        for path in paths:
            answer = client.get(path)
            assert answer.status_code in ((200, 400, 404) if place == url else (200, 503)), (
                path,
                answer.text,
            )
            texts.append(f"{path}: {answer.text} {dict(answer.headers)}")
    return "\n".join(texts)


def test_the_walk_knows_every_command() -> None:
    names = {command.name for command in app.registered_commands} | {f"db {name}" for name in db.COMMANDS}
    assert names == {"search", *READING, *WITHOUT_STORAGE, *OF_A_CLUSTER}


def test_fault_42_secret_given_to_every_command(
    seen: Seen, address: tuple[str, ...], config: str, home: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    search = ("search", "--config", config, *address, "--log-level", "debug")
    seen.run(*search, "--log-file", log)
    seen.run(*search, "--json", "--trials", 3)
    seen.run(*search, "--seed", 3)
    assert seen.codes == [0, 0, 2]
    for debug in ((), ("--debug",)):
        for command, more in READING.items():
            study = () if command.startswith(("db", "doctor", "dashboard")) else ("--study", "tiny")
            output = ("-o", tmp_path / "report.html") if command == "report" else ()
            seen.run(*debug, *command.split(), *more, *address, *study, *output)
    assert seen.codes.count(0) == 2 + 2 * (len(READING) - 1)
    for command in ("front", "trials", "explain", "doctor", "db status", "db check"):
        seen.run(*command.split(), *address, "--json")
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert {"search_started", "trial_ended", "search_ended"} <= set(events)
    assert list((home / ".cache" / "nas" / "logs").glob("*.log.jsonl"))
    url = address[1]
    seen.check(files_under(home, tmp_path), rows_of(url), pages_of(url))


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["plain", "debug"])
@pytest.mark.parametrize(
    "wrong", ["database", "password", "user", "option", "port", "host", "scheme", "escape"]
)
def test_fault_42_secret_in_an_address_that_fails(
    seen: Seen, server: Any, config: str, home: Path, tmp_path: Path, wrong: str, debug: tuple[str, ...]
) -> None:
    url = server.new_database()
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        bad = {
            "database": url.replace("/nas", "/missing"),
            "password": url.replace(CANARY, f"wrong-{CANARY}"),
            "user": url.replace("//nas", "//other"),
            "option": f"{url}?nonsense=1&sslpassword={CANARY}",
            "port": url.replace(f":{server.port}/", f":{free.getsockname()[1]}/"),
            "host": url.replace("127.0.0.1", "no.such.host.invalid"),
            "scheme": url.replace("postgresql", "mysql"),
            "escape": url.replace(CANARY, f"{CANARY}/@{CANARY}"),
        }[wrong]
        for command, more in READING.items():
            seen.run(*debug, *command.split(), *more, "--storage", bad)
        seen.run(*debug, "search", "--config", config, "--storage", bad)
        Path(config).write_text(yaml.safe_dump({**TINY, "storage": bad}))
        seen.run(*debug, "search", "--config", config)
    assert set(seen.codes) <= {0, 3} and seen.codes.count(3) >= len(READING) + 1
    assert all(("Traceback" in text) == bool(debug) for text in seen.texts if "python" not in text)
    seen.check(files_under(home, tmp_path))


MISPLACED: tuple[tuple[str, ...], ...] = (
    ("front", "{}"),
    ("front", "--storge", "{}"),
    ("front", "--storge={}"),
    ("front", "--study", "{}", "--storage", "sqlite:///{place}/nas.db"),
    ("front", "--storage", "{path}"),
    ("front", "--storage", "'{}'"),
    ("cost", "{}"),
    ("cost", "full", "--width", "{}"),
    ("evaluate", "full", "--task", "{}"),
    ("measure", "full", "--device", "{}"),
    ("{}",),
    ("search", "--workers", "{}"),
    ("search", "--set", "{}"),
    ("search", "--set", "storge={}"),
    ("search", "--set", "trials={}"),
    ("search", "--set", "space.mixers=[{}]"),
    ("search", "--config", "{}"),
    ("search", "--sampler", "{}"),
    ("search", "--objective", "{}"),
    ("search", "--constraint", "{}"),
    ("search", "--set", "tasks={bytes: {steps: 1}}", "--data", "{}"),
    ("search", "--log-level", "{}"),
    ("search", "--pool", "{}"),
    ("dashboard", "--host", "{}"),
    ("report", "-o", "{place}/missing/{}"),
    ("space", "--space", "{}"),
)


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["plain", "debug"])
@pytest.mark.parametrize("arguments", MISPLACED, ids=" ".join)
def test_fault_42_secret_where_none_belongs(
    seen: Seen, config: str, home: Path, tmp_path: Path, arguments: tuple[str, ...], debug: tuple[str, ...]
) -> None:
    url = f"postgresql://me:{CANARY}@127.0.0.1:9/nas"
    filled = [
        text.replace("{place}", str(tmp_path)).replace("{path}", url.partition("://")[2]).replace("{}", url)
        for text in arguments
    ]
    there = (
        ("--config", config, "--storage", f"sqlite:///{tmp_path}/nas.db")
        if arguments[0] == "search" and "--config" not in arguments
        else ()
    )
    seen.run(*debug, *filled, *there)
    assert seen.codes[0] in (2, 3), seen.texts
    seen.check(files_under(home, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "storage: [{}",
        "storage: '{}\ntrials: 3",
        "storge: {}",
        "trials: {}",
        "space: {{mixers: ['{}']}}",
        "- {}",
    ],
)
def test_fault_42_secret_in_a_file_that_cannot_be_read(seen: Seen, tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text.format(f"postgresql://me:{CANARY}@db/nas"))
    for debug in ((), ("--debug",)):
        seen.run(*debug, "search", "--config", path, "--storage", f"sqlite:///{tmp_path}/nas.db")
    assert set(seen.codes) == {2}
    seen.check()


def test_fault_42_secret_in_the_message_of_a_bug(
    seen: Seen, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any
) -> None:
    """Whatever a library puts into its exceptions: what is known to be secret is masked by its value."""
    url = server.new_database()
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-of-the-environment")

    def broken(*_: object, **__: object) -> None:
        try:
            psycopg.connect(url.replace("/nas", "/missing"))
        except psycopg.Error as error:
            raise RuntimeError(f"{url} and {CANARY} alone and password={CANARY}") from error

    monkeypatch.setattr("nas.search.Search._open_new", broken)
    log = tmp_path / "log.jsonl"
    for debug in ((), ("--debug",)):
        seen.run(*debug, "search", "--config", config, "--storage", url, "--log-file", log)
    assert seen.codes == [1, 1] and "Traceback" in seen.texts[1]
    failed = [
        line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "search_failed"
    ]
    assert len(failed) == 2 and all("RuntimeError" in line["traceback"] for line in failed)
    seen.check(log.read_text())


def test_fault_42_secret_beside_a_sqlite_file(seen: Seen, config: str, home: Path, tmp_path: Path) -> None:
    """A file's name is no address, but the same passwords may stand in the environment or behind a question mark."""
    for name in (f"nas.db?password={CANARY}", f"file:nas.db?token={CANARY}"):
        seen.run("--debug", "search", "--config", config, "--storage", f"sqlite:///{tmp_path}/{name}")
        seen.run("trials", "--storage", f"sqlite:///{name}")
    assert set(seen.codes) == {3}
    seen.check(files_under(home, tmp_path))


def test_fault_42_secret_in_a_study_of_an_older_hand(seen: Seen, tmp_path: Path, config: str) -> None:
    """Whoever wrote a password into a study's configuration does not see it on any page."""
    url = f"sqlite:///{tmp_path}/nas.db"
    seen.run("search", "--config", config, "--storage", url)
    with closing(sqlite3.connect(tmp_path / "nas.db")) as connection, connection:
        [(text,)] = connection.execute("SELECT config FROM nas_studies").fetchall()
        stored = json.loads(text) | {"storage": f"postgresql://me:{CANARY}@db/nas"}
        connection.execute("UPDATE nas_studies SET config = ?", [json.dumps(stored)])
    seen.run("report", "--study", "tiny", "--storage", url, "-o", tmp_path / "report.html")
    for command in ("front", "trials", "explain"):
        seen.run(command, "--study", "tiny", "--storage", url, "--json")
    assert set(seen.codes) == {0}
    seen.check((tmp_path / "report.html").read_text(), pages_of(url))

"""Every kind of database, as a fixture: a SQLite file, SQLite in memory, and a PostgreSQL server of our own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

import storage
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord, StudyRecord
from storage.store import Store

PASSWORD = "canary-7f3e"  # a real one: the server asks for it, and no message may repeat it
ROOT = Path(next(iter(storage.__path__))).parent


def _server_binaries() -> Path | None:
    candidates = [Path(found).parent for found in [shutil.which("initdb")] if found]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None
    )


class Server:
    """A PostgreSQL server on a free loopback port, run by an ordinary user (it refuses root)."""

    def __init__(self, binaries: Path, home: Path) -> None:
        self.binaries, self.home = binaries, home
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
            self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(home, user.pw_uid, user.pw_gid)
        secret = home / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        options = [
            "-D",
            str(home / "data"),
            "-U",
            "nas",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "-E",
            "UTF8",
        ]
        self._call([str(binaries / "initdb"), "--locale=C", "--no-sync", *options])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._databases = count()
        self.start()

    def _call(self, command: list[str]) -> None:
        subprocess.run(command, check=True, cwd=self.home, stdout=subprocess.DEVNULL, **self._identity)

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = ["-D", str(self.home / "data"), "-p", str(self.port), "-k", str(self.home)]
        options += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "postgres"), *options],
                cwd=self.home,
                stdout=log,
                stderr=log,
                **self._identity,
            )
        for _ in range(300):
            try:
                psycopg.connect(self._dsn("postgres")).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise RuntimeError((self.home / "log").read_text())

    def stop(self, kind: signal.Signals = signal.SIGINT) -> None:
        """Stops it: SIGINT in order, SIGQUIT as a crash."""
        self.process.send_signal(kind)
        self.process.wait(30)

    def _dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=nas password={PASSWORD} dbname={database}"

    def url(self, database: str) -> str:
        return f"postgresql://nas:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"nas{next(self._databases)}"
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    binaries = _server_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server (initdb, postgres) on this machine")
    home = Path(tempfile.mkdtemp(prefix="nas-pg-"))  # short, as a socket's path must be, and open to its user
    running = Server(binaries, home)
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(home)


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgresql":
        running: Server = request.getfixturevalue("server")
        return running.new_database()
    return "sqlite://" if request.param == "sqlite-memory" else f"sqlite:///{tmp_path}/nas.db"


@pytest.fixture(params=["sqlite-file", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that several processes can open."""
    if request.param == "postgresql":
        running: Server = request.getfixturevalue("server")
        return running.new_database()
    return f"sqlite:///{tmp_path}/nas.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1e3, high=1e9, log=True, unit="B"),
)
RESULT = ResultRecord(
    rung=0,
    quality=0.75,
    scores={"recall": 0.1 + 0.2},
    details={"curves": {"recall": [2.5, 1.25]}},
    steps=100,
    tokens=12_800,
    train_s=1.5,
    worker_s=2.0,
    seed=0,
)


@dataclass(frozen=True)
class Builders:
    """Records of ordinary content, as tests need many."""

    result: ResultRecord = RESULT

    def study(self, store: Store, name: str = "first") -> StudyRecord:
        return store.create_study(
            name=name,
            config={"trials": 3},
            config_hash="c0",
            axes=AXES,
            families={"kda": "linear", "full": "full"},
        )

    def trial(
        self, index: int = 0, *, costs: Mapping[str, float] | None = None, evaluation_key: str | None = None
    ) -> NewTrial:
        text = f"{index + 1}*kda full"
        layout = LayoutRecord(key=f"key{index}", text=text, layers=({"mixer": "kda"}, {"mixer": "full"}))
        return NewTrial(
            layout=layout,
            origin="random",
            params={"layer_0": "kda"},
            sampler_attrs={"parents": [1, 2]},
            costs={"kv_bytes": 4096.0, "params": 7} if costs is None else costs,
            layer_costs=({"kv_bytes": 0.0}, {"kv_bytes": 4096.0}),
            evaluation_key=f"evaluation{index}" if evaluation_key is None else evaluation_key,
        )

    def result_of(self, quality: float, rung: int = 0) -> ResultRecord:
        return replace(self.result, quality=quality, rung=rung)


@pytest.fixture(scope="session")
def build() -> Builders:
    return Builders()


class Child:
    """A second process that runs a few lines and answers line by line."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        )

    def line(self) -> str:
        """Its next answer."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        """Lets it pass its next `input()`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(code: str, *arguments: str) -> Child:
        started.append(Child(code, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.end()

"""Every kind of database, as a fixture: a SQLite file, SQLite in memory, and a PostgreSQL server."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import storage
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord, StudyRecord
from storage.store import Store

ROOT = Path(next(iter(storage.__path__))).parent


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("server").new_database())
    return "sqlite://" if request.param == "sqlite-memory" else f"sqlite:///{tmp_path}/nas.db"


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

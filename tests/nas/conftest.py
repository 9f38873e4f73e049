"""What the tests of the top floor share: a tiny configuration, commands run in this process, latencies made up."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nas
from nas import prices
from nas.cli.main import main
from nas.config import merge
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from trainers.measure import Latency

ROOT = Path(next(iter(nas.__path__))).parent
TINY: dict[str, Any] = {
    "study": "tiny",
    "workers": 1,
    "trials": 6,
    "repeats": 0,
    "rungs": {"shares": []},
    "sampler": "random",
    "latency_cache": None,
    "target": {
        "width": 64,
        "depth": 4,
        "train_length": 64,
        "context": 64,
        "contexts": [32, 128],
        "vocabulary": 64,
    },
    "proxy": {"width": 16, "length": 16},
    "space": {
        "layers": 2,
        "mixers": ["full", "window", "kda"],
        "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8, 16]}, "kda": {"head_dim": [16]}},
    },
    "tasks": {"mqar": {"steps": 2, "batch": 4, "learning_rates": [0.01]}},
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Made:
    """Latencies out of a hash instead of a clock, and what was asked for."""

    asked: list[str] = field(default_factory=list)

    def layer(self, layer: Layer, frame: Frame, phase: str, *, device: str) -> Latency:
        del frame, phase, device
        self.asked.append(str(layer))
        return Latency(
            latency_ms=1 + zlib.crc32(str(layer).encode()) % 1000 / 1000, spread_ms=0.1, repetitions=9
        )

    def network(self, network: Layout, frame: Frame, phase: str, *, device: str) -> Latency:
        parts = [self.layer(layer, frame, phase, device=device).latency_ms for layer in network.layers]
        self.asked.append(f"whole {network}")
        return Latency(latency_ms=1.1 * sum(parts), spread_ms=0.1, repetitions=9)


@pytest.fixture(autouse=True)
def latencies(monkeypatch: pytest.MonkeyPatch) -> Made:
    """No test in this process reads a clock."""
    made = Made()
    monkeypatch.setattr(prices, "measure_layer", made.layer)
    monkeypatch.setattr(prices, "measure_network", made.network)
    return made


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """The tiny configuration with some parts changed; a change of None takes a key out."""

    def make(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        changed = merge(TINY, changes or {})
        return {key: value for key, value in changed.items() if value is not None or key == "latency_cache"}

    return make


@pytest.fixture
def config_file(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    """The tiny configuration, changed, as a YAML file."""

    def write(changes: Mapping[str, Any] | None = None, name: str = "tiny.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tiny(changes)))
        return str(path)

    return write


@dataclass(frozen=True)
class Said:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value of standard output."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command line in this process."""

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Said(code, written.out, written.err)

    return call


@pytest.fixture
def refused(run: Callable[..., Said]) -> Callable[..., str]:
    """Runs a command line that must be refused in a few clear lines; returns them."""

    def call(*arguments: object, code: int = 2) -> str:
        said = run(*arguments)
        assert said.code == code, said.err
        assert said.out == ""
        lines = said.err.strip().splitlines()
        assert lines and lines[0].startswith("nas: ")
        assert len(lines) <= 3, said.err
        assert "Traceback" not in said.err and "internal error" not in said.err
        return said.err

    return call


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that is not there yet."""
    return f"sqlite:///{tmp_path}/nas.db"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python in a process of its own, with our packages on its path; ended at the latest with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env={
                "PATH": os.environ["PATH"],
                "HOME": os.environ.get("HOME", "/"),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def marked() -> Callable[[str], list[int]]:
    """Finds the processes that carry a mark, NAME=VALUE, in their environment, as all that were begun by one do."""

    def find(mark: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    return find

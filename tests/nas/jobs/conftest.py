"""A head of Ray with its job server for the tests: on loopback, with a token, on free ports, gone with the test for certain."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

TOKEN = "a-token-of-the-tests-0123456789abcdef"
MARK = "NAS_TESTS_HEAD"
"""In the environment of all processes of a head, by which they are found when it goes."""
NEEDED = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client", "opentelemetry.sdk", "grpc")


def free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class RayHead:
    """A head that can be killed and started again at the same address."""

    folder: Path
    marked: Callable[[str], list[int]]
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    client_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
            f"--port={self.port}", f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={self.client_port}", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0",
            "--num-cpus=1", "--object-store-memory=80000000", f"--temp-dir={self.folder}",
        ]  # fmt: skip
        environment = {
            # A job's `python` is that of the head.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            MARK: str(self.folder),
        }
        log = (self.folder / "head.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                command, cwd="/", env=environment, stdout=log, stderr=log, start_new_session=True
            )
        request = urllib.request.Request(
            f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            with suppress(OSError, urllib.error.URLError):
                if urllib.request.urlopen(request, timeout=5).status == 200:
                    return
            time.sleep(0.25)
        raise AssertionError((self.folder / "head.log").read_text())

    def kill(self) -> None:
        """As a power cut does: nothing of it can say goodbye."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self.process = None
        until = time.monotonic() + 30
        while (left := self.left()) and time.monotonic() < until:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert self.left() == []

    def left(self) -> list[int]:
        """Processes of this head: those that carry its mark."""
        return self.marked(f"{MARK}={self.folder}")


@pytest.fixture(scope="module")
def head(marked: Callable[[str], list[int]]) -> Iterator[RayHead]:
    lacking = [name for name in NEEDED if find_spec(name.partition(".")[0]) is None]
    if lacking:
        pytest.skip(f"no job server of Ray here: {', '.join(lacking)} (pip install 'ray[default]')")
    # Ray's sockets have long names in it, and a socket's path is at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="nas-head-", ignore_cleanup_errors=True) as folder:
        made = RayHead(Path(folder), marked)
        try:
            made.start()
            yield made
        finally:
            made.kill()


@dataclass(frozen=True)
class Done:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def nas(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Done]:
    """Runs a command in a process of its own, with the token unless another environment is given."""

    def call(*arguments: object, wait_s: float = 120, **environment: str) -> Done:
        given = environment or {"RAY_AUTH_TOKEN": TOKEN}
        process = start("-m", "nas", *map(str, arguments), **given)
        out, err = process.communicate(timeout=wait_s)
        return Done(process.returncode, out, err)

    return call

"""A process that is gone is told from one that lives, one that took its number, and one that cannot be seen from here."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import process
from storage.process import is_gone, name_of_this

NAMING = "from storage.process import name_of_this; print(name_of_this(), flush=True); input()"


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    root = Path(process.__file__).parents[1]
    other = subprocess.Popen(
        [sys.executable, "-c", NAMING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(root), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        yield other, other.stdout.readline().strip()
        other.kill()


def test_a_process_is_gone_once_it_was_killed(child: tuple[subprocess.Popen[str], str]) -> None:
    other, name = child
    assert name.startswith(f"pid {other.pid} on ") and not is_gone(name) and not is_gone(name_of_this())
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(0.05)
    assert not is_gone(name)  # it may go on
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(name)  # nobody has waited for it yet
    other.wait()
    assert is_gone(name)


def test_a_number_that_was_given_again_is_another_process() -> None:
    mine = name_of_this()
    since = mine.rpartition("since ")[2].split()[0]
    assert is_gone(mine.replace(f"since {since} ", f"since {int(since) - 1} "))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pid 999999999 on here",
        "pid 999999999 on here, since 7 of boot elsewhere/1",
        "a driver of an older release",
    ],
)
def test_what_cannot_be_seen_from_here_is_not_gone(name: str) -> None:
    assert not is_gone(name)


def test_another_numbering_of_processes_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = name_of_this()
    gone = mine.replace(f"pid {os.getpid()} ", "pid 999999999 ")
    assert is_gone(gone)
    boot, _, space = mine.rpartition(" ")[2].partition("/")
    assert not is_gone(gone.replace(f"{boot}/{space}", f"{boot}/{int(space) + 1}"))
    monkeypatch.setattr(process, "_PROC", Path("/nowhere"))
    assert name_of_this().startswith("pid ") and "boot" not in name_of_this() and not is_gone(gone)

"""Row 22 of what must be survived: power that fails. What was acknowledged lies on the disk, so at most the last is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import storage
from benchmarks.postgres import Server, server_binaries
from storage.check import check
from storage.store import Store

ROOT = Path(next(iter(storage.__path__))).parent
# Commits one result after the other, and says so of each once the store has said so.
COMMITTING = """
import os, sys
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord
from storage.store import Store
url, most = sys.argv[1], int(sys.argv[2])
result = ResultRecord(rung=0, quality=0.5, scores={"mqar": 0.5}, details={}, steps=1, tokens=1, train_s=1.0, worker_s=1.0, seed=0)
axes = (Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),)
with Store.open(url) as store:
    study = store.create_study(name="power", config={}, config_hash="", axes=axes, families={})
    with store.writer(study) as lease:
        for index in range(most):
            layout = LayoutRecord(key=str(index), text=f"{index}*kda", layers=())
            new = NewTrial(layout=layout, origin="search", params={}, sampler_attrs={}, costs={}, layer_costs=(), evaluation_key=str(index))
            trial, attempt = store.open_trial(study, new, lease, most=most)
            os.write(1, b"opened %d\\n" % trial.number)
            assert store.finish_trial(study, trial.number, attempt, result)
            os.write(1, b"kept %d\\n" % trial.number)
"""


def begin(*command: str) -> subprocess.Popen[str]:
    """The lines above in a process of their own; `command` stands before the interpreter."""
    *first, url, most = command
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}
    return subprocess.Popen(
        [*first, sys.executable, "-c", COMMITTING, url, most],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def kept_until(process: subprocess.Popen[str], number: int) -> list[int]:
    """The trials that the process said were kept, which it is killed after; whatever it said until its death counts."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == f"kept {number}\n":
            process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    return [int(line.split()[1]) for line in said if line.startswith("kept")]


def stored(url: str) -> dict[int, int]:
    """By number of the trials that are done: how many results there are."""
    with Store.open(url, read_only=True) as store:
        done = store.trials(store.studies()[0], states=["done"])
        return {trial.number: len(trial.results) for trial in done}


def no_layout(_layers: object) -> tuple[str, str]:
    raise ValueError("the trials above have layouts without layers")


def assert_sound(url: str) -> None:
    found = [one for one in check(url, no_layout).findings if one.check not in ("layouts", "writers")]
    assert found == []


@pytest.fixture
def durable_url() -> Iterator[tuple[Server, str]]:
    """A server that waits for its disk, as ours among the tests does not."""
    binaries = server_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server (initdb, postgres) on this machine")
    home = Path(tempfile.mkdtemp(prefix="nas-pg-"))
    server = Server(binaries, home, durable=True)
    try:
        yield server, server.new_database()
    finally:
        server.stop()
        shutil.rmtree(home)


def test_fault_22_power_loss_leaves_what_a_file_had_acknowledged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nas.db"
    kept = kept_until(begin(url, "100000"), 12)
    found = stored(url)
    assert kept == list(range(len(kept))) and len(kept) >= 13
    assert set(kept) <= set(found) and set(found.values()) == {1}
    assert len(found) <= len(kept) + 1  # one may have been committed and not acknowledged
    assert_sound(url)


@pytest.mark.slow
def test_fault_22_power_loss_of_a_server_leaves_what_it_had_acknowledged(
    durable_url: tuple[Server, str],
) -> None:
    server, url = durable_url
    with Store.open(url) as store, store._database.reading() as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert connection.exec_driver_sql(f"SHOW {setting}").scalar() == "on", setting
    process = begin(url, "100000")
    assert process.stdout is not None
    said = [line for line, _ in zip(process.stdout, range(30), strict=False)]
    server.stop(signal.SIGQUIT)  # all of its processes at once, and no last write
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait(30)
    process.stdout.close()
    server.start()
    kept = [int(line.split()[1]) for line in said if line.startswith("kept")]
    found = stored(url)
    assert len(kept) >= 13 and set(kept) <= set(found) and len(found) <= len(kept) + 1
    assert set(found.values()) == {1}
    assert_sound(url)


CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")


@pytest.mark.slow
def test_fault_22_power_loss_is_prepared_for_in_the_right_order(tmp_path: Path) -> None:
    """By a trace of the system's calls: the journal is on the disk before the file is touched, the file before the word."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on this machine")
    trace, calls = tmp_path / "trace", "pwrite64,write,fsync,fdatasync,unlink,unlinkat"
    process = begin(
        strace, "-f", "-y", "-e", f"trace={calls}", "-o", str(trace), f"sqlite:///{tmp_path}/nas.db", "6"
    )
    out, _ = process.communicate(timeout=120)
    if not trace.exists() or not trace.read_text():
        pytest.skip("strace may not trace here")
    assert process.returncode == 0 and out.count("kept") == 6
    unsynced: set[str] = set()
    acknowledged, journals = 0, 0
    for line in trace.read_text().splitlines():
        found = CALL.match(line)
        if found is None:
            continue
        name, arguments, _ = found.groups()
        place = re.search(r"<([^>]*)>", arguments)
        file = "" if place is None else Path(place.group(1)).name
        if name in ("pwrite64", "write") and file in ("nas.db", "nas.db-journal"):
            if file == "nas.db":
                assert "nas.db-journal" not in unsynced, (
                    "the file is changed before its journal is on the disk"
                )
            unsynced.add(file)
        elif name in ("fsync", "fdatasync"):
            unsynced.discard(file)
        elif name.startswith("unlink") and "nas.db-journal" in arguments:
            journals += 1
            assert "nas.db" not in unsynced, "the journal is dropped before the file is on the disk"
            unsynced.discard("nas.db-journal")
        elif name == "write" and ('"kept' in arguments or '"opened' in arguments):
            acknowledged += 1
            assert not unsynced, f"acknowledged with {unsynced} not on the disk"
    assert acknowledged == 12 and journals >= 12

"""Drivers that die, stand still, or work side by side: whatever happens to them, a trial has one result.

Each runs in a process of its own with all imports behind it, forked off one that a test lets do so again and again.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import nas
from storage.errors import StorageError
from storage.records import TrialRecord
from storage.store import Store
from storage.tables import TrialRow

ROOT = Path(next(iter(nas.__path__))).parent
TRIALS = 10
CHANGES: dict[str, Any] = {
    "trials": TRIALS,
    "lease_s": 1.0,
    "objectives": ["quality", "kv_bytes"],  # a latency that is measured differs from process to process
    "tasks": {"mqar": {"steps": 12, "batch": 4, "learning_rates": [0.01]}},
}
LONG: dict[str, Any] = {
    "tasks": {"mqar": {"steps": 900, "batch": 8, "learning_rates": [0.01]}},
    "trials": 3,
}
STILL: dict[str, Any] = {**LONG, "tasks": {"mqar": {"steps": 400, "batch": 8, "learning_rates": [0.01]}}}
START = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"

# A process that has imported all forks a driver, kills it while it trains, and so on; the last one may finish.
KILLING = """
import os, random, signal, sys, time
import nas.cli.session, nas.samplers.optuna_sampler, torch
from nas.cli.main import main
from storage.errors import StorageError
from storage.store import Store

random.seed(int(sys.argv[1]))
left = int(sys.argv[2])
url = sys.argv[sys.argv.index("--storage") + 1]

def begun():
    try:
        with Store.open(url, read_only=True) as store:
            return sum(one.kind == "trial_running" for one in store.events(limit=100_000))
    except StorageError:
        return 0

while True:
    sys.stdout.flush()
    before = begun()
    pid = os.fork()
    if pid == 0:
        os._exit(main(sys.argv[3:]))
    if left:
        while begun() == before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.3))
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left -= 1
            continue
        sys.exit(f"a driver ended before it was killed: {left} were to come")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

# The store's commit of a result, with a death at one side of it the first time.
DYING = """
import os, signal, sys
from storage.store import Store
from nas.cli.main import main

real = Store.finish_trial

def finish_trial(self, study, number, attempt, result, **rest):
    if sys.argv[1] == "before" and number == 2 and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    told = real(self, study, number, attempt, result, **rest)
    if sys.argv[1] == "after" and number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return told

Store.finish_trial = finish_trial
sys.exit(main(sys.argv[2:]))
"""

# On the path of every process of a search: a layout of which the process dies that trains it.
POISON = """
import os, signal
import nas.workers.pool as pool

real = pool.evaluate

def evaluate(job):
    if [branch["mixer"] for layer in job.layers for branch in layer["branches"]] == ["window", "window"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(job)

pool.evaluate = evaluate
"""

Start = Callable[..., subprocess.Popen[str]]
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(start: Start, config_file: Callable[..., str]) -> Begin:
    """Begins a search of a database, with some of the configuration changed; `code` in place of the command."""

    names = (f"{number}.yaml" for number in count())

    def call(
        url: str,
        changes: dict[str, Any] | None = None,
        *,
        code: str = START,
        first: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        path = config_file({**CHANGES, **(changes or {})}, next(names))
        command = ("search", "--config", path, "--storage", url, "--json")
        return start("-c", code, *first, *command, **(environment or {}))

    return call


def ended(process: subprocess.Popen[str], *codes: int) -> tuple[Any, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode in (codes or (0,)), err
    assert "Traceback" not in err
    return (json.loads(out) if process.returncode == 0 else None), err


def trials_of(url: str) -> list[TrialRecord]:
    with Store.open(url, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        return store.trials(study)


def kinds_of(url: str) -> Counter[str]:
    with Store.open(url, read_only=True) as store:
        return Counter(one.kind for one in store.events(limit=100_000))


def facts(url: str) -> list[Any]:
    """What must be the same however the search went."""
    return [
        (trial.number, trial.layout.text, trial.state, [(r.rung, r.quality, r.steps) for r in trial.results])
        for trial in trials_of(url)
    ]


def until(found: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def running(url: str) -> list[int]:
    try:
        store = Store.open(url, read_only=True)
    except StorageError:  # not made yet
        return []
    with store:
        study = store.study("tiny")
        return [] if study is None else [one.number for one in store.trials(study, states=["running"])]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_fault_04_driver_sigkill(begin: Begin, tmp_path: Any, shared_url: str, kills: int) -> None:
    clean = f"sqlite:///{tmp_path}/clean.db"
    # Four layers, since there are but sixteen layouts of two.
    trials = {"trials": 3 * kills, "space": {"layers": 4}}
    ended(begin(clean, trials))
    killed = begin(shared_url, trials, code=KILLING, first=(str(kills), str(kills)))
    ended(killed)
    assert facts(shared_url) == facts(clean)
    assert [trial.state for trial in trials_of(shared_url)] == ["done"] * 3 * kills
    told = kinds_of(shared_url)
    assert told["trial_done"] == 3 * kills and told["late_result_rejected"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_fault_03_a_driver_dies_at_either_side_of_a_commit(
    begin: Begin, shared_url: str, moment: str
) -> None:
    dying = begin(shared_url, code=DYING, first=(moment,))
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGKILL
    before = trials_of(shared_url)
    assert [trial.state for trial in before] == ["done"] * 2 + ["running" if moment == "before" else "done"]
    ended(begin(shared_url))
    after = trials_of(shared_url)
    assert [len(trial.results) for trial in after] == [1] * TRIALS
    # What was computed and not committed is computed again; what was committed is not.
    assert after[2].attempts == (2 if moment == "before" else 1)
    if moment == "after":
        assert after[2].results == before[2].results
    assert kinds_of(shared_url)["trial_done"] == TRIALS


@pytest.mark.slow
def test_fault_10_a_layout_that_kills_its_process_is_set_aside_and_named(
    begin: Begin, shared_url: str, run: Callable[..., Any], refused: Callable[..., str], tmp_path: Any
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    poisoned = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    # The first time the search dies with it, since it trains in its own process; afterwards it is careful with it.
    dying = begin(shared_url, environment=poisoned)
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGSEGV
    ended(begin(shared_url, environment=poisoned))
    where = ("--study", "tiny", "--storage", shared_url)
    told = run("trials", *where, "--state", "quarantined", "--json").json
    assert [(row["layout"], row["why"]) for row in told] == [
        ("2*window", "the process that trained it died: SIGSEGV")
    ]
    number = told[0]["trial"]
    assert trials_of(shared_url)[number].attempts == 4  # three times in a row, and once with the search
    assert Counter(trial.state for trial in trials_of(shared_url)) == {"done": TRIALS - 1, "quarantined": 1}
    # Another study does not run into it again; who asks for it gets another attempt.
    ended(begin(shared_url, {"study": "other"}, environment=poisoned))
    other = run(
        "trials", "--study", "other", "--storage", shared_url, "--state", "quarantined", "--json"
    ).json
    assert [row["why"] for row in other] == [f"as trial {number} of study 'tiny': {told[0]['why']}"]
    assert run("retry", number, *where).err.startswith("1 trial waits for another attempt")
    ended(begin(shared_url))
    assert {trial.state for trial in trials_of(shared_url)} == {"done"}
    assert "is done: only one that is unfit, lost or quarantined" in refused("retry", number, *where, code=3)
    assert run("retry", "--state", "lost", *where).err == "study 'tiny' has no trial that is lost\n"


@pytest.fixture
def server_url(server: Any) -> str:
    return str(server.new_database())


@pytest.mark.slow
def test_fault_15_two_drivers_on_a_server_share_a_study(begin: Begin, server_url: str, tmp_path: Any) -> None:
    clean = f"sqlite:///{tmp_path}/clean.db"
    many = {"trials": 14, "repeats": 3}
    wanted, _ = ended(begin(clean, many))
    both = [begin(server_url, many) for _ in range(2)]
    told = [ended(process) for process in both]
    trials = trials_of(server_url)
    assert [trial.state for trial in trials] == ["done"] * 14
    assert [len(trial.results) for trial in trials] == [1] * 14
    assert {trial.attempts for trial in trials} == {1}
    assert len({trial.layout.key for trial in trials}) == 14
    assert sum(len(trial.repeats) for trial in trials) == 3
    kinds = kinds_of(server_url)
    assert (kinds["late_result_rejected"], kinds["driver_started"], kinds["driver_ended"]) == (0, 2, 2)
    with Store.open(server_url, read_only=True) as store, store._database.reading() as connection:
        shares = Counter(connection.execute(select(TrialRow.driver_id)).scalars())
    assert len(shares) == 2 and min(shares.values()) >= 2
    # Both say how the study ended, the one front of both, and each followed the other's trials.
    assert told[0][0]["front"] == told[1][0]["front"] and wanted["trials"] == told[0][0]["trials"]
    assert all("elsewhere" in err for _, err in told)


@pytest.mark.slow
def test_fault_07_a_driver_that_stood_still_finds_its_trial_taken_over(begin: Begin, server_url: str) -> None:
    first = begin(server_url, STILL)
    until(lambda: bool(running(server_url)))
    os.kill(first.pid, signal.SIGSTOP)
    number = running(server_url)[0]
    try:
        ended(begin(server_url, STILL))
        taken_over = trials_of(server_url)[number]
        assert (taken_over.state, taken_over.attempts) == ("done", 2)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    _, err = ended(first)
    assert "came back too late: another driver has taken it over" in err
    assert trials_of(server_url)[number] == taken_over
    kinds = kinds_of(server_url)
    assert kinds["late_result_rejected"] == 1 and kinds["trial_done"] == 3


@pytest.mark.slow
def test_a_driver_takes_over_from_one_that_died_beside_it(begin: Begin, server_url: str) -> None:
    patient = {**LONG, "lease_s": 3600.0}  # it is the death that tells, long before the lease would
    first = begin(server_url, patient)
    until(lambda: bool(running(server_url)))
    second = begin(server_url, patient)
    until(lambda: kinds_of(server_url)["driver_started"] == 2)
    first.kill()
    first.wait()
    ended(second)
    assert [(trial.state, len(trial.results)) for trial in trials_of(server_url)] == [("done", 1)] * 3
    kinds = kinds_of(server_url)
    assert (kinds["driver_gone"], kinds["driver_silent"]) == (1, 0)

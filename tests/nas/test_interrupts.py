"""Searches in processes of their own that are told to stop, or are killed: resumable, and each trial has one result."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import nas
from storage.errors import StorageError
from storage.records import TrialRecord
from storage.store import Store

SEARCH = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"
ROOT = Path(next(iter(nas.__path__))).parent
TRIALS = 7
# Long enough for a signal to come in the middle of a trial, wherever it is looked for.
SLOW = {
    "trials": TRIALS,
    "tasks": {"mqar": {"steps": 60, "batch": 8, "learning_rates": [0.01]}},
    "space": {"layers": 2, "mixers": ["full", "window"], "settings": {"full": {"kv_heads": [1]}}},
}
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def search(start: Start, config_file: Callable[..., str], url: str) -> Callable[..., subprocess.Popen[str]]:
    path = config_file(SLOW, "slow.yaml")

    def begin(*arguments: str) -> subprocess.Popen[str]:
        return start("-c", SEARCH, "search", "--config", path, "--storage", url, "--json", *arguments)

    return begin


def trials_of(url: str) -> list[TrialRecord]:
    with Store.open(url, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        return store.trials(study)


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Its messages up to the line that holds a word."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if word in line:
            return said
    raise AssertionError(f"{word!r} was never said: {said}")


def finish(search: Start, url: str) -> list[TrialRecord]:
    """Runs the same command to its end; every trial then has its one result."""
    process = search()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["trials"]["done"] == TRIALS
    trials = trials_of(url)
    assert [trial.state for trial in trials] == ["done"] * TRIALS
    assert [len(trial.results) for trial in trials] == [1] * TRIALS
    return trials


def test_ctrl_c_finishes_what_runs_and_the_same_command_goes_on(search: Start, url: str) -> None:
    process = search()
    read_until(process, "[2/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "will finish; Ctrl-C again stops at once" in err
    assert "nothing is lost. To go on: nas search --study tiny" in err and "Traceback" not in err
    answer = json.loads(out)
    before = trials_of(url)
    assert answer["trials"]["running"] == 0 and 2 <= answer["trials"]["done"] < TRIALS
    after = finish(search, url)
    kept = [trial for trial in before if trial.state == "done"]
    for trial in kept:
        assert after[trial.number].layout == trial.layout and after[trial.number].attempts == trial.attempts
        assert after[trial.number].results == trial.results


def test_fault_32_ctrl_c_twice_stops_at_once(search: Start, url: str) -> None:
    process = search("--set", "tasks.mqar.steps=100000")
    read_until(process, "first trial running")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    read_until(process, "Ctrl-C again stops at once")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5 and "Traceback" not in err
    assert [(trial.state, trial.attempts) for trial in trials_of(url)] == [("waiting", 1)]


ON_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{SEARCH}"


def test_fault_32_ctrl_c_twice_on_a_terminal_stops_at_once(config_file: Callable[..., str], url: str) -> None:
    """Keys that are typed, as the terminal itself makes a signal of them, for every process that it is in front of."""
    path = config_file({**SLOW, "tasks": {"mqar": {"steps": 100_000, "batch": 8, "learning_rates": [0.01]}}})
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, "search", "--config", path, "--storage", url],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = bytearray()

    def until(there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not there():
            assert time.monotonic() < deadline and process.poll() is None, shown.decode(errors="replace")
            if select.select([ours], [], [], 0.1)[0]:
                shown.extend(os.read(ours, 65536))

    def running() -> bool:
        try:
            return [trial.state for trial in trials_of(url)] == ["running"]
        except (StorageError, AssertionError):  # not made yet
            return False

    try:
        until(running)
        os.write(ours, b"\x03")
        until(lambda: b"Ctrl-C again stops at once" in shown)
        assert running()  # the first one lets it go on
        os.write(ours, b"\x03")
        until_end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until_end:
            if select.select([ours], [], [], 0.1)[0]:
                with suppress(OSError):  # the terminal is gone with its last process
                    shown.extend(os.read(ours, 65536))
        assert process.poll() == 5, shown.decode(errors="replace")
        assert b"Traceback" not in shown
        assert [(trial.state, trial.attempts) for trial in trials_of(url)] == [("waiting", 1)]
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_fault_31_a_termination_puts_back_what_runs(search: Start, url: str) -> None:
    process = search("--set", "tasks.mqar.steps=100000")
    read_until(process, "first trial running")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 5
    assert [trial.state for trial in trials_of(url)] == ["waiting"]


def test_a_killed_search_goes_on_with_one_result_a_trial(search: Start, url: str) -> None:
    process = search()
    read_until(process, "[1/")
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    before = trials_of(url)
    assert before[0].state == "done" and len(before) < TRIALS
    left = [trial.number for trial in before if trial.state == "running"]
    after = finish(search, url)
    # Costs may gain a latency that was run end to end, should the trial stand on the front.
    assert (after[0].layout, after[0].results, after[0].attempts) == (
        before[0].layout,
        before[0].results,
        before[0].attempts,
    )
    for number in left:
        assert after[number].attempts == 2


def test_fault_15_two_drivers_of_one_file_do_not_run_together(search: Start, url: str) -> None:
    first = search("--set", "tasks.mqar.steps=100000")
    read_until(first, "first trial running")
    second = search("--set", "tasks.mqar.steps=100000")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 3 and "nas: " in err and "Traceback" not in err
    assert [trial.state for trial in trials_of(url)] == ["running"]
    first.kill()


def test_an_interrupt_before_the_first_trial_is_no_traceback(start: Start) -> None:
    code = "import os, signal, sys; from nas.cli.main import main\nimport nas.cli.mixers as m\n"
    # A shell that runs the suite in the background lets it ignore the signal, and its children with it.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import nas.cli.output as o\no.print_json = lambda v: os.kill(os.getpid(), signal.SIGINT)\n"
    process = start("-c", code + "sys.exit(main(['mixers', '--json']))")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (5, "nas: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(start: Start) -> None:
    process = start("-c", SEARCH, "mixers", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_nothing_of_a_run_is_left_to_guess(search: Start, url: str) -> Any:
    """Standard output of a search off a terminal is its answer and nothing else."""
    process = search("--trials", "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert set(json.loads(out)) == {"study", "storage", "trials", "hypervolume", "front", "rungs"}
    assert "Warning" not in err and "\x1b" not in err and "[2/2]" in err
    del url

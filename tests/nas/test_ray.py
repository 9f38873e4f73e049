"""Trials on a real local Ray: what comes back, what is lost with its worker, what is raised, what is ended by force."""

import json
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.config import resolve
from nas.plan import make_plan
from nas.workers import ray_pool
from nas.workers.inline import InlinePool
from nas.workers.pool import run_job
from trainers.evaluate import Job
from trainers.outcome import Lost, Measured, Outcome, Unfit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[ray_pool.RayPool]:
    # Ray's own client leaves sockets and files to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ray_pool.RayPool(2, None)
        yield made
        made.stop()


@pytest.fixture
def job(tiny: Callable[..., dict[str, Any]]) -> Job:
    plan = make_plan(resolve(tiny()))
    return plan.job(plan.starts[0].layout)


def next_of(pool: ray_pool.RayPool, wait_s: float = 120) -> tuple[int, Outcome]:
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        done = pool.next_done(0.25)
        if done is not None:
            return done
    raise AssertionError("nothing came back")


def replaced(pool: ray_pool.RayPool, monkeypatch: pytest.MonkeyPatch, work: Callable[[Job], Outcome]) -> None:
    """Has the workers do something else."""

    def instead(job: Job, _text: object, _far: bool) -> Outcome:
        return work(job)

    monkeypatch.setattr(pool, "task", ray_pool.ray.remote(num_cpus=1, max_retries=0)(instead))


def test_it_gives_what_the_inline_pool_gives(pool: ray_pool.RayPool, job: Job) -> None:
    inline = InlinePool()
    inline.submit(0, job)
    here = inline.next_done(0)
    assert here is not None and isinstance(here[1], Measured)
    pool.submit(4, job)
    pool.submit(5, job)
    there = dict([next_of(pool), next_of(pool)])
    assert set(there) == {4, 5} and pool.next_done(0.0) is None
    for outcome in there.values():
        assert isinstance(outcome, Measured)
        assert (outcome.quality, outcome.scores) == (here[1].quality, here[1].scores)
        assert outcome.details["curves"] == here[1].details["curves"]


def test_a_worker_that_is_killed_is_a_lost_trial_and_the_pool_goes_on(
    pool: ray_pool.RayPool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool.task

    def die(_job: Job) -> Outcome:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    replaced(pool, monkeypatch, die)
    pool.submit(1, job)
    number, outcome = next_of(pool)
    assert number == 1 and isinstance(outcome, Lost) and "the worker died" in outcome.why
    monkeypatch.setattr(pool, "task", real)
    pool.submit(2, job)
    assert isinstance(next_of(pool)[1], Measured)


def test_a_bug_in_a_worker_is_raised_here(
    pool: ray_pool.RayPool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(_job: Job) -> Outcome:
        raise ZeroDivisionError("a bug of ours")

    replaced(pool, monkeypatch, stumble)
    pool.submit(1, job)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        next_of(pool)
    assert pool.next_done(0.0) is None


def test_fault_13_a_trial_that_does_not_end_is_ended_by_force(
    pool: ray_pool.RayPool, job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    note = tmp_path / "pid"

    def sleep(_job: Job) -> Outcome:
        note.write_text(str(os.getpid()))
        time.sleep(600)
        raise AssertionError

    replaced(pool, monkeypatch, sleep)
    monkeypatch.setattr(ray_pool, "GRACE_S", 10.0)
    pool.submit(7, Job(**{**vars(job), "time_limit_s": 1.0}))
    number, outcome = next_of(pool)
    assert number == 7 and isinstance(outcome, Unfit) and "time limit" in outcome.why
    assert not pool.running
    assert note.exists(), "the trial had not begun"
    for _ in range(100):
        if not alive(int(note.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(note.read_text()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_fault_09_gpu_out_of_memory_is_named_and_the_next_trial_is_fine(
    pool: ray_pool.RayPool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool.task

    def fill(job: Job) -> Outcome:
        from trainers import evaluate

        def full(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

        before, evaluate.train = evaluate.train, full
        try:
            return run_job(job)
        finally:
            evaluate.train = before

    def fill_outside(_job: Job) -> Outcome:
        raise torch.OutOfMemoryError("CUDA out of memory")

    replaced(pool, monkeypatch, fill)
    said = "mqar: the device is out of memory: CUDA out of memory. Tried to allocate 2 TiB"
    # Alone on its GPU the layout is to blame; beside others the machine is, and the layout is tried again.
    for gpus, expected in (
        (1.0, Unfit(why=said, out_of_memory=True)),
        (0.5, Lost(why=f"gpu_oom, with 0.5 of a GPU: {said}")),
    ):
        monkeypatch.setattr(pool, "gpus", gpus)
        pool.submit(1, job)
        assert next_of(pool) == (1, expected)
    replaced(pool, monkeypatch, fill_outside)
    pool.submit(2, job)
    number, outcome = next_of(pool)
    assert number == 2 and isinstance(outcome, Lost) and outcome.why.startswith("gpu_oom")
    monkeypatch.setattr(pool, "task", real)
    pool.submit(3, job)
    assert isinstance(next_of(pool)[1], Measured)


SEARCH = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_a_search_with_two_workers_finds_what_one_finds(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
) -> None:
    path, other = config_file({"trials": 4}), f"sqlite:///{tmp_path}/inline.db"
    process = start("-c", SEARCH, "search", "--config", path, "--storage", url, "--workers", "2", "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["trials"]["done"] == 4
    assert "2 workers (Ray, local)" in err and "Warning" not in err and "Traceback" not in err
    assert run("search", "--config", path, "--storage", other, "--json").code == 0

    def scores(storage: str) -> dict[str, Any]:
        trials = run("trials", "--study", "tiny", "--storage", storage, "--json").json
        return {trial["layout"]: trial["scores"] for trial in trials}

    assert scores(url) == scores(other)


def test_a_trial_rests_with_one_worker_and_goes_on_with_another(
    pool: ray_pool.RayPool, job: Job, tmp_path: Any
) -> None:
    rungs = replace(job, budget=replace(job.budget, rungs=(0.5,)))
    whole = run_job(rungs)
    pool.submit(1, replace(rungs, rung=0, checkpoints=str(tmp_path)))
    first = next_of(pool)[1]
    pool.submit(2, replace(rungs, start=0, checkpoints=str(tmp_path)))
    last = next_of(pool)[1]
    assert isinstance(whole, Measured) and isinstance(first, Measured) and isinstance(last, Measured)
    assert (first.rung, first.quality) == (0, whole.rungs[0].quality)
    assert (last.rung, last.quality, last.steps) == (1, whole.quality, whole.steps)
    assert last.new_steps < whole.steps and "restarted" not in last.details

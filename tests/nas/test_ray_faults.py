"""Whole searches on a local Ray whose workers are killed: every trial is tried again, and has one result."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from storage.records import TrialRecord
from storage.store import Store

pytestmark = pytest.mark.slow
# What a worker does instead of its trial, once in the whole search: the first that makes the file is the one.
SABOTAGE = """
import os, signal, sys, threading, time
from nas.workers import node, ray_pool
from nas.cli.main import main

MARK = sys.argv[1]

def first():
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def sabotage(job, text, far):
{body}
    return node.work(job, text, far)

ray_pool.work = sabotage
sys.exit(main(sys.argv[2:]))
"""
WITHIN = """
    if job.start is not None and first():
        threading.Timer(0.05, kill).start()
        time.sleep(60)
"""
AFTER = """
    outcome = node.work(job, text, far)
    if first():
        kill()
    return outcome
"""
GREEDY = """
    if first():
        hoard = []
        for _ in range(160):
            hoard.append(b"x" * (64 << 20))
            time.sleep(0.05)
"""


@pytest.fixture
def search(
    start: Callable[..., subprocess.Popen[str]], config_file: Callable[..., str], url: str, tmp_path: Path
) -> Callable[..., list[TrialRecord]]:
    """Runs a search in which one worker misbehaves; gives its trials."""

    def run(body: str, changes: dict[str, Any], **environment: str) -> list[TrialRecord]:
        mark = tmp_path / "mark"
        process = start(
            "-c", SABOTAGE.format(body=body), str(mark),
            "search", "--config", config_file(changes), "--storage", url, "--pool", "ray", "--json",
            **environment,
        )  # fmt: skip
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert mark.exists(), "nobody misbehaved"
        assert json.loads(out)["trials"]["lost"] == 0 and "is tried again" in err
        with Store.open(url, read_only=True) as store:
            study = store.study("tiny")
            assert study is not None
            return store.trials(study)

    return run


def test_fault_01_a_worker_killed_in_a_trial_goes_on_from_the_checkpoint(
    search: Callable[..., list[TrialRecord]],
) -> None:
    trials = search(
        WITHIN,
        {
            "trials": 10,
            "rungs": {"shares": [0.5], "keep": 0.5},
            "tasks": {"mqar": {"steps": 8, "batch": 4, "learning_rates": [0.01]}},
        },
    )
    # One attempt for each rung that was reached, and one more for what was lost.
    spare = [trial.attempts - len(trial.results) for trial in trials]
    assert sorted(spare) == [0] * 9 + [1]
    [hit] = [trial for trial, more in zip(trials, spare, strict=True) if more]
    assert hit.state == "done" and [result.rung for result in hit.results] == [0, 1]
    assert hit.results[-1].steps == 8 and hit.results[-1].details["new_steps"] == 4
    assert "restarted" not in hit.results[-1].details


def test_fault_02_a_worker_killed_after_computing_leaves_no_second_result(
    search: Callable[..., list[TrialRecord]],
) -> None:
    trials = search(AFTER, {"trials": 3})
    assert [(trial.state, len(trial.results)) for trial in trials] == [("done", 1)] * 3
    assert sorted(trial.attempts for trial in trials) == [1, 1, 2]


def test_fault_08_the_host_out_of_memory_costs_one_attempt(search: Callable[..., list[TrialRecord]]) -> None:
    memory = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total, free = (int(memory[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    if free < 6 << 20:
        pytest.skip("less than 6 GiB of memory are free")
    # Room for Ray and its workers, and 3 GiB more; the greedy one takes up to 10 GiB.
    threshold = 1 - (free - (4 << 20)) / total
    trials = search(
        GREEDY,
        {"trials": 3},
        RAY_memory_usage_threshold=f"{threshold:.3f}",
        RAY_memory_monitor_refresh_ms="100",
    )
    assert [(trial.state, len(trial.results)) for trial in trials] == [("done", 1)] * 3
    assert sorted(trial.attempts for trial in trials) == [1, 1, 2]


ASLEEP = """
    if first():
        time.sleep(600)
"""
# A cluster whose only node is pulled away under a trial, and another one in its place; the search is a process beside it.
NODE = """
import os, subprocess, sys, time
from ray.cluster_utils import Cluster

script, mark, *command = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
search = subprocess.Popen([sys.executable, "-c", script, mark, *command, "--ray-address", cluster.address])
while not os.path.exists(mark) and search.poll() is None:
    time.sleep(0.1)
cluster.remove_node(node, allow_graceful=False)
time.sleep(1.0)
cluster.add_node(num_cpus=1)
code = search.wait()
cluster.shutdown()
sys.exit(code)
"""


# The same to a pool alone, that a larger node gives room for more.
POOL = """
import os, sys, time
from ray.cluster_utils import Cluster
from nas.workers import ray_pool

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
mark = sys.argv[1]

def wait(job, text, far):
    open(mark, "w").close()
    time.sleep(600)

def tell(job, text, far):
    from trainers.outcome import Unfit
    return Unfit(why="well")

class Job:
    time_limit_s = None
    class budget:
        tasks = ()

def ended():
    while (done := pool.next_done(1.0)) is None:
        pass
    return type(done[1]).__name__ + ": " + done[1].why

ray_pool.work = wait
pool = ray_pool.RayPool(4, cluster.address)
print(pool.capacity, file=sys.stderr)
pool.submit(0, Job())
while not os.path.exists(mark):
    time.sleep(0.1)
cluster.remove_node(node, allow_graceful=False)
print(ended(), file=sys.stderr)
cluster.add_node(num_cpus=2)
pool.task = ray_pool.ray.remote(num_cpus=1, max_retries=0)(tell)
ray_pool.COUNT_S = 0.0
while pool.capacity < 2:
    time.sleep(0.5)
pool.submit(1, Job())
print(ended(), file=sys.stderr)
pool.stop()
cluster.shutdown()
"""


@pytest.fixture
def mark(marked: Callable[[str], list[int]], tmp_path: Path) -> Iterator[dict[str, str]]:
    """For the environment of a cluster whose processes are gone with the test for certain."""
    own = {"NAS_TESTS_CLUSTER": str(tmp_path)}
    yield own
    [(name, value)] = own.items()
    for pid in marked(f"{name}={value}"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_fault_06_a_lost_node_costs_an_attempt_and_a_new_one_is_used(
    start: Callable[..., subprocess.Popen[str]],
    config_file: Callable[..., str],
    url: str,
    mark: dict[str, str],
    tmp_path: Path,
) -> None:
    process = start(
        "-c", NODE, SABOTAGE.format(body=ASLEEP), str(tmp_path / "mark"),
        "search", "--config", config_file({"trials": 3}), "--storage", url, "--json",
        RAY_AUTH_MODE="disabled", **mark,
    )  # fmt: skip
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    with Store.open(url, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        trials, told = store.trials(study), store.last_events(study, {"trial_requeued"}, 0, 9)
    assert [(trial.state, len(trial.results)) for trial in trials] == [("done", 1)] * 3
    assert sorted(trial.attempts for trial in trials) == [1, 1, 2]
    assert len(told) == 1 and "node" in told[0].payload["why"], told


def test_a_pool_counts_the_nodes_that_leave_and_come(
    start: Callable[..., subprocess.Popen[str]], mark: dict[str, str], tmp_path: Path
) -> None:
    process = start("-c", POOL, str(tmp_path / "mark"), RAY_AUTH_MODE="disabled", **mark)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    said = [line for line in err.splitlines() if line.startswith(("1", "Lost", "Unfit"))]
    assert said[0] == "1" and said[1].startswith("Lost: ") and said[2:] == ["Unfit: well"], err

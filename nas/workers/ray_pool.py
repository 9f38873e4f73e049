"""Trials on Ray: a local cluster of this machine's cores, or one that is already there. Ray never retries; we do."""

import atexit
import io
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from typing import Any

# Read by Ray at import: no usage reports, and tasks that hold no GPU see what they saw before.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from ray.exceptions import (
    AuthenticationError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from nas.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, Refused
from nas.jobs.bundle import package_folders
from nas.workers.node import work
from trainers.evaluate import Job
from trainers.outcome import Lost, Outcome, Unfit
from trainers.tasks.corpus import load

GRACE_S = 30.0
"""What a trial may take beyond its own time limit before its process is ended by force."""
FAR_GRACE_S = 180.0
"""The same on a cluster elsewhere, where a node must first fetch our code before its first trial."""
JOIN_S = 120.0
"""How long to wait for a cluster that is only just starting to have room for one trial."""
COUNT_S = 5.0
"""How old a count of the cluster's cores and GPUs may be: nodes come and go."""
LOST_S = 30.0
"""How long the head may be away until the search leaves it: Ray would end our process without a word after a minute."""
LEAST_SHARE = 1e-4
"""Ray counts GPUs in ten thousandths."""
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray where a job runs, whose own runtime environment holds our code already."""


class _Nowhere(io.TextIOBase):
    """Swallows what is written."""

    def write(self, text: str) -> int:
        return len(text)


@dataclass(frozen=True, kw_only=True)
class _Running:
    number: int
    deadline: float | None


class RayPool:
    """One Ray task a trial, each with one core and a share of a GPU, as many at a time as the cluster has room for.

    Args:
        workers: trials at the same time, at most.
        address: a cluster that is there; None starts one on this machine and ends it with the pool.
        gpus: the share of a GPU that each trial holds, 1 for a whole one; None shares the GPUs out among the workers.
        local_gpus: GPUs of a cluster that is started here; None: those that Ray finds.

    Raises:
        Refused: the cluster cannot be reached, or has no room for a single trial.
    """

    def __init__(
        self,
        workers: int,
        address: str | None,
        *,
        gpus: float | None = 0.0,
        local_gpus: int | None = None,
    ) -> None:
        self.running: dict[Any, _Running] = {}
        self.workers = workers
        self.far = address is not None
        self.texts: dict[str, Any] = {}
        """By source, the text in Ray's store, from where every node fetches it once."""
        connect(workers, address, local_gpus)
        self.head = str(ray.get_runtime_context().gcs_address)
        self.heard = time.monotonic()
        self.asked = self.heard
        self.lost = False
        self.quiet = ExitStack()
        # When a worker dies, a thread of Ray prints that to standard output, where our data alone belongs.
        self.quiet.enter_context(redirect_stdout(_Nowhere()))
        self.gpus = self._share() if gpus is None else gpus
        self.room, self.counted = 0, -math.inf
        if not wait_until(lambda resources: self._room(resources) >= 1, far=self.far):
            self.stop()
            needs = f"one core and {self.gpus:g} GPU" if self.gpus else "one core"
            raise Refused(
                f"the cluster at {address or 'this machine'} has no room for one trial, which needs {needs}: "
                "add nodes, or set gpus to a smaller share"
            )
        # A process that has used a GPU keeps its memory: the next trial gets a process of its own.
        once: dict[str, int] = {"max_calls": 1} if self.gpus else {}
        self.task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0, **once)(work)

    @property
    def capacity(self) -> int:
        """Trials that the cluster has room for now, so that no time limit runs out in a queue."""
        now = time.monotonic()
        # Without its head a count would wait until Ray ends this process.
        if now - self.counted > COUNT_S and _reachable(self.head):
            self.room, self.counted = self._room(ray.cluster_resources()), now
        # A cluster that loses its last node may get another one.
        return max(1, min(self.workers, self.room))

    def submit(self, number: int, job: Job) -> None:
        """Start a task."""
        grace_s = FAR_GRACE_S if self.far else GRACE_S
        limit = None if job.time_limit_s is None else time.monotonic() + job.time_limit_s + grace_s
        self.running[self.task.remote(job, self._text(job), self.far)] = _Running(
            number=number, deadline=limit
        )

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """The first task that ended, or that outlasted its limit and was ended by force."""
        if not self.running:
            return None
        self._listen()
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=timeout_s)
        for ref in done:
            return self.running.pop(ref).number, self._outcome(ref)
        now = time.monotonic()
        for ref, run in self.running.items():
            if run.deadline is not None and now > run.deadline:
                ray.cancel(ref, force=True)
                del self.running[ref]
                return run.number, Unfit(why="it did not stop at its time limit and was ended by force")
        return None

    def stop(self) -> None:
        """Cancel what runs and leave the cluster; a local one goes down."""
        if self.lost:
            # There is nobody to say goodbye to: Ray's own would wait for an answer until it ends this process, and without
            # it Ray's threads crash the interpreter as it ends.
            atexit.unregister(ray.shutdown)
            atexit.register(_leave)
        else:
            for ref in self.running:
                ray.cancel(ref, force=True)
            ray.shutdown()
        self.running.clear()
        self.quiet.close()

    def _listen(self) -> None:
        """Raise Refused where the head has been away for long; what was running is tried again when the study goes on."""
        now = time.monotonic()
        if now - self.asked < COUNT_S:
            return
        self.asked = now
        if _reachable(self.head):
            self.heard = time.monotonic()
        elif now - self.heard > LOST_S:
            self.lost = True
            raise Refused(
                f"the head of the cluster at {self.head} has not answered for {LOST_S:.0f} seconds; every result is kept, "
                "and the same command goes on once it is back",
                EXIT_INTERRUPTED,
            )

    def _outcome(self, ref: Any) -> Outcome:
        outcome = _outcome(ref)
        if isinstance(outcome, Unfit) and outcome.out_of_memory and self.gpus < 1:
            # A layout that had the GPU for itself is too large for it; one that shared it may have had greedy neighbours.
            return Lost(why=f"gpu_oom, with {self.gpus:g} of a GPU: {outcome.why}")
        return outcome

    def _text(self, job: Job) -> Any:
        """The text that a job reads, for nodes where it does not lie; None where they can read it themselves."""
        if not self.far or all(task.name != "bytes" for task in job.budget.tasks):
            return None
        source = job.budget.data
        if source not in self.texts:
            self.texts[source] = ray.put(load(source))
        return self.texts[source]

    def _share(self) -> float:
        """An equal part for each worker, a whole GPU at most."""
        total = ray.cluster_resources().get("GPU", 0.0)
        share = min(1.0, total / self.workers)
        return max(LEAST_SHARE, math.floor(share / LEAST_SHARE) * LEAST_SHARE) if total else 1.0

    def _room(self, resources: Mapping[str, float]) -> int:
        cores = int(resources.get("CPU", 0))
        if not self.gpus:
            return cores
        # A trial's share lies on one GPU.
        by_gpu = math.floor(1 / self.gpus + 1e-9)
        return min(cores, int(resources.get("GPU", 0)) * by_gpu)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def wait_until(there: Callable[[Mapping[str, float]], bool], *, far: bool) -> bool:
    """Whether a cluster has what is needed; one elsewhere, whose nodes may be about to join, is given some time."""
    until = time.monotonic() + (JOIN_S if far else 0)
    while not there(ray.cluster_resources()):
        if time.monotonic() >= until:
            return False
        time.sleep(1)
    return True


def connect(workers: int, address: str | None, local_gpus: int | None = None) -> None:
    """Start Ray on this machine, or join a cluster that is there, once a process.

    Raises:
        Refused: the cluster cannot be reached.
    """
    if ray.is_initialized():
        return
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=local_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        else:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if _IN_A_JOB in os.environ else _code(),
            )
    except AuthenticationError as error:
        raise Refused(
            f"the cluster at {address} asks for another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to that of its head"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        where = f"at {address}" if address else "on this machine"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"Ray cannot be reached {where}: {reason}; use --pool inline to do without", EXIT_INTERNAL
        ) from error


def _code() -> dict[str, Any]:
    """Our packages for nodes that lack them, or hold others."""
    return {"py_modules": [str(path) for path in package_folders()], "excludes": ["**/__pycache__/**"]}


def _outcome(ref: Any) -> Outcome:
    """What a task returned, or whose fault it was that it did not: of the machine, or of our code."""
    try:
        outcome: Outcome = ray.get(ref, timeout=GRACE_S)
    except OutOfMemoryError:
        return Lost(why="oom: the host ran out of memory and Ray ended the worker")
    except NodeDiedError:
        return Lost(why="the node went away")
    except (WorkerCrashedError, GetTimeoutError) as error:
        return Lost(why=f"the worker died: {type(error).__name__}", crashed=True)
    except RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, torch.OutOfMemoryError):
            return Lost(why="gpu_oom: the device ran out of memory outside of the training")
        # A bug in our code travels as the exception it was.
        raise cause from None
    except RayError as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return Lost(why=f"Ray lost the trial: {type(error).__name__}: {said[:200]}")
    return outcome

"""Trials on Ray: a local cluster of this machine's cores, or one that is already there. Ray never retries; we do."""

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

# Read by Ray at import: no usage reports, and no warning about a default that our tasks, which hold no GPU, never meet.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from nas.errors import Refused
from nas.workers.pool import run_job
from trainers.evaluate import Job
from trainers.outcome import Lost, Outcome, Unfit

GRACE_S = 30.0
"""What a trial may take beyond its own time limit before its process is ended by force."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    number: int
    deadline: float | None


class RayPool:
    """One Ray task a trial, each with one core, at most `capacity` at a time.

    Raises:
        Refused: the cluster cannot be reached.
    """

    def __init__(self, workers: int, address: str | None) -> None:
        self.running: dict[Any, _Running] = {}
        try:
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                )
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            where = f"at {address}" if address else "on this machine"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise Refused(
                f"Ray cannot be reached {where}: {reason}; use --pool inline to do without", 1
            ) from error
        # No more than the cluster has cores for, so that a time limit never runs out in a queue.
        cores = int(ray.cluster_resources().get("CPU", workers))
        self.capacity = max(1, min(workers, cores))
        self.task = ray.remote(num_cpus=1, max_retries=0)(run_job)

    def submit(self, number: int, job: Job) -> None:
        """Start a task."""
        limit = None if job.time_limit_s is None else time.monotonic() + job.time_limit_s + GRACE_S
        self.running[self.task.remote(job)] = _Running(number=number, deadline=limit)

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """The first task that ended, or that outlasted its limit and was ended by force."""
        if not self.running:
            return None
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=timeout_s)
        for ref in done:
            return self.running.pop(ref).number, _outcome(ref)
        now = time.monotonic()
        for ref, run in self.running.items():
            if run.deadline is not None and now > run.deadline:
                ray.cancel(ref, force=True)
                del self.running[ref]
                return run.number, Unfit(why="it did not stop at its time limit and was ended by force")
        return None

    def stop(self) -> None:
        """Cancel what runs and leave the cluster; a local one goes down."""
        for ref in self.running:
            ray.cancel(ref, force=True)
        self.running.clear()
        ray.shutdown()


def _outcome(ref: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref, timeout=GRACE_S)
    except OutOfMemoryError:
        return Lost(why="the host ran out of memory and Ray ended the worker")
    except (WorkerCrashedError, GetTimeoutError) as error:
        return Lost(why=f"the worker died: {type(error).__name__}", crashed=True)
    except RayTaskError as error:
        # A bug in our code travels as the exception it was.
        raise error.as_instanceof_cause() from None
    except RayError as error:
        return Lost(why=f"Ray lost the trial: {type(error).__name__}")
    return outcome

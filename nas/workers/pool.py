"""Where trials run: `submit` a job, take whichever is `next_done`. A pool knows no storage."""

from typing import Protocol

import torch

from trainers.evaluate import Job, evaluate
from trainers.outcome import Outcome
from trainers.probe import probe


class Pool(Protocol):
    """Runs jobs in its own order; every job that was submitted comes back exactly once, unless stopped."""

    @property
    def capacity(self) -> int:
        """Jobs that run at the same time."""

    def submit(self, number: int, job: Job) -> None:
        """Start a job under a number."""

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """The next finished job, or None if none finished in that time."""

    def stop(self) -> None:
        """End everything at once; what was running is lost."""


def run_job(job: Job) -> Outcome:
    """One evaluation on one thread: two busy threads a worker are slower than one (measured tenfold on two cores)."""
    torch.set_num_threads(1)
    return evaluate(job)


def probe_job(job: Job) -> float | None:
    """About how many seconds one evaluation will take, on one thread; None where it fails in its first steps."""
    torch.set_num_threads(1)
    return probe(job)

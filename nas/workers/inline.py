"""Trials in this very process, one after the other: the same seed gives the same study to the last bit."""

from collections import deque

from nas.workers.pool import run_job
from trainers.evaluate import Job
from trainers.outcome import Outcome


class InlinePool:
    """Runs the oldest job when asked for the next result."""

    capacity = 1

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Job]] = deque()

    def submit(self, number: int, job: Job) -> None:
        """Queue a job."""
        self.waiting.append((number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """Run the oldest job to its end, however long it takes."""
        del timeout_s
        if not self.waiting:
            return None
        number, job = self.waiting.popleft()
        return number, run_job(job)

    def stop(self) -> None:
        """Forget what was queued."""
        self.waiting.clear()

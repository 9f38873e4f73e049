"""Workers that sleep instead of training, in the place of true ones: what is left is the driver's own work."""

import heapq
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from nas.workers.pool import Pool
from trainers.evaluate import Job
from trainers.outcome import Measured, Outcome

LONGEST_S = 0.05


def outcome_of(number: int, job: Job) -> Measured:
    """What a training would bring, out of its number."""
    rng = random.Random(number)
    scores = {task.name: rng.random() for task in job.budget.tasks}
    return Measured(
        quality=statistics.mean(scores.values()),
        scores=scores,
        metrics=scores,
        steps=250,
        tokens=256_000,
        train_s=8.3,
        worker_s=8.9,
        details={"curves": {name: [round(rng.random(), 4) for _ in range(24)] for name in scores}},
        rung=len(job.budget.rungs) if job.rung is None else job.rung,
    )


def duration_s(number: int) -> float:
    """How long a trial of this number takes."""
    return random.Random(f"{number} takes").uniform(0.0, LONGEST_S)


@dataclass
class SleepingPool:
    """Workers that only take time; implements nas.workers.pool.Pool."""

    capacity: int
    running: list[tuple[float, int, Job]] = field(default_factory=list)
    waited_s: float = 0.0
    """How long the driver had nothing to do."""

    def submit(self, number: int, job: Job) -> None:
        """Begin one."""
        heapq.heappush(self.running, (time.perf_counter() + duration_s(number), number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """The one that ends first, if it ends in time."""
        began = time.perf_counter()
        ready = bool(self.running) and self.running[0][0] <= began + timeout_s
        time.sleep(max(0.0, self.running[0][0] - began) if ready else timeout_s)
        self.waited_s += time.perf_counter() - began
        if not ready:
            return None
        _, number, job = heapq.heappop(self.running)
        return number, outcome_of(number, job)

    def stop(self) -> None:
        """Forget what runs."""
        self.running.clear()


def nap(number: int, job: Job) -> Outcome:
    """A Ray task's trial."""
    time.sleep(duration_s(number))
    return outcome_of(number, job)


@dataclass
class WaitedFor:
    """A pool of the true kind, with a clock on what the driver waits; implements nas.workers.pool.Pool."""

    pool: Pool
    capacity: int
    waited_s: float = 0.0

    def submit(self, number: int, job: Job) -> None:
        """Begin one."""
        self.pool.submit(number, job)

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """The first that ended."""
        began = time.perf_counter()
        done = self.pool.next_done(timeout_s)
        self.waited_s += time.perf_counter() - began
        return done

    def stop(self) -> None:
        """End all."""
        self.pool.stop()


def ray_pool(workers: int) -> WaitedFor:
    """Ray on this machine as a search begins it; only what its tasks do is another thing."""
    import ray

    from nas.workers.ray_pool import RayPool

    pool = RayPool(workers, None)
    told: dict[int, Job] = {}

    class Naps:
        """In the place of the task that trains."""

        @staticmethod
        def remote(job: Job, _text: object, _far: bool) -> Any:
            return task.remote(len(told), told.setdefault(len(told), job))

    task = ray.remote(num_cpus=1, max_retries=0)(nap)
    pool.task = Naps
    return WaitedFor(pool=pool, capacity=workers)

"""What runs on a node: one trial, with the text that its driver has read and with caches that lie on the node itself."""

import os
import tempfile
from pathlib import Path

from nas.workers.pool import run_job
from trainers.evaluate import Job
from trainers.outcome import Outcome
from trainers.tasks.corpus import Corpus, keep


def work(job: Job, text: Corpus | None, far: bool) -> Outcome:
    """Run a job; `far` where the driver may be on another machine."""
    if far:
        # A home that nodes share is slow, and several that compile the same kernel at once would wait for each other.
        place = Path(tempfile.gettempdir()) / f"nas-triton-{os.getuid()}"
        os.environ.setdefault("TRITON_CACHE_DIR", str(place))
    if text is not None:
        keep(job.budget.data, text)
    return run_job(job)

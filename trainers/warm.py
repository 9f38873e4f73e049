"""Compile the Triton kernels of a layout's training before any trial needs them; no GPU is touched."""

import time
from dataclasses import dataclass, replace

import torch

from search_space.layout import from_json
from trainers.evaluate import Job, members_of, train_all
from trainers.tasks.registry import make_task


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What one layout's training step took of the compiler."""

    layout: str
    kernels: int
    """Different ones; those that were in the cache count too."""
    seconds: float


def warm(job: Job, architecture: str) -> Warmed:
    """Run one training step of every task as a GPU of this architecture would, its kernels compiled and not run.

    Under the same mixed precision, and with as many members stacked as there are learning rates.
    """
    # Only now, because Triton exists for Linux alone.
    from kernels.cache import keep_cache_local
    from kernels.launch import dry_run

    keep_cache_local()
    began = time.perf_counter()
    layout, budget = from_json(job.layers), job.budget
    precision = "bfloat16" if budget.precision == "auto" else budget.precision
    own = replace(job, device="cpu", budget=replace(budget, precision=precision))
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]), dry_run(architecture) as compiled:
        for tasks in budget.tasks:
            # No kernel is compiled by the batch; its numbers are arbitrary, so that one step is all there is.
            few = replace(tasks, steps=1, batch=min(tasks.batch, 4))
            task = make_task(tasks.name, budget.data, tasks.pairs)
            train_all(members_of(layout, own, task, few), own, task)
    return Warmed(
        layout=str(layout),
        kernels=len({one.binary.hash for one in compiled}),
        seconds=time.perf_counter() - began,
    )

"""How long an evaluation will take, from a few steps of it."""

from dataclasses import replace

import torch

from search_space.layout import from_json
from trainers.evaluate import Job, members_of, train_all
from trainers.loop import NotFinite
from trainers.tasks.registry import make_task


def probe(job: Job, steps: int = 3) -> float | None:
    """Seconds that training to the end will take about, from a few warm steps of every task; None where those fail.

    A layout that diverges or lacks memory is the search's to judge, and tells nothing of the time of others.
    """
    layout, seconds = from_json(job.layers), 0.0
    with torch.random.fork_rng(devices=[]):
        for budget in job.budget.tasks:
            task = make_task(budget.name, job.budget.data, budget.pairs)
            few = replace(budget, steps=steps, learning_rates=budget.learning_rates[:1])
            for _ in range(2):
                try:
                    trained = train_all(members_of(layout, job, task, few), job, task)[0]
                except torch.OutOfMemoryError:
                    return None
                if isinstance(trained, NotFinite):
                    return None
                train_s = trained.train_s
            seconds += train_s / steps * budget.steps * len(budget.learning_rates)
    return seconds

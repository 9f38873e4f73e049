"""How long an evaluation will take, from a few steps of it and one look at its scores."""

import time
from dataclasses import replace

import torch

from search_space.layout import from_json
from trainers.evaluate import Job, members_of, score_of, train_all
from trainers.loop import NotFinite
from trainers.tasks.registry import make_task


def probe(job: Job, steps: int = 3) -> float | None:
    """Seconds that training to the end and scoring will take about, from a few warm steps of every task and one scoring;
    None where those fail.

    A layout that diverges or lacks memory is the search's to judge, and tells nothing of the time of others.
    """
    layout, seconds = from_json(job.layers), 0.0
    scorings = len(job.budget.rungs) + 1
    with torch.random.fork_rng(devices=[]):
        for budget in job.budget.tasks:
            task = make_task(budget.name, job.budget.data, budget.pairs)
            few = replace(budget, steps=steps, learning_rates=budget.learning_rates[:1])
            for _ in range(2):
                try:
                    (member,) = members_of(layout, job, task, few)
                    trained = train_all([member], job, task)[0]
                    if isinstance(trained, NotFinite):
                        return None
                    began = time.perf_counter()
                    scored = score_of(member, trained, job, task, steps)
                    score_s, step_s = time.perf_counter() - began, trained.train_s / steps
                except torch.OutOfMemoryError:
                    return None
                if isinstance(scored, NotFinite):
                    return None
            a_rate = step_s * budget.steps + score_s * scorings
            seconds += a_rate * len(budget.learning_rates)
    return seconds

"""What the trainers' tests share: one thread, small frames, small jobs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> Frame:
    return Frame(width=16, train_length=16, context=16, dtype="float32", vocabulary=40)


@pytest.fixture(scope="session")
def make_job() -> Callable[..., Job]:
    """A job of a few steps on mqar, with anything about it changed."""

    def make(
        layout: str = "full kda",
        *,
        width: int = 16,
        length: int = 16,
        seed: int = 0,
        steps: int = 4,
        rates: tuple[float, ...] = (0.01,),
        tasks: tuple[TaskBudget, ...] | None = None,
        time_limit_s: float | None = None,
        **budget: Any,
    ) -> Job:
        default = TaskBudget(name="mqar", weight=1.0, steps=steps, batch=8, learning_rates=rates)
        return Job(
            layers=tuple(read(layout).to_json()),
            frame=Frame(width=width, train_length=length, context=length, dtype="float32"),
            budget=Budget(tasks=tasks or (default,), length=length, **{"data": "stdlib", **budget}),
            seed=seed,
            time_limit_s=time_limit_s,
        )

    return make

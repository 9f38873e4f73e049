"""The door of the trainers: a layout in, an outcome out. Workers call this and nothing else."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.layout import Layout, from_json
from trainers.loop import NotFinite, OutOfTime, Precision, Trained, Training, train
from trainers.members import Member, train_members
from trainers.model import ProxyModel
from trainers.outcome import Measured, Outcome, Unfit
from trainers.tasks.bytes import Bytes
from trainers.tasks.registry import make_task
from trainers.tasks.task import Score, Task

SCORING_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class TaskBudget:
    """How much of one task: its weight in the quality, steps, batch, and the learning rates to try."""

    name: str
    weight: float
    steps: int
    batch: int
    learning_rates: tuple[float, ...]
    pairs: tuple[int, ...] = ()
    """Numbers of pairs to recall, for mqar; its own if empty."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Everything that a trial's training depends on besides the layout, the frame and the seed."""

    tasks: tuple[TaskBudget, ...]
    length: int
    data: str
    stem_taps: int = 4
    weight_decay: float = 0.1
    precision: Precision = "auto"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation as plain values that any process can receive."""

    layers: tuple[Mapping[str, Any], ...]
    """The proxy's layout as JSON, already shrunk."""
    frame: Frame
    budget: Budget
    seed: int
    time_limit_s: float | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class _TaskRun:
    score: Score
    learning_rate: float
    trained: Trained


def evaluate(job: Job) -> Outcome:
    """Train the layout on every task of the budget, once for each learning rate, and score the best of them.

    A layout whose numbers leave the finite range at every learning rate is `Unfit`, and so is one that outlasts its
    time limit or the device's memory; anything else that goes wrong is a bug and is raised.
    """
    began = time.perf_counter()
    layout = from_json(job.layers)
    runs: dict[str, _TaskRun] = {}
    diverged: dict[str, str] = {}
    steps = tokens = 0
    train_s = 0.0

    def late() -> bool:
        return job.time_limit_s is not None and time.perf_counter() - began > job.time_limit_s

    with torch.random.fork_rng(devices=[]):
        for task_budget in job.budget.tasks:
            task = make_task(task_budget.name, job.budget.data, task_budget.pairs)
            try:
                results = _runs(layout, job, task, task_budget, late)
            except OutOfTime as error:
                return Unfit(why=f"{task.name}: over its time limit of {job.time_limit_s:g} s, {error}")
            except torch.OutOfMemoryError as error:
                return Unfit(why=f"{task.name}: the device is out of memory: {str(error).splitlines()[0]}")
            for learning_rate, run in zip(task_budget.learning_rates, results, strict=True):
                if isinstance(run, NotFinite):
                    # Another learning rate may still do.
                    diverged[task.name] = f"{task.name}, learning rate {learning_rate:g}: {run}"
                    continue
                steps, tokens = steps + task_budget.steps, tokens + run.trained.tokens
                train_s += run.trained.train_s
                best = runs.get(task.name)
                if best is None or run.score.score > best.score.score:
                    runs[task.name] = run
            if task.name not in runs:
                return Unfit(why=diverged[task.name])
    weights = {task.name: task.weight for task in job.budget.tasks}
    scores = {name: run.score.score for name, run in runs.items()}
    return Measured(
        quality=sum(weights[name] * score for name, score in scores.items()) / sum(weights.values()),
        scores=scores,
        metrics={key: value for run in runs.values() for key, value in run.score.metrics.items()},
        steps=steps,
        tokens=tokens,
        train_s=train_s,
        worker_s=time.perf_counter() - began,
        details=_details(runs, job),
    )


def _details(runs: Mapping[str, _TaskRun], job: Job) -> dict[str, Any]:
    details: dict[str, Any] = {
        "layout": str(from_json(job.layers)),
        "curves": {name: [list(point) for point in run.trained.curve] for name, run in runs.items()},
        "learning_rates": {name: run.learning_rate for name, run in runs.items()},
    }
    if any(run.trained.prepare_s for run in runs.values()):
        details["prepare_s"] = {name: run.trained.prepare_s for name, run in runs.items()}
        details["stepping"] = {name: run.trained.stepping for name, run in runs.items()}
    if "bytes" in runs:
        corpus = Bytes(data=job.budget.data).corpus
        details["data"] = {"source": corpus.source, "sha256": corpus.sha256, "files": corpus.files}
    return details


def probe(job: Job, steps: int = 3) -> float:
    """Seconds that `evaluate` will take about, from a few warm training steps of every task."""
    layout, seconds = from_json(job.layers), 0.0
    with torch.random.fork_rng(devices=[]):
        for budget in job.budget.tasks:
            task = make_task(budget.name, job.budget.data, budget.pairs)
            few = replace(budget, steps=steps)
            for _ in range(2):
                member = _member(layout, job, task, few, budget.learning_rates[0])
                trained = train_all([member], job, task)[0]
                if isinstance(trained, NotFinite):
                    raise trained
                train_s = trained.train_s
            seconds += train_s / steps * budget.steps * len(budget.learning_rates)
    return seconds


def _member(layout: Layout, job: Job, task: Task, budget: TaskBudget, learning_rate: float) -> Member:
    """A fresh proxy of the layout, with how it is to be trained."""
    # Every layout starts from the same seed, so that two of them differ by what they are and not by their luck.
    torch.manual_seed(job.seed)
    frame = Frame(
        width=job.frame.width,
        train_length=job.budget.length,
        context=job.budget.length,
        batch=budget.batch,
        dtype="float32",
        vocabulary=task.vocabulary,
        rotary_base=job.frame.rotary_base,
        rotary_scaling=job.frame.rotary_scaling,
        rotary_factor=job.frame.rotary_factor,
        rotary_length=job.frame.rotary_length,
        max_length=task.longest(job.budget.length),
    )
    model = ProxyModel(layout, frame, stem_taps=job.budget.stem_taps).to(job.device)
    training = Training(
        steps=budget.steps,
        batch=budget.batch,
        length=job.budget.length,
        learning_rate=learning_rate,
        weight_decay=job.budget.weight_decay,
        precision=job.budget.precision,
    )
    return Member(model=model, training=training, seed=job.seed, random_state=torch.get_rng_state())


def members_of(layout: Layout, job: Job, task: Task, budget: TaskBudget) -> list[Member]:
    """A fresh proxy for every learning rate."""
    return [_member(layout, job, task, budget, rate) for rate in budget.learning_rates]


def train_all(
    members: Sequence[Member], job: Job, task: Task, late: Callable[[], bool] = lambda: False
) -> list[Trained | NotFinite]:
    """Train the members, stacked if they are several, or the device wants its steps in one piece."""
    device = torch.device(job.device)
    if len(members) > 1 or device.type == "cuda":
        return train_members(members, task, device=device, out_of_time=late)
    (only,) = members
    try:
        trained = train(only.model, task, only.training, seed=only.seed, device=device, out_of_time=late)
    except NotFinite as error:
        return [error]
    return [trained]


def _runs(
    layout: Layout, job: Job, task: Task, budget: TaskBudget, late: Callable[[], bool]
) -> list[_TaskRun | NotFinite]:
    """Train at every learning rate and score what was trained; memory that several need at once is no layout's fault."""
    own = members_of(layout, job, task, budget)
    try:
        results = train_all(own, job, task, late)
    except torch.OutOfMemoryError:
        if len(own) == 1:
            raise
        own = members_of(layout, job, task, budget)
        results = [train_all([member], job, task, late)[0] for member in own]
    return [
        trained if isinstance(trained, NotFinite) else _score(member, trained, job, task)
        for member, trained in zip(own, results, strict=True)
    ]


def _score(member: Member, trained: Trained, job: Job, task: Task) -> _TaskRun | NotFinite:
    """The score of a trained member on held-out sequences."""
    model, device = member.model, torch.device(job.device)
    model.eval()

    def predict(tokens: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad():
            parts = zip(tokens.split(SCORING_BATCH), asked.split(SCORING_BATCH), strict=True)
            return torch.cat([model.head(model(part.to(device))[mask.to(device)]) for part, mask in parts])

    score = task.score(predict, job.budget.length)
    for name, value in score.metrics.items():
        if not math.isfinite(value):
            return NotFinite(f"{name} is {value} after step {member.training.steps - 1}")
    return _TaskRun(score=score, learning_rate=member.training.learning_rate, trained=trained)

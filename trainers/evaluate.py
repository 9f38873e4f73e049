"""The door of the trainers: a layout in, an outcome out. Workers call this and nothing else."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.layout import Layout, from_json
from trainers.checkpoint import Damaged, Saved, key_of, load, pack, plain, save, unpack
from trainers.loop import NotFinite, OutOfTime, Precision, Track, Trained, Training, train
from trainers.members import Member, track_of, train_members
from trainers.model import ProxyModel
from trainers.outcome import Measured, Outcome, Unfit, outgrown
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
    """Everything that a trial's training depends on besides the layout, the frame and the seed.

    Raises:
        ValueError: the rungs do not rise between 0 and 1.
    """

    tasks: tuple[TaskBudget, ...]
    length: int
    data: str
    stem_taps: int = 4
    weight_decay: float = 0.1
    precision: Precision = "auto"
    rungs: tuple[float, ...] = ()
    """Shares of every task's steps at which it is scored too; the last rung, 1, is not named. They change no bit of
    the training: its schedule is always that of all steps."""

    def __post_init__(self) -> None:
        if not all(low < high for low, high in pairwise((0.0, *self.rungs, 1.0))):
            shares = ", ".join(f"{share:g}" for share in self.rungs)
            raise ValueError(f"rungs {shares} are not valid: they must rise, above 0 and below 1")

    def steps_at(self, task: TaskBudget, rung: int) -> int:
        """The steps of a task after which a rung is scored."""
        return task.steps if rung == len(self.rungs) else max(1, round(task.steps * self.rungs[rung]))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation as plain values that any process can receive.

    Raises:
        ValueError: there is no such rung, or it is to go on from a rung without a place for checkpoints.
    """

    layers: tuple[Mapping[str, Any], ...]
    """The proxy's layout as JSON, already shrunk."""
    frame: Frame
    budget: Budget
    seed: int
    time_limit_s: float | None = None
    device: str = "cpu"
    rung: int | None = None
    """The rung to go to, from 0; None: to the end. Every rung on the way is scored."""
    start: int | None = None
    """The rung whose checkpoint to go on from; None: from the first step."""
    checkpoints: str | None = None
    """The folder of checkpoints, where one is left unless the training ends; None for none."""

    def __post_init__(self) -> None:
        last = len(self.budget.rungs)
        if not 0 <= self.goal <= last:
            raise ValueError(f"there is no rung {self.rung}: the last one is {last}")
        if self.start is not None and not (self.checkpoints is not None and 0 <= self.start < self.goal):
            raise ValueError(f"rung {self.goal} cannot go on from rung {self.start}, or from no folder")

    @property
    def goal(self) -> int:
        """The rung to go to."""
        return len(self.budget.rungs) if self.rung is None else self.rung


@dataclass(frozen=True, kw_only=True)
class _TaskRun:
    score: Score
    learning_rate: float
    trained: Trained


@dataclass
class _Stop:
    """A rung of one task: the runs by learning rate, and what they took up to there, an earlier call's included."""

    runs: list[_TaskRun | NotFinite] = field(default_factory=list)
    steps: int = 0
    new_steps: int = 0
    train_s: float = 0.0
    worker_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """One task: its rungs, and the models where they stopped, in the groups that they were trained in."""

    task: TaskBudget
    stops: list[_Stop]
    lanes: list[tuple[list[Member], Track]]


def evaluate(job: Job) -> Outcome:
    """Train the layout on every task of the budget, once for each learning rate, and score the best of them.

    A job that goes on from a rung whose checkpoint cannot be used starts anew, and its details say so.

    A layout whose numbers leave the finite range at every learning rate is `Unfit`, and so is one that outlasts its
    time limit or the device's memory; anything else that goes wrong is a bug and is raised.
    """
    began = time.perf_counter()
    notes: dict[str, Any] = {}
    if job.start is not None:
        assert job.checkpoints is not None
        try:
            saved = load(job.checkpoints, checkpoint_key(job), job.start)
            return _evaluate(job, saved, began, notes)
        except Damaged as error:
            notes["restarted"] = f"{error}; trained from the start"
    return _evaluate(job, None, began, notes)


def checkpoint_key(job: Job) -> str:
    """Equal for two jobs that train the very same thing, however far."""
    meaning = {"layers": list(job.layers), "seed": job.seed, "device": torch.device(job.device).type}
    data = Bytes(data=job.budget.data).corpus.sha256 if _reads_text(job.budget) else None
    return key_of(meaning | {"frame": plain(job.frame), "budget": plain(job.budget), "data": data})


def _reads_text(budget: Budget) -> bool:
    return any(task.name == "bytes" for task in budget.tasks)


def _evaluate(job: Job, saved: Saved | None, began: float, notes: dict[str, Any]) -> Outcome:
    layout = from_json(job.layers)

    def late() -> bool:
        return job.time_limit_s is not None and time.perf_counter() - began > job.time_limit_s

    ran: list[_Ran] = []
    with torch.random.fork_rng(devices=[]):
        for budget in job.budget.tasks:
            task = make_task(budget.name, job.budget.data, budget.pairs)
            try:
                one = _runs(layout, job, task, budget, late, saved)
            except OutOfTime as error:
                return Unfit(why=f"{task.name}: over its time limit of {job.time_limit_s:g} s, {error}")
            except torch.OutOfMemoryError as error:
                return outgrown(task.name, str(error))
            ran.append(one)
            if _best(one.stops[-1]) is None:
                # Another learning rate might still have done.
                rate, end = list(zip(budget.learning_rates, one.stops[-1].runs, strict=True))[-1]
                return Unfit(why=f"{task.name}, learning rate {rate:g}: {end}", diverged=True)
        if job.checkpoints is not None and job.goal < len(job.budget.rungs):
            try:
                _save(job, ran, time.perf_counter() - began + _seconds_before(saved))
            except OSError as error:
                notes["checkpoint"] = f"not written: {error}"
    first = job.goal + 1 - len(ran[0].stops)
    whole = _measured(job, ran, job.goal, -1)
    passed = [
        _measured(job, ran, first + place, place)
        for place in range(len(ran[0].stops) - 1)
        if all(_best(one.stops[place]) is not None for one in ran)
    ]
    return replace(
        whole,
        worker_s=time.perf_counter() - began + _seconds_before(saved),
        details=_details({one.task.name: _sure(one.stops[-1]) for one in ran}, job) | notes,
        rungs=tuple(passed),
    )


def _seconds_before(saved: Saved | None) -> float:
    return 0.0 if saved is None else float(saved.header["worker_s"])


def _save(job: Job, ran: Sequence[_Ran], worker_s: float) -> None:
    """Leave a checkpoint of all tasks."""
    assert job.checkpoints is not None
    header: dict[str, Any] = {"layout": str(from_json(job.layers)), "worker_s": worker_s, "tasks": {}}
    tensors: dict[str, Tensor] = {}
    for one in ran:
        header["tasks"][one.task.name], own = pack(one.task.name, one.lanes)
        tensors |= own
    save(job.checkpoints, checkpoint_key(job), job.goal, header, tensors)


def _best(stop: _Stop) -> _TaskRun | None:
    """The best of the learning rates that did not diverge, the first of equals."""
    runs = [run for run in stop.runs if isinstance(run, _TaskRun)]
    return max(runs, key=lambda run: run.score.score, default=None)


def _sure(stop: _Stop) -> _TaskRun:
    best = _best(stop)
    assert best is not None
    return best


def _measured(job: Job, ran: Sequence[_Ran], rung: int, place: int) -> Measured:
    """What the best learning rates score at one rung."""
    runs = {one.task.name: _sure(one.stops[place]) for one in ran}
    weights = {one.task.name: one.task.weight for one in ran}
    scores = {name: run.score.score for name, run in runs.items()}
    return Measured(
        quality=sum(weights[name] * score for name, score in scores.items()) / sum(weights.values()),
        scores=scores,
        metrics={key: value for run in runs.values() for key, value in run.score.metrics.items()},
        steps=sum(one.stops[place].steps for one in ran),
        tokens=sum(one.stops[place].steps * one.task.batch * job.budget.length for one in ran),
        train_s=sum(one.stops[place].train_s for one in ran),
        worker_s=sum(one.stops[place].worker_s for one in ran),
        details={"learning_rates": {name: run.learning_rate for name, run in runs.items()}},
        rung=rung,
        trained_steps=sum(one.stops[place].new_steps for one in ran),
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
    if _reads_text(job.budget):
        corpus = Bytes(data=job.budget.data).corpus
        details["data"] = {"source": corpus.source, "sha256": corpus.sha256, "files": corpus.files}
    return details


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
    members: Sequence[Member],
    job: Job,
    task: Task,
    late: Callable[[], bool] = lambda: False,
    *,
    track: Track | None = None,
    until: int | None = None,
) -> list[Trained | NotFinite]:
    """Train the members, stacked if they are several, or the device wants its steps in one piece."""
    device = torch.device(job.device)
    if len(members) > 1 or device.type == "cuda":
        return train_members(members, task, device=device, out_of_time=late, track=track, until=until)
    (only,) = members
    if track is not None and 0 in track.ends:
        return [track.ends[0]]
    try:
        trained = train(
            only.model,
            task,
            only.training,
            seed=only.seed,
            device=device,
            out_of_time=late,
            track=track,
            until=until,
        )
    except NotFinite as error:
        return [error]
    return [trained]


def _runs(
    layout: Layout,
    job: Job,
    task: Task,
    budget: TaskBudget,
    late: Callable[[], bool],
    saved: Saved | None,
) -> _Ran:
    """Train at every learning rate and score what was trained; memory that several need at once is no layout's fault."""
    own = members_of(layout, job, task, budget)
    try:
        return _through([own], job, task, budget, late, saved)
    except torch.OutOfMemoryError:
        if len(own) == 1:
            raise
    own = members_of(layout, job, task, budget)
    return _through([[member] for member in own], job, task, budget, late, saved)


def _through(
    groups: Sequence[list[Member]],
    job: Job,
    task: Task,
    budget: TaskBudget,
    late: Callable[[], bool],
    saved: Saved | None,
) -> _Ran:
    """Train the groups, one after another, from where they were left through the rungs to the job's."""
    first = 0 if saved is None else int(saved.header["rung"]) + 1
    stops = [_Stop() for _ in range(first, job.goal + 1)]
    lanes, place = [], 0
    for members in groups:
        track = track_of(members, torch.device(job.device))
        if saved is not None:
            places = range(place, place + len(members))
            share = len(members) / len(budget.learning_rates)
            unpack(task.name, saved, places, members, track, share)
        place += len(members)
        before, began = sum(track.taken), time.perf_counter()
        for rung, stop in enumerate(stops, start=first):
            trained = train_all(
                members, job, task, late, track=track, until=job.budget.steps_at(budget, rung)
            )
            stop.runs += [
                run if isinstance(run, NotFinite) else score_of(member, run, job, task, track.step)
                for member, run in zip(members, trained, strict=True)
            ]
            stop.steps += sum(track.taken)
            stop.new_steps += sum(track.taken) - before
            stop.train_s += track.train_s
            stop.worker_s += time.perf_counter() - began
        # A graph holds the memory of a whole step.
        track.ready = None
        lanes.append((members, track))
    return _Ran(task=budget, stops=stops, lanes=lanes)


def score_of(member: Member, trained: Trained, job: Job, task: Task, steps: int) -> _TaskRun | NotFinite:
    """The score on held-out sequences of a member that was trained for so many steps."""
    model, device = member.model, torch.device(job.device)
    model.eval()

    def predict(tokens: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad():
            parts = zip(tokens.split(SCORING_BATCH), asked.split(SCORING_BATCH), strict=True)
            return torch.cat([model.head(model(part.to(device))[mask.to(device)]) for part, mask in parts])

    score = task.score(predict, job.budget.length)
    for name, value in score.metrics.items():
        if not math.isfinite(value):
            return NotFinite(f"{name} is {value} after step {steps - 1}")
    return _TaskRun(score=score, learning_rate=member.training.learning_rate, trained=trained)

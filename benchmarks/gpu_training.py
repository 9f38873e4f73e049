"""The training loop's part of the GPU benchmark: tokens a second of proxies, plain, with our kernels, stacked, replayed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import forced
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.loop import NotFinite, Training, train
from trainers.members import Member, train_members
from trainers.model import ProxyModel
from trainers.tasks.bytes import Bytes
from trainers.tasks.mqar import Mqar
from trainers.tasks.task import Task

LAYOUTS = ("4*full", "4*gated_delta", "3*kda mla", "2*(mamba2 window[size=64])")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One task at the sizes of a proxy."""

    name: str
    task: Task
    width: int
    batch: int
    length: int
    steps: int


SHAPES = (
    Shape(name="mqar", task=Mqar(), width=64, batch=128, length=64, steps=30),
    Shape(name="bytes", task=Bytes(), width=256, batch=32, length=512, steps=15),
)
TOY = (Shape(name="mqar", task=Mqar(pairs=(2,)), width=16, batch=1, length=16, steps=2),)


def rows(device: torch.device, left_s: Callable[[], float], *, toy: bool) -> list[dict[str, Any]]:
    """Tokens a second of every shape, layout and way of training."""
    found = []
    for shape in TOY if toy else SHAPES:
        for layout in ("full linear",) if toy else LAYOUTS:
            for mode in MODES:
                row: dict[str, Any] = {"task": shape.name, "layout": layout, "mode": mode}
                if left_s() < 0:
                    row["why"] = "no time was left"
                else:
                    try:
                        row |= MODES[mode](shape, layout, device)
                    except (RuntimeError, ValueError) as error:
                        row["why"] = str(error).splitlines()[0][:200]
                found.append(row)
    return found


def _member(shape: Shape, layout: str, rate: float, device: torch.device) -> Member:
    torch.manual_seed(0)
    frame = Frame(
        width=shape.width,
        train_length=shape.length,
        context=shape.length,
        batch=shape.batch,
        dtype="float32",
        vocabulary=shape.task.vocabulary,
        max_length=shape.length,
    )
    model = ProxyModel(read(layout), frame).to(device)
    training = Training(steps=shape.steps, batch=shape.batch, length=shape.length, learning_rate=rate)
    return Member(model=model, training=training, seed=0, random_state=torch.get_rng_state())


def _alone(shape: Shape, layout: str, device: torch.device, *, ours: bool) -> dict[str, Any]:
    """The plain loop, after a short run that compiles and warms up, where there is a device to warm up."""
    with forced("triton") if ours else forced("chunked"):
        for steps in (3, shape.steps) if device.type == "cuda" else (shape.steps,):
            member = _member(shape, layout, RATES[1], device)
            training = Training(
                steps=steps,
                batch=shape.batch,
                length=shape.length,
                learning_rate=member.training.learning_rate,
            )
            trained = train(member.model, shape.task, training, seed=0, device=device)
    return {"tokens_per_s": round(trained.tokens / trained.train_s), "loss": trained.curve[-1][1]}


def _stacked(
    shape: Shape, layout: str, device: torch.device, *, members: int, replay: bool
) -> dict[str, Any]:
    with forced("triton") if device.type == "cpu" else nullcontext():
        group = [_member(shape, layout, rate, device) for rate in RATES[:members]]
        done = train_members(group, shape.task, device=device, replay=replay)
    trained = [one for one in done if not isinstance(one, NotFinite)]
    seconds = sum(one.train_s for one in trained)
    return {
        "tokens_per_s": round(sum(one.tokens for one in trained) / seconds),
        "prepare_s": round(sum(one.prepare_s for one in trained), 2),
        "stepping": trained[0].stepping,
        "losses": [one.curve[-1][1] for one in trained],
    }


MODES: dict[str, Callable[[Shape, str, torch.device], dict[str, Any]]] = {
    "chunked, eager": lambda *call: _alone(*call, ours=False),
    "triton, eager": lambda *call: _alone(*call, ours=True),
    "triton, 4 stacked": lambda *call: _stacked(*call, members=4, replay=False),
    "triton, replayed": lambda *call: _stacked(*call, members=1, replay=True),
    "triton, 4 stacked, replayed": lambda *call: _stacked(*call, members=4, replay=True),
}

"""Several models of one layout trained as one: learning rates and seeds side by side in every operation.

A proxy is too small to fill a device, and its many small operations cost more to start than to do. The members'
parameters are stacked on a leading axis and the model is run once for all under `torch.func.vmap`; every member keeps
its own clipping, moments and learning rate, so that it is trained as it would be alone, within rounding.
The idea is HFTA's, arXiv:2102.02344.

Letters: M members, B batch, T time, N asked positions.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.graph import Drawn, Run, prepare
from trainers.loop import (
    CURVE_POINTS,
    NotFinite,
    OutOfTime,
    Track,
    Trained,
    Training,
    fresh_track,
    learning_rate_at,
    places_of,
    set_learning_rate,
    use_bfloat16,
)
from trainers.model import ProxyModel
from trainers.stack import Stack, StackedAdamW
from trainers.tasks.task import IGNORED, Task


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a stack: a model of its own with the state of the random numbers after it was built."""

    model: ProxyModel
    training: Training
    seed: int
    """Of its batches; members of one seed share them."""
    random_state: Tensor


@dataclass(frozen=True, kw_only=True)
class Advance:
    """One step of all members: losses, gradients, clipping, optimiser. The same operations every time."""

    stack: Stack
    optimiser: StackedAdamW
    clip: float
    device: torch.device
    autocast: bool

    def gradients(self, batch: Drawn) -> Tensor:
        """The members' losses [M], their gradients left in the parameters."""
        # Nothing is gained by a cache of cast weights that are read once, and a graph could not keep it.
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):
            losses = self.stack.losses(*batch)
        self.stack.backward(losses)
        return losses.detach()

    def __call__(self, batch: Drawn) -> Tensor:
        """The members' losses and the norms of their gradients [2, M]; what is not finite is for the caller to see."""
        losses = self.gradients(batch)
        norms = self.stack.clip(self.clip)
        self.optimiser.step()
        return torch.stack([losses, norms])


def track_of(members: Sequence[Member], device: torch.device) -> Track:
    """The track of members that have not been trained yet."""
    return fresh_track(
        [member.model for member in members],
        [member.training for member in members],
        [member.seed for member in members],
        [member.random_state for member in members],
        device,
    )


def train_members(
    members: Sequence[Member],
    task: Task,
    *,
    device: torch.device,
    replay: bool = True,
    out_of_time: Callable[[], bool] = lambda: False,
    track: Track | None = None,
    until: int | None = None,
) -> list[Trained | NotFinite]:
    """Train all members in place; what each one leaves, or why its numbers left the finite range, in their order.

    They must be of one layout, with trainings that differ in the learning rate alone. A member that diverges leaves
    the stack, and the others go on. On a GPU the step is captured once and replayed, unless `replay` says no.
    With a track they go on from there, and `until` a step they stop as if for a moment, as `train` does.

    Raises:
        OutOfTime: `out_of_time` answered yes.
    """
    training = members[0].training
    track = track or track_of(members, device)
    until = training.steps if until is None else until
    every = max(1, training.steps // CURVE_POINTS)
    for member in members:
        member.model.train()
    alive = [m for m in range(len(members)) if m not in track.ends]
    while alive and track.step < until:
        seeds = [members[m].seed for m in alive]
        batch = _draw(seeds, track.rngs, task, training, device)
        run = _prepared(members, alive, track, batch, device, replay=replay)
        began = time.perf_counter()
        dead: list[int] = []
        while not dead and track.step < until:
            step = track.step
            for m in alive:
                set_learning_rate(track.optimisers[m], learning_rate_at(step, members[m].training))
            losses, norms = run(batch).tolist()
            for m, loss, norm in zip(alive, losses, norms, strict=True):
                track.taken[m] = step + 1
                if not math.isfinite(loss) or not math.isfinite(norm):
                    what, number = ("loss", loss) if not math.isfinite(loss) else ("gradient", norm)
                    track.ends[m] = NotFinite(f"the {what} is {number} at step {step}")
                    dead.append(m)
                    continue
                track.random_states[m] = _after_step(members[m].model, track.random_states[m])
                if step % every == 0 or step == training.steps - 1:
                    track.curves[m].append((step, loss))
            if out_of_time():
                raise OutOfTime(f"stopped at step {step} of {training.steps}")
            track.step += 1
            if not dead and track.step < until:
                batch = _draw(seeds, track.rngs, task, training, device)
        track.train_s += time.perf_counter() - began
        alive = [m for m in alive if m not in dead]
    count = len(members)
    return [
        track.ends[m]
        if m in track.ends
        else Trained(
            curve=tuple(track.curves[m]),
            tokens=track.step * training.batch * training.length,
            train_s=track.train_s / count,
            prepare_s=track.prepare_s / count,
            stepping=track.stepping,
        )
        for m in range(count)
    ]


def _prepared(
    members: Sequence[Member],
    alive: list[int],
    track: Track,
    batch: Drawn,
    device: torch.device,
    *,
    replay: bool,
) -> Run:
    """One step of those that are left, as it is to be run; made once for as long as they are the same."""
    if track.ready is not None and track.ready[0] == tuple(alive):
        return track.ready[1]
    track.ready = None
    stack = Stack([members[m].model for m in alive])
    advance = Advance(
        stack=stack,
        optimiser=StackedAdamW.of(stack, [track.optimisers[m] for m in alive]),
        clip=members[0].training.clip,
        device=device,
        autocast=use_bfloat16(members[0].training.precision, members[0].model.head.in_features, device),
    )
    began = time.perf_counter()
    run: Run = advance
    if replay:
        before = {name: buffer.clone() for name, buffer in stack.buffers.items()}
        run, track.stepping = prepare(advance, batch)
        # What the warm-ups counted, such as the loads of experts, was no step.
        for name, buffer in stack.buffers.items():
            buffer.copy_(before[name])
    track.prepare_s += time.perf_counter() - began
    track.ready = tuple(alive), run
    return run


def _draw(
    seeds: Sequence[int],
    rngs: dict[int, torch.Generator],
    task: Task,
    training: Training,
    device: torch.device,
) -> Drawn:
    """The next batch of every seed, and where and what it asks; one for all where all have one seed."""
    drawn = {}
    for seed in dict.fromkeys(seeds):
        batch = task.batch(training.batch, training.length, rngs[seed])
        drawn[seed] = (batch.tokens, *places_of(batch.targets))
    if len(drawn) == 1:
        (only,) = drawn.values()
        return only[0].to(device), only[1].to(device), only[2].to(device)
    most = max(len(places) for _, places, _ in drawn.values())
    rows = [drawn[seed] for seed in seeds]
    return (
        torch.stack([tokens for tokens, _, _ in rows]).to(device),
        torch.stack([pad(places, (0, most - len(places))) for _, places, _ in rows]).to(device),
        torch.stack([pad(wanted, (0, most - len(wanted)), value=IGNORED) for _, _, wanted in rows]).to(
            device
        ),
    )


def _after_step(model: ProxyModel, random_state: Tensor) -> Tensor:
    """What the model renews after a step, with the random numbers it would have drawn alone; their state after it."""
    before = torch.get_rng_state()
    torch.set_rng_state(random_state)
    model.after_step()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    return after

"""The training loop of one model on one task: AdamW, warm-up and cosine, clipping, and a check of every gradient.

Letters: B batch, T time, N scored positions.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy.ops import linear_cross_entropy
from search_space.channel.moe import Experts
from trainers.graph import Run
from trainers.model import ProxyModel
from trainers.tasks.task import IGNORED, Task

Precision = Literal["auto", "float32", "bfloat16"]
AUTOCAST_WIDTH = 128
"""On a CPU with matrix units bfloat16 pays from about this width on; below, casting costs more than it saves."""
CURVE_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how a model is trained; counts are steps and tokens, never wall time.

    Raises:
        ValueError: a number is not positive.
    """

    steps: int
    batch: int
    length: int
    learning_rate: float
    weight_decay: float = 0.1
    warmup_share: float = 0.1
    clip: float = 1.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not valid: it must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning rate {self.learning_rate} is not valid: it must be a positive number")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a finished run leaves: the curve of (step, loss), and the time spent inside the loop."""

    curve: tuple[tuple[int, float], ...]
    tokens: int
    train_s: float
    """A member's share, where several were trained stacked."""
    prepare_s: float = 0.0
    """Before the first step, on a GPU: compiling kernels and capturing the step; not in `train_s`."""
    stepping: str = "eager"
    """`eager`, `replayed` as one graph a step, or why it could not be."""


class NotFinite(Exception):
    """The loss or its gradient is no longer a finite number; the message names the step."""


class OutOfTime(Exception):
    """The trial's time limit passed inside the loop."""


@dataclass
class Track:
    """How far the trainings of some models have come: with their weights, all that is needed to go on unnoticed."""

    optimisers: list[torch.optim.Optimizer]
    rngs: dict[int, torch.Generator]
    """Of the batches, by seed."""
    random_states: list[Tensor]
    """Of the random numbers that each model draws for itself after a step."""
    curves: list[list[tuple[int, float]]]
    taken: list[int]
    """Steps of each, the one that it diverged at included."""
    ends: dict[int, NotFinite]
    """Those that diverged, and why."""
    step: int = 0
    train_s: float = 0.0
    """Of all together."""
    prepare_s: float = 0.0
    stepping: str = "eager"
    ready: tuple[tuple[int, ...], Run] | None = None
    """The step of those models as it was prepared, while they are the ones that are left."""


def fresh_track(
    models: Sequence[ProxyModel],
    trainings: Sequence[Training],
    seeds: Sequence[int],
    random_states: Sequence[Tensor],
    device: torch.device,
) -> Track:
    """The track of models that have not been trained yet."""
    return Track(
        optimisers=[
            make_optimiser(model, training, device) for model, training in zip(models, trainings, strict=True)
        ],
        rngs={seed: torch.Generator().manual_seed(seed) for seed in seeds},
        random_states=list(random_states),
        curves=[[] for _ in models],
        taken=[0 for _ in models],
        ends={},
    )


def use_bfloat16(precision: Precision, width: int, device: torch.device) -> bool:
    """Whether to train under bfloat16 autocast: when told to, on a GPU, or on a CPU where it pays."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return width >= AUTOCAST_WIDTH and bool(torch.cpu._is_amx_tile_supported())


def train(
    model: ProxyModel,
    task: Task,
    training: Training,
    *,
    seed: int,
    device: torch.device,
    out_of_time: Callable[[], bool] = lambda: False,
    track: Track | None = None,
    until: int | None = None,
) -> Trained:
    """Train a model in place; the same seed gives the same batches.

    With a track it goes on from there, and `until` a step it stops as if for a moment: the schedule is that of all
    steps, so that a run in parts is bit for bit the run in one.

    Raises:
        NotFinite: the loss or a gradient became infinite or NaN.
        OutOfTime: `out_of_time` answered yes.
    """
    track = track or fresh_track([model], [training], [seed], [torch.get_rng_state()], device)
    until = training.steps if until is None else until
    optimiser, rng, curve = track.optimisers[0], track.rngs[seed], track.curves[0]
    autocast = use_bfloat16(training.precision, model.head.in_features, device)
    every = max(1, training.steps // CURVE_POINTS)
    torch.set_rng_state(track.random_states[0])
    model.train()
    began = time.perf_counter()
    try:
        while track.step < until:
            step = track.step
            batch = task.batch(training.batch, training.length, rng)
            tokens, targets = batch.tokens.to(device), batch.targets.to(device)
            set_learning_rate(optimiser, learning_rate_at(step, training))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = loss_of(model, tokens, targets)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            value = loss.item()
            track.taken[0] = step + 1
            for what, number in (("loss", value), ("gradient", norm.item())):
                if not math.isfinite(number):
                    track.ends[0] = NotFinite(f"the {what} is {number} at step {step}")
                    raise track.ends[0]
            optimiser.step()
            model.after_step()
            if step % every == 0 or step == training.steps - 1:
                curve.append((step, value))
            if out_of_time():
                raise OutOfTime(f"stopped at step {step} of {training.steps}")
            track.step += 1
    finally:
        track.random_states[0] = torch.get_rng_state()
        track.train_s += time.perf_counter() - began
    return Trained(
        curve=tuple(curve),
        tokens=track.step * training.batch * training.length,
        train_s=track.train_s,
    )


def loss_of(model: ProxyModel, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the asked positions, which alone reach the head, and what the layers add to it."""
    return loss_at(model, tokens, *places_of(targets))


def places_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where targets [B, T] ask something, as places [N] in their rows end to end, and what they want there [N]."""
    flat = targets.flatten()
    places = (flat != IGNORED).nonzero()[:, 0]
    return places, flat[places]


def loss_at(model: ProxyModel, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """`loss_of` with its targets given as `places_of` tells them; IGNORED ones may fill the list up."""
    features, extra = model.read(tokens)
    asked = features.flatten(0, 1)[places]
    loss = linear_cross_entropy(asked, model.head.weight, wanted, ignore_index=IGNORED)
    return loss + torch.stack(extra).sum() if extra else loss


def learning_rate_at(step: int, training: Training) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(training.steps * training.warmup_share))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, training.steps - warmup)
    return training.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimiser(model: nn.Module, training: Training, device: torch.device) -> torch.optim.Optimizer:
    """AdamW that decays the matrices of linear layers and experts alone: rates, biases, norms, taps, embeddings stay free."""
    decayed = {
        id(weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Experts))
        for name, weight in module.named_parameters(recurse=False)
        if name != "bias"
    }
    parameters = list(model.parameters())
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ],
        # A graph reads the rate from the device's memory.
        lr=torch.tensor(training.learning_rate, device=device) if on_gpu else training.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type in ("cpu", "cuda"),
        capturable=on_gpu,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups, in place where a captured graph reads it."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

"""The training loop of one model on one task: AdamW, warm-up and cosine, clipping, and a check of every gradient.

Letters: B batch, T time, N scored positions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy.ops import linear_cross_entropy
from search_space.channel.moe import Experts
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
) -> Trained:
    """Train a model in place; the same seed gives the same batches.

    Raises:
        NotFinite: the loss or a gradient became infinite or NaN.
        OutOfTime: `out_of_time` answered yes.
    """
    rng = torch.Generator().manual_seed(seed)
    optimiser = make_optimiser(model, training, device)
    width = model.head.in_features
    autocast = use_bfloat16(training.precision, width, device)
    every = max(1, training.steps // CURVE_POINTS)
    curve: list[tuple[int, float]] = []
    model.train()
    began = time.perf_counter()
    for step in range(training.steps):
        batch = task.batch(training.batch, training.length, rng)
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        set_learning_rate(optimiser, learning_rate_at(step, training))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, tokens, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFinite(f"the loss is {value} at step {step}")
        if not math.isfinite(norm.item()):
            raise NotFinite(f"the gradient is {norm.item()} at step {step}")
        optimiser.step()
        model.after_step()
        if step % every == 0 or step == training.steps - 1:
            curve.append((step, value))
        if out_of_time():
            raise OutOfTime(f"stopped at step {step} of {training.steps}")
    return Trained(
        curve=tuple(curve),
        tokens=training.steps * training.batch * training.length,
        train_s=time.perf_counter() - began,
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

"""The loop: its schedule, what decays, what it refuses, and that equal seeds give equal losses to the last bit."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.vocabulary import VOCABULARY, read
from trainers import loop
from trainers.loop import (
    NotFinite,
    OutOfTime,
    Training,
    learning_rate_at,
    make_optimiser,
    train,
    use_bfloat16,
)
from trainers.model import ProxyModel
from trainers.tasks.mqar import Mqar
from trainers.tasks.task import IGNORED

CPU = torch.device("cpu")
TRAINING = Training(
    steps=6, batch=8, length=16, learning_rate=0.01, weight_decay=0.1, warmup_share=0.1, clip=1.0
)


def model_of(small: Frame, text: str = "full kda", seed: int = 0) -> ProxyModel:
    torch.manual_seed(seed)
    return ProxyModel(read(text), small)


def test_the_learning_rate_warms_up_and_falls_by_a_cosine_to_a_tenth() -> None:
    training = replace(TRAINING, steps=110, learning_rate=2.0, warmup_share=10 / 110)
    rates = [learning_rate_at(step, training) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 < rates[109] < 0.21
    assert learning_rate_at(0, replace(training, steps=1)) == 2.0


@pytest.mark.parametrize("text", list(VOCABULARY))
def test_only_the_weights_of_linear_layers_decay(text: str, small: Frame) -> None:
    model = model_of(small, text)
    decayed, free = make_optimiser(model, TRAINING, CPU).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    assert {id(weight) for weight in decayed["params"]} == linear
    assert {id(weight) for weight in free["params"]} == {id(w) for w in model.parameters()} - linear
    ids = {id(weight) for weight in free["params"]}
    assert {id(model.embedding.weight), id(model.stem), id(model.norm.weight)} <= ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 is not valid"),
        ({"batch": -1}, "batch -1 is not valid"),
        ({"length": 0}, "length 0 is not valid"),
        ({"learning_rate": 0.0}, "learning rate 0.0 is not valid"),
        ({"learning_rate": math.inf}, "learning rate inf is not valid"),
        ({"learning_rate": math.nan}, "learning rate nan is not valid"),
    ],
)
def test_a_training_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **change)


def test_training_lowers_the_loss_and_counts_its_tokens(small: Frame) -> None:
    training = replace(TRAINING, steps=40, batch=16)
    trained = train(model_of(small), Mqar(pairs=(4,)), training, seed=0, device=CPU)
    losses = [loss for _, loss in trained.curve]
    assert losses[0] == pytest.approx(math.log(40), rel=0.3)
    assert losses[-1] < losses[0] - 0.3
    assert trained.tokens == 40 * 16 * 16
    assert trained.curve[0][0] == 0 and trained.curve[-1][0] == 39


def test_the_same_seed_gives_the_same_losses_to_the_last_bit(small: Frame) -> None:
    def losses(seed: int) -> list[float]:
        torch.rand(seed + 3)  # what others drew before plays no part
        trained = train(model_of(small), Mqar(pairs=(4,)), TRAINING, seed=seed, device=CPU)
        return [loss for _, loss in trained.curve]

    assert losses(0) == losses(0)
    assert losses(1) != losses(0)


def test_only_asked_positions_reach_the_loss(small: Frame) -> None:
    model = model_of(small).eval()
    batch = Mqar(pairs=(4,)).batch(4, 16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = loop.loss_of(model, batch.tokens, batch.targets)
        logits = model.head(model(batch.tokens)).double().log_softmax(-1)
    asked = batch.targets != IGNORED
    picked = logits[asked].gather(1, batch.targets[asked][:, None])
    assert float(found) == pytest.approx(-float(picked.mean()), rel=1e-4)


def test_gradients_are_clipped(small: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    real = nn.utils.clip_grad_norm_

    def watch(parameters: Any, most: float) -> Tensor:
        kept = list(parameters)
        before = real(kept, most)
        norms.append(
            math.sqrt(sum(float(w.grad.double().square().sum()) for w in kept if w.grad is not None))
        )
        return before

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watch)
    train(model_of(small), Mqar(pairs=(4,)), replace(TRAINING, clip=0.01), seed=0, device=CPU)
    assert len(norms) == 6 and max(norms) < 0.0101


class Spoiler:
    """A task whose batches are fine until one step; a stand-in for a model whose numbers run away."""

    name, vocabulary = "spoilt", 40

    def __init__(self, model: ProxyModel, step: int, spoil: Callable[[ProxyModel], None]) -> None:
        self.inner, self.model, self.left, self.spoil = Mqar(pairs=(4,)), model, step, spoil

    def check(self, length: int) -> None:
        self.inner.check(length)

    def score(self, predict: Any, length: int) -> Any:
        return self.inner.score(predict, length)

    def batch(self, size: int, length: int, rng: torch.Generator) -> Any:
        if self.left == 0:
            self.spoil(self.model)
        self.left -= 1
        return self.inner.batch(size, length, rng)


def poison(value: float) -> Callable[[ProxyModel], None]:
    def spoil(model: ProxyModel) -> None:
        with torch.no_grad():
            model.head.weight.fill_(value)

    return spoil


def test_a_loss_that_is_no_number_stops_with_its_step(small: Frame) -> None:
    model = model_of(small)
    with pytest.raises(NotFinite, match="the loss is nan at step 3"):
        train(model, Spoiler(model, 3, poison(math.nan)), TRAINING, seed=0, device=CPU)


def test_a_gradient_that_is_no_number_stops_before_it_is_used(small: Frame) -> None:
    model = model_of(small)

    def break_gradient(broken: ProxyModel) -> None:
        broken.norm.weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(NotFinite, match=r"the gradient is (nan|inf) at step 2"):
        train(model, Spoiler(model, 2, break_gradient), TRAINING, seed=0, device=CPU)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_time_is_asked_for_every_step(small: Frame) -> None:
    answers = iter([False, False, True])
    with pytest.raises(OutOfTime, match="stopped at step 2 of 6"):
        train(
            model_of(small), Mqar(pairs=(4,)), TRAINING, seed=0, device=CPU, out_of_time=lambda: next(answers)
        )


def test_precision_is_what_was_asked_for() -> None:
    assert use_bfloat16("bfloat16", 8, CPU) and not use_bfloat16("float32", 4096, CPU)
    assert not use_bfloat16("auto", 8, CPU)


def test_it_trains_under_autocast(small: Frame) -> None:
    training = replace(TRAINING, precision="bfloat16")
    trained = train(model_of(small), Mqar(pairs=(4,)), training, seed=0, device=CPU)
    assert all(math.isfinite(loss) for _, loss in trained.curve)
    full = train(model_of(small), Mqar(pairs=(4,)), TRAINING, seed=0, device=CPU)
    assert trained.curve != full.curve
    assert trained.curve[0][1] == pytest.approx(full.curve[0][1], rel=0.05)

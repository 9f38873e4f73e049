"""Channel mixers within a training: losses of their own, what is renewed after a step, states beside the mixers'."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from search_space.channel.moe import MoEChannel
from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.state import state_bytes
from search_space.vocabulary import CHANNELS, read
from trainers.evaluate import Job, evaluate
from trainers.loop import Training, loss_of, make_optimiser, train
from trainers.measure import measure_layer
from trainers.model import ProxyModel, Stack
from trainers.outcome import Measured
from trainers.tasks.mqar import Mqar

CPU = torch.device("cpu")
TRAINING = Training(steps=6, batch=8, length=16, learning_rate=0.01)
TASK = Mqar(pairs=(4,))
TEXTS = [
    *(f"full/{name}" for name in CHANNELS),
    "full/relu2[shift=true]",
    "full/moe[router=sigmoid,shared=1]",
]


def model_of(text: str, frame: Frame) -> ProxyModel:
    torch.manual_seed(0)
    return ProxyModel(read(text), frame)


def channels(model: ProxyModel) -> list[MoEChannel]:
    found = [part for part in model.modules() if isinstance(part, MoEChannel)]
    assert found
    return found


def batch() -> tuple[Tensor, Tensor]:
    drawn = TASK.batch(8, 16, torch.Generator().manual_seed(3))
    return drawn.tokens, drawn.targets


def gradients(model: ProxyModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, *batch()).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("text", TEXTS)
def test_every_channel_mixer_trains(text: str, small: Frame) -> None:
    model = model_of(f"2*{text}", small)
    trained = train(model, TASK, replace(TRAINING, steps=30, batch=16), seed=0, device=CPU)
    assert trained.curve[-1][1] < trained.curve[0][1]


def test_losses_of_all_layers_are_part_of_the_loss_and_of_its_gradient(small: Frame) -> None:
    model = model_of("2*full/moe[balance=0.01,z_loss=0.001]", small).train()
    features, extra = model.read(batch()[0])
    assert len(extra) == 2
    asked = batch()[1] >= 0
    alone = F.cross_entropy(model.head(features[asked]), batch()[1][asked])
    torch.testing.assert_close(loss_of(model, *batch()), alone + extra[0] + extra[1])
    silent = model_of("2*full/moe[balance=0,z_loss=0]", small).train()
    silent.load_state_dict(model.state_dict())
    of_all, of_task = gradients(model), gradients(silent)
    model.zero_grad()
    torch.stack(model.read(batch()[0])[1]).sum().backward()
    for name, weight in model.named_parameters():
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(of_all[name], of_task[name] + own, rtol=1e-3, atol=1e-6)
    assert all(
        part.router.weight.grad.any() for part in channels(model) if part.router.weight.grad is not None
    )


def test_each_step_of_the_optimiser_moves_the_bias_once(small: Frame) -> None:
    model = model_of("full/moe[router=sigmoid,balance=0.01] full/moe[router=sigmoid]", small)
    train(model, TASK, TRAINING, seed=0, device=CPU)
    for part, unit in zip(channels(model), (0.01, 0.001), strict=True):
        moves = part.bias / unit
        torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-3)
        # One move a step, or none where an expert saw just the mean.
        assert moves.abs().max() <= TRAINING.steps + 1e-3 and moves.any()
        assert not part.load.any()


def test_scoring_changes_nothing_and_repeats(small: Frame) -> None:
    model = model_of("2*full/moe[router=sigmoid]", small)
    train(model, TASK, TRAINING, seed=0, device=CPU)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = batch()[0]
    with torch.no_grad():
        first, extra = model.read(tokens)
        assert extra == ()
        assert torch.equal(model(tokens), first)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(part.load.any() for part in channels(model))


def test_a_trial_repeats_to_the_last_bit(make_job: Callable[..., Job]) -> None:
    job = make_job("full/moe[experts=8] kda/moe[experts=8,router=sigmoid] full/relu2[shift=true]")
    one, two = evaluate(job), evaluate(job)
    assert isinstance(one, Measured) and isinstance(two, Measured)
    assert one.details == two.details and one.metrics == two.metrics and one.quality == two.quality


def test_experts_decay_as_other_matrices_do(small: Frame) -> None:
    model = model_of("full/moe[shared=1,shared_gate=true]", small)
    decayed, free = make_optimiser(model, TRAINING, CPU).param_groups
    ids = {id(weight) for weight in decayed["params"]}
    assert all(id(weight) in ids for weight in channels(model)[0].parameters())
    assert not ids & {id(weight) for weight in free["params"]}


@pytest.mark.parametrize("text", TEXTS)
def test_a_stack_steps_as_it_runs_and_keeps_what_it_costs(text: str, small: Frame) -> None:
    torch.manual_seed(0)
    layout = read(f"2*{text} kda")
    stack = Stack(layout, small).eval()
    x = torch.randn(2, 9, small.width)
    with torch.no_grad():
        whole, _ = stack(x)
        prefix, states = stack(x[:, :5], stack.start(2, 9))
        rows: list[Any] = []
        for place in range(5, 9):
            y, states = stack.step(x[:, place], states)
            rows.append(y)
    assert torch.allclose(torch.cat([prefix, torch.stack(rows, 1)], 1), whole, atol=1e-4)
    assert state_bytes(states) == layout_cost(layout, replace(small, context=9, batch=2)).stored_bytes


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_with_any_channel_mixer_is_measured(text: str, small: Frame) -> None:
    layer = read(text).layers[0]
    for phase in ("prefill", "decode"):
        assert measure_layer(layer, small, phase).latency_ms > 0

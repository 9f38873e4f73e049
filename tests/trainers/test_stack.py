"""The stack's own optimiser and clipping beside torch's, member by member."""

import copy

import pytest
import torch
from torch import nn

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.loop import Training, make_optimiser, set_learning_rate
from trainers.model import ProxyModel
from trainers.stack import APART, Stack, StackedAdamW, lay_out

CPU = torch.device("cpu")
RATES = (0.003, 0.02, 0.1)
# Sizes that are no multiples of what tensors are laid apart, a bias, a norm, taps, a tied embedding.
TEXT = "mamba2 full[heads=2]/moe"


def model(seed: int) -> ProxyModel:
    torch.manual_seed(seed)
    frame = Frame(width=24, train_length=16, context=16, dtype="float32", vocabulary=37)
    return ProxyModel(read(TEXT), frame).double()


def optimisers(models: list[ProxyModel]) -> list[torch.optim.Optimizer]:
    trainings = [Training(steps=9, batch=2, length=8, learning_rate=rate, weight_decay=0.3) for rate in RATES]
    return [make_optimiser(one, training, CPU) for one, training in zip(models, trainings, strict=True)]


def draw(models: list[ProxyModel], rng: torch.Generator) -> list[list[torch.Tensor]]:
    return [
        [torch.randn(weight.shape, generator=rng, dtype=weight.dtype) for weight in one.parameters()]
        for one in models
    ]


def put(models: list[ProxyModel], gradients: list[list[torch.Tensor]]) -> None:
    for one, own in zip(models, gradients, strict=True):
        for weight, gradient in zip(one.parameters(), own, strict=True):
            if weight.grad is None:
                weight.grad = gradient.clone()
            else:
                weight.grad.copy_(gradient)


def test_its_steps_and_clipping_are_those_of_torch_wherever_the_members_optimisers_stand() -> None:
    alone = [model(seed) for seed in range(len(RATES))]
    own = optimisers(alone)
    rng = torch.Generator().manual_seed(5)
    for _ in range(2):
        put(alone, draw(alone, rng))
        for optimiser in own:
            optimiser.step()
    members = copy.deepcopy(alone)
    theirs = optimisers(members)
    for optimiser, one in zip(theirs, own, strict=True):
        optimiser.load_state_dict(one.state_dict())
    stack = Stack(members)
    together = StackedAdamW.of(stack, theirs)
    for step in range(3):
        gradients = draw(alone, rng)
        put(alone, gradients)
        put(members, gradients)
        norms = stack.clip(10.0)
        for m, (one, optimiser) in enumerate(zip(alone, own, strict=True)):
            for stepping in (optimiser, theirs[m]):
                set_learning_rate(stepping, RATES[m] * 0.7**step)
            norm = nn.utils.clip_grad_norm_(one.parameters(), 10.0)
            assert norm > 10 and norms[m].item() == pytest.approx(norm.item(), rel=1e-12)
            optimiser.step()
        together.step()
        for m, (one, member) in enumerate(zip(alone, members, strict=True)):
            for (name, weight), stacked in zip(one.named_parameters(), member.parameters(), strict=True):
                assert torch.allclose(stacked, weight, rtol=1e-12, atol=1e-14), name
                wanted, got = own[m].state[weight], theirs[m].state[stacked]
                assert wanted.keys() == got.keys() and wanted["step"] == got["step"] == step + 3
                for part in ("exp_avg", "exp_avg_sq"):
                    assert torch.allclose(got[part], wanted[part], rtol=1e-12, atol=1e-14), name


def test_a_short_gradient_is_left_as_it_is() -> None:
    stack = Stack([model(0), model(1)])
    stack.gradients[0, 0] = 0.5
    stack.gradients[1, 0] = 4.0
    assert stack.clip(1.0).tolist() == [0.5, 4.0]
    assert stack.gradients[:, 0].tolist() == pytest.approx([0.5, 1.0])


def test_tensors_begin_where_kernels_expect_them() -> None:
    one = model(0)
    stack = Stack([one])
    begin = stack.weights.data_ptr()
    for name, weight in one.named_parameters():
        assert (weight.data_ptr() - begin) % (APART * weight.element_size()) == 0, name
    laid = lay_out([[torch.ones(3), torch.ones(APART), torch.ones(1)]])
    assert laid.shape == (1, 3 * APART) and laid.sum() == 4 + APART
    assert laid[0, APART] == 1 and laid[0, 3] == 0


def test_parameters_of_several_formats_are_refused() -> None:
    one = model(0)
    one.head.weight.data = one.head.weight.data.float()
    with pytest.raises(ValueError, match="in float32, float64 cannot be stacked"):
        Stack([one])

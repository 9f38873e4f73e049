"""The model of a layout: every parameter is priced or named here, and a layer's state runs through the whole stack."""

import pytest
import torch

from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.vocabulary import VOCABULARY, read
from trainers.model import ProxyModel, Stack

TEXTS = [*VOCABULARY, "2*kda mla/none", "window[size=4]|mamba2 full/swiglu[ratio=4]"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("taps", [0, 3])
def test_parameters_are_the_price_and_what_stands_around(text: str, taps: int, small: Frame) -> None:
    layout = read(text)
    model = ProxyModel(layout, small, stem_taps=taps)
    width, vocabulary = small.width, small.vocabulary
    around = 2 * vocabulary * width + width + taps * width
    count = sum(weight.numel() for weight in model.parameters())
    assert count == layout_cost(layout, small).params + around


@pytest.mark.parametrize("text", TEXTS)
def test_a_stack_steps_as_it_runs(text: str, small: Frame) -> None:
    torch.manual_seed(0)
    stack = Stack(read(text), small).eval()
    x = torch.randn(2, 9, small.width)
    with torch.no_grad():
        whole, nothing = stack(x)
        assert nothing is None
        prefix, states = stack(x[:, :5], stack.start(2, 9))
        steps = []
        for place in range(5, 9):
            y, states = stack.step(x[:, place], states)
            steps.append(y)
    assert torch.allclose(torch.cat([prefix, torch.stack(steps, 1)], 1), whole, atol=1e-4)


@pytest.mark.parametrize("taps", [0, 4])
def test_no_token_sees_a_later_one(taps: int, small: Frame) -> None:
    torch.manual_seed(0)
    model = ProxyModel(read("full kda"), small, stem_taps=taps).eval()
    tokens = torch.randint(0, small.vocabulary, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % small.vocabulary
    with torch.no_grad():
        one, two = model(tokens), model(changed)
    assert torch.allclose(one[:, :7], two[:, :7], atol=1e-5)
    assert not torch.allclose(one[:, 7:], two[:, 7:], atol=1e-3)


def test_a_layer_without_channel_mixer_has_no_second_norm(small: Frame) -> None:
    with_channel, without = Stack(read("full"), small), Stack(read("full/none"), small)
    assert with_channel.blocks[0].channel is not None
    assert without.blocks[0].channel is None and without.blocks[0].channel_norm is None

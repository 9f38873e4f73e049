"""RWKV-7: the layer against the published loop, and what it is within a network: one value that all layers share."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.cost import frames_of, layer_cost, layout_cost
from search_space.frame import Frame, Place
from search_space.mixers.rwkv7 import RWKV7, RWKV7Mixer
from search_space.spec import Stream
from search_space.state import state_bytes
from search_space.vocabulary import mixer_of, read
from trainers.model import Stack

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 70
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
LATER = replace(FRAME, place=Place(index=2, depth=4, earlier=frozenset({"rwkv7", "full"})))


def x_of(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 64)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def published(mixer: RWKV7Mixer, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence [T, D] by the paper's loop, whose states are values by keys; and the layer's value."""
    width, size = x.shape[1], mixer.head_dim
    shares = mixer.shares

    def linear(layer: nn.Module, z: Tensor) -> Tensor:
        return layer.weight @ z

    last, states = torch.zeros(width), [torch.zeros(size, size) for _ in range(width // size)]
    outputs, values = [], []
    for t in range(x.shape[0]):
        xr, xw, xk, xv, xa, xg = (x[t] + share * (last - x[t]) for share in shares)
        last = x[t]
        r, k, v = linear(mixer.read, xr), linear(mixer.key, xk), linear(mixer.value, xv)
        raw = linear(mixer.decay.up, torch.tanh(linear(mixer.decay.down, xw))) + mixer.decay.bias
        # The published form of the decay: exp(−exp(−½ − softplus(−raw))).
        w = torch.exp(-torch.exp(-0.5 - torch.log1p(torch.exp(-raw))))
        a = sigmoid(linear(mixer.rate.up, linear(mixer.rate.down, xa)) + mixer.rate.bias)
        g = linear(mixer.gate.up, sigmoid(linear(mixer.gate.down, xg)))
        if first is not None:
            blend = sigmoid(linear(mixer.blend.up, linear(mixer.blend.down, xv)) + mixer.blend.bias)
            v = v + (first[t] - v) * blend
        values.append(v)
        kappa = k * mixer.direction
        k = k * (1 + (a - 1) * mixer.key_rate)
        y = []
        for head in range(width // size):
            own = slice(head * size, (head + 1) * size)
            unit = kappa[own] / kappa[own].norm()
            erase = torch.outer(states[head] @ unit, unit * a[own])
            states[head] = states[head] * w[own] - erase + torch.outer(v[own], k[own])
            seen = states[head] @ r[own]
            seen = (seen - seen.mean()) / (seen.var(correction=0) + 64e-5).sqrt()
            seen = seen * mixer.norm_weight[own] + mixer.norm_bias[own]
            y.append(seen + (r[own] * k[own] * mixer.bonus[own]).sum() * v[own])
        outputs.append(mixer.out.weight @ (torch.cat(y) * g))
    return torch.stack(outputs), torch.stack(values)


@pytest.mark.parametrize("head_dim", [8, 16, 64])
def test_the_first_layer_is_the_published_loop(head_dim: int, far: Far, shake: Shake) -> None:
    mixer = RWKV7(head_dim=head_dim).build(FRAME)
    assert isinstance(mixer, RWKV7Mixer) and mixer.blend is None
    shake(mixer)
    x = x_of()
    with torch.no_grad():
        y, _, stream = mixer.forward_with(x, None, Stream())
        for row in range(2):
            wanted, value = published(mixer, x[row], None)
            assert far(y[row], wanted) < 1e-4
            assert far(stream.values["rwkv7"][row], value) < 1e-5
        assert torch.equal(mixer(x)[0], y)


def test_a_later_layer_mixes_the_first_value_in(far: Far, shake: Shake) -> None:
    mixer = RWKV7(rank_ratio=0.5).build(LATER)
    assert isinstance(mixer, RWKV7Mixer) and mixer.blend is not None
    shake(mixer)
    x, first = x_of(), x_of()
    with torch.no_grad():
        y, _, stream = mixer.forward_with(x, None, Stream().with_value("rwkv7", first))
        assert far(y[0], published(mixer, x[0], first[0])[0]) < 1e-4
        # It hands the first value on, not its own.
        assert torch.equal(stream.values["rwkv7"], first)
        y_zero, _, _ = mixer.forward_with(x, None, Stream().with_value("rwkv7", torch.zeros_like(first)))
        assert far(y, y_zero) > 0.1


def test_a_later_layer_without_the_first_value_says_so() -> None:
    mixer = RWKV7().build(LATER)
    x = x_of(length=3)
    for stream in (Stream(), Stream().with_value("other", x)):
        with pytest.raises(ValueError, match="the stream holds none"):
            mixer.forward_with(x, None, stream)
    with pytest.raises(ValueError, match="run it within its network"):
        mixer(x)
    with pytest.raises(ValueError, match="run it within its network"):
        mixer.step(x[:, 0], mixer.start(2, 8))


def test_heads_that_do_not_fill_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=24 does not divide the width 64"):
        RWKV7(head_dim=24).sized(FRAME)


def test_decays_are_bounded() -> None:
    mixer = RWKV7().build(FRAME)
    assert isinstance(mixer, RWKV7Mixer)
    x = 1e3 * x_of(length=5)
    *_, log_decay, _, _ = mixer.scan_inputs(x, torch.zeros_like(x), Stream())[0]
    assert -math.exp(-0.5) - 1e-6 <= log_decay.min() and log_decay.max() <= 0


def test_initial_values_follow_the_layers_place() -> None:
    def built(index: int) -> RWKV7Mixer:
        earlier = frozenset({"rwkv7"} if index else ())
        made = RWKV7(head_dim=8).build(replace(FRAME, place=Place(index=index, depth=4, earlier=earlier)))
        assert isinstance(made, RWKV7Mixer)
        return made

    first, last = built(0), built(3)
    # Early layers look at the token before; late ones, hardly; the first channel of all looks there alone.
    assert (first.shares > last.shares)[:, 1:].all() and (first.shares[:, 0] == 1).all()
    # Late layers start with longer memories in the middle of the ramp.
    assert first.decay.bias is not None and last.decay.bias is not None
    assert (
        last.decay.bias <= first.decay.bias + 1e-6
    ).all() and last.decay.bias.mean() < first.decay.bias.mean()


# What it costs.


@pytest.mark.parametrize("context", [1, 8192, 131072])
def test_states_of_the_published_network_to_the_byte(context: int) -> None:
    frame = Frame(width=2560, context=context)
    cost = layout_cost(read("32*rwkv7/none"), frame)
    by_name = {name: sum(t.stored_bytes for t in cost.cache if t.name == name) for name in ("matrix", "tail")}
    # The other half of the published 327,680 bytes of token shift is the channel mixer's.
    assert by_name == {"matrix": 20971520, "tail": 327680 // 2}
    assert by_name["matrix"] == 32 * 40 * 64**2 * 4 == 32 * 256 * 2560


@pytest.mark.parametrize(
    ("layers", "width", "published"),
    [(12, 768, 191_034_624), (24, 2048, 1_527_404_544), (32, 2560, 2_947_735_040)],
    ids=["0.1B", "1.5B", "2.9B"],
)
def test_parameters_of_the_released_networks(layers: int, width: int, published: int) -> None:
    frame = Frame(width=width, vocabulary=65536)
    mixers = layout_cost(read(f"{layers}*rwkv7/none"), frame).params
    # Its channel mixer has a share of the token before and two matrices of four widths; its norms have biases, and there
    # is a second norm a layer, one behind the embedding.
    rest = layers * (width + 8 * width**2) + layers * 3 * width + 4 * width
    assert mixers + rest + 2 * 65536 * width == published


def test_parameters_by_hand() -> None:
    frame = Frame(width=2560)
    later = replace(frame, place=Place(index=5, depth=32, earlier=frozenset({"rwkv7"})))
    assert RWKV7().ranks(later) == (96, 64, 320)
    assert RWKV7().cost(later).params == 4 * 2560**2 + 2 * 2560 * (96 + 96 + 64 + 320) + 14 * 2560
    assert RWKV7().ranks(frame) == (96, 0, 320)
    assert RWKV7().cost(frame).params == 4 * 2560**2 + 2 * 2560 * (96 + 96 + 320) + 13 * 2560
    assert RWKV7(rank_ratio=0.5).ranks(later) == (48, 32, 160)


def test_flops_by_hand() -> None:
    cost = RWKV7().cost(Frame(width=2560))
    weights = 4 * 2560**2 + 2 * 2560 * (96 + 96 + 320)
    assert cost.flops_decode == 2 * weights + 8 * 2560 * 64
    mixing = 40 * (10 * 64 * 64 + 6 * 64 * 64 + 8 * 64 * 64 + 2 * 64 * 64 / 3)
    assert cost.flops_prefill == pytest.approx(2 * weights + mixing)


# Within a network.

LAYOUTS = ["3*rwkv7", "full rwkv7/none window[size=8] rwkv7 rwkv7|kda"]


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_network_costs_what_it_holds(text: str) -> None:
    layout = read(text)
    stack, cost = Stack(layout, FRAME), layout_cost(layout, FRAME)
    assert sum(weight.numel() for weight in stack.parameters()) == cost.params
    assert state_bytes(stack.start(1, FRAME.context)) == cost.stored_bytes
    frames = frames_of(layout, FRAME)
    own = [index for index, layer in enumerate(layout.layers) if "rwkv7" in str(layer)]
    counts = [mixer_of(layout.layers[index].branches[0]).cost(frames[index]).params for index in own]
    assert counts[0] == counts[1] - 2 * 64 * 32 - 64 and set(counts[1:]) == {counts[1]}
    for index, block in enumerate(stack.blocks):
        held = sum(weight.numel() for weight in block.parameters())
        assert held == layer_cost(layout.layers[index], frames[index]).params


@pytest.fixture(params=LAYOUTS)
def stack(request: pytest.FixtureRequest, shake: Shake) -> Stack:
    made = Stack(read(request.param), FRAME)
    shake(made)
    return made.eval()


def step_through(stack: Stack, x: Tensor, states: Any) -> tuple[Tensor, Any]:
    rows = []
    for t in range(x.shape[1]):
        y, states = stack.step(x[:, t], states)
        rows.append(y)
    return torch.stack(rows, dim=1), states


def test_no_future_reaches_the_past(stack: Stack) -> None:
    x = x_of()
    with torch.no_grad():
        y, _ = stack(x)
        for t in (0, 20, 63, LENGTH - 2):
            changed = x.clone()
            changed[:, t + 1 :] = 3 * torch.randn_like(changed[:, t + 1 :])
            z, _ = stack(changed)
            torch.testing.assert_close(z[:, : t + 1], y[:, : t + 1], rtol=1e-5, atol=1e-5)
            assert (z[:, t + 1 :] - y[:, t + 1 :]).abs().max() > 1e-2


def test_step_equals_forward(stack: Stack, far: Far) -> None:
    x = x_of()
    with torch.no_grad():
        whole, none = stack(x)
        assert none is None
        assert far(step_through(stack, x, stack.start(2, LENGTH))[0], whole) < 1e-4
        for prefix in (1, 21, 64):
            y, states = stack(x[:, :prefix], stack.start(2, LENGTH))
            rest, _ = step_through(stack, x[:, prefix:], states)
            assert far(torch.cat([y, rest], dim=1), whole) < 1e-4


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (31,), (64,), (5, 6, 60)], ids=str)
def test_prefill_can_be_cut_anywhere(stack: Stack, cuts: tuple[int, ...], far: Far) -> None:
    x = x_of()
    with torch.no_grad():
        whole, _ = stack(x)
        states, parts = stack.start(2, LENGTH), []
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            y, states = stack(x[:, start:end], states)
            parts.append(y)
        assert far(torch.cat(parts, dim=1), whole) < 1e-4


def test_the_first_value_reaches_every_later_layer() -> None:
    stack = Stack(read("3*rwkv7/none"), FRAME)
    mixers = [block.mixer for block in stack.blocks]
    assert [mixer.blend is None for mixer in mixers] == [True, False, False]
    x = x_of(length=12)
    # Silence the first layer's own output: what is left of its value is what the stream carries.
    with torch.no_grad():
        mixers[0].out.weight.zero_()
    y, _ = stack(x)
    y.square().sum().backward()
    gradient = mixers[0].value.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    with torch.no_grad():
        mixers[0].value.weight.mul_(2)
        assert (stack(x)[0] - y).abs().max() > 1e-3
    for name, weight in stack.named_parameters():
        assert weight.grad is not None, name

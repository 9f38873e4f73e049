"""What every channel mixer promises, asked of the whole list: a new one is tested by being listed."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout, from_json
from search_space.setting import UNITS, Value, settings_of
from search_space.spec import Channel, ChannelSpec, Stream, shrink
from search_space.state import state_bytes, tensors_of
from search_space.vocabulary import CHANNELS, branch_of, channel_of, read

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32", vocabulary=64)
SIZES = (24, 40, 72)
LENGTH = 12


def draws(name: str, count: int = 6) -> list[ChannelSpec]:
    """The word with its defaults, and random settings of small size that fit together."""
    rng = random.Random(name)
    found = [CHANNELS[name]()]
    settings = settings_of(CHANNELS[name])
    while len(found) < count + 1 and settings:
        chosen: dict[str, Value] = {}
        for setting in settings:
            if rng.random() < 0.6:
                chosen[setting.name] = rng.choice(SIZES if setting.unit else setting.options)
        try:
            spec = CHANNELS[name](**chosen).sized(FRAME)
        except ValueError:
            continue
        if spec not in found:
            found.append(spec)
    return found


SPECS = [spec for name in CHANNELS for spec in draws(name)]


@pytest.fixture(params=SPECS, ids=lambda spec: str(branch_of(spec)))
def spec(request: pytest.FixtureRequest) -> ChannelSpec:
    chosen: ChannelSpec = request.param
    return chosen


@pytest.fixture
def channel(spec: ChannelSpec, shake: Callable[[nn.Module], None]) -> Channel:
    made = spec.build(FRAME)
    shake(made)
    return made.eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def walk(channel: Channel, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Step by step over [B, T, D]."""
    rows = []
    for t in range(x.shape[1]):
        y, state, _ = channel.step_with(x[:, t], state, Stream())
        rows.append(y)
    return torch.stack(rows, dim=1), state


def test_every_word_is_drawn_often() -> None:
    for name in CHANNELS:
        assert sum(spec.name == name for spec in SPECS) == (1 if not settings_of(CHANNELS[name]) else 7)


def test_price_names_every_parameter(spec: ChannelSpec) -> None:
    cost = spec.cost(FRAME)
    assert sum(weight.numel() for weight in spec.build(FRAME).parameters()) == cost.params
    assert 0 <= cost.idle_params <= cost.params
    assert cost.serial_steps == 0
    assert (cost.flops_decode == 0) == (cost.params == 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_price_names_every_byte_of_the_state(spec: ChannelSpec, dtype: str) -> None:
    for batch in (1, 3):
        frame = replace(FRAME, batch=batch, dtype=dtype)
        made, cost = spec.build(frame), spec.cost(frame)
        state = made.start(batch)
        assert cost.read_bytes <= cost.stored_bytes == state_bytes(state)
        x = tokens(batch)
        _, state, _ = made.forward_with(x[:, :5], state, Stream())
        assert state_bytes(state) == cost.stored_bytes
        _, state = walk(made, x[:, 5:], state)
        assert state_bytes(state) == cost.stored_bytes
        # Nothing larger is kept alive behind the state.
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(state)) == cost.stored_bytes


def test_step_equals_forward_and_a_text_may_be_cut_anywhere(channel: Channel, far: Far) -> None:
    x = tokens()
    with torch.no_grad():
        whole = channel(x)
        unasked, none, _ = channel.forward_with(x, None, Stream())
        assert torch.equal(unasked, whole) and none is None
        if not whole.any():
            return
        for cut in range(1, LENGTH):
            first, state, _ = channel.forward_with(x[:, :cut], channel.start(2), Stream())
            rest, _, _ = channel.forward_with(x[:, cut:], state, Stream())
            assert far(torch.cat([first, rest], dim=1), whole) < 1e-5
            _, state, _ = channel.forward_with(x[:, :cut], channel.start(2), Stream())
            assert far(walk(channel, x[:, cut:], state)[0], whole[:, cut:]) < 1e-5
        assert far(walk(channel, x, channel.start(2))[0], whole) < 1e-5


def test_each_token_is_seen_by_itself_or_with_those_before(spec: ChannelSpec, channel: Channel) -> None:
    x = tokens()
    changed = x.clone()
    changed[:, 5] = torch.randn_like(changed[:, 5])
    with torch.no_grad():
        y, z = channel(x), channel(changed)
    torch.testing.assert_close(z[:, :5], y[:, :5], rtol=1e-5, atol=1e-6)
    differs = (z - y).abs().amax(dim=(0, 2)) > 1e-4
    if spec.cost(FRAME).stored_bytes:
        assert differs[5] and differs[6]
    else:
        torch.testing.assert_close(z[:, 6:], y[:, 6:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(channel(x[:, 3]), y[:, 3], rtol=1e-5, atol=1e-6)
        assert differs[5] == (spec.name != "none")


def test_each_sequence_of_a_batch_is_alone(channel: Channel) -> None:
    x = tokens(batch=3)
    with torch.no_grad():
        together = channel(x)
        for row in range(3):
            torch.testing.assert_close(
                channel(x[row : row + 1]), together[row : row + 1], rtol=1e-4, atol=1e-6
            )


def test_evaluation_repeats_to_the_last_bit_and_leaves_nothing(channel: Channel) -> None:
    x, before = tokens(), {name: buffer.clone() for name, buffer in channel.named_buffers()}
    first, _, stream = channel.forward_with(x, None, Stream())
    again, _, _ = channel.forward_with(x, None, Stream())
    assert torch.equal(first, again)
    assert stream.losses == () and not stream.values
    assert all(torch.equal(buffer, before[name]) for name, buffer in channel.named_buffers())


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_it_learns(spec: ChannelSpec, low: bool) -> None:
    if spec.name == "none":
        pytest.skip("there is nothing to learn")
    made = spec.build(FRAME)
    x = torch.randn(4, 16, 64)
    wanted = torch.tanh(x @ torch.randn(64, 64) / 8)
    optimiser = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for number in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            y, _, stream = made.forward_with(x, None, Stream())
        loss = (y.float() - wanted).square().mean()
        optimiser.zero_grad()
        (loss + sum(stream.losses)).backward()
        for name, weight in made.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            assert number or weight.grad.any(), f"{name} is dead"
        optimiser.step()
        made.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_autocast_keeps_the_output_near(spec: ChannelSpec, channel: Channel) -> None:
    x = tokens(4, 40)
    with torch.no_grad():
        exact = channel(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = channel(x).float()
    assert (rough - exact).square().mean().sqrt() <= 0.02 * exact.square().mean().sqrt(), spec


def test_it_runs_in_low_precision(spec: ChannelSpec) -> None:
    frame = replace(FRAME, dtype="bfloat16")
    made, x = spec.build(frame).bfloat16(), tokens().bfloat16()
    y, state, stream = made.forward_with(x, made.start(2), Stream())
    z, state, _ = made.step_with(x[:, 0], state, stream)
    assert y.dtype == z.dtype == torch.bfloat16 and y.shape == x.shape and z.shape == x[:, 0].shape
    assert state_bytes(state) == spec.cost(replace(frame, batch=2)).stored_bytes
    made.after_step()


def test_zeros_in_give_numbers_out(channel: Channel) -> None:
    x = torch.zeros(1, 4, 64, requires_grad=True)
    y = channel(x)
    assert y.isfinite().all()
    if y.requires_grad:
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in channel.parameters())


def test_a_state_is_made_where_the_module_is(spec: ChannelSpec) -> None:
    made = spec.build(FRAME).to("meta")
    assert {tensor.device.type for tensor in tensors_of(made.start(2))} <= {"meta"}


def test_text_and_json_round_trip(spec: ChannelSpec) -> None:
    layout = Layout((Layer((Branch("full"),), branch_of(spec)),) * 3)
    assert read(str(layout)) == layout
    assert from_json(json.loads(layout.dump())) == layout
    assert channel_of(branch_of(spec)) == spec


@pytest.mark.parametrize("width", [8, 24, 32, 40, 64])
def test_shrinking_stays_valid_and_builds(spec: ChannelSpec, width: int) -> None:
    proxy = replace(FRAME, width=width, train_length=32)
    small = shrink(spec, Frame(width=2048), proxy)
    assert channel_of(branch_of(small)) == small
    for setting in settings_of(type(spec)):
        before, after = getattr(spec, setting.name), getattr(small, setting.name)
        if setting.unit is None or before is None:
            assert after == before
        else:
            step = UNITS[setting.unit].step
            assert after % step == 0 and after >= step
    x = torch.randn(2, 9, width)
    assert small.build(proxy)(x).shape == x.shape


@pytest.mark.parametrize("name", CHANNELS)
def test_a_word_says_who_it_is(name: str) -> None:
    spec = CHANNELS[name]
    assert spec.name == name and spec.family == "channel" and spec.__doc__
    assert "arXiv" in spec.source
    assert spec().build(FRAME).__doc__

"""The clockwork network: its clock, its modules, what they see of one another, and what of it costs."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.clockwork import Clockwork, ClockworkMixer

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(spec: Clockwork, frame: Frame, shake: Shake) -> ClockworkMixer:
    mixer = spec.build(frame)
    assert isinstance(mixer, ClockworkMixer)
    shake(mixer)
    return mixer


def block(mixer: ClockworkMixer, to: int, source: int) -> Tensor:
    """The weights from one module to another that is not slower, counted row by row through the triangle."""
    before = sum(mixer.modules_count - row for row in range(to))
    return mixer.between[before + source - to]


def loop(mixer: ClockworkMixer, x: Tensor, periods: list[int]) -> Tensor:
    """Hidden states [B, T, I] module by module, as the paper says it."""
    count, units = mixer.modules_count, mixer.units
    hidden, rows = [torch.zeros(x.shape[0], units) for _ in range(count)], []
    for t in range(x.shape[1]):
        before = list(hidden)
        for to in range(count):
            if t % periods[to] == 0:
                own = slice(to * units, (to + 1) * units)
                said = x[:, t] @ mixer.enter.weight[own].T + mixer.enter.bias[own]
                for source in range(to, count):
                    said = said + before[source] @ block(mixer, to, source).T
                hidden[to] = said.tanh()
        rows.append(torch.cat(hidden, dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("modules", [2, 4, 8])
@pytest.mark.parametrize("base", [2, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_clockwork_is_its_loop_written_out(
    small: Frame, modules: int, base: int, ratio: float, far: Far, shake: Shake
) -> None:
    mixer = made(Clockwork(modules=modules, base=base, ratio=ratio), small, shake)
    x = torch.randn(2, LENGTH, 64)
    states = loop(mixer, x, [base**index for index in range(modules)])
    assert far(mixer(x)[0], mixer.out(states)) < 1e-5


def test_with_every_period_one_it_is_a_block_masked_elman_network(
    small: Frame, far: Far, shake: Shake
) -> None:
    mixer = made(Clockwork(modules=4), small, shake)
    mixer.periods = [1, 1, 1, 1]
    elman = nn.RNN(64, 64, batch_first=True)
    weights = dict(elman.named_parameters())
    weights["weight_ih_l0"].copy_(mixer.enter.weight)
    weights["bias_ih_l0"].copy_(mixer.enter.bias)
    weights["bias_hh_l0"].zero_()
    weights["weight_hh_l0"].zero_()
    for to in range(4):
        for source in range(to, 4):
            rows, columns = slice(16 * to, 16 * to + 16), slice(16 * source, 16 * source + 16)
            weights["weight_hh_l0"][rows, columns] = block(mixer, to, source)
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], mixer.out(elman(x)[0])) < 1e-5


@pytest.mark.parametrize("base", [2, 4])
def test_modules_hold_still_between_their_ticks(small: Frame, base: int, shake: Shake) -> None:
    mixer = made(Clockwork(modules=4, base=base), small, shake)
    x, state = torch.randn(2, LENGTH, 64), mixer.start(2, LENGTH)
    for t in range(LENGTH):
        before = state.hidden.unflatten(1, (4, 16))
        _, state = mixer.step(x[:, t], state)
        after = state.hidden.unflatten(1, (4, 16))
        for index in range(4):
            held = torch.equal(after[:, index], before[:, index])
            assert held == (t % base**index != 0), (t, index)


def test_the_clock_is_carried(small: Frame, far: Far, shake: Shake) -> None:
    mixer = made(Clockwork(), small, shake)
    x = torch.randn(2, LENGTH, 64)
    whole, _ = mixer(x)
    _, state = mixer(x[:, :37], mixer.start(2, LENGTH))
    assert state.length == 37
    assert far(mixer(x[:, 37:], state)[0], whole[:, 37:]) < 1e-5
    # The same numbers under another clock say something else.
    assert far(mixer(x[:, 37:], replace(state, length=36))[0], whole[:, 37:]) > 1e-2


def test_the_slow_tell_the_fast_and_not_the_other_way(small: Frame, shake: Shake) -> None:
    mixer = made(Clockwork(modules=2), small, shake)
    x, state = torch.randn(1, 5, 64), mixer.start(1, 5)
    for moved, others in ((0, 1), (1, 0)):
        changed = state.hidden.clone().unflatten(1, (2, 32))
        changed[:, moved] += 1
        _, plain = mixer(x, replace(state))
        _, other = mixer(x, replace(state, hidden=changed.flatten(1)))
        same = torch.equal(*(own.hidden.unflatten(1, (2, 32))[:, others] for own in (plain, other)))
        assert same == (moved == 0)


@pytest.mark.parametrize("width", [16, 24, 40, 72, 2304])
def test_units_that_do_not_divide_the_width_are_rounded_down(width: int) -> None:
    frame = Frame(width=width)
    for modules in (2, 4, 8):
        for ratio in (1.0, 0.5):
            units = Clockwork(modules=modules, ratio=ratio).units(frame)
            assert units >= 1
            assert units * modules <= width * ratio < (units + 1) * modules


def test_a_token_pays_for_the_modules_that_move() -> None:
    frame = Frame(width=64, context=1024)
    cost = Clockwork(modules=4, base=2).cost(frame)
    # Sixteen units a module see 64, 48, 32 and 16 units; they move at every, second, fourth and eighth token.
    met = 16 * ((64 + 64) + (48 + 64) / 2 + (32 + 64) / 4 + (16 + 64) / 8)
    assert cost.flops_decode == cost.flops_prefill == 2 * met + 2 * 64 * 64
    assert cost.params == 16 * 16 * 10 + 64 * 65 + 64 * 64
    assert cost.stored_bytes == 64 * 4
    assert cost.serial_steps == 1024
    slower = Clockwork(modules=4, base=4).cost(frame)
    assert slower.params == cost.params and slower.flops_decode < cost.flops_decode

"""S4 and S4D: initial modes against formulas, convolution against recurrences written out, prices by hand."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from search_space.derived import Derived
from search_space.frame import Frame
from search_space.mixers.s4 import S4, S4Mixer
from search_space.mixers.s4d import S4D, S4DMixer
from search_space.modes import SLOW, first_poles, legendre

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


def x_of(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 64, dtype=torch.float64)


def hippo(state: int) -> tuple[Tensor, Tensor]:
    """A [N, N] and B [N] of HiPPO-LegS, entry by entry."""
    matrix, entering = torch.zeros(state, state).double(), torch.zeros(state).double()
    for n in range(state):
        entering[n] = math.sqrt(2 * n + 1)
        for k in range(state):
            if n > k:
                matrix[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
            elif n == k:
                matrix[n, k] = -(n + 1)
    return matrix, entering


@pytest.mark.parametrize("state", [8, 16, 64, 128])
def test_legendre_modes_are_those_of_hippo(state: int) -> None:
    matrix, _ = hippo(state)
    column = torch.tensor([math.sqrt(n + 0.5) for n in range(state)], dtype=torch.float64)
    pole, low_rank, write = legendre(state)
    assert (low_rank.imag == 0).all() and (low_rank.real > 0).all() and (pole.imag > 0).all()
    # The normal part, by a solver that knows nothing of its symmetry.
    found = torch.linalg.eigvals(matrix + torch.outer(column, column))
    torch.testing.assert_close(found.real, torch.full((state,), -0.5).double(), rtol=0, atol=1e-9)
    positive = found.imag[found.imag > 0].sort().values
    torch.testing.assert_close(positive, pole.imag.sort().values, rtol=1e-10, atol=0)
    # S4D's other published formula for them: nothing but the skew part.
    skew = (matrix - matrix.T) / 2
    torch.testing.assert_close(
        torch.linalg.eigvalsh(1j * skew)[state // 2 :], pole.imag.sort().values, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(write, math.sqrt(2) * low_rank)


@pytest.mark.parametrize("state", [8, 16])
def test_the_structured_form_is_the_dense_one(state: int) -> None:
    """What is written by B and read by P, at several frequencies: it depends on no choice of a basis."""
    matrix, entering = hippo(state)
    column = torch.tensor([math.sqrt(n + 0.5) for n in range(state)], dtype=torch.float64)
    pole, low_rank, write = (torch.cat([x, x.conj()]) for x in legendre(state))
    structured = torch.diag(pole) - torch.outer(low_rank, low_rank.conj())
    one = torch.eye(state).to(pole.dtype)
    for s in (0.3, 1.0 + 2.0j, 5.0j, 40.0 + 1.0j):
        dense = column.to(pole.dtype) @ torch.linalg.solve(s * one - matrix, entering.to(pole.dtype))
        ours = low_rank.conj() @ torch.linalg.solve(s * one - structured, write)
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=0)


@pytest.mark.parametrize("state", [8, 64])
def test_initial_poles_by_their_formulas(state: int) -> None:
    half = state // 2
    lin, inv, real = (first_poles(init, state) for init in ("lin", "inv", "real"))
    assert [float(x) for x in lin.imag] == pytest.approx([math.pi * n for n in range(half)])
    by_hand = [state / math.pi * (state / (2 * n + 1) - 1) for n in range(half)]
    assert [float(x) for x in inv.imag] == pytest.approx(by_hand)
    assert real.tolist() == [-(n + 1) for n in range(state)]
    for poles in (lin, inv, first_poles("legs", state)):
        assert len(poles) == half and (poles.real == -0.5).all()
    assert torch.equal(first_poles("legs", state), legendre(state)[0])


@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
def test_a_fresh_mixer_has_the_formulas_poles_and_steps_in_range(init: str) -> None:
    mixer = S4D(state=16, init=init, step_max=0.01).build(Frame(width=64))
    assert isinstance(mixer, S4DMixer)
    step = (mixer.log_step * SLOW).exp()
    assert 1e-3 <= step.min() and step.max() <= 0.01 + 1e-8
    poles = -(mixer.rate * SLOW).exp()
    if init != "real":
        poles = torch.complex(poles, mixer.angle * SLOW)
    torch.testing.assert_close(
        poles, first_poles(init, 16).to(poles.dtype).expand(64, -1), rtol=1e-5, atol=1e-5
    )
    wider = S4D(state=16, init=init).build(Frame(width=64))
    assert isinstance(wider, S4DMixer)
    assert 0.01 < (wider.log_step * SLOW).exp().max() <= 0.1 + 1e-8


def gated(mixer: S4Mixer | S4DMixer, y: Tensor, x: Tensor) -> Tensor:
    """The block around the filters: skip, GELU by the error function, a gated linear map."""
    z = y + mixer.skip * x
    z = z * (1 + torch.erf(z / 2**0.5)) / 2
    value, gate = (z @ mixer.out.out.weight.T + mixer.out.out.bias).chunk(2, dim=-1)
    return value / (1 + (-gate).exp())


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
def test_s4d_is_its_recurrence_in_float64(
    small: Frame, init: str, disc: str, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    if (init, disc) == ("real", "bilinear"):
        with pytest.raises(ValueError, match="init=real needs disc=zoh"):
            S4D(init=init, disc=disc).build(small)
        return
    mixer = S4D(state=16, init=init, disc=disc).build(small).double()
    assert isinstance(mixer, S4DMixer)
    shake(mixer)
    a = -(mixer.rate * SLOW).exp()
    c = mixer.read
    if init != "real":
        a, c = torch.complex(a, mixer.angle * SLOW), torch.complex(c[..., 0], c[..., 1])
    delta = (mixer.log_step * SLOW).exp()[:, None]
    if disc == "zoh":
        fade, entering = (delta * a).exp(), ((delta * a).exp() - 1) / a
    else:
        fade, entering = (1 + delta * a / 2) / (1 - delta * a / 2), delta / (1 - delta * a / 2)
    x = x_of()
    state, rows = torch.zeros(2, *a.shape, dtype=a.dtype), []
    for t in range(LENGTH):
        state = fade * state + entering * x[:, t, :, None]
        rows.append((2 if init != "real" else 1) * (c * state).sum(-1).real)
    with torch.no_grad():
        assert far(mixer(x)[0], gated(mixer, torch.stack(rows, dim=1), x)) < 1e-12


def test_the_two_discretisations_differ(small: Frame, far: Far) -> None:
    one, other = (S4D(state=16, disc=disc).build(small) for disc in ("zoh", "bilinear"))
    other.load_state_dict(one.state_dict())
    x = x_of().float()
    with torch.no_grad():
        assert far(one(x)[0], other(x)[0]) > 1e-3


def test_s4_is_the_power_iteration_of_its_dense_matrix(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = S4(state=16).build(small).double()
    assert isinstance(mixer, S4Mixer)
    shake(mixer)
    with torch.no_grad():
        mixer.low_rank.add_(torch.randn_like(mixer.low_rank))
        mixer.write.add_(torch.randn_like(mixer.write))
    # Of real numbers alone: the real part of a mode, then its imaginary one.
    decay, angle = -(mixer.rate * SLOW).exp(), mixer.angle * SLOW
    turns = zip(decay.tolist(), angle.tolist(), strict=True)
    block = [torch.tensor([[d, -w], [w, d]], dtype=torch.float64) for d, w in turns]
    column, entering = (SLOW * y.flatten() for y in (mixer.low_rank, mixer.write))
    matrix = torch.block_diag(*block) - 2 * torch.outer(column, column)
    reading = 2 * torch.stack([mixer.read[..., 0], -mixer.read[..., 1]], dim=-1).flatten(1)
    x, one = x_of(), torch.eye(16).double()
    y = torch.zeros_like(x)
    for channel, delta in enumerate((mixer.log_step * SLOW).exp()):
        implicit = torch.linalg.inv(one - delta / 2 * matrix)
        forward, entered = implicit @ (one + delta / 2 * matrix), implicit @ entering * delta
        state = torch.zeros(2, 16).double()
        for t in range(LENGTH):
            state = state @ forward.T + x[:, t, channel, None] * entered
            y[:, t, channel] = state @ reading[channel]
    with torch.no_grad():
        assert far(mixer(x)[0], gated(mixer, y, x)) < 1e-12


def test_fresh_s4_without_the_rank_one_part_is_s4d(small: Frame, far: Far) -> None:
    """The same modes, S4D's way of writing them as S4's: B is one, and nothing couples the modes."""
    s4, s4d = S4(state=16).build(small).double(), S4D(state=16, disc="bilinear").build(small).double()
    assert isinstance(s4, S4Mixer) and isinstance(s4d, S4DMixer)
    with torch.no_grad():
        s4.low_rank.zero_()
        s4.write.copy_(torch.tensor([1.0, 0.0]) / SLOW)
        for name in ("read", "log_step", "skip"):
            getattr(s4, name).copy_(getattr(s4d, name))
        s4.out.load_state_dict(s4d.out.state_dict())
        x = x_of()
        assert far(s4(x)[0], s4d(x)[0]) < 1e-11


@pytest.mark.parametrize("spec", [S4(state=64), S4D(state=64), S4D(state=64, disc="bilinear")], ids=str)
def test_steps_keep_up_over_a_long_text(spec: S4 | S4D, far: Far) -> None:
    frame = Frame(width=16, train_length=1024, context=1024, dtype="float32")
    mixer = spec.build(frame)
    x = torch.randn(1, 1000, 16)
    with torch.no_grad():
        state, rows = mixer.start(1, 1000), []
        for t in range(1000):
            y, state = mixer.step(x[:, t], state)
            rows.append(y)
        whole, carried = mixer(x, mixer.start(1, 1000))
    assert far(torch.stack(rows, dim=1), whole) < 1e-4
    assert far(torch.view_as_real(state.modes), torch.view_as_real(carried.modes)) < 2e-4


def test_prices_by_hand() -> None:
    frame = Frame(width=1024, context=4096, batch=2)
    s4, s4d = S4().cost(frame), S4D().cost(frame)
    around = 1024 * 2048 + 2048
    # Once a layer: rates, angles, P and B of 32 pairs; by channel: C, a step, a share.
    assert s4.params == around + 6 * 32 + 1024 * (64 + 2)
    assert s4d.params == around + 1024 * (64 + 64 + 2)
    assert S4D(init="real").cost(frame).params == s4d.params
    for cost in (s4, s4d, S4D(init="real").cost(frame)):
        # 32 complex numbers of 8 bytes, or 64 real ones of 4, whatever the frame's type.
        assert cost.stored_bytes == cost.read_bytes == 2 * 1024 * 32 * 8
    convolution = 30 * math.log2(8192) * 1024
    assert s4d.flops_prefill == 4 * 1024**2 + convolution + 8 * 32 * 1024 / 2
    assert s4d.flops_decode == 4 * 1024**2 + 7 * 64 * 1024
    power = 2 * 64**3 * 12 * 1024 / 4096
    assert s4.flops_prefill == 4 * 1024**2 + convolution + (8 * 32 * 1024 + power) / 2
    assert s4.flops_decode == 4 * 1024**2 + 12 * 64 * 1024


def test_real_modes_are_kept_as_real_numbers(small: Frame) -> None:
    real, pairs = (S4D(state=16, init=init).build(small).start(2, 8).modes for init in ("real", "legs"))
    assert (real.dtype, real.shape) == (torch.float32, (2, 64, 16))
    assert (pairs.dtype, pairs.shape) == (torch.complex64, (2, 64, 8))


@pytest.mark.parametrize("spec", [S4(state=16), S4D(state=16)], ids=str)
def test_poles_and_steps_move_at_a_tenth_of_the_rate(spec: S4 | S4D, small: Frame) -> None:
    mixer = spec.build(small)
    assert isinstance(mixer, (S4Mixer, S4DMixer))
    before = {name: getattr(mixer, name).detach() * SLOW for name in ("log_step", "rate", "angle")}
    optimiser = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    mixer(x_of().float())[0].square().sum().backward()
    optimiser.step()
    for name, value in before.items():
        moved = (getattr(mixer, name) * SLOW - value).abs()
        assert 0.9e-3 < moved.max() < 1.1e-3, name


@pytest.mark.parametrize("spec", [S4(state=16), S4D(state=16), S4D(state=16, init="real")], ids=str)
def test_steps_follow_weights_that_change(spec: S4 | S4D, small: Frame, far: Far) -> None:
    mixer, other = spec.build(small), spec.build(small)
    x = x_of(9).float()

    def stepped() -> Tensor:
        state, rows = mixer.start(2, 9), []
        for t in range(9):
            y, state = mixer.step(x[:, t], state)
            rows.append(y)
        return torch.stack(rows, dim=1)

    with torch.no_grad():
        before = stepped()
        assert far(before, mixer(x)[0]) < 1e-4
        mixer.load_state_dict(other.state_dict())
        assert far(stepped(), mixer(x)[0]) < 1e-4
        assert far(stepped(), before) > 1e-2
        mixer.log_step.add_(3)
        assert far(stepped(), mixer(x)[0]) < 1e-4
    # Where gradients are taken they reach the poles through steps too.
    stepped().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in mixer.parameters())


def test_what_is_derived_is_made_once() -> None:
    source, made, derived = nn.Parameter(torch.ones(2)), [], Derived[Tensor]()

    def make() -> Tensor:
        made.append(1)
        return source * 2

    for _ in range(3):
        assert derived.get([source], make).requires_grad
    assert len(made) == 3
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(derived.get([source], make), torch.full((2,), 2.0))
        assert len(made) == 4
        source.mul_(5)
        assert torch.equal(derived.get([source], make), torch.full((2,), 10.0))
        source.data = torch.zeros(2, dtype=torch.float64)
        assert torch.equal(derived.get([source], make), torch.zeros(2).double())
    with torch.inference_mode():
        assert torch.equal(derived.get([source, torch.ones(1)], make), torch.zeros(2).double())
    assert len(made) == 7


def test_a_narrow_frame_has_a_smaller_state() -> None:
    for spec in (S4(), S4D()):
        assert spec.sized(Frame(width=2048)).state == 64
        assert spec.sized(Frame(width=128)).state == 16
        wide = replace(spec, state=128)
        assert wide.sized(Frame(width=128)).state == 128

"""Filters made of modes: Vandermonde products against steps, known series, hard decays, far lags."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.modal_filter.ops import modal_filter, modal_response, modal_state, modal_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
DECAYS = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "none": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild beside hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}
KINDS = ["pairs", "real"]


def draw(time, decay="mild", kind="pairs", batch=2, channels=3, modes=5, dtype=torch.float32):
    """Inputs by name; real numbers throughout, pairs of them in a last axis for complex ones."""
    tail = (2,) if kind == "pairs" else ()
    decays = DECAYS[decay](channels, modes)
    inputs = {
        "log_pole": torch.stack([decays, 6 * torch.rand(channels, modes) - 3], -1) if tail else decays,
        "weight": torch.randn(channels, modes, *tail),
        "u": torch.randn(batch, time, channels),
        "state": torch.randn(batch, channels, modes, *tail),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def mode(x, kind):
    return torch.view_as_complex(x.contiguous()) if kind == "pairs" else x


def plain(x):
    return torch.view_as_real(x) if x.is_complex() else x


def everything(kind):
    """The filter, the last state and the response as one call, on real numbers."""

    def call(backend, log_pole, weight, u, state):
        poles, weights, held = (mode(x, kind) for x in (log_pole, weight, state))
        time = u.shape[1]
        return (
            modal_filter(poles, weights, time, backend=backend),
            plain(modal_state(u, poles, held, backend=backend)),
            modal_response(held, poles, weights, time, backend=backend),
        )

    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", LENGTHS)
def test_products_equal_steps(agree, time, decay, kind):
    inputs = draw(time, decay, kind)
    for ask in ([0], [1], [2]):
        agree(everything(kind), inputs, ask=ask, floor=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [1, 40, 65])
def test_no_state_is_a_state_of_zeros(agree, time, kind):
    inputs = draw(time, "mild", kind)
    poles = mode(inputs["log_pole"], kind)
    state = modal_state(inputs["u"], poles)
    zeros = torch.zeros_like(mode(inputs["state"], kind))
    assert torch.allclose(plain(state), plain(modal_state(inputs["u"], poles, zeros)))
    agree(
        lambda backend, p, u: (plain(modal_state(u, mode(p, kind), backend=backend)),),
        {"p": inputs["log_pole"], "u": inputs["u"]},
    )


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 140),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    modes=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    decay=st.sampled_from(sorted(DECAYS)),
)
def test_random_shapes(time, batch, channels, modes, kind, decay):
    inputs = draw(time, decay, kind, batch, channels, modes).values()
    results = [everything(kind)(backend, *inputs) for backend in ("chunked", "reference")]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_filter_is_a_sum_of_powers(near):
    log_pole, weight, *_ = draw(1, dtype=torch.float64).values()
    poles, weights = mode(log_pole, "pairs").exp(), mode(weight, "pairs")
    taps = torch.stack([2 * (weights * poles**lag).sum(-1).real for lag in range(70)], dim=-1)
    near(modal_filter(poles.log(), weights, 70), taps, 1e-13)
    taps = torch.stack([(weights.real * poles.abs() ** lag).sum(-1) for lag in range(70)], dim=-1)
    near(modal_filter(poles.abs().log(), weights.real, 70), taps, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_pair_of_real_numbers_is_half_a_real_mode(near, backend, kind):
    """A complex mode on the real axis counts twice."""
    log_pole, weight, *_ = (x.double() for x in draw(1, kind="real").values())
    scale = 0.5 if kind == "pairs" else 1.0
    cast = (lambda x: x.to(torch.complex128)) if kind == "pairs" else (lambda x: x)
    near(
        modal_filter(cast(log_pole), cast(weight) * scale, 30, backend=backend),
        (weight[..., None] * (log_pole[..., None] * torch.arange(30)).exp()).sum(1),
        1e-13,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_states_cut_anywhere(near, cut, kind):
    log_pole, weight, u, state = draw(75, "mild", kind, dtype=torch.float64).values()
    poles, weights, held = (mode(x, kind) for x in (log_pole, weight, state))
    between = modal_state(u[:, :cut], poles, held)
    near(plain(modal_state(u[:, cut:], poles, between)), plain(modal_state(u, poles, held)), 1e-13)
    # Without inputs a state only fades, and goes on responding.
    between = modal_state(torch.zeros_like(u[:, :cut]), poles, held)
    rest = modal_response(between, poles, weights, 75 - cut)
    near(rest, modal_response(held, poles, weights, 75)[:, cut:], 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_filter_the_response_and_the_state(near, kind):
    log_pole, weight, u, state = draw(40, "mild", kind, dtype=torch.float64).values()
    poles, weights, held = (mode(x, kind) for x in (log_pole, weight, state))
    taps = modal_filter(poles, weights, 40)
    expected = modal_response(held, poles, weights, 40)
    for t in range(40):
        expected[:, t] += (u[:, : t + 1] * taps[:, : t + 1].flip(1).mT).sum(1)
    rows, last = [], held
    for t in range(40):
        y, last = modal_step(u[:, t], poles.exp(), weights, last)
        rows.append(y)
    near(torch.stack(rows, 1), expected, 1e-13)
    near(plain(last), plain(modal_state(u, poles, held)), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend, kind):
    inputs = draw(6, "mild", kind, channels=2, modes=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: everything(kind)(backend, *x), leaves)


def test_far_lags_turn_as_far_as_they_should(near):
    """A float32 product of 30,000 tokens and an angle of 3 is off by a hundredth of a turn."""
    log_pole = torch.complex(torch.full((1, 3), -1e-5), torch.tensor([[3.1, 2.0, 1.0]]))
    weight = torch.ones(1, 3, dtype=torch.complex64)
    taps = modal_filter(log_pole, weight, 30_000)
    near(taps, modal_filter(log_pole.to(torch.complex128), weight, 30_000), 1e-6)


def test_the_table_of_all_powers_is_never_made(largest_bytes):
    log_pole, weight, *_ = draw(1, channels=4, modes=16).values()
    poles, weights = mode(log_pole, "pairs"), mode(weight, "pairs")
    assert largest_bytes(lambda: modal_filter(poles, weights, 8192)) <= 4 * 8192 * 4
    assert 4 * 8192 * 4 < 4 * 16 * 8192 * 8


def test_types_and_autocast(near):
    inputs = draw(50)
    poles, weights, held = (mode(inputs[x], "pairs") for x in ("log_pole", "weight", "state"))
    low = inputs["u"].bfloat16()
    expected = modal_state(low.float(), poles, held)
    with torch.autocast("cpu", torch.bfloat16):
        state = modal_state(low, poles, held)
        taps = modal_filter(poles, weights, 50)
        response = modal_response(held, poles, weights, 50)
        y, last = modal_step(low[:, 0], poles.exp(), weights, held)
    assert torch.equal(state, expected)
    assert state.dtype == last.dtype == torch.complex64
    assert y.dtype == torch.bfloat16
    assert taps.dtype == response.dtype == torch.float32
    assert torch.equal(taps, modal_filter(poles, weights, 50))
    assert state.is_contiguous() and response.is_contiguous()
    assert modal_state(inputs["u"].double(), poles).dtype == torch.complex128
    assert modal_state(inputs["u"].double(), poles.real).dtype == torch.float64
    near(y, modal_step(low[:, 0].float(), poles.exp(), weights, held)[0], 5e-3)


def test_wrong_calls_are_named():
    inputs = draw(5)
    poles, weights, held = (mode(inputs[x], "pairs") for x in ("log_pole", "weight", "state"))
    u = inputs["u"]
    with pytest.raises(ValueError, match=r"modal_filter: weight has shape \[3, 4\].*\[C, N\] = \[3, 5\]"):
        modal_filter(poles, weights[:, :4], 5)
    with pytest.raises(
        ValueError, match=r"modal_filter: weight is torch.float32 and log_pole torch.complex64"
    ):
        modal_filter(poles, weights.real, 5)
    with pytest.raises(ValueError, match="modal_filter: length=0 must be at least 1"):
        modal_filter(poles, weights, 0)
    with pytest.raises(ValueError, match="modal_filter: there is no Triton kernel yet"):
        modal_filter(poles, weights, 5, backend="triton")
    with pytest.raises(ValueError, match="modal_filter: log_pole has shape"):
        modal_filter(poles[0], weights[0], 5)
    with pytest.raises(ValueError, match="modal_state: u has shape"):
        modal_state(u[..., :2], poles, held)
    with pytest.raises(ValueError, match="modal_state: state has shape"):
        modal_state(u, poles, held[:1])
    with pytest.raises(ValueError, match="modal_response: state has shape"):
        modal_response(held[:, :2], poles, weights, 5)
    with pytest.raises(ValueError, match=r"modal_step: state is torch.float32"):
        modal_step(u[:, 0], poles, weights, held.real)
    with pytest.raises(ValueError, match="modal_step: u has shape"):
        modal_step(u, poles, weights, held)

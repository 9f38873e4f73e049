"""Filters of S4: Cauchy sums against powers of the dense matrix, the limit at minus one, states, steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cauchy_filter.ops import (
    cauchy_discrete,
    cauchy_filter,
    cauchy_response,
    cauchy_state,
    cauchy_step,
)

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 130)
NAMES = ("pole", "low_rank", "write", "read", "step", "u", "state")


def draw(time, batch=2, channels=3, pairs=4, rate=0.5, dtype=torch.float32):
    """Inputs by name; real numbers throughout, pairs of them in a last axis for complex ones."""
    inputs = {
        "pole": torch.stack([-rate * (0.5 + torch.rand(pairs)), 8 * torch.rand(pairs) + 0.3], -1),
        "low_rank": torch.randn(pairs, 2),
        "write": torch.randn(pairs, 2),
        "read": torch.randn(channels, pairs, 2),
        "step": 10 ** -(1 + 2 * torch.rand(channels)),
        "u": torch.randn(batch, time, channels),
        "state": torch.randn(batch, channels, pairs, 2),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def parts(inputs):
    """The same with complex numbers where they belong."""
    return {
        name: x if name in ("step", "u") else torch.view_as_complex(x.contiguous())
        for name, x in inputs.items()
    }


def everything(backend, *inputs):
    """The filter, the last state and the response as one call, on real numbers."""
    x = parts(dict(zip(NAMES, inputs, strict=True)))
    space, time = (x["pole"], x["low_rank"]), x["u"].shape[1]
    return (
        cauchy_filter(*space, x["write"], x["read"], x["step"], time, backend=backend),
        torch.view_as_real(cauchy_state(x["u"], *space, x["write"], x["step"], x["state"], backend=backend)),
        cauchy_response(x["state"], *space, x["read"], x["step"], time, backend=backend),
    )


@pytest.mark.parametrize("time", LENGTHS)
def test_sums_equal_powers_of_the_dense_matrix(agree, near, time):
    inputs = draw(time)
    for ask in ([0], [1], [2]):
        # The powers err as well: a dense matrix near one, rounded to float32, fades at a slightly different rate.
        agree(everything, inputs, ask=ask, bound=1e-4, floor=1e-2)
    exact = everything("reference", *(x.double() for x in inputs.values()))
    for actual, expected in zip(everything("chunked", *inputs.values()), exact, strict=True):
        near(actual, expected)


@pytest.mark.parametrize("time", LENGTHS)
def test_sums_equal_powers_in_float64(agree, time):
    agree(everything, draw(time, dtype=torch.float64), bound=1e-12)


@pytest.mark.parametrize("pairs", [8, 32, 64])
def test_legendre_states_of_published_sizes(near, pairs):
    """The eigenvalues of S4 reach thousands, and float32 must bear it."""
    order = torch.arange(2 * pairs).double()
    matrix = -(torch.outer(2 * order + 1, 2 * order + 1).sqrt().tril(-1) + torch.diag(order + 1))
    column, entering = (order + 0.5).sqrt(), (2 * order + 1).sqrt()
    skew = matrix + torch.outer(column, column) + 0.5 * torch.eye(2 * pairs)
    angles, vectors = torch.linalg.eigh(-1j * skew)
    vectors = vectors[:, pairs:]
    pole = torch.complex(torch.full_like(angles[pairs:], -0.5), angles[pairs:])
    low_rank, write = (vectors.mH @ x.to(vectors.dtype) for x in (column, entering))
    read = torch.randn(3, pairs, dtype=torch.complex128)
    step = torch.tensor([1e-3, 1e-2, 1e-1]).double()
    # The original matrix, real and dense, stepped by the bilinear rule.
    one, taps = torch.eye(2 * pairs).double(), []
    back = 2 * (read.unsqueeze(1) * vectors.mH.T).sum(-1).real
    for channel, delta in enumerate(step):
        left = one - delta / 2 * matrix
        forward = torch.linalg.solve(left, one + delta / 2 * matrix)
        x, row = torch.linalg.solve(left, delta * entering), []
        for _ in range(100):
            row.append(back[channel] @ x)
            x = forward @ x
        taps.append(torch.stack(row))
    inputs = (pole, low_rank, write, read, step)
    near(cauchy_filter(*inputs, 100), torch.stack(taps), 1e-11)
    low = [x.to(torch.complex64) if x.is_complex() else x.float() for x in inputs]
    near(cauchy_filter(*low, 100), torch.stack(taps), 1e-4)


def test_the_highest_frequency_is_its_limit(near):
    """At z = -1 the spectrum is half a step times what is read of what is written, and no 0/0."""
    x = parts(draw(1, dtype=torch.float64))
    space = (x["pole"], x["low_rank"], x["write"])
    taps = cauchy_filter(*space, x["read"], x["step"], 64)
    # What is read of a state after 64 tokens is missing from a filter cut there.
    basis = torch.eye(4, dtype=torch.complex128)
    after = cauchy_response(
        torch.stack([basis, 1j * basis]).flatten(0, 1).unsqueeze(1).expand(-1, 3, -1),
        *space[:2],
        x["read"],
        x["step"],
        64,
    )[:, -1]
    cut = x["read"] - torch.complex(after[:4].mT, -after[4:].mT) / 2
    expected = x["step"] / 2 * 2 * (cut * x["write"]).sum(-1).real
    alternating = (taps * (-1.0) ** torch.arange(64)).sum(-1)
    near(alternating, expected, 1e-12)


def test_without_the_rank_one_part_it_is_diagonal(near):
    x = parts(draw(1, dtype=torch.float64))
    nothing = torch.zeros_like(x["low_rank"])
    taps = cauchy_filter(x["pole"], nothing, x["write"], x["read"], x["step"], 50)
    half = x["step"][:, None] / 2 * x["pole"]
    poles, entered = (1 + half) / (1 - half), x["step"][:, None] * x["write"] / (1 - half)
    expected = torch.stack([2 * (x["read"] * entered * poles**lag).sum(-1).real for lag in range(50)], dim=-1)
    near(taps, expected, 1e-13)
    with_it = cauchy_filter(x["pole"], x["low_rank"], x["write"], x["read"], x["step"], 50)
    assert (with_it - taps).abs().max() > 1e-2


@settings(deadline=None, max_examples=10)
@given(time=st.integers(1, 140), batch=st.integers(1, 3), channels=st.integers(1, 4), pairs=st.integers(1, 6))
def test_random_shapes(time, batch, channels, pairs):
    inputs = draw(time, batch, channels, pairs, dtype=torch.float64).values()
    results = [everything(backend, *inputs) for backend in ("chunked", "reference")]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rate", [1e-3, 50.0, 1e4])
def test_modes_that_hardly_fade_and_that_fade_at_once(agree, rate):
    """At a rate of 10,000 the bilinear factor is nearly minus one: it rings, and stays bounded."""
    agree(everything, draw(75, rate=rate), bound=1e-4, floor=1e-2)


@pytest.mark.parametrize("time", [1, 40])
def test_no_state_is_a_state_of_zeros(time):
    x = parts(draw(time))
    given_ = (x["u"], x["pole"], x["low_rank"], x["write"], x["step"])
    for backend in ("chunked", "reference"):
        without = cauchy_state(*given_, backend=backend)
        zeros = cauchy_state(*given_, torch.zeros_like(x["state"]), backend=backend)
        assert torch.equal(without, zeros)


@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_states_cut_anywhere(near, cut):
    x = parts(draw(75, dtype=torch.float64))
    space, u = (x["pole"], x["low_rank"], x["write"], x["step"]), x["u"]
    between = cauchy_state(u[:, :cut], *space, x["state"])
    whole, joined = cauchy_state(u, *space, x["state"]), cauchy_state(u[:, cut:], *space, between)
    near(torch.view_as_real(joined), torch.view_as_real(whole), 1e-13)


def test_steps_are_the_powers_of_the_dense_matrix(near):
    x = parts(draw(40, dtype=torch.float64))
    pole, low_rank, write, read, step, u, state = x.values()
    taps = cauchy_filter(pole, low_rank, write, read, step, 40, backend="reference")
    expected = cauchy_response(state, pole, low_rank, read, step, 40, backend="reference")
    for t in range(40):
        expected[:, t] += (u[:, : t + 1] * taps[:, : t + 1].flip(1).mT).sum(1)
    known = cauchy_discrete(pole, low_rank, write, step)
    rows, last = [], state
    for t in range(40):
        y, last = cauchy_step(u[:, t], known, read, last)
        rows.append(y)
    near(torch.stack(rows, 1), expected, 1e-13)
    whole = cauchy_state(u, pole, low_rank, write, step, state, backend="reference")
    near(torch.view_as_real(last), torch.view_as_real(whole), 1e-13)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend):
    inputs = draw(5, channels=2, pairs=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: everything(backend, *x), leaves)


def test_channels_may_come_in_pieces(near, monkeypatch):
    inputs = list(parts(draw(30)).values())[:5]
    whole = cauchy_filter(*inputs, 30)
    monkeypatch.setattr("kernels.cauchy_filter.chunked.AT_ONCE", 1)
    near(cauchy_filter(*inputs, 30), whole, 1e-6)


def test_types_and_autocast():
    x = parts(draw(50))
    pole, low_rank, write, read, step, u, state = x.values()
    low = u.bfloat16()
    expected = cauchy_state(low.float(), pole, low_rank, write, step, state)
    with torch.autocast("cpu", torch.bfloat16):
        taps = cauchy_filter(pole, low_rank, write, read, step, 50)
        carried = cauchy_state(low, pole, low_rank, write, step, state)
        response = cauchy_response(state, pole, low_rank, read, step, 50)
        y, last = cauchy_step(low[:, 0], cauchy_discrete(pole, low_rank, write, step), read, state)
    assert torch.equal(carried, expected)
    assert torch.equal(taps, cauchy_filter(pole, low_rank, write, read, step, 50))
    assert taps.dtype == response.dtype == torch.float32
    assert carried.dtype == last.dtype == torch.complex64
    assert y.dtype == torch.bfloat16
    assert carried.is_contiguous() and response.is_contiguous()
    assert cauchy_filter(pole, low_rank, write, read, step.double(), 5).dtype == torch.float64


def test_wrong_calls_are_named():
    x = parts(draw(5))
    pole, low_rank, write, read, step, u, state = x.values()
    with pytest.raises(ValueError, match=r"cauchy_filter: low_rank has shape \[3\].*\[N\] = \[4\]"):
        cauchy_filter(pole, low_rank[:3], write, read, step, 5)
    with pytest.raises(ValueError, match=r"cauchy_filter: write is torch.float32, but must be complex"):
        cauchy_filter(pole, low_rank, write.real, read, step, 5)
    with pytest.raises(ValueError, match=r"cauchy_filter: step has shape \[2\]"):
        cauchy_filter(pole, low_rank, write, read, step[:2], 5)
    with pytest.raises(ValueError, match="cauchy_filter: length=0 must be at least 1"):
        cauchy_filter(pole, low_rank, write, read, step, 0)
    with pytest.raises(ValueError, match="cauchy_filter: there is no Triton kernel yet"):
        cauchy_filter(pole, low_rank, write, read, step, 5, backend="triton")
    with pytest.raises(ValueError, match="cauchy_state: state has shape"):
        cauchy_state(u, pole, low_rank, write, step, state[:, :, :3])
    with pytest.raises(ValueError, match=r"cauchy_response: state is torch.float32"):
        cauchy_response(state.real, pole, low_rank, read, step, 5)
    with pytest.raises(ValueError, match="cauchy_response: read has shape"):
        cauchy_response(state, pole, low_rank, read[:2], step, 5)
    with pytest.raises(ValueError, match="cauchy_discrete: step has shape"):
        cauchy_discrete(pole, low_rank, write, step[:, None])
    known = cauchy_discrete(pole, low_rank, write, step)
    with pytest.raises(ValueError, match="cauchy_step: u has shape"):
        cauchy_step(u, known, read, state)
    with pytest.raises(ValueError, match=r"cauchy_step: known\.change has shape"):
        cauchy_step(u[:, 0, :2], known, read, state)
    with pytest.raises(ValueError, match="cauchy_step: state has shape"):
        cauchy_step(u[:, 0], known, read, state[:1])

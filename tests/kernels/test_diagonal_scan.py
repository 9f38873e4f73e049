"""Diagonal recurrence: blocks against steps, a closed form, causality, hard gates, complex numbers."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.diagonal_scan import chunked, triton
from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step, mode_scan, mode_scan_step

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 130)
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "zero": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -50 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}


def draw(time, gate="mild", batch=2, channels=7, dtype=torch.float32):
    """Inputs by name, in the order of the call; complex ones turn as they fade."""
    inputs = {
        "log_decay": GATES[gate](batch, time, channels),
        "x": torch.randn(batch, time, channels),
        "state": torch.randn(batch, channels),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if dtype.is_complex:
        inputs = {name: x + 1j * torch.randn(x.shape, dtype=x.real.dtype) for name, x in inputs.items()}
    return inputs


def call(backend, *inputs):
    return diagonal_scan(*inputs, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_blocks_equal_steps(agree, time, gate):
    agree(call, draw(time, gate))


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_gradient_of_one_result_alone(agree, ask):
    agree(call, draw(75), ask=ask)


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, time):
    inputs = draw(time)
    del inputs["state"]
    agree(call, inputs)
    output, last = diagonal_scan(*inputs.values())
    expected, expected_last = diagonal_scan(*inputs.values(), torch.zeros(2, 7))
    assert torch.equal(output, expected)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("size", [1, 2, 16, 20, 33, 75, 100])
def test_any_block_will_do(agree, size):
    def cut(backend, *inputs):
        if backend == "reference":
            return diagonal_scan(*inputs, backend=backend)
        return chunked.diagonal_scan(*inputs, size)

    agree(cut, draw(75, "mild behind hard"))


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 70),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    size=st.integers(1, 70),
    gate=st.sampled_from(sorted(GATES)),
)
def test_random_shapes(time, batch, channels, size, gate):
    inputs = draw(time, gate, batch, channels).values()
    output, last = chunked.diagonal_scan(*inputs, size)
    expected, expected_last = call("reference", *inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)


def test_blocks_are_even_and_none_is_empty():
    for time in range(1, 700):
        size = chunked.block_size(time)
        blocks = -(-time // size)
        assert 1 <= size <= time
        assert blocks * size - time < blocks


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_it_is_a_weighted_sum_of_the_past(near, backend):
    """h_t = Σ_{s ≤ t} exp(g_{s+1} + … + g_t) x_s, in float64 over all pairs."""
    log_decay, x, state = draw(40).values()
    total = log_decay.double().cumsum(1)
    between = total[:, :, None] - total[:, None]
    weights = between.exp() * torch.ones(40, 40, dtype=torch.float64).tril()[None, :, :, None]
    expected = (weights * x.double()[:, None]).sum(2) + total.exp() * state.double()[:, None]
    output, last = diagonal_scan(log_decay, x, state, backend=backend)
    near(output, expected)
    assert torch.equal(last, output[:, -1])


def test_no_decay_at_all_is_a_running_sum(near):
    _, x, state = draw(65).values()
    output, _ = diagonal_scan(torch.zeros_like(x), x, state)
    near(output, x.cumsum(1) + state[:, None])


def test_a_decay_of_nought_forgets_all(agree):
    inputs = draw(65)
    inputs["log_decay"][:, 20] = -math.inf
    output, _ = diagonal_scan(*inputs.values())
    assert torch.equal(output[:, 20], inputs["x"][:, 20])
    agree(call, inputs)
    inputs["log_decay"][:] = -math.inf
    output, last = diagonal_scan(*inputs.values())
    assert torch.equal(output, inputs["x"])
    assert torch.equal(last, inputs["x"][:, -1])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    log_decay, x, state = draw(75).values()
    expected, expected_last = diagonal_scan(log_decay, x, state, backend="reference")
    first, state = diagonal_scan(log_decay[:, :cut], x[:, :cut], state, backend=backend)
    rest, state = diagonal_scan(log_decay[:, cut:], x[:, cut:], state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_steps_equal_forward(near, dtype):
    log_decay, x, state = draw(20, dtype=dtype).values()
    expected, expected_last = diagonal_scan(log_decay, x, state)
    outputs = []
    for t in range(20):
        state = diagonal_scan_step(log_decay[:, t], x[:, t], state)
        outputs.append(state)
    output = torch.stack(outputs, 1)
    assert output.dtype == expected.dtype == dtype
    if dtype.is_complex:
        output, expected, state, expected_last = map(
            torch.view_as_real, (output, expected, state, expected_last)
        )
    near(output, expected)
    near(state, expected_last)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    log_decay, x, state = draw(76).values()
    before, _ = diagonal_scan(log_decay, x, state, backend=backend)
    for future in (0.5, 1e3, torch.nan):
        changed = [log_decay.clone(), x.clone()]
        for tensor in changed:
            tensor[:, t + 1 :] = -future
        after, _ = diagonal_scan(*changed, state, backend=backend)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_no_gradient_reaches_the_future():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    output, _ = diagonal_scan(*inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:2]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


def test_channels_do_not_meet():
    log_decay, x, state = draw(40).values()
    before, _ = diagonal_scan(log_decay, x, state)
    for tensor in (log_decay, x, state):
        tensor[..., 3] -= 1
    after, _ = diagonal_scan(log_decay, x, state)
    assert [torch.equal(after[..., c], before[..., c]) for c in range(7)] == [c != 3 for c in range(7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [None, 1, 4])
def test_gradients_in_float64(dtype, size):
    leaves = [x.requires_grad_() for x in draw(7, batch=1, channels=2, dtype=dtype).values()]
    assert torch.autograd.gradcheck(lambda *x: chunked.diagonal_scan(*x, size), leaves)
    assert torch.autograd.gradcheck(lambda *x: diagonal_scan(*x, backend="reference"), leaves)


@pytest.mark.parametrize("time", [1, 17, 75])
def test_complex_blocks_equal_steps(near, time):
    """A complex factor turns the state as it fades; real and imaginary parts are asked for by themselves."""
    inputs = draw(time, dtype=torch.complex64).values()
    found = []
    for backend in ("reference", "chunked"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = diagonal_scan(*leaves, backend=backend)
        torch.manual_seed(1)
        loss = sum((torch.view_as_real(y) * torch.randn(*y.shape, 2)).sum() for y in results)
        found.append([*results, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(found[1], found[0], strict=True):
        near(torch.view_as_real(actual), torch.view_as_real(expected))


def test_the_layout_of_the_memory_does_not_matter(agree):
    inputs = draw(20)
    for name in ("log_decay", "x"):
        inputs[name] = inputs[name].mT.contiguous().mT
    agree(call, inputs)
    steady = inputs["log_decay"][:1, :1].expand(2, 20, 7)
    output, _ = diagonal_scan(steady, inputs["x"])
    expected, _ = diagonal_scan(steady.contiguous(), inputs["x"], backend="reference")
    torch.testing.assert_close(output, expected)


def test_a_turn_and_no_fading_keeps_the_length(near):
    angle = torch.rand(1, 1, 5).expand(1, 50, 5)
    output, _ = diagonal_scan(
        1j * angle, torch.zeros(1, 50, 5, dtype=torch.complex64), torch.ones(1, 5) * (1 + 0j)
    )
    near(output.abs(), torch.ones(1, 50, 5))
    turned = torch.polar(torch.ones(5), 50 * angle[0, 0])
    near(torch.view_as_real(output[0, -1]), torch.view_as_real(turned), 1e-4)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = diagonal_scan(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    log_decay, x, _ = draw(40, dtype=dtype).values()
    output, last = diagonal_scan(log_decay, x, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    expected, expected_last = diagonal_scan(log_decay.double(), x.double(), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    # What is carried keeps nothing else alive.
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()


def test_autocast_leaves_the_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = diagonal_scan(*inputs)
            loss = output.square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_documents_are_texts_of_their_own(near, dtype):
    spans = (slice(0, 1), slice(1, 21), slice(21, 37))
    log_decay, x, _ = draw(37, batch=1, dtype=dtype).values()
    state = draw(1, batch=3, dtype=dtype)["state"]
    found = []
    for backend in ("reference", "chunked"):
        leaves = [y.clone().requires_grad_() for y in (log_decay, x, state)]
        output, last = diagonal_scan(*leaves, cu_seqlens=torch.tensor([0, 1, 21, 37]), backend=backend)
        loss = (output * output.conj()).real.sum() + (last * last.conj()).real.sum()
        found.append([output, last, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(found[1], found[0], strict=True):
        near(actual, expected)
    apart = [diagonal_scan(log_decay[:, span], x[:, span], state[n : n + 1]) for n, span in enumerate(spans)]
    assert torch.equal(found[1][0], torch.cat([y for y, _ in apart], 1))
    assert torch.equal(found[1][1], torch.cat([last for _, last in apart]))


def results(backend, inputs, ask=(0, 1)):
    """Outputs and gradients of all inputs for a loss of the outputs asked for."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = diagonal_scan(*leaves, backend=backend)
    loss = sum((outputs[i] * outputs[i].conj()).real.sum() for i in ask)
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_triton_derives_either_result_alone(near, ask):
    inputs = draw(17).values()
    for actual, expected in zip(
        results("triton", inputs, ask), results("reference", inputs, ask), strict=True
    ):
        near(actual, expected)


def test_triton_walks_many_tiles_and_forgets_all_at_a_decay_of_nought(near):
    inputs = draw(3, channels=600)
    inputs["log_decay"][:, 1] = -math.inf
    assert torch.equal(diagonal_scan(*inputs.values(), backend="triton")[0][:, 1], inputs["x"][:, 1])
    for actual, expected in zip(
        results("triton", inputs.values()), results("reference", inputs.values()), strict=True
    ):
        near(actual, expected)


def test_triton_keeps_states_before_chunks_only_for_a_gradient(monkeypatch):
    kept = []
    monkeypatch.setattr(triton, "launch", lambda *call, **_: kept.append(call[3][5]))
    inputs = [x.requires_grad_() for x in draw(20).values()]
    with torch.no_grad():
        diagonal_scan(*inputs, backend="triton")
    diagonal_scan(*inputs, backend="triton")
    assert kept[0] is None
    assert kept[1] is not None


@pytest.mark.parametrize("size", [1.0, 30.0, 3e4, 1e9])
def test_triton_turns_by_any_angle(near, size):
    """Complex numbers that are conjugates by a flag alone, too; and what was turned far is as exact as what was not."""
    inputs = draw(3, dtype=torch.complex64)
    inputs["log_decay"] = torch.complex(inputs["log_decay"].real, size * inputs["log_decay"].imag)
    conjugates = [x.conj() for x in inputs.values()]
    expected = results("reference", [x.resolve_conj().to(torch.complex128) for x in conjugates])
    for actual, wide in zip(results("triton", conjugates), expected, strict=True):
        near(actual, wide)


def test_triton_never_grows_by_turning():
    log_decay = torch.complex(torch.zeros(1, 20, 7), 1e30 * torch.randn(1, 20, 7))
    state = torch.ones(1, 7, dtype=torch.complex64)
    h, _ = diagonal_scan(log_decay, torch.zeros_like(log_decay), state, backend="triton")
    torch.testing.assert_close(h.abs(), torch.ones(1, 20, 7))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 35), r"x has shape \[2, 35\], but must be \[B, T, C\]"),
        ("x", (2, 0, 7), r"x has shape \[2, 0, 7\]"),
        ("log_decay", (2, 5, 1), r"log_decay has shape .*\[B, T, C\] = \[2, 5, 7\]"),
        ("state", (2, 1, 7), r"state has shape .*\[B, C\] = \[2, 7\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"diagonal_scan: {message}"):
        diagonal_scan(*inputs.values())


def test_wrong_settings_are_named():
    log_decay, x, state = draw(5).values()
    with pytest.raises(ValueError, match=r"diagonal_scan: a tensor is torch.complex128.*, and complex64"):
        diagonal_scan(log_decay + 0j, x.double() + 0j, backend="triton")
    with pytest.raises(ValueError, match="diagonal_scan: cu_seqlens packs documents in one row"):
        diagonal_scan(log_decay, x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"some are real; convert the real ones with .to\(torch.complex64\)"):
        diagonal_scan(log_decay + 0j, x, state + 0j)
    with pytest.raises(ValueError, match="diagonal_scan_step: some of"):
        diagonal_scan_step(log_decay[:, 0], x[:, 0], state + 0j)
    with pytest.raises(ValueError, match=r"diagonal_scan_step: a tensor is torch.float64"):
        diagonal_scan_step(log_decay[:, 0], x[:, 0], state.double(), backend="triton")
    with pytest.raises(ValueError, match="diagonal_scan_step: state has shape"):
        diagonal_scan_step(log_decay[:, 0], x[:, 0], state[:1])


def modes(kind, batch=2, time=20, channels=5, count=3):
    """Poles, weights, inputs and a state in float64; every third channel forgets all at once."""
    torch.manual_seed(3)
    real = -torch.rand(channels, count, dtype=torch.float64)
    real[::3] *= 100
    weight, state = torch.randn(channels, count).double(), torch.randn(batch, channels, count).double()
    u = torch.randn(batch, time, channels, dtype=torch.float64)
    if kind == "real":
        return real, weight, u, state
    return (
        torch.complex(real, 3 * torch.randn_like(real)),
        torch.complex(weight, torch.randn_like(weight)),
        u,
        torch.complex(state, torch.randn_like(state)),
    )


def walk(log_pole, weight, u, state):
    """The recurrence written out."""
    outputs, twice = [], 2 if log_pole.is_complex() else 1
    for t in range(u.shape[1]):
        state = log_pole.exp() * state + u[:, t, :, None]
        outputs.append(twice * (weight * state).real.sum(-1))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_modes_are_their_recurrence_and_their_steps(near, backend, kind):
    inputs = [x.requires_grad_() for x in modes(kind)]
    results = mode_scan(*inputs, backend=backend)
    expected = walk(*inputs)
    plain = [torch.view_as_real(x) if x.is_complex() else x for x in (*results, *expected)]
    near(plain[0], plain[2], 1e-12)
    near(plain[1], plain[3], 1e-12)
    found, wanted = (
        torch.autograd.grad(sum(x.square().sum() for x in pair), inputs, retain_graph=True)
        for pair in (plain[:2], plain[2:])
    )
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-10)
    log_pole, weight, u, state = inputs
    for t in range(u.shape[1]):
        y, state = mode_scan_step(log_pole.exp(), weight, u[:, t], state)
        torch.testing.assert_close(y, expected[0][:, t])
    torch.testing.assert_close(state, expected[1])


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_stacked_members_have_modes_of_their_own(near, backend):
    log_pole, weight, u, _ = (
        x.to(torch.complex64 if x.is_complex() else torch.float32) for x in modes("complex")
    )
    members = [torch.stack(column) for column in ((log_pole, log_pole / 2), (weight, weight + 1), (u, -u))]
    call = partial(mode_scan, backend=backend)
    y, last = torch.func.vmap(call)(*members)
    for m in range(2):
        alone, held = call(*(x[m] for x in members))
        near(y[m], alone)
        near(torch.view_as_real(last[m]), torch.view_as_real(held))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_modes_of_packed_documents(near, backend):
    log_pole, weight, u, state = modes("complex", batch=3)
    spans = (slice(0, 1), slice(1, 13), slice(13, 20))
    y, last = mode_scan(
        log_pole, weight, u[:1], state, cu_seqlens=torch.tensor([0, 1, 13, 20]), backend=backend
    )
    for n, span in enumerate(spans):
        alone, held = mode_scan(log_pole, weight, u[:1, span], state[n : n + 1])
        near(y[:, span], alone, 1e-12)
        near(torch.view_as_real(last[n : n + 1]), torch.view_as_real(held), 1e-12)


def test_wrong_modes_are_named():
    log_pole, weight, u, state = modes("complex")
    with pytest.raises(ValueError, match=r"mode_scan: weight is torch.float64 and log_pole torch.complex128"):
        mode_scan(log_pole, weight.real, u)
    with pytest.raises(ValueError, match=r"mode_scan: log_pole has shape .*\[C, N\] = \[5, 3\]"):
        mode_scan(log_pole[:4], weight, u)
    with pytest.raises(ValueError, match=r"mode_scan: weight has shape .*\[B, C, N\] = \[2, 5, 3\]"):
        mode_scan(log_pole, weight[None], u)
    with pytest.raises(ValueError, match="mode_scan: state has shape"):
        mode_scan(log_pole, weight, u, state[:1])
    with pytest.raises(ValueError, match=r"mode_scan_step: state is torch.float64"):
        mode_scan_step(log_pole, weight, u[:, 0], state.real)
    with pytest.raises(ValueError, match="mode_scan_step: u has shape"):
        mode_scan_step(log_pole, weight, u, state)

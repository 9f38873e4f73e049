"""Trapezoidal recurrence: chunks against steps, the matrix it stands for, no look-ahead, extreme gates."""

import math
from functools import partial

import pytest
import torch

from kernels.scalar_decay.ops import scalar_decay
from kernels.trapezoid.ops import trapezoid, trapezoid_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "zero": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}


def draw(time, gate="mild", batch=2, ranks=1, heads=3, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call, the token before as its last two."""
    inputs = {
        "q": torch.randn(batch, time, ranks, heads, key),
        "k": torch.randn(batch, time, ranks, heads, key),
        "v": torch.randn(batch, time, ranks, heads, value),
        "log_decay": GATES[gate](batch, time, heads),
        "late": torch.rand(batch, time, heads),
        "fresh": torch.rand(batch, time, heads),
        "state": torch.randn(batch, heads, key, value),
        "before_k": torch.randn(batch, ranks, heads, key),
        "before_v": torch.randn(batch, ranks, heads, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(backend, q, k, v, log_decay, late, fresh, state, before_k, before_v, chunk=64):
    return trapezoid(
        q, k, v, log_decay, late, fresh, state, (before_k, before_v), chunk=chunk, backend=backend
    )


def test_stacked_members_have_a_token_before_of_their_own(near):
    """It is a tuple of tensors."""
    members = [draw(9), draw(9)]
    stacked = [torch.stack(column) for column in zip(*(one.values() for one in members), strict=True)]
    results = torch.func.vmap(partial(call, "chunked"))(*stacked)
    for m, one in enumerate(members):
        for actual, expected in zip(results, call("chunked", *one.values()), strict=True):
            near(actual[m], expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    agree(call, draw(time, gate))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("time", [1, 2, 17, 64, 75])
def test_chunks_of_several_rows_a_token_equal_steps(agree, time, ranks):
    for gate in ("mild", "mild behind hard"):
        agree(lambda backend, *x: call(backend, *x, chunk=16), draw(time, gate, ranks=ranks))


@pytest.mark.parametrize("chunk", [1, 2, 16, 20, 33, 100])
def test_any_chunk_will_do(agree, chunk):
    agree(lambda backend, *x: call(backend, *x, chunk=chunk), draw(75, "mild behind hard", ranks=2))


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_gradient_of_one_result_alone(agree, ask):
    agree(call, draw(75), ask=ask)


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, near, time):
    inputs = list(draw(time).items())[:6]
    agree(lambda backend, *x: trapezoid(*x, backend=backend), dict(inputs))
    values = [x for _, x in inputs]
    none = torch.zeros(2, 3, 12, 20), (torch.zeros(2, 1, 3, 12), torch.zeros(2, 1, 3, 20))
    for a, b in zip(trapezoid(*values), trapezoid(*values, *none), strict=True):
        near(a, b, 1e-6)


def matrix_form(q, k, v, log_decay, late, fresh):
    """o_t = Σ_s M_ts Σ_r (q_t·k_sr) v_sr, with M_ts summed up from every way in which token s is written."""
    time = q.shape[1]
    mix = torch.zeros(q.shape[0], q.shape[3], time, time)
    for s in range(time):
        for t in range(s, time):
            # Straight away, and one token later, before that token's decay.
            mix[:, :, t, s] = fresh[:, s] * log_decay[:, s + 1 : t + 1].sum(1).exp()
            if t > s:
                mix[:, :, t, s] += late[:, s + 1] * log_decay[:, s + 1 : t + 1].sum(1).exp()
    return torch.einsum("btqhk,bsrhk,bhts,bsrhv->btqhv", q, k, mix, v)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_it_is_its_matrix(near, backend, ranks):
    inputs = list(draw(40, ranks=ranks).values())[:6]
    output, _ = trapezoid(*inputs, backend=backend, chunk=16)
    near(output, matrix_form(*inputs))


def test_with_nothing_late_it_is_scalar_decay(near):
    q, k, v, log_decay, late, fresh, state, *before = draw(75).values()
    output, last = trapezoid(q, k, v, log_decay, torch.zeros_like(late), fresh, state, tuple(before))
    scaled = v[:, :, 0] * fresh[..., None]
    expected, expected_last = scalar_decay(q[:, :, 0], k[:, :, 0], scaled, log_decay, state)
    near(output[:, :, 0], expected)
    near(last, expected_last)


def test_rows_of_a_token_are_written_together_and_each_reads_all(near):
    q, k, v, *rest = draw(40, ranks=3).values()
    output, last = trapezoid(q, k, v, *rest[:4])
    # The state is the sum of the rows' own, and every row's query reads that sum.
    parts = [
        [trapezoid(q[:, :, [r]], k[:, :, [s]], v[:, :, [s]], *rest[:3]) for s in range(3)] for r in range(3)
    ]
    for r in range(3):
        near(
            output[:, :, r],
            sum(part[0][:, :, 0] for part in parts[r]) + decayed(q[:, :, r], rest[0], rest[3]),
        )
    near(last, sum(part[1] for part in parts[0]) + rest[0].sum(1).exp()[..., None, None] * rest[3])


def decayed(q, log_decay, state):
    """What the queries [B, T, H, K] read of the first state alone."""
    return torch.einsum("bthk,bth,bhkv->bthv", q, log_decay.cumsum(1).exp(), state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    *inputs, state, before_k, before_v = draw(75, ranks=2).values()
    whole = {"chunk": 16, "backend": backend}
    expected, expected_last = trapezoid(*inputs, state, (before_k, before_v), backend="reference")
    first, state = trapezoid(*(x[:, :cut] for x in inputs), state, (before_k, before_v), **whole)
    between = inputs[1][:, cut - 1], inputs[2][:, cut - 1]
    rest, state = trapezoid(*(x[:, cut:] for x in inputs), state, between, **whole)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


def test_steps_equal_forward(near):
    *inputs, state, before_k, before_v = draw(20, ranks=2).values()
    before = before_k, before_v
    expected, expected_last = trapezoid(*inputs, state, before)
    outputs = []
    for t in range(20):
        output, state = trapezoid_step(*(x[:, t] for x in inputs), state, before)
        outputs.append(output)
        before = inputs[1][:, t], inputs[2][:, t]
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = list(draw(76).values())
    before, _ = call(backend, *inputs)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in inputs]
        for x in changed[:6]:
            x[:, t + 1 :] = -future
        after, _ = call(backend, *changed)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_no_gradient_reaches_the_future():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    output, _ = call("auto", *inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:6]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize(("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 3)])
def test_gradients_in_float64(backend, chunk):
    inputs = draw(7, batch=1, ranks=2, heads=2, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x, chunk=chunk), leaves)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = call("chunked", *leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


def test_a_gate_that_forgets_all_leaves_the_later_ones_exact(agree):
    inputs = draw(40, "mild")
    inputs["log_decay"][:, ::7] = -1e30
    agree(call, inputs)


def test_the_small_gradient_of_a_hard_gate_is_not_drowned(near):
    """One gate of -20 among mild ones: what crosses it is e^-20 of the rest, and so is its gradient."""
    inputs = draw(64, batch=1, heads=1, dtype=torch.float32)
    inputs["log_decay"][:, 20] = -20.0
    found = []
    for backend in ("reference", "chunked"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        output, last = call(backend, *leaves)
        found.append(torch.autograd.grad(output.square().sum() + last.square().sum(), leaves)[3][0, 20, 0])
    near(found[1], found[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    inputs = list(draw(40, ranks=2, dtype=dtype).values())[:6]
    output, last = trapezoid(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous() and last.is_contiguous()
    expected, expected_last = trapezoid(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    before = inputs[1][:, 0], inputs[2][:, 0]
    stepped, _ = trapezoid_step(*(x[:, 0] for x in inputs), torch.zeros_like(last), before, backend=backend)
    assert stepped.dtype == dtype


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = call("auto", *inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 1, 3, 11), r"q has shape .*\[B, T, R, H, K\] = \[2, 5, 1, 3, 12\]"),
        ("k", (2, 5, 3, 12), r"k has shape .*\[B, T, R, H, K\]"),
        ("v", (2, 5, 2, 3, 20), r"v has shape .*\[2, 5, 1, 3, 20\]"),
        ("late", (2, 5, 3, 1), r"late has shape .*\[2, 5, 3\]"),
        ("state", (2, 3, 20, 12), r"state has shape .*\[2, 3, 12, 20\]"),
        ("before_v", (2, 3, 20), r"previous\[1\] has shape .*\[2, 1, 3, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"trapezoid: {message}"):
        call("auto", *inputs.values())


def test_wrong_settings_are_named():
    *inputs, state, before_k, before_v = draw(5).values()
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        trapezoid(*inputs, chunk=0)
    with pytest.raises(ValueError, match=r"trapezoid: a tensor is torch\.float64"):
        trapezoid(*(x.double() for x in inputs), backend="triton")
    with pytest.raises(ValueError, match="trapezoid_step: state has shape"):
        trapezoid_step(*(x[:, 0] for x in inputs), state.mT, (before_k, before_v))

"""Linear recurrence with one decay a head: chunks against steps, known equalities, causality, oracles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 75, 130)
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "zero": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
    "none": None,
}


def draw(time, gate="mild", batch=2, groups=2, heads=4, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call, without log_decay for the gate `none`."""
    inputs = {
        "q": torch.randn(batch, time, groups, key),
        "k": torch.randn(batch, time, groups, key),
        "v": torch.randn(batch, time, heads, value),
        "log_decay": GATES[gate](batch, time, heads) if GATES[gate] else None,
        "state": torch.randn(batch, heads, key, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items() if x is not None}


def call(backend, q, k, v, *rest, chunk=64):
    """rest is log_decay and state, or the state alone."""
    log_decay, state = rest if len(rest) == 2 else (None, *rest)
    return scalar_decay(q, k, v, log_decay, state, chunk=chunk, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    agree(call, draw(time, gate))


@pytest.mark.parametrize("gate", ["mild", "none"])
@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_gradient_of_one_result_alone(agree, ask, gate):
    agree(call, draw(75, gate), ask=ask)


@pytest.mark.parametrize("gate", ["mild", "none"])
@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, near, time, gate):
    inputs = draw(time, gate)
    del inputs["state"]
    q, k, v, log_decay = (*inputs.values(), None)[:4]
    agree(lambda backend, *x: scalar_decay(*(*x, None)[:4], backend=backend), inputs)
    output, last = scalar_decay(q, k, v, log_decay)
    expected, expected_last = scalar_decay(q, k, v, log_decay, torch.zeros(2, 4, 12, 20))
    near(output, expected, 1e-6)
    near(last, expected_last, 1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 16, 20, 33, 100])
def test_any_chunk_will_do(agree, chunk):
    agree(lambda backend, *x: call(backend, *x, chunk=chunk), draw(75, "mild behind hard"))
    agree(lambda backend, *x: call(backend, *x, chunk=chunk), draw(75, "none"))


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 3), (3, 3), (2, 6)])
@pytest.mark.parametrize("gate", ["mild", "none"])
def test_groups_are_repeated_heads(agree, near, groups, heads, gate):
    inputs = draw(40, gate, groups=groups, heads=heads)
    agree(call, inputs)
    output, last = call("chunked", *inputs.values())
    inputs["q"], inputs["k"] = (inputs[x].repeat_interleave(heads // groups, dim=2) for x in "qk")
    for backend in ("reference", "chunked"):
        expected, expected_last = call(backend, *inputs.values())
        near(output, expected, 2e-6)
        near(last, expected_last, 2e-6)


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 70),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    chunk=st.integers(1, 70),
    gate=st.sampled_from(sorted(GATES)),
)
def test_random_shapes(time, batch, groups, shared, key, value, chunk, gate):
    inputs = draw(time, gate, batch, groups, groups * shared, key, value).values()
    output, last = call("chunked", *inputs, chunk=chunk)
    expected, expected_last = call("reference", *inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)


def test_without_decay_it_is_causal_linear_attention(near):
    q, k, v, _ = draw(75, "none", groups=4).values()
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshv->bthv", scores, v)
    for backend in ("reference", "chunked"):
        output, last = scalar_decay(q, k, v, None, backend=backend)
        near(output, expected)
        near(last, torch.einsum("bshk,bshv->bhkv", k, v))


def test_fixed_decay_is_retention(near):
    """o_t = Σ_{s ≤ t} γ^(t-s) (q_t·k_s) v_s, arXiv:2307.08621."""
    q, k, v, _ = draw(75, "none", groups=4).values()
    gamma = torch.tensor([0.99, 0.9, 0.5, 1.0])
    distance = torch.arange(75)[:, None] - torch.arange(75)
    decay = (gamma[:, None, None] ** distance.clamp(min=0)).tril()
    expected = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, decay, v)
    output, _ = scalar_decay(q, k, v, gamma.log().expand(2, 75, 4))
    near(output, expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    *inputs, state = draw(75).values()
    expected, expected_last = scalar_decay(*inputs, state, backend="reference")
    first, state = scalar_decay(*(x[:, :cut] for x in inputs), state, backend=backend)
    rest, state = scalar_decay(*(x[:, cut:] for x in inputs), state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("gate", ["mild", "none"])
def test_steps_equal_forward(near, gate):
    inputs = draw(20, gate)
    state = inputs.pop("state")
    q, k, v, log_decay = (*inputs.values(), None)[:4]
    expected, expected_last = scalar_decay(q, k, v, log_decay, state)
    outputs = []
    for t in range(20):
        decay = None if log_decay is None else log_decay[:, t]
        output, state = scalar_decay_step(q[:, t], k[:, t], v[:, t], decay, state)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = draw(76)
    state = inputs.pop("state")
    before, _ = scalar_decay(*inputs.values(), state, backend=backend)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = -future
        after, _ = scalar_decay(*changed, state, backend=backend)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_no_gradient_reaches_the_future():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    output, _ = scalar_decay(*inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:4]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize("gate", ["mild", "none"])
@pytest.mark.parametrize(("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 4)])
def test_gradients_in_float64(backend, chunk, gate):
    inputs = draw(7, gate, batch=1, groups=1, heads=2, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x, chunk=chunk), leaves)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = scalar_decay(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    *inputs, _ = draw(40, dtype=dtype).values()
    output, last = scalar_decay(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = scalar_decay(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    stepped, _ = scalar_decay_step(*(x[:, 0] for x in inputs), torch.zeros_like(last), backend=backend)
    assert stepped.dtype == dtype


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = scalar_decay(*inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_work_grows_with_the_length():
    def flops(time):
        with FlopCounterMode(display=False) as counter:
            scalar_decay(*draw(time).values())
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) > 0


def test_scores_are_shared_by_a_group():
    """Six heads of one group cost one score matrix, not six."""

    def flops(groups, key):
        with FlopCounterMode(display=False) as counter:
            scalar_decay(*draw(64, groups=groups, heads=6, key=key, value=1).values())
        return counter.get_total_flops()

    per_key = (flops(6, 200) - flops(6, 100)) - (flops(1, 200) - flops(1, 100))
    assert per_key == 2 * 2 * 64 * 64 * 100 * (6 - 1)


def test_oracle_mamba2(near):
    pytest.importorskip("transformers")
    from transformers.models.mamba2 import modeling_mamba2

    q, k, v, _, state = draw(75).values()
    dt, rate = 0.1 + torch.rand(2, 75, 4), -torch.rand(4)
    expected, expected_last = modeling_mamba2.mamba2_chunk_scan(
        v, dt, rate, k, q, chunk_size=16, initial_states=state.mT, return_final_states=True
    )
    for backend in ("reference", "chunked"):
        output, last = scalar_decay(q, k, v * dt[..., None], dt * rate, state, backend=backend)
        near(output, expected)
        near(last, expected_last.mT)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 2, 11), r"q has shape \[2, 5, 2, 11\].*\[B, T, G, K\] = \[2, 5, 2, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, G, K\]"),
        ("v", (2, 4, 4, 20), r"v has shape .*\[2, 5, 4, 20\]"),
        ("v", (2, 5, 3, 20), r"3 heads cannot share 2 groups evenly"),
        ("log_decay", (2, 5, 4, 1), r"log_decay has shape"),
        ("state", (2, 4, 20, 12), r"state has shape .*\[2, 4, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"scalar_decay: {message}"):
        scalar_decay(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5)
    with pytest.raises(ValueError, match="chunk=-1 must be at least 1"):
        scalar_decay(*inputs.values(), chunk=-1)
    with pytest.raises(ValueError, match=r"scalar_decay: backend='cuda' is not one of auto"):
        scalar_decay(*inputs.values(), backend="cuda")
    state = inputs.pop("state")
    with pytest.raises(ValueError, match=r"scalar_decay_step: backend='cuda' is not one of auto"):
        scalar_decay_step(*(x[:, 0] for x in inputs.values()), state, backend="cuda")
    with pytest.raises(ValueError, match="scalar_decay_step: state has shape"):
        scalar_decay_step(*(x[:, 0] for x in inputs.values()), state.mT)

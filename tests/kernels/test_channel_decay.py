"""Linear recurrence with a decay a key channel: chunks against steps, known equalities, stability, causality."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from kernels.channel_decay.ops import channel_decay, channel_decay_step
from kernels.scalar_decay.ops import scalar_decay

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 75, 130)
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "none": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}
BONUS = [False, True]


def draw(time, gate="mild", bonus=False, batch=2, heads=3, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call, without the bonus unless one is asked for."""
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, time, heads, key),
        "v": torch.randn(batch, time, heads, value),
        "log_decay": GATES[gate](batch, time, heads, key),
        "state": torch.randn(batch, heads, key, value),
    }
    if bonus:
        inputs["bonus"] = torch.randn(heads, key)
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(backend, q, k, v, log_decay, state, bonus=None, chunk=64):
    return channel_decay(q, k, v, log_decay, state, bonus=bonus, chunk=chunk, backend=backend)


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate, bonus):
    agree(call, draw(time, gate, bonus))


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
@pytest.mark.parametrize("time", [17, 75])
def test_gradient_of_one_result_alone(agree, time, ask, bonus):
    agree(call, draw(time, "mild", bonus), ask=ask)
    agree(call, draw(time, "mild behind hard", bonus), ask=ask)


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, near, time, bonus):
    inputs = draw(time, bonus=bonus)
    zeros = torch.zeros_like(inputs.pop("state"))

    def stateless(backend, q, k, v, log_decay, own=None):
        return channel_decay(q, k, v, log_decay, bonus=own, backend=backend)

    # With one token and nothing before it the gate and, where the read comes first, the past stay without effect.
    agree(stateless, inputs, floor=1e-3)
    results = stateless("chunked", *inputs.values())
    q, k, v, log_decay, *own = inputs.values()
    for actual, expected in zip(results, call("chunked", q, k, v, log_decay, zeros, *own), strict=True):
        near(actual, expected, 1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 16, 20, 33, 48, 100])
def test_any_chunk_will_do(agree, chunk):
    for bonus in BONUS:
        agree(lambda backend, *x: call(backend, *x, chunk=chunk), draw(75, "mild behind hard", bonus))


@pytest.mark.parametrize(("key", "value"), [(1, 1), (16, 16), (24, 8), (5, 33)])
def test_odd_widths(agree, key, value):
    agree(call, draw(37, "mild", True, key=key, value=value))


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 70),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    chunk=st.integers(1, 70),
    gate=st.sampled_from(sorted(GATES)),
    bonus=st.booleans(),
)
def test_random_shapes(time, batch, heads, key, value, chunk, gate, bonus):
    inputs = draw(time, gate, bonus, batch, heads, key, value).values()
    output, last = call("chunked", *inputs, chunk=chunk)
    expected, expected_last = call("reference", *inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_it_is_the_sum_over_the_past(near, backend):
    """o_t = Σ_s (q_t · exp(G_t − G_s) · k_s) v_s in float64, pair by pair."""
    q, k, v, gate, _ = draw(40, dtype=torch.float64).values()
    sums = gate.cumsum(1)
    for t in (0, 1, 17, 39):
        decay = (sums[:, t : t + 1] - sums[:, : t + 1]).exp()
        weights = (q[:, t : t + 1] * decay * k[:, : t + 1]).sum(-1, keepdim=True)
        output, _ = channel_decay(q, k, v, gate, backend=backend)
        near(output[:, t], (weights * v[:, : t + 1]).sum(1), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_bonus_is_rwkv6s_read_before_the_update(near, backend):
    """o_t = rᵀ(S + Diag(u) k vᵀ), S ← Diag(w) S + k vᵀ, arXiv:2404.05892, one row and head at a time."""
    r, k, v, gate, state, u = draw(75, bonus=True).values()
    output, last = call(backend, r, k, v, gate, state, u)
    for row in range(2):
        for head in range(3):
            memory = state[row, head]
            for t in range(75):
                outer = torch.outer(k[row, t, head], v[row, t, head])
                expected = r[row, t, head] @ (memory + torch.diag(u[head]) @ outer)
                torch.testing.assert_close(output[row, t, head], expected, rtol=1e-4, atol=1e-4)
                memory = torch.diag(gate[row, t, head].exp()) @ memory + outer
            near(last[row, head], memory)


def test_a_bonus_is_a_read_after_the_update_of_the_token_before(near):
    """With u = exp(−g) and queries that fade with the past, reading first is reading last."""
    q, k, v, gate, state = draw(75).values()
    gate = gate[:1, :1].expand_as(q)
    after, _ = channel_decay(q, k, v, gate, state)
    before, _ = channel_decay(q * gate.exp(), k, v, gate, state, bonus=(-gate[0, 0]).exp())
    near(before, after)


@pytest.mark.parametrize("time", [16, 75])
def test_uniform_gate_is_scalar_decay(near, time):
    q, k, v, gate, state = draw(time).values()
    gate = gate[..., :1]
    for backend in ("reference", "chunked"):
        results = channel_decay(q, k, v, gate.expand_as(q), state, backend=backend)
        wanted = scalar_decay(q, k, v, gate[..., 0], state, backend="reference")
        for actual, expected in zip(results, wanted, strict=True):
            near(actual, expected)


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend, bonus):
    q, k, v, gate, state, *own = draw(75, bonus=bonus).values()
    inputs = q, k, v, gate
    expected, expected_last = call("reference", *inputs, state, *own)
    first, state = call(backend, *(x[:, :cut] for x in inputs), state, *own)
    rest, state = call(backend, *(x[:, cut:] for x in inputs), state, *own)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("bonus", BONUS)
def test_packed_documents_are_separate_ones(agree, bonus):
    cu_seqlens = torch.tensor([0, 5, 38, 39])
    inputs = draw(39, "mild behind hard", bonus, batch=1)
    inputs["state"] = torch.randn(3, 3, 12, 20)

    def packed(backend, q, k, v, log_decay, state, bonus=None):
        return channel_decay(q, k, v, log_decay, state, bonus=bonus, cu_seqlens=cu_seqlens, backend=backend)

    agree(packed, inputs)
    q, k, v, log_decay, state, *own = inputs.values()
    output, last = packed("chunked", q, k, v, log_decay, state, *own)
    alone, alone_last = call("chunked", *(x[:, 5:38] for x in (q, k, v, log_decay)), state[1:2], *own)
    assert torch.equal(output[:, 5:38], alone)
    assert torch.equal(last[1:2], alone_last)


def test_a_bonus_for_each_batch_entry_is_one_for_each_member(agree, near):
    inputs = draw(20, "mild behind hard")
    inputs["bonus"] = torch.randn(2, 3, 12)
    agree(call, inputs)
    q, k, v, gate, state, bonus = inputs.values()
    output, last = call("chunked", *inputs.values())
    for b in range(2):
        own = (x[b : b + 1] for x in (q, k, v, gate, state))
        near(output[b : b + 1], call("reference", *own, bonus[b])[0])
    members = [x.unsqueeze(1) for x in (q, k, v, gate, state)]
    stacked, after = vmap(lambda *x: call("chunked", *x))(*members, bonus)
    near(stacked.squeeze(1), output)
    near(after.squeeze(1), last)


@pytest.mark.parametrize("bonus", BONUS)
def test_steps_equal_forward(near, bonus):
    q, k, v, gate, state, *own = draw(20, bonus=bonus).values()
    expected, expected_last = call("auto", q, k, v, gate, state, *own)
    outputs = []
    for t in range(20):
        output, state = channel_decay_step(
            q[:, t], k[:, t], v[:, t], gate[:, t], state, bonus=own[0] if own else None
        )
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 31, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t, bonus):
    q, k, v, gate, state, *own = draw(76, bonus=bonus).values()
    before, _ = call(backend, q, k, v, gate, state, *own)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in (q, k, v, gate)]
        for x in changed:
            x[:, t + 1 :] = -future
        after, _ = call(backend, *changed, state, *own)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("time", [48, 75])
def test_no_gradient_reaches_the_future(time, bonus):
    inputs = [x.requires_grad_() for x in draw(time, bonus=bonus).values()]
    output, _ = call("auto", *inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:4]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize(
    ("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 4), ("chunked", 5)]
)
def test_gradients_in_float64(backend, chunk, bonus):
    inputs = draw(9, "mild", bonus, batch=1, heads=2, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x, chunk=chunk), leaves)


def test_second_derivatives_are_refused():
    inputs = [x.requires_grad_() for x in draw(5).values()]
    output, _ = call("chunked", *inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("bonus", BONUS)
def test_gates_beyond_every_exponent_stay_finite(bonus):
    for scale in (1e4, math.inf):
        inputs = draw(75, bonus=bonus)
        inputs["log_decay"] = -scale * (0.1 + torch.rand_like(inputs["log_decay"]))
        leaves = [x.requires_grad_() for x in inputs.values()]
        output, last = call("auto", *leaves)
        for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
            assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    for bonus in BONUS:
        inputs = list(draw(40, bonus=bonus, dtype=dtype).values())
        output, last = call(backend, *inputs)
        assert output.dtype == dtype
        assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert output.is_contiguous()
        assert last.is_contiguous()
        expected, expected_last = call("reference", *(x.double() for x in inputs))
        near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
        near(last, expected_last)
        stepped, _ = channel_decay_step(
            *(x[:, 0] for x in inputs[:4]), last, bonus=inputs[5] if bonus else None, backend=backend
        )
        assert stepped.dtype == dtype


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75, bonus=True).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = call("auto", *inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_bfloat16(near, backend):
    rounded = {name: x.bfloat16() for name, x in draw(75, bonus=True).items()}
    results = []
    for leaves, way in (
        ([x.clone() for x in rounded.values()], backend),
        ([x.double() for x in rounded.values()], "reference"),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        output, last = call(way, *leaves)
        gradients = torch.autograd.grad(output.double().sum() + last.double().sum(), leaves)
        results.append([output, *gradients])
    for name, actual, expected in zip(("output", *rounded), *results, strict=True):
        near(actual, expected, 2e-2 if name == "log_decay" else 8e-3, name=name)


def test_work_grows_with_the_length():
    def flops(time):
        with FlopCounterMode(display=False) as counter:
            channel_decay(*draw(time).values())
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) > 0


def test_no_tensor_grows_with_the_square_of_the_text(largest_bytes):
    """A step keeps one state, and a chunk form no tensor that grows with the square of the length."""
    inputs = draw(512, batch=1).values()
    state = 3 * 12 * 20 * 4
    assert largest_bytes(lambda: call("reference", *inputs)) <= 512 * 3 * 20 * 4 + state
    assert largest_bytes(lambda: call("chunked", *inputs)) <= 512 * 3 * 64 * 4


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 3, 11), r"q has shape \[2, 5, 3, 11\].*\[B, T, H, K\] = \[2, 5, 3, 12\]"),
        ("k", (2, 5, 36), r"k has shape .*\[B, T, H, K\]"),
        ("v", (2, 4, 3, 20), r"v has shape .*\[2, 5, 3, 20\]"),
        ("log_decay", (2, 5, 3), r"log_decay has shape"),
        ("state", (2, 3, 20, 12), r"state has shape .*\[2, 3, 12, 20\]"),
        ("bonus", (12, 3), r"bonus has shape .*\[H, K\] = \[3, 12\]"),
        ("bonus", (3, 3, 12), r"bonus has shape .*\[B, H, K\] = \[2, 3, 12\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5, bonus=True)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"channel_decay: {message}"):
        call("auto", *inputs.values())


def test_wrong_settings_are_named():
    inputs = list(draw(5).values())
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        channel_decay(*inputs, chunk=0)
    with pytest.raises(ValueError, match="channel_decay: backend='cuda' is not one of auto"):
        channel_decay(*inputs, backend="cuda")
    with pytest.raises(
        ValueError, match="channel_decay: cu_seqlens packs documents in one row, but there are 2"
    ):
        channel_decay(*inputs, cu_seqlens=torch.tensor([0, 5]))
    token, state = [x[:, 0] for x in inputs[:4]], inputs[4]
    with pytest.raises(ValueError, match="channel_decay_step: backend='cuda' is not one of auto"):
        channel_decay_step(*token, state, backend="cuda")
    with pytest.raises(ValueError, match="channel_decay_step: state has shape"):
        channel_decay_step(*token, state.mT)
    with pytest.raises(ValueError, match=r"channel_decay_step: bonus has shape \[12\]"):
        channel_decay_step(*token, state, bonus=torch.zeros(12))
    with pytest.raises(ValueError, match=r"k has shape \[2, 0, 3, 12\]"):
        channel_decay(*(x[:, :0] for x in inputs[:4]), state)

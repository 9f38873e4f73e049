"""The generalised delta rule of RWKV-7: chunks against steps, stability, causality, and the rules it contains."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from kernels.channel_delta.ops import channel_delta
from kernels.low_rank_delta.ops import low_rank_delta, low_rank_delta_step
from kernels.scalar_delta.ops import scalar_delta

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 75, 130)
GATES = {
    "as in the paper": lambda *shape: -math.exp(-0.5) * torch.rand(shape),
    "none": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}
NAMES = ("q", "k", "v", "log_decay", "a", "b", "state")


def draw(time, gate="as in the paper", batch=2, heads=2, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call; a = −κ and b = κ ⊙ η as in the layer, κ of unit length."""
    shape = batch, time, heads, key
    unit = normalize(torch.randn(shape), dim=-1)
    inputs = (
        torch.randn(shape),
        torch.randn(shape) / key**0.5,
        torch.randn(batch, time, heads, value),
        GATES[gate](*shape),
        -unit,
        unit * torch.rand(shape),
        torch.randn(batch, heads, key, value),
    )
    return {name: x.to(dtype) for name, x in zip(NAMES, inputs, strict=True)}


def call(backend, *inputs, chunk=64, bound=None):
    return low_rank_delta(*inputs, chunk=chunk, bound=bound, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    # Wide values, so that chunks of 64 tokens come up.
    agree(call, draw(time, gate, value=50 if time > 60 else 20))


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.607, 1.3, 5.0, 100.0])
@pytest.mark.parametrize("time", LENGTHS)
def test_a_promised_bound_changes_nothing(agree, time, bound):
    """From blocks as long as the chunk down to single tokens; the hardest decay that is promised comes up too."""
    inputs = draw(time, value=50 if time > 60 else 20)
    hardest = torch.rand_like(inputs["log_decay"]) < 0.5
    inputs["log_decay"] = torch.where(hardest, -1.0, -torch.rand_like(inputs["log_decay"])) * min(bound, 50)
    agree(lambda backend, *x: call(backend, *x, bound=bound), inputs)


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
@pytest.mark.parametrize("time", [17, 75])
def test_gradient_of_one_result_alone(agree, time, ask):
    agree(call, draw(time), ask=ask)
    agree(call, draw(time, "mild behind hard"), ask=ask)


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, near, time):
    inputs = draw(time)
    inputs["state"].zero_()
    state = inputs.pop("state")
    agree(call, inputs)
    output, last = low_rank_delta(*inputs.values())
    expected, expected_last = low_rank_delta(*inputs.values(), state)
    near(output, expected, 1e-6)
    near(last, expected_last, 1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 16, 20, 33, 100])
def test_any_chunk_will_do(agree, chunk):
    agree(lambda backend, *x: call(backend, *x, chunk=chunk), draw(75, "mild behind hard"))


@pytest.mark.parametrize(("key", "value"), [(1, 1), (16, 16), (24, 8), (5, 33)])
def test_odd_widths(agree, key, value):
    agree(call, draw(37, key=key, value=value))


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 70),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    chunk=st.integers(1, 70),
    gate=st.sampled_from(sorted(GATES)),
)
def test_random_shapes(time, batch, heads, key, value, chunk, gate):
    inputs = draw(time, gate, batch, heads, key, value)
    output, last = low_rank_delta(*inputs.values(), chunk=chunk)
    expected, expected_last = low_rank_delta(*inputs.values(), backend="reference")
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_it_is_the_rule_written_as_matrices(near, backend):
    """S ← (Diag(w) + b aᵀ) S + k vᵀ, one head at a time."""
    q, k, v, gate, a, b, state = draw(40).values()
    expected = torch.empty_like(v)
    for row in range(2):
        for head in range(2):
            memory = state[row, head]
            for t in range(40):
                here = row, t, head
                transition = torch.diag(gate[here].exp()) + torch.outer(b[here], a[here])
                memory = transition @ memory + torch.outer(k[here], v[here])
                expected[here] = q[here] @ memory
    near(low_rank_delta(q, k, v, gate, a, b, state, backend=backend)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("most", [1.0, 2.0])
def test_kimi_delta_attention_is_a_special_case(near, backend, most):
    """(1 − β k kᵀ) Diag(w) S + β k vᵀ: b = β k corrects what a = −w ⊙ k read before the state faded."""
    q, k, v, gate, *_, state = draw(75).values()
    k, beta = normalize(k, dim=-1), most * torch.rand(2, 75, 2)
    write = k * beta[..., None]
    expected, expected_last = channel_delta(q, k, v, gate, beta, state)
    output, last = low_rank_delta(q, write, v, gate, -k * gate.exp(), write, state, backend=backend)
    near(output, expected)
    near(last, expected_last)
    if most == 2.0:
        expected, expected_last = scalar_delta(q, k, v, gate[..., 0], beta, state)
        gate = gate[..., :1].expand_as(gate)
        output, last = low_rank_delta(q, write, v, gate, -k * gate.exp(), write, state, backend=backend)
        near(output, expected)
        near(last, expected_last)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    *inputs, state = draw(75).values()
    expected, expected_last = low_rank_delta(*inputs, state, backend="reference")
    first, state = low_rank_delta(*(x[:, :cut] for x in inputs), state, backend=backend)
    rest, state = low_rank_delta(*(x[:, cut:] for x in inputs), state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


def test_packed_documents_are_separate_ones(agree):
    cu_seqlens = torch.tensor([0, 5, 38, 39])
    inputs = draw(39, batch=1)
    inputs["state"] = torch.randn(3, 2, 12, 20)

    def packed(backend, *own):
        return low_rank_delta(*own, cu_seqlens=cu_seqlens, bound=0.7, backend=backend)

    agree(packed, inputs)
    *timed, state = inputs.values()
    output, last = packed("chunked", *timed, state)
    alone, alone_last = call("chunked", *(x[:, 5:38] for x in timed), state[1:2], bound=0.7)
    assert torch.equal(output[:, 5:38], alone)
    assert torch.equal(last[1:2], alone_last)


def test_steps_equal_forward(near):
    *inputs, state = draw(20).values()
    expected, expected_last = low_rank_delta(*inputs, state)
    outputs = []
    for t in range(20):
        output, state = low_rank_delta_step(*(x[:, t] for x in inputs), state)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("t", [0, 16, 31, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t, bound):
    inputs = draw(76)
    state = inputs.pop("state")
    before, _ = low_rank_delta(*inputs.values(), state, bound=bound, backend=backend)
    for future in (0.2, 1e3, torch.nan):
        changed = [x.clone() for x in inputs.values()]
        # Corrections that are much larger would overflow within a few tokens.
        for x in changed[: 4 if future == 1e3 else 6]:
            x[:, t + 1 :] = -future
        if bound and not math.isnan(future):
            changed[3].clamp_(min=-bound)
        after, _ = low_rank_delta(*changed, state, bound=bound, backend=backend)
        error = 1e-5 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=error)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("time", [48, 75])
def test_no_gradient_reaches_the_future(time):
    inputs = [x.requires_grad_() for x in draw(time).values()]
    output, _ = low_rank_delta(*inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:6]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize(
    ("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 2), ("chunked", 1)]
)
def test_gradients_in_float64(backend, chunk):
    inputs = [x.requires_grad_() for x in draw(5, batch=1, key=2, value=3, dtype=torch.float64).values()]
    for bound in (None, 0.7, 3.0):
        assert torch.autograd.gradcheck(lambda *x, b=bound: call(backend, *x, chunk=chunk, bound=b), inputs)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = low_rank_delta(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


def test_equal_keys_and_reflections_stay_exact(agree):
    """b = 2 κ with one κ again and again flips the state at each token; powers of the triangle would blow up."""
    inputs = draw(64, "none", value=50)
    inputs["a"] = inputs["a"][:, :1].expand_as(inputs["a"]).contiguous()
    inputs["b"] = -2 * inputs["a"]
    agree(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    *inputs, _ = draw(40, dtype=dtype).values()
    output, last = low_rank_delta(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = low_rank_delta(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    stepped, _ = low_rank_delta_step(*(x[:, 0] for x in inputs), torch.zeros_like(last), backend=backend)
    assert stepped.dtype == dtype


def test_the_last_state_keeps_nothing_larger_alive():
    for length in (10, 130):
        _, last = low_rank_delta(*draw(length).values())
        assert last.untyped_storage().nbytes() == last.numel() * 4


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = low_rank_delta(*inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_bfloat16(near, backend):
    rounded = [x.bfloat16() for x in draw(75).values()]
    results = []
    for leaves, way in (
        ([x.clone() for x in rounded], backend),
        ([x.double() for x in rounded], "reference"),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        output, last = low_rank_delta(*leaves, backend=way)
        gradients = torch.autograd.grad(output.double().sum() + last.double().sum(), leaves)
        results.append([output, *gradients])
    for name, actual, expected in zip(("output", *NAMES), *results, strict=True):
        near(actual, expected, 2e-2 if name == "log_decay" else 8e-3, name=name)


def test_work_grows_with_the_length():
    def flops(time):
        with FlopCounterMode(display=False) as counter:
            low_rank_delta(*draw(time).values())
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) > 0


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 2, 11), r"q has shape \[2, 5, 2, 11\].*\[B, T, H, K\] = \[2, 5, 2, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, H, K\]"),
        ("v", (2, 4, 2, 20), r"v has shape .*\[2, 5, 2, 20\]"),
        ("log_decay", (2, 5, 2), r"log_decay has shape"),
        ("a", (2, 5, 2, 1), r"a has shape"),
        ("b", (2, 5, 1, 12), r"b has shape"),
        ("state", (2, 2, 20, 12), r"state has shape .*\[2, 2, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"low_rank_delta: {message}"):
        low_rank_delta(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        low_rank_delta(*inputs.values(), chunk=0)
    with pytest.raises(ValueError, match=r"bound=-0.5 is negative: give the hardest decay without its sign"):
        low_rank_delta(*inputs.values(), bound=-0.5)
    with pytest.raises(ValueError, match="low_rank_delta: backend='cuda' is not one of auto"):
        low_rank_delta(*inputs.values(), backend="cuda")
    with pytest.raises(
        ValueError, match="low_rank_delta: cu_seqlens packs documents in one row, but there are 2"
    ):
        low_rank_delta(*inputs.values(), cu_seqlens=torch.tensor([0, 5]))
    state = inputs.pop("state")
    with pytest.raises(ValueError, match="low_rank_delta_step: backend='cuda' is not one of auto"):
        low_rank_delta_step(*(x[:, 0] for x in inputs.values()), state, backend="cuda")
    with pytest.raises(ValueError, match="low_rank_delta_step: state has shape"):
        low_rank_delta_step(*(x[:, 0] for x in inputs.values()), state.mT)
    with pytest.raises(ValueError, match=r"k has shape \[2, 0, 2, 12\]"):
        low_rank_delta(*(x[:, :0] for x in inputs.values()))

"""The delta rule with a decay a key channel: chunks against steps, stability, causality, oracles."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from kernels.channel_delta.ops import channel_delta, channel_delta_step

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 75, 130)
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "none": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}


def draw(time, gate="mild", batch=2, heads=2, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call; unit keys as in the layer that uses this."""
    return {
        name: x.to(dtype)
        for name, x in {
            "q": torch.randn(batch, time, heads, key),
            "k": normalize(torch.randn(batch, time, heads, key), dim=-1),
            "v": torch.randn(batch, time, heads, value),
            "log_decay": GATES[gate](batch, time, heads, key),
            "beta": torch.rand(batch, time, heads),
            "state": torch.randn(batch, heads, key, value),
        }.items()
    }


def call(backend, *inputs, chunk=64):
    return channel_delta(*inputs, chunk=chunk, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    agree(call, draw(time, gate))


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
    output, last = channel_delta(*inputs.values())
    expected, expected_last = channel_delta(*inputs.values(), state)
    near(output, expected, 1e-6)
    near(last, expected_last, 1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 16, 20, 33, 48, 100])
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
    output, last = channel_delta(*inputs.values(), chunk=chunk)
    expected, expected_last = channel_delta(*inputs.values(), backend="reference")
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    *inputs, state = draw(75).values()
    expected, expected_last = channel_delta(*inputs, state, backend="reference")
    first, state = channel_delta(*(x[:, :cut] for x in inputs), state, backend=backend)
    rest, state = channel_delta(*(x[:, cut:] for x in inputs), state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


def test_steps_equal_forward(near):
    *inputs, state = draw(20).values()
    expected, expected_last = channel_delta(*inputs, state)
    outputs = []
    for t in range(20):
        output, state = channel_delta_step(*(x[:, t] for x in inputs), state)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 31, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = draw(76)
    state = inputs.pop("state")
    before, _ = channel_delta(*inputs.values(), state, backend=backend)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = -future
        after, _ = channel_delta(*changed, state, backend=backend)
        bound = 1e-5 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("time", [48, 75])
def test_no_gradient_reaches_the_future(time):
    inputs = [x.requires_grad_() for x in draw(time).values()]
    output, _ = channel_delta(*inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:5]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize(
    ("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 4), ("chunked", 5)]
)
def test_gradients_in_float64(backend, chunk):
    inputs = [x.requires_grad_() for x in draw(9, batch=1, key=2, value=3, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *x: channel_delta(*x, chunk=chunk, backend=backend), inputs)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = channel_delta(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


def test_equal_keys_and_reflections_stay_exact(agree):
    """β = 2 with one key again and again flips the state at each token; powers of the triangle would blow up."""
    inputs = draw(64, "none")
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    agree(call, inputs)


@pytest.mark.parametrize("time", [16, 75])
def test_uniform_gate_is_the_gated_delta_rule(near, time):
    q, k, v, gate, beta, state = draw(time).values()
    gate = gate[..., :1]
    actual, last = channel_delta(q, k, v, gate.expand_as(q), beta, state)
    outputs = []
    eye = torch.eye(q.shape[-1])
    for t in range(time):
        key, weight = k[:, t, :, :, None], beta[:, t, :, None, None]
        state = (eye - weight * key @ key.mT) @ (gate[:, t].exp()[..., None] * state)
        state = state + weight * key @ v[:, t, :, None, :]
        outputs.append((state.mT @ q[:, t, :, :, None]).squeeze(-1))
    near(actual, torch.stack(outputs, 1))
    near(last, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    *inputs, _ = draw(40, dtype=dtype).values()
    output, last = channel_delta(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = channel_delta(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    stepped, _ = channel_delta_step(*(x[:, 0] for x in inputs), torch.zeros_like(last), backend=backend)
    assert stepped.dtype == dtype


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = channel_delta(*inputs)
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
        output, last = channel_delta(*leaves, backend=way)
        gradients = torch.autograd.grad(output.double().sum() + last.double().sum(), leaves)
        results.append([output, *gradients])
    names = ("output", "q", "k", "v", "log_decay", "beta", "state")
    for name, actual, expected in zip(names, *results, strict=True):
        near(actual, expected, 2e-2 if name in ("log_decay", "beta") else 8e-3, name=name)


def test_work_grows_with_the_length():
    def flops(time):
        with FlopCounterMode(display=False) as counter:
            channel_delta(*draw(time).values())
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) > 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_are_separate_ones(near, backend):
    documents = [draw(length, batch=1) for length in (3, 64, 1, 20)]
    packed = {
        name: torch.cat([one[name] for one in documents], dim=0 if name == "state" else 1)
        for name in documents[0]
    }
    cu_seqlens = torch.tensor([0, 3, 67, 68, 88])
    output, last = channel_delta(*packed.values(), cu_seqlens=cu_seqlens, backend=backend)
    apart = [channel_delta(*one.values(), backend="reference") for one in documents]
    near(output, torch.cat([x for x, _ in apart], 1))
    near(last, torch.cat([x for _, x in apart]))


def kernels_agree(near, inputs, bound=1e-5):
    """Asserts that Triton's kernels equal the reference in float64, in outputs and in the gradient of every input."""
    results = []
    for backend, leaves in (
        ("triton", [x.clone() for x in inputs.values()]),
        ("reference", [x.double() for x in inputs.values()]),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        outputs = call(backend, *leaves)
        torch.manual_seed(1)
        cotangents = [torch.randn(x.shape).to(x) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    names = ("output", "last state", *(f"gradient of {name}" for name in inputs))
    for name, actual, expected in zip(names, *results, strict=True):
        near(actual, expected, bound, floor=1e-4, name=name)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_kernels_take_any_chunk_that_the_table_may_hold(near, monkeypatch, chunk):
    from kernels.channel_delta import triton

    configure = triton.configure

    def of_chunk(operator, kernel, widths, like):
        row = configure(operator, kernel, widths, like)
        return replace(row, blocks={**row.blocks, "CHUNK": chunk}) if kernel == "prepare" else row

    monkeypatch.setattr(triton, "configure", of_chunk)
    kernels_agree(near, draw(75, "mild behind hard", batch=1, heads=1))


def test_kernels_keep_equal_keys_and_reflections_exact(near):
    """β = 2 with one key again and again flips the state at each token: each adds to the error, but none multiplies it."""
    inputs = draw(64, "none", batch=1, heads=1)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    kernels_agree(near, inputs, 1e-4)


def test_kernels_stay_finite_beyond_every_exponent(near):
    inputs = draw(75, batch=1, heads=1)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    kernels_agree(near, inputs)


@pytest.mark.parametrize("form", ["recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"])
def test_oracle_kimi_linear(near, form):
    pytest.importorskip("transformers")
    from transformers.models.kimi_linear import modeling_kimi_linear

    q, k, v, gate, beta, state = draw(75).values()
    expected, expected_last = getattr(modeling_kimi_linear, form)(
        q, k, v, g=gate, beta=beta, initial_state=state, output_final_state=True
    )
    for backend in ("reference", "chunked"):
        output, last = channel_delta(q * q.shape[-1] ** -0.5, k, v, gate, beta, state, backend=backend)
        near(output, expected)
        near(last, expected_last)


def test_oracle_qwen3_next(near):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next

    q, k, v, gate, beta, state = draw(75).values()
    expected, expected_last = modeling_qwen3_next.torch_chunk_gated_delta_rule(
        q, k, v, g=gate[..., 0], beta=beta, initial_state=state, output_final_state=True
    )
    output, last = channel_delta(q * q.shape[-1] ** -0.5, k, v, gate[..., :1].expand_as(q), beta, state)
    near(output, expected)
    near(last, expected_last)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 2, 11), r"q has shape \[2, 5, 2, 11\].*\[B, T, H, K\] = \[2, 5, 2, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, H, K\]"),
        ("v", (2, 4, 2, 20), r"v has shape .*\[2, 5, 2, 20\]"),
        ("log_decay", (2, 5, 2), r"log_decay has shape"),
        ("beta", (2, 5, 2, 1), r"beta has shape"),
        ("state", (2, 2, 20, 12), r"state has shape .*\[2, 2, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"channel_delta: {message}"):
        channel_delta(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        channel_delta(*inputs.values(), chunk=0)
    with pytest.raises(ValueError, match=r"channel_delta: backend='cuda' is not one of auto"):
        channel_delta(*inputs.values(), backend="cuda")
    with pytest.raises(
        ValueError, match="channel_delta: cu_seqlens packs documents in one row, but there are 2 rows"
    ):
        channel_delta(*inputs.values(), cu_seqlens=torch.tensor([0, 5]))
    state = inputs.pop("state")
    with pytest.raises(ValueError, match=r"channel_delta_step: backend='cuda' is not one of auto"):
        channel_delta_step(*(x[:, 0] for x in inputs.values()), state, backend="cuda")
    with pytest.raises(ValueError, match="channel_delta_step: state has shape"):
        channel_delta_step(*(x[:, 0] for x in inputs.values()), state.mT)
    with pytest.raises(ValueError, match=r"k has shape \[2, 0, 2, 12\]"):
        channel_delta(*(x[:, :0] for x in inputs.values()))

"""The delta rule with one decay a head or none: chunks against steps, stability, causality, oracles."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from kernels.scalar_delta.ops import scalar_delta, scalar_delta_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 75, 130)
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
    """Inputs by name, in the order of the call, without log_decay for the gate `none`; β reaches up to two."""
    inputs = {
        "q": torch.randn(batch, time, groups, key),
        "k": normalize(torch.randn(batch, time, groups, key), dim=-1),
        "v": torch.randn(batch, time, heads, value),
        "log_decay": GATES[gate](batch, time, heads) if GATES[gate] else None,
        "beta": 2 * torch.rand(batch, time, heads),
        "state": torch.randn(batch, heads, key, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items() if x is not None}


def call(backend, q, k, v, *rest, chunk=64):
    """rest is log_decay, beta and state, or without the first."""
    log_decay, beta, state = rest if len(rest) == 3 else (None, *rest)
    return scalar_delta(q, k, v, log_decay, beta, state, chunk=chunk, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    # Wide values, so that chunks of 64 tokens come up.
    agree(call, draw(time, gate, value=50 if time > 60 else 20))


@pytest.mark.parametrize("gate", ["mild behind hard", "none"])
@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
@pytest.mark.parametrize("time", [17, 75])
def test_gradient_of_one_result_alone(agree, time, ask, gate):
    agree(call, draw(time, gate), ask=ask)


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, near, time):
    inputs = draw(time)
    inputs["state"].zero_()
    state = inputs.pop("state")
    agree(lambda backend, *x: scalar_delta(*x, backend=backend), inputs)
    output, last = scalar_delta(*inputs.values())
    expected, expected_last = scalar_delta(*inputs.values(), state)
    near(output, expected, 1e-6)
    near(last, expected_last, 1e-6)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_no_decay_is_a_decay_of_one(near, gate):
    q, k, v, beta, state = draw(75, "none").values()
    gate = None if gate == "none" else torch.zeros_like(beta)
    for got, wanted in zip(
        scalar_delta(q, k, v, gate, beta, state),
        scalar_delta(q, k, v, torch.zeros_like(beta), beta, state, backend="reference"),
        strict=True,
    ):
        near(got, wanted)


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


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("gate", ["mild", "none"])
def test_it_is_the_rule_written_as_matrices(near, backend, gate):
    """S ← α (1 − β k kᵀ) S + β k vᵀ, one head at a time."""
    inputs = draw(40, gate, heads=2)
    q, k, v, *_, beta, state = inputs.values()
    fade = inputs["log_decay"].exp() if "log_decay" in inputs else torch.ones_like(beta)
    expected = torch.empty_like(v)
    for row in range(2):
        for head in range(2):
            memory = state[row, head]
            for t in range(40):
                key, strength = k[row, t, head], beta[row, t, head]
                memory = fade[row, t, head] * (torch.eye(12) - strength * torch.outer(key, key)) @ memory
                memory = memory + strength * torch.outer(key, v[row, t, head])
                expected[row, t, head] = q[row, t, head] @ memory
    near(call(backend, *inputs.values())[0], expected)


def test_a_full_write_replaces_what_was_there(near):
    """With β = 1 and no decay the key then returns its value, whatever the past."""
    _, k, v, beta, state = draw(75, "none", groups=4).values()
    output, _ = scalar_delta(k, k, v, None, torch.ones_like(beta), state)
    near(output, v, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    *inputs, state = draw(75).values()
    expected, expected_last = scalar_delta(*inputs, state, backend="reference")
    first, state = scalar_delta(*(x[:, :cut] for x in inputs), state, backend=backend)
    rest, state = scalar_delta(*(x[:, cut:] for x in inputs), state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("gate", ["mild", "none"])
def test_steps_equal_forward(near, gate):
    inputs = draw(20, gate)
    q, k, v, *_, beta, state = inputs.values()
    log_decay = inputs.get("log_decay")
    expected, expected_last = scalar_delta(q, k, v, log_decay, beta, state)
    outputs = []
    for t in range(20):
        decay = None if log_decay is None else log_decay[:, t]
        output, state = scalar_delta_step(q[:, t], k[:, t], v[:, t], decay, beta[:, t], state)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 31, 63, 64, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = draw(76)
    state = inputs.pop("state")
    before, _ = scalar_delta(*inputs.values(), state, backend=backend)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = -future
        after, _ = scalar_delta(*changed, state, backend=backend)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("time", [48, 75])
def test_no_gradient_reaches_the_future(time):
    inputs = [x.requires_grad_() for x in draw(time).values()]
    output, _ = scalar_delta(*inputs)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs[:5]):
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
    output, last = scalar_delta(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


@pytest.mark.parametrize("gate", ["zero", "none"])
def test_equal_keys_and_reflections_stay_exact(agree, gate):
    """β = 2 with one key again and again flips the state at each token; powers of the triangle would blow up."""
    inputs = draw(64, gate, value=50)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    agree(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    *inputs, _ = draw(40, dtype=dtype).values()
    output, last = scalar_delta(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = scalar_delta(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    stepped, _ = scalar_delta_step(*(x[:, 0] for x in inputs), torch.zeros_like(last), backend=backend)
    assert stepped.dtype == dtype


def test_the_last_state_keeps_nothing_larger_alive():
    for length in (10, 130):
        _, last = scalar_delta(*draw(length).values())
        assert last.untyped_storage().nbytes() == last.numel() * 4


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = scalar_delta(*inputs)
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
        output, last = scalar_delta(*leaves, backend=way)
        gradients = torch.autograd.grad(output.double().sum() + last.double().sum(), leaves)
        results.append([output, *gradients])
    names = ("output", "q", "k", "v", "log_decay", "beta", "state")
    for name, actual, expected in zip(names, *results, strict=True):
        near(actual, expected, 2e-2 if name in ("log_decay", "beta") else 8e-3, name=name)


def flops_of(*arguments, **sizes):
    with FlopCounterMode(display=False) as counter:
        call("chunked", *draw(*arguments, **sizes).values())
    return counter.get_total_flops()


def test_work_grows_with_the_length():
    assert flops_of(512) == 2 * flops_of(256) > 0


def test_scores_are_shared_by_a_group():
    """Six heads of one group cost one pair of score matrices, not six; the states cost the same in both."""
    per_key = [
        flops_of(64, groups=g, heads=6, key=192) - flops_of(64, groups=g, heads=6, key=96) for g in (6, 1)
    ]
    assert per_key[0] - per_key[1] == 2 * 2 * 2 * 64 * 64 * 96 * (6 - 1)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_are_separate_ones(near, backend):
    documents = [draw(length, batch=1) for length in (3, 64, 1, 20)]
    packed = {
        name: torch.cat([one[name] for one in documents], dim=0 if name == "state" else 1)
        for name in documents[0]
    }
    cu_seqlens = torch.tensor([0, 3, 67, 68, 88])
    output, last = scalar_delta(*packed.values(), cu_seqlens=cu_seqlens, backend=backend)
    apart = [scalar_delta(*one.values(), backend="reference") for one in documents]
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
    from kernels import delta

    configure = delta.configure

    def of_chunk(operator, kernel, widths, like):
        row = configure(operator, kernel, widths, like)
        return replace(row, blocks={**row.blocks, "CHUNK": chunk}) if kernel == "prepare" else row

    monkeypatch.setattr(delta, "configure", of_chunk)
    kernels_agree(near, draw(75, "mild behind hard", batch=1, groups=1, heads=2))


def test_kernels_keep_equal_keys_and_reflections_exact(near):
    """β = 2 with one key again and again flips the state at each token: each adds to the error, but none multiplies it."""
    inputs = draw(64, "none", batch=1, groups=1, heads=2)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    kernels_agree(near, inputs, 1e-4)


def test_kernels_stay_finite_beyond_every_exponent(near):
    inputs = draw(75, batch=1, groups=1, heads=2)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    kernels_agree(near, inputs)


@pytest.mark.parametrize("model", ["qwen3_next", "olmo_hybrid"])
@pytest.mark.parametrize("form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_oracles(near, form, model):
    pytest.importorskip("transformers")
    from importlib import import_module

    theirs = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), form)
    q, k, v, gate, beta, state = draw(75).values()
    expected, expected_last = theirs(
        *(x.repeat_interleave(2, dim=2) for x in (q, k)),
        v,
        g=gate,
        beta=beta,
        initial_state=state,
        output_final_state=True,
    )
    for backend in ("reference", "chunked"):
        output, last = scalar_delta(q * q.shape[-1] ** -0.5, k, v, gate, beta, state, backend=backend)
        near(output, expected)
        near(last, expected_last)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 2, 11), r"q has shape \[2, 5, 2, 11\].*\[B, T, G, K\] = \[2, 5, 2, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, G, K\]"),
        ("v", (2, 4, 4, 20), r"v has shape .*\[2, 5, 4, 20\]"),
        ("v", (2, 5, 3, 20), r"3 heads cannot share 2 groups evenly"),
        ("log_decay", (2, 5, 4, 1), r"log_decay has shape"),
        ("beta", (2, 5, 2), r"beta has shape .*\[2, 5, 4\]"),
        ("state", (2, 4, 20, 12), r"state has shape .*\[2, 4, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"scalar_delta: {message}"):
        scalar_delta(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5)
    with pytest.raises(ValueError, match="chunk=-1 must be at least 1"):
        scalar_delta(*inputs.values(), chunk=-1)
    with pytest.raises(ValueError, match=r"scalar_delta: backend='cuda' is not one of auto"):
        scalar_delta(*inputs.values(), backend="cuda")
    with pytest.raises(
        ValueError, match="scalar_delta: cu_seqlens packs documents in one row, but there are 2 rows"
    ):
        scalar_delta(*inputs.values(), cu_seqlens=torch.tensor([0, 5]))
    state = inputs.pop("state")
    with pytest.raises(ValueError, match=r"scalar_delta_step: backend='cuda' is not one of auto"):
        scalar_delta_step(*(x[:, 0] for x in inputs.values()), state, backend="cuda")
    with pytest.raises(ValueError, match="scalar_delta_step: state has shape"):
        scalar_delta_step(*(x[:, 0] for x in inputs.values()), state.mT)

"""Depthwise causal convolution: shifted sums against steps, the carried tail, causality, torch's own."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d, silu

from kernels.short_convolution.ops import short_convolution, short_convolution_step

LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 75, 130)


def draw(time, taps=4, batch=2, channels=7, dtype=torch.float32):
    """Inputs by name, in the order of the call."""
    inputs = {
        "x": torch.randn(batch, time, channels),
        "weight": torch.randn(channels, taps),
        "bias": torch.randn(channels),
        "tail": torch.randn(batch, taps - 1, channels),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("time", LENGTHS)
def test_shifted_sums_equal_steps(agree, time, activation):
    agree(
        lambda backend, *x: short_convolution(*x, activation=activation, backend=backend),
        draw(time),
        bound=2e-6,
    )


@pytest.mark.parametrize("taps", [2, 3, 4, 8])
@pytest.mark.parametrize("time", [1, 2, 9])
def test_any_number_of_taps(agree, time, taps):
    agree(lambda backend, *x: short_convolution(*x, backend=backend), draw(time, taps), bound=2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_one_tap_has_no_past(near, backend):
    x, weight, bias, tail = draw(5, taps=1).values()
    y, rest = short_convolution(x, weight, bias, tail, backend=backend)
    near(y, x * weight[:, 0] + bias, 1e-6)
    assert rest.shape == (2, 0, 7)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("time", [1, 3, 17])
def test_equals_a_padded_convolution(near, time, bias, backend):
    x, weight, b, _ = draw(time).values()
    b = b if bias else None
    expected = conv1d(x.mT, weight.unsqueeze(1), b, padding=3, groups=7)[..., :time].mT
    y, tail = short_convolution(x, weight, b, backend=backend)
    near(y, expected, 1e-6)
    near(short_convolution(x, weight, b, activation="silu", backend=backend)[0], silu(expected), 1e-6)
    padded = torch.cat([torch.zeros(2, 3, 7), x], 1)
    assert torch.equal(tail, padded[:, -3:])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 15])
def test_cut_anywhere(near, cut, backend):
    x, weight, bias, tail = draw(16).values()
    expected, expected_tail = short_convolution(x, weight, bias, tail, activation="silu", backend="reference")
    first, tail = short_convolution(x[:, :cut], weight, bias, tail, activation="silu", backend=backend)
    rest, tail = short_convolution(x[:, cut:], weight, bias, tail, activation="silu", backend=backend)
    near(torch.cat([first, rest], 1), expected, 2e-6)
    assert torch.equal(tail, expected_tail)


def test_steps_equal_forward(near):
    x, weight, bias, tail = draw(9).values()
    expected, expected_tail = short_convolution(x, weight, bias, tail, activation="silu")
    outputs = []
    for t in range(9):
        y, tail = short_convolution_step(x[:, t], weight, bias, tail, activation="silu")
        outputs.append(y)
    near(torch.stack(outputs, 1), expected, 2e-6)
    assert torch.equal(tail, expected_tail)


def test_the_tail_is_its_own_memory():
    x, weight, _, _ = draw(50).values()
    _, tail = short_convolution(x, weight)
    assert tail.untyped_storage().nbytes() == tail.numel() * 4
    kept = tail.clone()
    x.zero_()
    assert torch.equal(tail, kept)


@settings(deadline=None, max_examples=15)
@given(time=st.integers(1, 20), batch=st.integers(1, 3), channels=st.integers(1, 9), taps=st.integers(1, 6))
def test_random_shapes(time, batch, channels, taps):
    inputs = draw(time, taps, batch, channels).values()
    y, tail = short_convolution(*inputs)
    expected, expected_tail = short_convolution(*inputs, backend="reference")
    torch.testing.assert_close(y, expected)
    assert torch.equal(tail, expected_tail)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("future", [1e6, torch.nan])
def test_the_future_does_not_reach_the_past(backend, future):
    x, weight, bias, tail = draw(20).values()
    before, _ = short_convolution(x, weight, bias, tail, backend=backend)
    x[:, 11:] = future
    after, _ = short_convolution(x, weight, bias, tail, backend=backend)
    assert torch.equal(after[:, :11], before[:, :11])
    assert not torch.equal(after[:, 11:14], before[:, 11:14])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend):
    inputs = [x.requires_grad_() for x in draw(6, batch=1, channels=2, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(
        lambda *x: short_convolution(*x, activation="silu", backend=backend), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    inputs = draw(40, dtype=dtype).values()
    y, tail = short_convolution(*inputs, activation="silu", backend=backend)
    assert y.dtype == tail.dtype == dtype
    expected, _ = short_convolution(*(x.double() for x in inputs), activation="silu", backend="reference")
    near(y, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-6))


def test_autocast_keeps_the_sum_wide(near):
    x, weight, bias, tail = draw(40).values()
    expected, _ = short_convolution(x, weight, bias, tail)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = short_convolution(x, weight, bias, tail)
        mixed, _ = short_convolution(x.bfloat16(), weight, bias, tail)
    assert torch.equal(y, expected)
    assert mixed.dtype == torch.bfloat16
    near(mixed, expected, 5e-3)


def test_oracle_qwen3_next(near):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next

    x, weight, bias, _ = draw(17).values()
    expected = modeling_qwen3_next.causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT
    y, tail = short_convolution(x, weight, bias, activation="silu")
    near(y, expected, 1e-6)
    state = tail.mT.contiguous()
    token = torch.randn(2, 7)
    expected = modeling_qwen3_next.causal_conv1d_update(token.unsqueeze(-1), state, weight, bias, "silu")
    y, tail = short_convolution_step(token, weight, bias, tail, activation="silu")
    near(y, expected.squeeze(-1), 1e-6)
    assert torch.equal(tail, state.mT)


def by_entry(time, names=("weight", "bias")):
    """Inputs of a batch whose entries have a weight and a bias each, or one of them."""
    inputs = draw(time)
    return {**inputs, **{name: torch.randn(2, *inputs[name].shape) for name in names}}


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("time", [1, 2, 17])
def test_weights_by_entry_equal_steps(agree, near, time, names):
    def call(backend, *x):
        return short_convolution(*x, activation="silu", backend=backend)

    agree(call, by_entry(time, names), bound=2e-6)
    for expected, actual in both_ways(call, by_entry(time, names).values()):
        near(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_weights_by_entry_are_models_side_by_side(near, backend):
    inputs = by_entry(9)
    y, tail = short_convolution(*inputs.values(), activation="silu", backend=backend)
    token = torch.randn(2, 7)
    filters = inputs["weight"], inputs["bias"]
    with torch.no_grad():
        after, rest = short_convolution_step(token, *filters, tail, activation="silu", backend=backend)
    for b in range(2):
        x, weight, bias, before = (value[b] for value in inputs.values())
        alone, own = short_convolution(x[None], weight, bias, before[None], activation="silu")
        near(y[b : b + 1], alone, 1e-6)
        assert torch.equal(tail[b : b + 1], own)
        alone, own = short_convolution_step(token[b : b + 1], weight, bias, own, activation="silu")
        near(after[b : b + 1], alone, 1e-6)
        assert torch.equal(rest[b : b + 1], own)


@pytest.mark.parametrize("stacked", [False, True])
def test_documents_are_texts_of_their_own(agree, stacked):
    """Also those shorter than the filter, whose new tail still holds some of the old one."""
    inputs = draw(30, batch=1)
    inputs["tail"] = torch.randn(4, 3, 7)
    if stacked:
        inputs.update(weight=inputs["weight"][None], bias=inputs["bias"][None])
    cu_seqlens = torch.tensor([0, 1, 3, 20, 30])

    def packed(backend, *inputs):
        return short_convolution(*inputs, activation="silu", cu_seqlens=cu_seqlens, backend=backend)

    agree(packed, inputs, bound=2e-6)
    y, tail = packed("chunked", *inputs.values())
    x, *filters, before = inputs.values()
    for n, (start, end) in enumerate(pairwise(cu_seqlens)):
        alone, own = short_convolution(x[:, start:end], *filters, before[n : n + 1], activation="silu")
        assert torch.equal(y[:, start:end], alone)
        assert torch.equal(tail[n : n + 1], own)


@pytest.mark.parametrize("own", [("weight",), ("weight", "bias")], ids="+".join)
def test_members_of_a_stack_are_entries_of_one_batch(near, own):
    x, filters = torch.randn(3, 2, 9, 7), {"weight": torch.randn(3, 7, 4), "bias": torch.randn(3, 7)}
    leaves = [y.requires_grad_() for y in (x, *filters.values())]

    def call(x, weight, bias):
        return short_convolution(x, weight, bias, activation="silu", backend="triton")[0]

    dims = tuple(0 if name in own else None for name in filters)
    given = [filters[name] if name in own else filters[name][0] for name in filters]
    y = torch.func.vmap(call, (0, *dims))(x, *given)
    alone = [
        call(x[m], *(z if dim is None else z[m] for z, dim in zip(given, dims, strict=True)))
        for m in range(3)
    ]
    near(y, torch.stack(alone), 1e-6)
    expected = torch.autograd.grad(torch.stack(alone).square().sum(), leaves)
    for actual, wanted in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        near(actual, wanted)


def both_ways(call, inputs):
    """Outputs and gradients of all inputs by the reference and by Triton, pair by pair."""
    found = []
    for backend in ("reference", "triton"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = call(backend, *leaves)
        loss = sum(output.square().sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("taps", [1, 2, 3, 16])
@pytest.mark.parametrize("time", [1, 2, 70])
def test_triton_takes_any_number_of_taps(near, time, taps):
    inputs = draw(time, taps).values()
    for expected, actual in both_ways(
        lambda backend, *x: short_convolution(*x, activation="silu", backend=backend), inputs
    ):
        if expected.numel():
            near(actual, expected)
        assert actual.shape == expected.shape


def test_triton_takes_short_documents(near):
    inputs = draw(13, batch=1)
    inputs["tail"] = torch.randn(5, 3, 7)
    cu_seqlens = torch.tensor([0, 1, 3, 6, 10, 13])
    for expected, actual in both_ways(
        lambda backend, *x: short_convolution(*x, cu_seqlens=cu_seqlens, backend=backend), inputs.values()
    ):
        near(actual, expected)


@pytest.mark.parametrize("ask", [0, 1], ids=["output", "tail"])
def test_triton_derives_either_result_alone(near, ask):
    for expected, actual in both_ways(
        lambda backend, *x: short_convolution(*x, activation="silu", backend=backend)[ask : ask + 1],
        draw(9).values(),
    ):
        near(actual, expected)


def test_triton_reads_slices_and_many_tiles(near):
    """One half of a projection is convolved, as in Mamba, and it is wider than a tile."""
    x = torch.randn(2, 70, 600)[..., :300]
    weight, bias = torch.randn(300, 4), torch.randn(300)
    for expected, actual in both_ways(
        lambda backend, *x: short_convolution(*x, activation="silu", backend=backend), (x, weight, bias)
    ):
        near(actual, expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 7), r"x has shape \[2, 7\].*\[B, T, C\]"),
        ("weight", (6, 4), r"weight has shape \[6, 4\].*\[C, W\] = \[7, 4\]"),
        ("weight", (3, 7, 4), r"weight has shape \[3, 7, 4\].*\[B, C, W\] = \[2, 7, 4\]"),
        ("weight", (4,), r"weight has shape \[4\].*\[C, W\]"),
        ("bias", (4,), r"bias has shape \[4\].*\[7\]"),
        ("bias", (3, 7), r"bias has shape \[3, 7\].*\[B, C\] = \[2, 7\]"),
        ("tail", (2, 4, 7), r"tail has shape \[2, 4, 7\].*\[B, W-1, C\] = \[2, 3, 7\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"short_convolution: {message}"):
        short_convolution(*inputs.values())


def test_wrong_settings_are_named():
    x, weight, bias, tail = draw(5).values()
    with pytest.raises(ValueError, match="activation='gelu' is not known; use 'silu' or None"):
        short_convolution(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"short_convolution: no configuration serves W=17 .* W ≤ 16"):
        short_convolution(x, torch.randn(7, 17), backend="triton")
    with pytest.raises(ValueError, match="short_convolution: cu_seqlens packs documents in one row"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"short_convolution_step: a tensor is torch.float64"):
        short_convolution_step(x[:, 0], weight, bias, tail.double(), backend="triton")
    with pytest.raises(ValueError, match="short_convolution_step: tail has shape"):
        short_convolution_step(x[:, 0], weight, bias, tail[:, 1:])

"""Attention over a first part of the keys: large operations against single queries, empty rows, causality."""

import pytest
import torch

from kernels.prefix_attention.ops import prefix_attention
from kernels.softmax_attention.ops import softmax_attention


def draw(time, slots, heads=4, groups=2, key=6, value=5, dtype=torch.float32):
    inputs = {
        "q": torch.randn(2, time, heads, key),
        "k": torch.randn(2, slots, groups, key),
        "v": torch.randn(2, slots, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(visible):
    return lambda backend, *x: prefix_attention(*x, visible, backend=backend)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 4, 33])
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_chunked_is_the_reference(agree, near, time, slots, groups):
    inputs = draw(time, slots, groups=groups)
    visible = torch.randint(0, slots + 1, (time,))
    visible[0] = 1
    agree(call(visible), inputs, floor=0.1, ask=[0])
    _, weights = prefix_attention(*inputs.values(), visible)
    near(weights.sum(-1), (visible > 0)[None, :, None].expand(2, time, 4).float(), 1e-6)
    assert not weights.requires_grad


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_as_many_as_came_is_causal_attention(near, backend):
    inputs = draw(40, 40).values()
    output, _ = prefix_attention(*inputs, torch.arange(1, 41), backend=backend)
    near(output, softmax_attention(*inputs), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_who_sees_nothing_gets_nothing(backend):
    inputs = [x.requires_grad_() for x in draw(3, 4).values()]
    output, weights = prefix_attention(*inputs, torch.tensor([0, 2, 0]), backend=backend)
    assert output[:, ::2].abs().max() == 0 and weights[:, ::2].abs().max() == 0
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][:, ::2].abs().max() == 0 and gradients[1][:, 2:].abs().max() == 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend):
    leaves = [x.requires_grad_() for x in draw(4, 3, 2, 1, 2, 2, torch.float64).values()]
    visible = torch.tensor([0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, visible, backend=backend)[0], leaves)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(agree, size):
    inputs = draw(20, 9)
    inputs["q"] *= size
    agree(call(torch.arange(20) // 2), inputs, bound=1e-4 if size > 1e3 else 1e-5, floor=1e-3, ask=[0])


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("future", [1e3, torch.nan])
def test_hidden_keys_are_not_read(backend, future):
    inputs = draw(12, 6)
    visible = torch.arange(12) // 2
    before = prefix_attention(*inputs.values(), visible, backend=backend)
    for name in "kv":
        inputs[name][:, 3:] = future
    after = prefix_attention(*inputs.values(), visible, backend=backend)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new[:, :8], old[:, :8], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types_and_autocast(near, dtype, backend):
    inputs = draw(20, 9, dtype=dtype).values()
    visible = torch.arange(20) // 2
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = prefix_attention(*inputs, visible, backend=backend)
    assert output.dtype == dtype
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = prefix_attention(*(x.double() for x in inputs), visible, backend="reference")
    near(output, expected, {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 3e-6))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 6), r"q has shape"),
        ("k", (2, 4, 2, 7), r"k has shape .*\[2, 4, 2, 6\]"),
        ("v", (2, 3, 2, 5), r"v has shape"),
        ("q", (2, 5, 3, 6), r"3 heads cannot share 2 groups"),
        ("visible", (4,), r"visible has shape \[4\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5, 4) | {"visible": torch.zeros(5, dtype=torch.int64)}
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=f"prefix_attention: {message}"):
        prefix_attention(*inputs.values())

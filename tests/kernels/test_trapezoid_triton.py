"""What is special to the trapezoidal rule's Triton kernels: rows that share a chunk, and hard gates between them."""

import pytest
import torch

from kernels.trapezoid.ops import trapezoid, trapezoid_step


def draw(time, ranks, heads=1, key=16, value=16):
    wide = [torch.randn(1, time, ranks, heads, size) for size in (key, key, value)]
    numbers = [torch.rand(1, time, heads) for _ in range(3)]
    before = [torch.randn(1, ranks, heads, size) for size in (key, value)]
    log_decay = torch.where(numbers[0] < 0.3, -50.0, -0.05 * numbers[0])
    return [*wide, log_decay, *numbers[1:], torch.randn(1, heads, key, value), *before]


def call(backend, *inputs):
    return trapezoid(*inputs[:-2], inputs[-2:], backend=backend)


@pytest.mark.parametrize(("time", "ranks"), [(40, 2), (9, 16)])
def test_hard_gates_part_the_rows_of_different_tokens_alone(near, time, ranks):
    inputs = draw(time, ranks)
    found = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = call(backend, *leaves)
        loss = sum((x.double() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for place, (actual, expected) in enumerate(zip(found[1], found[0], strict=True)):
        near(actual, expected, name=str(place))


def test_more_ranks_than_a_chunk_holds_well_are_named():
    inputs = draw(3, 17)
    with pytest.raises(ValueError, match=r"trapezoid: 17 ranks are more than the 16 .*backend='auto'"):
        call("triton", *inputs)
    assert call("auto", *inputs)[0].isfinite().all()


def test_a_step_that_is_asked_for_gradients_is_answered_in_pytorch(near):
    *inputs, state, before_k, before_v = draw(1, 2)
    token = [x[:, 0].requires_grad_() for x in inputs]
    output, _ = trapezoid_step(*token, state, (before_k, before_v), backend="triton")
    expected, _ = trapezoid_step(*token, state, (before_k, before_v), backend="reference")
    near(output, expected)
    for actual, wanted in zip(
        torch.autograd.grad(output.sum(), token), torch.autograd.grad(expected.sum(), token), strict=True
    ):
        near(actual, wanted)

"""The generalised delta rule in Triton: what the probes do not ask, in the interpreter."""

import math

import pytest
import torch

from kernels.low_rank_delta.ops import low_rank_delta
from kernels.low_rank_delta.probe import PROBES
from kernels.probe import Sizes

NAMES = ("q", "k", "v", "log_decay", "a", "b", "state")


def draw(time, gate=None, **sizes):
    """Inputs of the probe, all log-decays equal to `gate` where one is given."""
    generator = torch.Generator().manual_seed(0)
    inputs = PROBES[0].draw(Sizes(time=time, heads=1, **sizes), generator)
    if gate is not None:
        inputs["log_decay"].fill_(gate)
    return inputs


def derive(backend, inputs, ask, dtype):
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = low_rank_delta(*(leaves.get(name) for name in NAMES), backend=backend)
    torch.manual_seed(1)
    cotangents = [torch.randn(x.shape).to(x) for x in outputs]
    asked, given = [outputs[i] for i in ask], [cotangents[i] for i in ask]
    gradients = torch.autograd.grad(asked, list(leaves.values()), given, materialize_grads=True)
    return [*(x.detach() for x in outputs), *gradients]


def agree(near, inputs, ask=(0, 1)):
    expected = derive("reference", inputs, ask, torch.float64)
    for place, actual in enumerate(derive("triton", inputs, ask, torch.float32)):
        near(actual, expected[place], 1e-5, floor=1e-4, name=str(place))


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_one_result_alone_without_a_state(near, ask):
    inputs = draw(21)
    del inputs["state"]
    agree(near, inputs, ask)


@pytest.mark.parametrize("gate", [0.1, 0.0, -50.0, -1e4, -math.inf])
def test_any_gate(near, gate):
    agree(near, draw(18, gate))


def test_equal_keys_and_reflections_stay_exact(near):
    """b = 2 κ with one κ again and again flips the state at each token; powers of the triangle would blow up."""
    inputs = draw(40, 0.0)
    inputs["a"] = inputs["a"][:, :1].expand_as(inputs["a"]).contiguous()
    inputs["b"] = -2 * inputs["a"]
    agree(near, inputs)


def test_a_promised_bound_changes_nothing():
    inputs = [draw(20)[name] for name in NAMES]
    for actual, expected in zip(
        low_rank_delta(*inputs, bound=0.7, backend="triton"),
        low_rank_delta(*inputs, backend="triton"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_states_are_kept_for_gradients_alone(largest_bytes):
    inputs = [draw(64, key=32, value=64)[name] for name in NAMES]
    states = 4 * 32 * 64 * 4

    def call():
        low_rank_delta(*inputs, backend="triton")

    assert largest_bytes(call) < states
    inputs[0].requires_grad_()
    assert largest_bytes(call) == states

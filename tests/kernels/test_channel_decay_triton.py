"""The linear recurrence with a decay a key channel in Triton: what the probes do not ask, in the interpreter."""

import math

import pytest
import torch

from kernels.channel_decay.ops import channel_decay, channel_decay_step
from kernels.channel_decay.probe import PROBES
from kernels.check import deviations
from kernels.probe import Sizes, some_hard

NAMES = ("q", "k", "v", "log_decay", "state", "bonus")


def draw(time, gate=None, **sizes):
    """Inputs of the probe with a bonus and mild gates, all log-decays equal to `gate` where one is given."""
    generator = torch.Generator().manual_seed(0)
    inputs = PROBES[-1].draw(Sizes(time=time, heads=1, **sizes), generator)
    if gate is not None:
        inputs["log_decay"].fill_(gate)
    return inputs


def derive(backend, inputs, ask, dtype):
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    q, k, v, log_decay, state, bonus = (leaves.get(name) for name in NAMES)
    outputs = channel_decay(q, k, v, log_decay, state, bonus=bonus, backend=backend)
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
    inputs = draw(37)
    del inputs["state"]
    agree(near, inputs, ask)
    del inputs["bonus"]
    agree(near, inputs, ask)


@pytest.mark.parametrize("gate", [0.5, 0.0, -50.0, -1e4, -math.inf])
def test_any_gate(near, gate):
    inputs = draw(18, gate)
    agree(near, inputs)
    del inputs["bonus"]
    agree(near, inputs)


def test_a_mild_gate_behind_the_hardest(near):
    inputs = draw(40, -1e4)
    inputs["log_decay"][:, 5:] = -0.01
    inputs["log_decay"][:, 30] = -1e4
    agree(near, inputs)


def test_hard_gates_and_a_bonus(near):
    inputs = draw(40)
    inputs["log_decay"] = some_hard(torch.Generator().manual_seed(2), *inputs["log_decay"].shape)
    agree(near, inputs)


def test_a_bonus_for_each_batch_entry(near):
    inputs = draw(37, batch=2)
    inputs["bonus"] = torch.randn(2, *inputs["bonus"].shape)
    agree(near, inputs)
    token = {name: inputs[name][:, 0] for name in NAMES[:4]}
    rest = {"state": inputs["state"], "bonus": inputs["bonus"]}
    with torch.no_grad():
        results = [
            channel_decay_step(**token, **rest, backend=backend) for backend in ("triton", "reference")
        ]
    for actual, expected in zip(*results, strict=True):
        near(actual, expected)


def test_wide_keys_and_values(near):
    """Many tiles of values; keys as wide as float32 is served, and in half precision twice as wide."""
    agree(near, draw(3, key=120, value=300))
    for found in deviations(PROBES[-1], Sizes(time=3, heads=1, key=200, value=300), torch.float16, "cpu"):
        assert found.ok, found


def test_states_are_kept_for_gradients_alone(largest_bytes):
    inputs = draw(128, key=32, value=64)
    q, k, v, log_decay, state, bonus = (inputs[name] for name in NAMES)
    states = 8 * 32 * 64 * 4

    def call():
        channel_decay(q, k, v, log_decay, state, bonus=bonus, backend="triton")

    assert largest_bytes(call) < states
    q.requires_grad_()
    assert largest_bytes(call) == states

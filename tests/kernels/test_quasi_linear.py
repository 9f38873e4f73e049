"""Quasi-linear attention: blocks against steps, the cases in which it is linear, the paper's formula, extreme gates."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.quasi_linear.ops import fold_block, quasi_linear, quasi_linear_step
from kernels.scalar_decay.ops import scalar_decay

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def draw(time, decay=True, batch=2, heads=3, key=12, value=20, dtype=torch.float32):
    """Inputs by name, in the order of the call; the values are small, so that the activation bends them."""
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, time, heads, key),
        "v": torch.randn(batch, time, heads, value) / 4,
        "log_decay": -0.2 * torch.rand(heads) if decay else None,
        "state": torch.randn(batch, heads, key, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items() if x is not None}


def call(backend, q, k, v, *rest, block=16, **settings):
    """rest is log_decay and state, or the state alone."""
    log_decay, state = rest if len(rest) == 2 else (None, *rest)
    return quasi_linear(q, k, v, log_decay, state, block=block, backend=backend, **settings)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("block", [1, 3, 16, 64])
@pytest.mark.parametrize("time", LENGTHS)
def test_blocks_equal_steps(agree, time, block, decay):
    agree(lambda backend, *x: call(backend, *x, block=block), draw(time, decay))


@pytest.mark.parametrize("seen", [0, 48])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("block", [1, 16])
def test_means_and_plain_sums(agree, block, activation, seen):
    settings = {"block": block, "activation": activation, "seen": seen}
    agree(lambda backend, *x: call(backend, *x, **settings), draw(75, False))


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(near, time):
    *inputs, _ = draw(time).values()
    for backend in ("reference", "chunked"):
        found = quasi_linear(*inputs, block=16, backend=backend)
        wanted = quasi_linear(*inputs, torch.zeros(2, 3, 12, 20), block=16, backend=backend)
        for a, b in zip(found, wanted, strict=True):
            near(a, b, 1e-6, floor=1e-9)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("block", [1, 7, 16, 75])
@pytest.mark.parametrize("seen", [None, 0])
def test_without_activation_it_is_linear_attention(near, backend, block, seen):
    q, k, v, log_decay, state = draw(75).values()
    settings = {"block": block, "activation": None, "seen": seen, "backend": backend}
    output, _ = quasi_linear(q, k, v, None, state, **settings)
    near(output, scalar_decay(q, k, v, None, state)[0])
    output, _ = quasi_linear(q, k, v, log_decay, state, **settings)
    near(output, scalar_decay(q, k, v, log_decay.expand(2, 75, 3), state)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_within_one_block_it_is_linear_attention_whatever_the_activation(near, backend):
    q, k, v, *_ = draw(75).values()
    output, last = quasi_linear(q, k, v, None, block=75, backend=backend)
    near(output, scalar_decay(q, k, v, None)[0])
    near(last, torch.einsum("bshk,bshv->bhkv", k, v))
    _, untouched = quasi_linear(q, k, v, None, block=76, backend=backend)
    assert untouched.abs().max() == 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_blocks_of_one_token_are_the_papers_formula_for_a_candidate(near, backend):
    """A candidate sees the activated sum over the history, and itself: arXiv:2510.22049, appendix B."""
    q, k, v, *_ = draw(20).values()
    output, _ = quasi_linear(q, k, v, None, block=1, backend=backend)
    for t in (0, 1, 19):
        history = torch.einsum("bshk,bshv->bhkv", k[:, :t], v[:, :t])
        own = (q[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        near(output[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t], F.silu(history)) + own)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_means_bend_the_mean_and_give_back_the_sum(near, backend):
    q, k, v, _, state = draw(24).values()
    output, last = quasi_linear(q, k, v, None, state, block=8, seen=40, backend=backend)
    sums = state + torch.einsum("bshk,bshv->bhkv", k[:, :16], v[:, :16])
    past = torch.einsum("bthk,bhkv->bthv", q[:, 16:], 56 * F.silu(sums / 56))
    near(output[:, 16:], past + scalar_decay(q[:, 16:], k[:, 16:], v[:, 16:], None)[0])
    near(last, state + torch.einsum("bshk,bshv->bhkv", k, v))


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("block", [1, 4])
def test_steps_equal_forward(near, block, decay):
    inputs = draw(21, decay)
    state = inputs.pop("state")
    q, k, v, log_decay = (*inputs.values(), None)[:4]
    for seen in (None, 8):
        expected, expected_last = quasi_linear(q, k, v, log_decay, state, block=block, seen=seen)
        outputs, matrix = [], state
        for t in range(21):
            opened = slice(t - t % block, t + 1)
            count = None if seen is None else seen + t - t % block
            outputs.append(
                quasi_linear_step(q[:, t], k[:, opened], v[:, opened], log_decay, matrix, seen=count)
            )
            if (t + 1) % block == 0:
                matrix = fold_block(k[:, opened], v[:, opened], log_decay, matrix)
        near(torch.stack(outputs, 1), expected)
        near(matrix, expected_last)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [16, 48, 64])
def test_cut_between_blocks(near, cut, backend):
    q, k, v, log_decay, state = draw(75).values()
    settings = {"block": 16, "backend": backend}
    expected, expected_last = quasi_linear(q, k, v, log_decay, state, seen=32, **settings)
    first, state = quasi_linear(*(x[:, :cut] for x in (q, k, v)), log_decay, state, seen=32, **settings)
    rest, state = quasi_linear(*(x[:, cut:] for x in (q, k, v)), log_decay, state, seen=32 + cut, **settings)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 15, 16, 40, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = list(draw(76).values())
    before, _ = call(backend, *inputs)
    for future in (0.5, 1e3, torch.nan):
        changed = [x.clone() for x in inputs]
        for x in changed[:3]:
            x[:, t + 1 :] = future
        after, _ = call(backend, *changed)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize(("backend", "block"), [("reference", 3), ("chunked", 3), ("chunked", 1)])
def test_gradients_in_float64(backend, block):
    inputs = draw(7, batch=1, heads=2, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x, block=block, seen=5), leaves)


@pytest.mark.parametrize("rate", [0.0, -5.0, -50.0, -1e4])
def test_extreme_decays_stay_finite_and_equal(agree, rate):
    inputs = draw(75)
    inputs["log_decay"] = torch.full((3,), rate)
    agree(call, inputs, floor=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    *inputs, _ = draw(40, dtype=dtype).values()
    output, last = quasi_linear(*inputs, block=8, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous() and last.is_contiguous()
    expected, expected_last = quasi_linear(*(x.double() for x in inputs), block=8, backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)


def test_autocast_leaves_the_state_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = call("auto", *inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_states_of_one_group_of_blocks_are_held_at_a_time(largest_bytes):
    def bytes_at(time):
        q, k, v, log_decay, _ = draw(time, batch=1, heads=1, key=32, value=32).values()
        with torch.no_grad():
            return largest_bytes(lambda: quasi_linear(q, k, v, log_decay, block=1))

    # A state is 4 KiB; what grows with the length is no more than one state a token: what the tokens write.
    assert bytes_at(512) <= 512 * 4096


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 3, 11), r"q has shape .*\[B, T, H, K\] = \[2, 5, 3, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, H, K\]"),
        ("v", (2, 4, 3, 20), r"v has shape .*\[2, 5, 3, 20\]"),
        ("log_decay", (2, 5, 3), r"log_decay has shape .*\[3\]"),
        ("state", (2, 3, 20, 12), r"state has shape .*\[2, 3, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"quasi_linear: {message}"):
        call("auto", *inputs.values())


def test_wrong_settings_are_named():
    *inputs, state = draw(5).values()
    q, k, v, log_decay = inputs
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        quasi_linear(*inputs, block=0)
    with pytest.raises(ValueError, match="seen=-1 must be at least 0"):
        quasi_linear(*inputs, block=4, seen=-1)
    with pytest.raises(ValueError, match="activation='relu' is not known"):
        quasi_linear(*inputs, block=4, activation="relu")
    with pytest.raises(ValueError, match="quasi_linear: there is no Triton kernel yet"):
        quasi_linear(*inputs, block=4, backend="triton")
    with pytest.raises(ValueError, match="quasi_linear_step: q has shape"):
        quasi_linear_step(q, k, v, log_decay, state)
    with pytest.raises(ValueError, match="fold_block: state has shape"):
        fold_block(k, v, log_decay, state.mT)

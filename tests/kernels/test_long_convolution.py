"""Causal convolution with long filters: blocks against steps, direct sums, causality to the last bit, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.long_convolution.chunked import smooth
from kernels.long_convolution.ops import long_convolution, long_convolution_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def draw(time, past=9, batch=2, channels=6, filters=6, taps=None, dtype=torch.float32):
    """Inputs by name, in the order of the call."""
    inputs = {
        "u": torch.randn(batch, time, channels),
        "h": torch.randn(filters, taps or time + past),
        "past": torch.randn(batch, past, channels),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(backend, *inputs):
    return (long_convolution(*inputs, backend=backend),)


def direct(u, h, past=None):
    """The double sum, in float64."""
    before = 0 if past is None else past.shape[1]
    seen = (u if past is None else torch.cat([past, u], dim=1)).double()
    h = h.double().repeat_interleave(u.shape[2] // h.shape[0], dim=0)
    y = torch.zeros_like(u, dtype=torch.float64)
    for t in range(u.shape[1]):
        for lag in range(min(before + t + 1, h.shape[1])):
            y[:, t] += h[:, lag] * seen[:, before + t - lag]
    return y


@pytest.mark.parametrize("time", LENGTHS)
def test_blocks_equal_steps(agree, time):
    agree(call, draw(time))


@pytest.mark.parametrize("time", LENGTHS)
def test_no_past_is_a_past_of_zeros(agree, near, time):
    u, h, past = draw(time).values()
    agree(call, {"u": u, "h": h})
    expected = long_convolution(u, h)
    near(long_convolution(u, h, torch.zeros_like(past)), expected, 1e-6)
    near(long_convolution(u, h, past[:, :0]), expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("time", "past"), [(1, 0), (7, 3), (40, 90), (130, 1)])
def test_it_is_the_double_sum(near, backend, time, past):
    inputs = draw(time, past).values()
    near(long_convolution(*inputs, backend=backend), direct(*inputs), 2e-6)


@pytest.mark.parametrize("taps", [1, 2, 17, 64, 70, 200])
def test_a_filter_may_be_shorter_or_longer_than_the_text(agree, near, taps):
    inputs = draw(75, past=20, taps=taps)
    agree(call, inputs)
    near(long_convolution(*inputs.values()), direct(*inputs.values()), 2e-6)


def test_a_tree_of_several_levels(near):
    """1030 tokens make blocks of 1024, of 64 within them, and a last one that is nearly empty."""
    for time in (1024, 1030, 2500):
        u, h, _ = draw(time, past=0, batch=1, channels=2, filters=2, dtype=torch.float64).values()
        size = 2 * time
        spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(h, n=size).mT
        expected = torch.fft.irfft(spectrum, n=size, dim=1)[:, :time]
        near(long_convolution(u, h), expected, 1e-13)
        near(long_convolution(u.float(), h.float()), expected, 1e-6)


def test_without_padding_the_end_reaches_the_beginning(near):
    u, h, _ = draw(130, past=0).values()
    around = torch.fft.irfft(torch.fft.rfft(u, dim=1) * torch.fft.rfft(h).mT, n=130, dim=1)
    y = long_convolution(u, h)
    assert (around - y)[:, 0].abs().max() > 1
    near(around[:, -1], y[:, -1])


@pytest.mark.parametrize("filters", [1, 2, 3])
def test_tied_filters_are_repeated_ones(agree, near, filters):
    inputs = draw(70, filters=filters)
    agree(call, inputs)
    y = long_convolution(*inputs.values())
    inputs["h"] = inputs["h"].repeat_interleave(6 // filters, dim=0)
    for backend in ("reference", "chunked"):
        near(y, long_convolution(*inputs.values(), backend=backend), 2e-6)


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 140),
    past=st.integers(0, 90),
    batch=st.integers(1, 3),
    filters=st.integers(1, 3),
    shared=st.integers(1, 3),
    taps=st.integers(1, 200),
)
def test_random_shapes(time, past, batch, filters, shared, taps):
    inputs = draw(time, past, batch, filters * shared, filters, taps).values()
    expected = long_convolution(*inputs, backend="reference")
    torch.testing.assert_close(long_convolution(*inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    u, h, past = draw(75).values()
    expected = long_convolution(u, h, past, backend="reference")
    first = long_convolution(u[:, :cut], h, past, backend=backend)
    rest = long_convolution(u[:, cut:], h, torch.cat([past, u[:, :cut]], dim=1), backend=backend)
    near(torch.cat([first, rest], 1), expected)


@pytest.mark.parametrize("taps", [3, 400])
def test_steps_equal_forward(near, taps):
    """300 tokens of past are more than one block of a step."""
    u, h, past = draw(20, past=290, taps=taps, filters=3).values()
    expected = long_convolution(u, h, past)
    seen = torch.cat([past, u], dim=1)
    rows = [long_convolution_step(u[:, t], h, seen[:, : 290 + t]) for t in range(20)]
    near(torch.stack(rows, 1), expected)


@pytest.mark.parametrize("time", [75, 130, 1100])
def test_the_future_does_not_reach_the_past_to_the_last_bit(time):
    """One FFT over the text would leak a loud future into it: of its size, times the rounding."""
    u, h, past = draw(time, batch=1, channels=2, filters=2).values()
    before = long_convolution(u, h, past)
    for t in (0, 16, 63, 64, time - 3):
        changed = u.clone()
        changed[:, t + 1 :] = 1e6
        after = long_convolution(changed, h, past)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 63, 64, 74])
def test_nan_in_the_future_does_not_reach_the_past(backend, t):
    u, h, past = draw(76).values()
    before = long_convolution(u, h, past, backend=backend)
    u[:, t + 1 :] = torch.nan
    after = long_convolution(u, h, past, backend=backend)
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-4)
    assert after[:, t + 1 :].isnan().all()


@pytest.mark.parametrize("time", [75, 200])
def test_no_gradient_reaches_the_future(time):
    u, h, past = (x.requires_grad_() for x in draw(time).values())
    (gradient,) = torch.autograd.grad(long_convolution(u, h, past)[:, :70].square().sum(), u)
    assert gradient[:, 70:].abs().max() == 0
    assert (gradient[:, :70].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize(
    ("backend", "time", "past"), [("reference", 7, 3), ("chunked", 7, 3), ("chunked", 67, 0)]
)
def test_gradients_in_float64(backend, time, past):
    inputs = draw(time, past, batch=2, channels=2, filters=1, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values() if x.numel()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x), leaves)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_gradient_of_one_input_alone(near, frozen):
    inputs = list(draw(75, past=0).values())[:2]
    whole = torch.autograd.grad(
        long_convolution(*(x.requires_grad_() for x in inputs)).square().sum(), inputs
    )[1 - frozen]
    inputs[frozen] = inputs[frozen].detach()
    (alone,) = torch.autograd.grad(long_convolution(*inputs).square().sum(), inputs[1 - frozen])
    near(alone, whole, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    inputs = draw(80, dtype=dtype).values()
    y = long_convolution(*inputs, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous()
    expected = long_convolution(*(x.double() for x in inputs), backend="reference")
    near(y, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-6))
    u, h, past = inputs
    assert long_convolution_step(u[:, 0], h, past).dtype == dtype


def test_autocast_leaves_the_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = long_convolution(*inputs)
            loss = y.square().sum()
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_lengths_of_transforms_are_smooth_and_close():
    for size in range(1, 3000):
        found = smooth(size)
        assert size <= found <= max(1.34 * size, 2)
        while found % 2 == 0:
            found //= 2
        assert found in (1, 3, 5, 9, 15)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (2, 6), r"u has shape \[2, 6\].*\[B, T, C\]"),
        ("u", (2, 0, 6), r"u has shape \[2, 0, 6\]"),
        ("h", (4, 14), r"6 channels cannot share 4 filters evenly"),
        ("h", (6,), r"h has shape \[6\].*\[H, L\]"),
        ("past", (2, 9, 5), r"past has shape \[2, 9, 5\].*\[B, S, C\] = \[2, 9, 6\]"),
        ("past", (9, 6), r"past has shape \[9, 6\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"long_convolution: {message}"):
        long_convolution(*inputs.values())


def test_wrong_calls_are_named():
    u, h, past = draw(5).values()
    with pytest.raises(ValueError, match="long_convolution: there is no Triton kernel yet"):
        long_convolution(u, h, past, backend="triton")
    with pytest.raises(ValueError, match="long_convolution_step: there is no Triton kernel yet"):
        long_convolution_step(u[:, 0], h, past, backend="triton")
    with pytest.raises(ValueError, match="long_convolution_step: past has shape"):
        long_convolution_step(u[:, 0], h, past[:1])
    with pytest.raises(ValueError, match="long_convolution_step: u has shape"):
        long_convolution_step(u, h, past)

"""Softmax attention: large operations against single queries, windows, groups, caches, causality, work."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 75, 130)


def draw(time, keys=None, batch=2, heads=4, groups=2, key=12, value=20, dtype=torch.float32):
    """q, k and v by name; `keys` of k and v, as many as queries where it is left out."""
    keys = time if keys is None else keys
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, keys, groups, key),
        "v": torch.randn(batch, keys, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(window=None, scale=None):
    return lambda backend, *x: (softmax_attention(*x, window=window, scale=scale, backend=backend),)


def by_mask(q, k, v, window=None):
    """The whole square of scores with repeated heads, written out."""
    time, keys, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    position, key = torch.arange(keys - time, keys)[:, None], torch.arange(keys)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("value", [12, 20])
@pytest.mark.parametrize("more", [0, 1, 37])
@pytest.mark.parametrize("time", LENGTHS)
def test_causal(agree, near, time, more, value):
    inputs = draw(time, time + more, value=value)
    agree(call(), inputs, floor=0.1)
    near(softmax_attention(*inputs.values()), by_mask(*inputs.values()), 2e-6)


@pytest.mark.parametrize("window", [1, 2, 16, 33, 64, 150])
@pytest.mark.parametrize("keys", [1, 16, 65, 130, 131, 200])
def test_window(agree, near, keys, window):
    for time, value in itertools.product({1, keys // 2 + 1, keys}, (12, 20)):
        inputs = draw(time, keys, value=value)
        agree(call(window), inputs, floor=0.1)
        near(softmax_attention(*inputs.values(), window=window), by_mask(*inputs.values(), window), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("time", "keys"), [(40, 40), (200, 200), (50, 200)])
def test_a_window_as_long_as_the_text_is_full_attention(near, time, keys, backend):
    inputs = draw(time, keys).values()
    expected = softmax_attention(*inputs, backend=backend)
    for window in (keys, keys + 1, 10**6):
        near(softmax_attention(*inputs, window=window, backend=backend), expected, 1e-6)
    shorter = softmax_attention(*inputs, window=keys - 1, backend=backend)
    assert torch.equal(shorter[:, -1], expected[:, -1]) is False


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("time", [30, 150])
def test_groups_are_repeated_heads(near, time, heads, groups, window):
    q, k, v = draw(time, heads=heads, groups=groups).values()
    output = softmax_attention(q, k, v, window=window)
    k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
    near(output, softmax_attention(q, k, v, window=window, backend="reference"), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_scale(near, backend):
    q, k, v = draw(40).values()
    expected = softmax_attention(q, k, v, backend="reference")
    near(softmax_attention(q * 3, k, v, scale=12**-0.5 / 3, backend=backend), expected, 2e-6)
    uniform = softmax_attention(q, k, v, scale=0.0, backend=backend)
    mean = v.cumsum(1) / torch.arange(1, 41)[:, None, None]
    near(uniform, mean.repeat_interleave(2, dim=2), 2e-6)
    step = softmax_attention_step(q[:, -1], k, v, visible=40, scale=0.0, backend=backend)
    near(step, mean[:, -1].repeat_interleave(2, dim=1), 2e-6)


@pytest.mark.parametrize("value", [12, 20])
@pytest.mark.parametrize("time", [64, 300])
def test_long_and_narrow_windows_and_wide_values(agree, time, value):
    """Beyond the size where values that are wider than keys are padded for the fused kernel."""
    agree(call(), draw(time, batch=1, value=value), floor=0.1)
    agree(call(7), draw(time, batch=1, value=value), floor=0.1)


@settings(deadline=None, max_examples=25)
@given(
    time=st.integers(1, 70),
    more=st.integers(0, 150),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    window=st.none() | st.integers(1, 80),
)
def test_random_shapes(time, more, groups, shared, key, value, window):
    inputs = draw(time, time + more, 1, groups * shared, groups, key, value).values()
    output = softmax_attention(*inputs, window=window)
    torch.testing.assert_close(output, by_mask(*inputs, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("cut", [1, 31, 64, 149])
def test_cut_anywhere(near, cut, window, backend):
    q, k, v = draw(150).values()
    expected = softmax_attention(q, k, v, window=window, backend="reference")
    first = softmax_attention(q[:, :cut], k[:, :cut], v[:, :cut], window=window, backend=backend)
    rest = softmax_attention(q[:, cut:], k, v, window=window, backend=backend)
    near(torch.cat([first, rest], 1), expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 9])
def test_steps_over_a_ring_equal_forward(near, window, backend):
    q, k, v = draw(30).values()
    expected = softmax_attention(q, k, v, window=window)
    slots = window or 30
    keys, values = torch.full((2, slots, 2, 12), torch.nan), torch.full((2, slots, 2, 20), torch.nan)
    outputs = []
    for t in range(30):
        keys[:, t % slots], values[:, t % slots] = k[:, t], v[:, t]
        visible = min(t + 1, slots)
        outputs.append(softmax_attention_step(q[:, t], keys, values, visible=visible, backend=backend))
    near(torch.stack(outputs, 1), expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_nothing_visible_answers_zero(backend):
    q, k, v = draw(5).values()
    k.fill_(torch.nan)
    v.fill_(torch.nan)
    output = softmax_attention_step(q[:, 0], k, v, visible=0, backend=backend)
    assert torch.equal(output, torch.zeros(2, 4, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_over_half_caches(near, groups, dtype):
    _, k, v = draw(3000, groups=groups, key=64, value=80, batch=3).values()
    q = 2 * torch.randn(3, 4, 64)
    k, v = k.to(dtype), v.to(dtype)
    expected = softmax_attention_step(q.double(), k.double(), v.double(), visible=2900, backend="reference")
    output = softmax_attention_step(q, k, v, visible=2900)
    assert output.dtype == dtype
    near(output, expected, 2e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_may_be_a_view_of_the_keys(near, dtype):
    cache = torch.randn(2, 500, 1, 40).to(dtype)
    q = torch.randn(2, 6, 40).to(dtype)
    expected = softmax_attention_step(q, cache, cache[..., :32].clone(), visible=400, backend="reference")
    output = softmax_attention_step(q, cache, cache[..., :32], visible=400)
    near(output, expected, 1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_step_copies_no_cache(largest_bytes, groups, dtype):
    slots, heads = 2**17 // groups, 2 * groups
    k = torch.randn(1, slots, groups, 64).to(dtype)
    q = torch.randn(1, heads, 64).to(dtype)
    cache = k.numel() * k.element_size()
    wide = 4 * heads * slots
    assert wide < cache / 4 or groups > 1
    largest = largest_bytes(lambda: softmax_attention_step(q, k, k[..., :48], visible=slots - 1))
    assert largest <= max(wide, cache / 4)
    assert largest < cache


def test_steps_carry_gradients(agree):
    inputs = draw(1, 20)
    agree(
        lambda backend, q, k, v: (softmax_attention_step(q[:, 0], k, v, visible=17, backend=backend),), inputs
    )


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("value", [12, 20])
@pytest.mark.parametrize(("time", "window"), [(60, None), (60, 7), (200, 7), (200, 50), (200, None)])
def test_the_future_does_not_reach_the_past(time, window, value, backend):
    inputs = draw(time, value=value)
    before = softmax_attention(*inputs.values(), window=window, backend=backend)
    for t, future in itertools.product((0, 31, time - 2), (1e3, torch.nan)):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = future
        after = softmax_attention(*changed, window=window, backend=backend)
        bound = 1e-5 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("time", [60, 200])
def test_what_lies_before_the_window_is_not_seen(time):
    inputs = draw(time)
    before = softmax_attention(*inputs.values(), window=9)
    for name in "kv":
        inputs[name][:, : time - 40] = torch.nan
    after = softmax_attention(*inputs.values(), window=9)
    torch.testing.assert_close(after[:, -32:], before[:, -32:], rtol=0, atol=1e-5)
    assert after[:, -33].isnan().all()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("time", [60, 150])
def test_no_gradient_reaches_the_future(time, window):
    inputs = [x.requires_grad_() for x in draw(time).values()]
    output = softmax_attention(*inputs, window=window)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("value", [2, 3])
def test_gradients_in_float64(window, backend, value):
    inputs = draw(5, 6, batch=1, heads=2, groups=1, key=2, value=value, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: softmax_attention(*x, window=window, backend=backend), leaves)


def test_gradients_in_float64_of_blocks():
    inputs = draw(140, 141, batch=1, heads=1, groups=1, key=1, value=1, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: softmax_attention(*x, window=3), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("time", "window", "value"), [(60, None, 12), (60, None, 20), (150, 20, 12)])
def test_types(near, time, window, value, backend, dtype):
    inputs = draw(time, value=value, dtype=dtype).values()
    output = softmax_attention(*inputs, window=window, backend=backend)
    assert output.dtype == dtype
    assert output.is_contiguous()
    expected = by_mask(*(x.double() for x in inputs), window)
    near(output, expected, {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}.get(dtype, 2e-6))


@pytest.mark.parametrize("value", [12, 20])
def test_autocast_leaves_the_softmax_alone(value):
    inputs = [x.requires_grad_() for x in draw(75, value=value).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = softmax_attention(*inputs)
            step = softmax_attention_step(inputs[0][:, -1], *inputs[1:], visible=75)
            loss = output.float().square().sum()
        results.append([output, step, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def _fused(q, k, *_shapes, **_rest):
    """Work of the fused CPU kernel, which torch's own counter overlooks: every query against every key."""
    return 2 * 2 * math.prod(q[:3]) * k[2] * k[3]


def _fused_backward(_gradient, q, k, *_shapes, **_rest):
    return 5 * _fused(q, k) // 2


FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


def _flops(time, keys, window, value):
    inputs = [x.requires_grad_() for x in draw(time, keys, batch=1, value=value).values()]
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        softmax_attention(*inputs, window=window).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("value", [12, 20])
def test_work_of_a_window_grows_with_the_length_and_the_window(value):
    assert _flops(1024, 1024, None, value) >= 3.9 * _flops(512, 512, None, value) > 0
    assert _flops(1024, 1024, 32, value) == 2 * _flops(512, 512, 32, value) > 0
    assert _flops(1024, 1024, 64, value) <= 2.1 * _flops(1024, 1024, 32, value)
    assert _flops(64, 4096, 32, value) == _flops(64, 160, 32, value)
    assert 10 * _flops(1024, 1024, 32, value) <= _flops(1024, 1024, None, value)


@pytest.mark.parametrize("value", [12, 20])
def test_memory_of_a_window_grows_with_the_length(largest_bytes, value):
    def largest(time, keys, window=32):
        inputs = [x.requires_grad_() for x in draw(time, keys, batch=1, value=value).values()]
        return largest_bytes(lambda: softmax_attention(*inputs, window=window).sum().backward())

    assert largest(2048, 2048) <= 2.1 * largest(1024, 1024)
    assert largest(1024, 1024) < 1024 * 1024


def test_oracle_llama(near):
    """Grouped heads as the transformers package repeats them, and its mask for a window."""
    pytest.importorskip("transformers")
    from transformers.masking_utils import sliding_window_overlay
    from transformers.models.llama import modeling_llama

    q, k, v = draw(50).values()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    inside = sliding_window_overlay(7)
    for window in (None, 7):
        mask = torch.full((50, 50), -torch.inf).triu(1)
        if window is not None:
            seen = [
                [bool(inside(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(50)] for i in range(50)
            ]
            mask = mask.masked_fill(~torch.tensor(seen), -torch.inf)
        expected, _ = modeling_llama.eager_attention_forward(
            module.eval(), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling=12**-0.5
        )
        near(softmax_attention(q, k, v, window=window), expected, 2e-6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 4), r"q has shape \[2, 5, 4\].*\[B, T, H, K\]"),
        ("k", (2, 5, 2, 11), r"k has shape .*\[B, S, G, K\] = \[2, 5, 2, 12\]"),
        ("v", (2, 6, 2, 20), r"v has shape .*\[2, 5, 2, 20\]"),
        ("q", (2, 5, 3, 12), r"3 heads cannot share 2 groups evenly"),
        ("q", (2, 6, 4, 12), r"5 keys for 6 queries"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"softmax_attention: {message}"):
        softmax_attention(*inputs.values())


def test_wrong_settings_are_named():
    q, k, v = draw(5).values()
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        softmax_attention(q, k, v, window=0)
    wide = torch.zeros(2, 5, 2, 300)
    with pytest.raises(ValueError, match="softmax_attention: no configuration serves K=12, V=300"):
        softmax_attention(q, k, wide, backend="triton")
    with pytest.raises(ValueError, match=r"softmax_attention_step: a tensor is torch.float64"):
        softmax_attention_step(q[:, 0].double(), k, v, visible=5, backend="triton")
    for visible in (-1, 6):
        with pytest.raises(ValueError, match=f"visible={visible} lies outside the 5 slots"):
            softmax_attention_step(q[:, 0], k, v, visible=visible)
    with pytest.raises(ValueError, match="softmax_attention_step: v has shape"):
        softmax_attention_step(q[:, 0], k, v[:, :4], visible=3)

"""Softmax attention in Triton beyond what every kernel owes: each option alone, tails of keys, packed documents, caches."""

import pytest
import torch

from kernels import attention
from kernels.attention import SMALLEST_PART
from kernels.softmax_attention.ops import (
    softmax_attention,
    softmax_attention_step,
    softmax_attention_with_sums,
)
from kernels.window_mass.ops import window_mass, window_mass_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPES = torch.tensor([0.5, 0.1], device=DEVICE)
LOGITS = torch.tensor([0.3, -1.0], device=DEVICE)


def draw(time, keys=None, batch=1, heads=2, groups=1, key=16, value=24):
    keys = time if keys is None else keys
    shapes = ((batch, time, heads, key), (batch, keys, groups, key), (batch, keys, groups, value))
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def derive(backend, inputs, call=softmax_attention_with_sums, ask=slice(None), **options):
    """Outputs and the gradients of q, k, v and of what is learned among the options."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    learned = {
        name: options[name].detach().clone().requires_grad_()
        for name in ("slopes", "sink_logits")
        if name in options
    }
    outputs = call(*leaves, backend=backend, **options | learned)
    asked = outputs[ask]
    draws = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(x.shape, generator=draws).to(x) for x in asked]
    gradients = torch.autograd.grad(asked, [*leaves, *learned.values()], cotangents, materialize_grads=True)
    return [x.detach() for x in outputs] + list(gradients)


def check(near, inputs, **options):
    expected = derive("reference", inputs, **options)
    for i, (a, b) in enumerate(zip(derive("triton", inputs, **options), expected, strict=True)):
        near(a, b, 1e-5, floor=1e-2, name=f"{options}: {i}")


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 9},
        {"window": 9, "sinks": 3},
        {"window": 12, "sinks": 35, "skipped": 7},
        {"sinks": 3, "skipped": 7, "slopes": SLOPES},
        {"slopes": SLOPES},
        {"slopes": SLOPES, "window": 66},
        {"soft_cap": 2.0},
        {"sink_logits": LOGITS, "window": 300},
        {"spans": (4, 90)},
        {"scale": 0.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_each_option_alone(near, options):
    check(near, draw(40, 110), **options)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_of_a_group(near, groups):
    check(near, draw(40, heads=4, groups=groups, batch=2), spans=(3, 50, 20, 5))


@pytest.mark.parametrize("key", [40, 80, 96])
def test_keys_that_are_cut_in_two(near, key):
    """Into a power of two and a tail, which the step's cache is too."""
    inputs = draw(70, 90, key=key, value=16)
    check(near, inputs)
    q, k, v = inputs
    expected = softmax_attention_step(q[:, 0], k, v, visible=80, backend="reference")
    near(softmax_attention_step(q[:, 0], k, v, visible=80, backend="triton"), expected)


@pytest.mark.parametrize("ask", [slice(0, 1), slice(1, 2)], ids=["output", "sums"])
def test_a_gradient_of_one_output_alone(near, ask):
    inputs = draw(20, 30)
    options = {"soft_cap": 3.0, "sink_logits": LOGITS}
    expected = derive("reference", inputs, ask=ask, **options)
    for a, b in zip(derive("triton", inputs, ask=ask, **options), expected, strict=True):
        near(a, b, floor=1e-2)


def test_parts_of_one_projection_are_read_where_they_lie(near):
    whole = torch.randn(2, 33, 4 * 16, device=DEVICE)
    q, k, v = (x.unflatten(2, (-1, 16)) for x in whole.split([32, 16, 16], dim=2))
    assert not any(x.is_contiguous() for x in (q, k, v))
    check(near, (q, k, v))


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(near, size):
    q, k, v = draw(40, key=4)
    q = q * size / 4
    for options in ({"sink_logits": torch.tensor([-1e4, 1e4], device=DEVICE)}, {"soft_cap": 50.0}, {}):
        expected = softmax_attention(
            q.double(), k.double(), v.double(), window=9, backend="reference", **options
        )
        actual = derive("triton", (q, k, v), window=9, **options)
        near(actual[0], expected, 1e-3)
        assert all(x.isfinite().all() for x in actual)


def test_the_future_does_not_reach_the_past():
    q, k, v = draw(75)
    before = softmax_attention(q, k, v, backend="triton")
    for x in (q, k, v):
        x[:, 40:] = 1e3
    after = softmax_attention(q, k, v, backend="triton")
    assert torch.equal(after[:, :40], before[:, :40])


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": 2, "sink_logits": LOGITS}], ids=str)
def test_packed_documents_are_what_they_are_apart(near, backend, options):
    lengths = [1, 32, 5, 34]
    inputs = draw(sum(lengths))
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0)
    packed = derive(backend, inputs, cu_seqlens=starts, **options)
    apart = [
        derive("reference", own, **options)
        for own in zip(*(x.split(lengths, 1) for x in inputs), strict=True)
    ]
    for i in range(2):
        near(packed[i], torch.cat([one[i] for one in apart], 1), floor=1e-2)
    output = softmax_attention(*inputs, cu_seqlens=starts, backend=backend, **options)
    near(output, packed[0])
    expected = derive("reference", inputs, cu_seqlens=starts, **options)
    for a, b in zip(packed, expected, strict=True):
        near(a, b, floor=1e-2)


def test_packed_documents_hold_as_many_keys_as_queries():
    q, k, v = draw(8, 9)
    for backend in ("auto", "reference", "chunked"):
        with pytest.raises(ValueError, match="9 keys for 8 queries; pass as many keys as queries"):
            softmax_attention(q, k, v, cu_seqlens=torch.tensor([0, 8]), backend=backend)
    with pytest.raises(ValueError, match="packs documents in one row, but there are 2 rows"):
        softmax_attention(*draw(8, batch=2), cu_seqlens=torch.tensor([0, 8]))


@pytest.mark.parametrize("visible", [0, 1, 255, 256, 257, 700])
def test_steps_over_caches_of_every_length(near, visible):
    q, k, v = draw(1, 700, batch=2, heads=6, groups=2)
    q = q[:, 0]
    options = {"sink_logits": torch.randn(6, device=DEVICE), "spans": (300, 8, 9, 400, 8, 9), "sinks": 2}
    options["distance"] = torch.randperm(700, device=DEVICE)
    # What no token was written to holds anything at all.
    k[:, visible:] = torch.nan
    v[:, visible:] = torch.nan
    for own in ({}, options):
        expected = softmax_attention_step(q, k, v, visible=visible, backend="reference", **own)
        near(softmax_attention_step(q, k, v, visible=visible, backend="triton", **own), expected, floor=1e-3)


def test_a_head_that_sees_nothing_answers_nought():
    q, k, v = draw(1, 300)
    output = softmax_attention_step(
        q[:, 0],
        k,
        v,
        visible=300,
        spans=(5, 5),
        distance=torch.arange(10, 310, device=DEVICE),
        backend="triton",
    )
    assert torch.equal(output, torch.zeros_like(output))


def test_a_long_cache_is_cut_in_so_many_parts_and_no_more(near, monkeypatch):
    monkeypatch.setattr(attention, "MOST_PARTS", 3)
    time = SMALLEST_PART * 3 + 300
    q, k, v = draw(1, time, heads=1, key=4, value=4)
    expected = softmax_attention_step(
        q[:, 0].double(), k.double(), v.double(), visible=time, backend="reference"
    )
    near(softmax_attention_step(q[:, 0], k, v, visible=time, backend="triton"), expected)


@pytest.mark.parametrize("key", [64, 80, 100])
def test_values_that_are_the_keys_first_columns_are_read_once(near, key):
    cache = torch.randn(2, 290, 1, key, device=DEVICE)
    q = torch.randn(2, 5, key, device=DEVICE)
    for value in (64, 48):
        expected = softmax_attention_step(q, cache, cache[..., :value], visible=280, backend="reference")
        near(softmax_attention_step(q, cache, cache[..., :value], visible=280, backend="triton"), expected)


def test_a_step_copies_no_cache(largest_bytes):
    cache = torch.randn(1, 600, 2, 64, device=DEVICE)
    q = torch.randn(1, 4, 64, device=DEVICE)
    for v in (cache, cache[..., :48], cache.clone()):
        largest = largest_bytes(
            lambda v=v: softmax_attention_step(q, cache, v, visible=500, backend="triton")
        )
        assert largest < 600 * 64 * 4 / 4


def test_a_step_carries_gradients(near):
    q, k, v = draw(1, 30)
    results = []
    for backend in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = softmax_attention_step(leaves[0][:, 0], *leaves[1:], visible=20, backend=backend)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for a, b in zip(*results, strict=True):
        near(a, b)


@pytest.mark.parametrize(("window", "past"), [(2, 0), (16, 5), (64, 90), (300, 130)])
def test_mass(near, window, past):
    inputs = draw(40, 40 + past, heads=2, groups=2)
    check(near, inputs, call=window_mass, window=window)
    q, k, v = (x[:, -1] if i == 0 else x for i, x in enumerate(inputs))
    expected = window_mass_step(q, k, v, visible=30, backend="reference")
    for a, b in zip(window_mass_step(q, k, v, visible=30, backend="triton"), expected, strict=True):
        near(a, b)


def test_equal_scores_count_the_keys(near):
    q, k, v = draw(30)
    leaf = torch.zeros_like(q).requires_grad_()
    output, mass = window_mass(leaf, k, v, window=8, backend="triton")
    near(mass, torch.arange(1.0, 31, device=DEVICE).clamp(max=8)[None, :, None].expand(1, 30, 2), 1e-6)
    near(output[:, 7], v[:, :8].mean(1).expand(1, 2, -1), 1e-6)
    assert torch.autograd.grad(mass.sum(), leaf)[0].isfinite().all()

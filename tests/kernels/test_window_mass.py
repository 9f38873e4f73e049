"""Windowed attention and its mass: blocks against single queries, other operators, extreme scores, what is not read."""

import math

import pytest
import torch

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_with_sums
from kernels.window_mass.ops import window_mass, window_mass_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
BACKENDS = ("reference", "chunked")


def draw(time, past=0, heads=4, groups=2, key=6, value=5, dtype=torch.float32):
    inputs = {
        "q": 2 * torch.randn(2, time, heads, key),
        "k": torch.randn(2, past + time, groups, key),
        "v": torch.randn(2, past + time, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(window):
    return lambda backend, *x: window_mass(*x, window=window, backend=backend)


@pytest.mark.parametrize("window", [1, 4, 16, 33, 64, 100, 300])
@pytest.mark.parametrize("time", LENGTHS)
def test_blocks_equal_single_queries(agree, time, window):
    agree(call(window), draw(time), floor=0.1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("past", [1, 15, 63, 64, 90])
@pytest.mark.parametrize("time", [1, 17, 65])
def test_keys_of_the_past(agree, time, past, groups):
    for window in (8, 64, 70):
        agree(call(window), draw(time, past, groups=groups), floor=0.1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("time", "window"), [(24, 8), (12, 4), (32, 16), (64, 64)])
def test_one_head_and_few_blocks(agree, batch, time, window):
    """Where sizes of one leave a folded tensor without a copy of its own."""
    inputs = {name: x[:batch] for name, x in draw(time, heads=1, groups=1).items()}
    agree(call(window), inputs, floor=0.1)


def test_many_tiles(agree):
    agree(call(64), draw(1100, 70, heads=8, groups=8))
    agree(call(20), draw(1300, heads=8, groups=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 8, 50])
def test_it_is_softmax_attention_and_the_denominator_over_its_largest_term(near, backend, window):
    q, k, v = draw(40, 10).values()
    output, mass = window_mass(q, k, v, window=window, backend=backend)
    near(output, softmax_attention(q, k, v, window=window), 2e-6)
    _, sums = softmax_attention_with_sums(q, k, v, window=window)
    scores = torch.einsum("bthk,bshk->bths", q, k.repeat_interleave(2, 2)) / math.sqrt(6)
    distance = torch.arange(10, 50)[:, None] - torch.arange(50)
    scores = scores.masked_fill(((distance < 0) | (distance >= window))[:, None], -torch.inf)
    near(mass, (sums - scores.amax(-1)).exp(), 2e-6)
    assert mass.min() >= 1 and mass.max() <= window


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_count_the_keys(near, backend):
    q, k, v = draw(30).values()
    output, mass = window_mass(torch.zeros_like(q), k, v, window=8, backend=backend)
    near(mass, torch.arange(1.0, 31).clamp(max=8)[None, :, None].expand(2, 30, 4), 1e-6)
    near(output[:, 7], v[:, :8].mean(1).repeat_interleave(2, 1), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_float64(backend):
    leaves = [x.requires_grad_() for x in draw(5, 2, 2, 1, 3, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *x: window_mass(*x, window=3, backend=backend), leaves)


@pytest.mark.parametrize(("size", "bound"), [(1e2, 1e-4), (3e3, 1e-3)])
def test_extreme_scores(agree, near, size, bound):
    """Scores up to ten times the size, of which float32 holds seven digits."""
    inputs = draw(70)
    inputs["q"] *= size
    for got, wanted in zip(*(call(16)(backend, *inputs.values()) for backend in BACKENDS), strict=True):
        near(got, wanted, bound)
    # Rows of one weight have no gradient but what rounding leaves, times the queries.
    agree(call(16), inputs, bound=bound, floor=size / 10)


@pytest.mark.parametrize("visible", [0, 1, 9, 20])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_is_a_query(near, groups, visible):
    q, k, v = draw(20, groups=groups).values()
    found = {
        backend: window_mass_step(q[:, 0], k, v, visible=visible, backend=backend) for backend in BACKENDS
    }
    if not visible:
        assert all(x.abs().max() == 0 for both in found.values() for x in both)
        return
    wanted = window_mass(q[:, :1], k[:, :visible], v[:, :visible], window=visible)
    order = torch.randperm(visible)
    turned = window_mass_step(q[:, 0], k[:, order], v[:, order], visible=visible)
    for got in (*found.values(), turned):
        for a, b in zip(got, wanted, strict=True):
            near(a, b[:, 0], 2e-6)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unseen", [1e3, torch.nan])
def test_keys_outside_the_window_are_not_read(backend, unseen):
    inputs = draw(50)
    before = window_mass(*inputs.values(), window=8, backend=backend)
    for name in "kv":
        inputs[name][:, :10] = unseen
        inputs[name][:, 40:] = unseen
    after = window_mass(*inputs.values(), window=8, backend=backend)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new[:, 17:40], old[:, 17:40], rtol=1e-5, atol=1e-6)


def test_nothing_grows_with_the_square_of_the_text(largest_bytes):
    def largest(time):
        inputs = [x.requires_grad_() for x in draw(time, heads=2, groups=2).values()]

        def run():
            output, mass = window_mass(*inputs, window=32)
            (output.sum() + mass.sum()).backward()

        return largest_bytes(run)

    assert largest(4096) < 2.5 * largest(2048)
    assert largest(4096) < 4096 * 4096


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_types_and_autocast(near, dtype, backend):
    inputs = draw(20, dtype=dtype).values()
    with torch.autocast("cpu", torch.bfloat16):
        output, mass = window_mass(*inputs, window=8, backend=backend)
        one, weight = window_mass_step(
            *(x[:, -1] if i == 0 else x[:, -8:] for i, x in enumerate(inputs)), visible=8, backend=backend
        )
    assert output.dtype == one.dtype == dtype
    assert mass.dtype == weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, exact = window_mass(*(x.double() for x in inputs), window=8, backend="reference")
    bound = {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 3e-6)
    near(output, expected, bound)
    near(one, expected[:, -1], bound)
    near(mass, exact, bound)
    near(weight, exact[:, -1], bound)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 6), r"q has shape"),
        ("q", (2, 5, 3, 6), r"3 heads cannot share 2 groups"),
        ("q", (2, 6, 4, 6), r"5 keys for 6 queries"),
        ("k", (2, 5, 2, 7), r"k has shape .*\[2, 5, 2, 6\]"),
        ("v", (2, 4, 2, 5), r"v has shape"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"window_mass: {message}"):
        window_mass(*inputs.values(), window=4)


def test_wrong_sizes_are_named():
    q, k, v = draw(5).values()
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        window_mass(q, k, v, window=0)
    with pytest.raises(ValueError, match="visible=6 lies outside the 5 slots"):
        window_mass_step(q[:, 0], k, v, visible=6)
    with pytest.raises(ValueError, match=r"window_mass: a tensor is torch.float64"):
        window_mass(q.double(), k, v, window=4, backend="triton")

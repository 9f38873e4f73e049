"""Attention over chosen blocks: large operations against single queries, gradients of outputs and sums, causality."""

import math

import pytest
import torch

from kernels.routed_attention.ops import routed_attention, routed_attention_step
from kernels.softmax_attention.ops import softmax_attention

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def draw(time, keys=None, batch=2, heads=4, groups=2, key=8, value=6, dtype=torch.float32):
    keys = time if keys is None else keys
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, keys, groups, key),
        "v": torch.randn(batch, keys, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def name_blocks(time, keys, block, choosers=2, named=3, batch=2, own=False):
    """Random blocks, some of them ahead of the query and some left out; the query's own first if asked for."""
    count = -(-keys // block)
    order = torch.rand(batch, time, choosers, count)
    if own:
        here = (torch.arange(keys - time, keys) // block)[:, None, None]
        order.scatter_(-1, here.expand(batch, time, choosers, 1), -1.0)
    blocks = order.argsort(-1)[..., :named]
    left_out = torch.rand(blocks.shape) < 0.25
    left_out[..., :1] &= not own
    return blocks.masked_fill(left_out, -1)


def call(blocks, block, scale=None):
    """Outputs and sums, the sums of nothing by a number: a test of closeness cannot take an infinity."""

    def run(backend, *x):
        output, sums = routed_attention(*x, blocks, block=block, scale=scale, backend=backend)
        return output, sums.masked_fill(sums == -torch.inf, -1.0)

    return run


def by_mask(q, k, v, blocks, block):
    """The whole square of scores with repeated heads, hidden where no named block is, written out."""
    time, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    blocks = blocks.repeat_interleave(heads // blocks.shape[2], dim=2)
    token = torch.arange(keys)
    seen = (blocks.unsqueeze(-1) == token // block).any(-2).transpose(1, 2)
    seen &= token <= torch.arange(keys - time, keys)[:, None]
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshv->bthv", weights, v), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize(("choosers", "groups", "heads"), [(1, 1, 2), (2, 2, 4), (4, 2, 4)])
@pytest.mark.parametrize("more", [0, 21])
@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_is_the_reference_and_the_square(agree, near, time, more, choosers, groups, heads):
    inputs = draw(time, time + more, heads=heads, groups=groups)
    for block in (1, 8, 16):
        blocks = name_blocks(time, time + more, block, choosers)
        agree(call(blocks, block), inputs, floor=0.1)
        output, sums = routed_attention(*inputs.values(), blocks, block=block)
        wanted, wanted_sums = by_mask(*inputs.values(), blocks, block)
        near(output, wanted, 3e-6, floor=0.1)
        assert torch.equal(sums == -torch.inf, wanted_sums == -torch.inf)
        none = sums == -torch.inf
        near(sums.masked_fill(none, 0), wanted_sums.masked_fill(none, 0), 3e-6, floor=0.1)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("time", [1, 17, 64, 100])
def test_all_blocks_are_full_attention(near, time, backend):
    inputs = draw(time, groups=4).values()
    blocks = torch.arange(-(-time // 16)).flip(0).expand(2, time, 4, -1)
    output, _ = routed_attention(*inputs, blocks, block=16, backend=backend)
    near(output, softmax_attention(*inputs), 2e-6)


def test_sums_join_disjoint_blocks(near):
    inputs = draw(50, groups=4)
    q, k, v = inputs.values()
    here = (torch.arange(50) // 8)[None, :, None, None].expand(2, 50, 4, 1)
    before = torch.where(here > 0, here - 1, -1)
    both, sums = routed_attention(q, k, v, torch.cat([here, before], -1), block=8)
    parts = [routed_attention(q, k, v, blocks, block=8) for blocks in (here, before)]
    joined = torch.logaddexp(parts[0][1], parts[1][1])
    near(joined, sums, 2e-6)
    near(sum((part[1] - joined).exp().unsqueeze(-1) * part[0] for part in parts), both, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_query_that_names_nothing_sees_nothing(agree, backend):
    inputs = draw(20)
    blocks = torch.full((2, 20, 2, 2), -1)
    blocks[:, :4] = torch.tensor([3, 4])
    output, sums = routed_attention(*inputs.values(), blocks, block=4, backend=backend)
    assert torch.equal(output, torch.zeros_like(output))
    assert (sums == -torch.inf).all()
    blocks[:, 15] = torch.tensor([0, -1])
    agree(call(blocks, 4), inputs, floor=0.1)
    step, sums = routed_attention_step(
        inputs["q"][:, 0], inputs["k"], inputs["v"], blocks[:, -1], block=4, length=20, backend=backend
    )
    assert torch.equal(step, torch.zeros_like(step)) and (sums == -torch.inf).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(agree, size):
    inputs = draw(40, key=4)
    inputs["q"] *= size
    agree(call(name_blocks(40, 40, 8, own=True), 8), inputs, bound=1e-4 if size > 1e3 else 1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend):
    blocks = name_blocks(7, 9, 2, choosers=2, named=2, batch=1)
    inputs = draw(7, 9, batch=1, heads=2, groups=1, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    run = call(blocks, 2, 0.7)
    assert torch.autograd.gradcheck(lambda *x: run(backend, *x), leaves)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("choosers", "groups"), [(1, 1), (4, 2)])
def test_steps_equal_the_whole(near, backend, choosers, groups):
    q, k, v = draw(37, groups=groups).values()
    blocks = name_blocks(37, 37, 8, choosers, own=True)
    blocks = torch.where(blocks * 8 <= torch.arange(37)[:, None, None], blocks, -1)
    whole, sums = routed_attention(q, k, v, blocks, block=8)
    for t in range(37):
        output, own = routed_attention_step(
            q[:, t], k, v, blocks[:, t], block=8, length=t + 1, backend=backend
        )
        near(output, whole[:, t], 3e-6)
        near(own, sums[:, t], 3e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_step_touches_its_blocks_alone(backend):
    q, k, v = draw(64).values()
    blocks = torch.tensor([[[1, 6]], [[0, 6]]]).expand(2, 2, 2)
    expected, _ = routed_attention_step(q[:, 0], k, v, blocks, block=8, length=52, backend=backend)
    for x in (k, v):
        x[0, :8], x[1, 8:16], x[:, 16:48], x[:, 52:] = (torch.nan,) * 4
    output, sums = routed_attention_step(q[:, 0], k, v, blocks, block=8, length=52, backend=backend)
    assert torch.equal(output, expected) and sums.isfinite().all()


def test_a_step_gathers_what_it_reads(largest_bytes):
    q, k, v = draw(4096, key=64, value=64, batch=1).values()
    blocks = torch.tensor([3, 255]).expand(1, 2, 2)
    largest = largest_bytes(lambda: routed_attention_step(q[:, 0], k, v, blocks, block=16, length=4096))
    assert largest == 2 * 2 * 16 * 64 * 4


def test_memory_grows_with_the_length(largest_bytes):
    def largest(time):
        inputs = [x.requires_grad_() for x in draw(time, batch=1).values()]
        blocks = name_blocks(time, time, 16, own=True, batch=1)
        return largest_bytes(lambda: routed_attention(*inputs, blocks, block=16)[0].sum().backward())

    assert largest(2048) <= 2.1 * largest(1024)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_future_does_not_reach_the_past(backend):
    inputs = draw(60)
    blocks = name_blocks(60, 60, 8, own=True)
    before = routed_attention(*inputs.values(), blocks, block=8, backend=backend)
    for t in (0, 30, 58):
        for future in (1e3, torch.nan):
            changed = [x.clone() for x in inputs.values()]
            for x in changed:
                x[:, t + 1 :] = future
            after = routed_attention(*changed, blocks, block=8, backend=backend)
            for old, new in zip(before, after, strict=True):
                torch.testing.assert_close(new[:, : t + 1], old[:, : t + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types_and_autocast(near, dtype, backend):
    inputs = draw(50, dtype=dtype).values()
    blocks = name_blocks(50, 50, 8, own=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, sums = routed_attention(*inputs, blocks, block=8, backend=backend)
    assert output.dtype == dtype
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = by_mask(*(x.double() for x in inputs), blocks, 8)
    near(output, expected, {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 3e-6))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 8), r"q has shape .*\[B, T, H, K\]"),
        ("k", (2, 5, 2, 7), r"k has shape .*\[B, S, G, K\]"),
        ("v", (2, 6, 2, 6), r"v has shape"),
        ("q", (2, 5, 3, 8), r"3 heads cannot share 2 groups evenly"),
        ("q", (2, 6, 4, 8), r"5 keys for 6 queries|blocks has shape"),
        ("blocks", (2, 5, 3, 1), r"4 heads cannot share 3 groups"),
        ("blocks", (2, 4, 2, 1), r"blocks has shape"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5) | {"blocks": torch.zeros(2, 5, 2, 1, dtype=torch.int64)}
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=f"routed_attention: .*{message}|routed_attention: {message}"):
        routed_attention(*inputs.values(), block=4)


@pytest.mark.parametrize(
    ("blocks", "block", "message"),
    [
        ([0, 2], 4, "blocks run from 0 to 2; 5 tokens have the blocks 0 to 1"),
        ([-2, 0], 4, "blocks run from -2 to 0"),
        ([1, 1], 4, "names the same block twice"),
        ([0, 1], 0, "block=0 must be at least 1"),
    ],
)
def test_wrong_blocks_are_named(blocks, block, message):
    q, k, v = draw(5).values()
    named = torch.tensor(blocks).expand(2, 5, 2, 2)
    with pytest.raises(ValueError, match=message):
        routed_attention(q, k, v, named, block=block)
    with pytest.raises(ValueError, match=message):
        routed_attention_step(q[:, 0], k, v, named[:, 0], block=block, length=5)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        routed_attention(q, k, v, named.float(), block=4)
    with pytest.raises(ValueError, match="length=6 lies outside the 5 slots"):
        routed_attention_step(q[:, 0], k, v, named[:, 0], block=4, length=6)

"""Attention over listed blocks: tiles against single queries, lists, positions, merging, steps, extremes, work."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.block_attention import chunked
from kernels.block_attention.ops import block_attention, block_attention_step, merge

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def draw(time, keys=None, batch=2, heads=4, groups=2, key=12, value=20, dtype=torch.float32):
    """q, k and v by name; as many keys as queries where `keys` is left out."""
    keys = time if keys is None else keys
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, keys, groups, key),
        "v": torch.randn(batch, keys, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def lists(first, time, block, keys, key_block, count, many=None):
    """Random lists of blocks, some entries absent; with many, as many lists."""
    rows = (first + time - 1) // block - first // block + 1
    blocks = -(-keys // key_block)
    count = min(count, blocks)
    made = [torch.randperm(blocks)[:count] for _ in range(rows * (many or 1))]
    index = torch.stack(made).view(many or 1, rows, count)
    index = index.masked_fill(torch.rand(index.shape) < 0.2, -1)
    return index if many else index[0]


def every(first, time, block, keys, key_block):
    """Lists of all blocks there are."""
    rows = (first + time - 1) // block - first // block + 1
    return torch.arange(-(-keys // key_block)).expand(rows, -1)


def by_mask(q, k, v, seen, scale=None):
    """The whole square of scores [T, S] or [H, T, S] with repeated heads, written out; rows that see nothing are 0."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshv->bthv", weights, v), scores.logsumexp(-1).transpose(1, 2)


def seen_by(index, time, keys, block, key_block, first=0, positions=None, window=None):
    """[I, T, S]: the definition, one query at a time."""
    index = index if index.dim() == 3 else index[None]
    where = torch.arange(keys) if positions is None else positions
    seen = torch.zeros(index.shape[0], time, keys, dtype=torch.bool)
    for i, t in itertools.product(range(index.shape[0]), range(time)):
        at = first + t
        listed = index[i, at // block - first // block]
        seen[i, t] = torch.isin(torch.arange(keys) // key_block, listed) & (where <= at)
        if window is not None:
            seen[i, t] &= where > at - window
    return seen


def call(index, **settings):
    """Outputs and sums, a sum of nothing written as nought."""

    def attend(backend, *x):
        output, total = block_attention(*x, index, backend=backend, **settings)
        return output, total.masked_fill(total == -torch.inf, 0.0)

    return attend


@pytest.mark.parametrize("many", [None, 2, 4])
@pytest.mark.parametrize(
    ("time", "first", "more"), [(time, 5, 5) for time in LENGTHS] + [(40, 33, 1), (65, 0, 0)]
)
def test_lists(agree, near, time, first, more, many):
    inputs = draw(time, time + more)
    sizes = {"block": 16, "key_block": 8, "first": first}
    index = lists(first, time, 16, time + more, 8, 4, many)
    agree(call(index, **sizes), inputs, floor=0.1)
    seen = seen_by(index, time, time + more, 16, 8, first)
    seen = seen.repeat_interleave(4 // seen.shape[0], 0) if many else seen
    output, total = block_attention(*inputs.values(), index, **sizes)
    expected, sums = by_mask(*inputs.values(), seen)
    near(output, expected, 2e-6, floor=0.1)
    assert torch.equal(total == -torch.inf, sums == -torch.inf)
    near(total.nan_to_num(neginf=0), sums.nan_to_num(neginf=0), 2e-6, floor=0.1)


@pytest.mark.parametrize("window", [None, 1, 7, 40, 10**9])
@pytest.mark.parametrize(("block", "key_block"), [(1, 1), (5, 3), (16, 16), (7, 40), (200, 200)])
@pytest.mark.parametrize("time", [1, 17, 65])
def test_all_blocks_are_full_attention_and_a_window_cuts_it(agree, near, time, block, key_block, window):
    inputs = draw(time)
    index = every(0, time, block, time, key_block)
    agree(call(index, block=block, key_block=key_block, window=window), inputs, floor=0.1)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    seen = (distance >= 0) & (distance < (window or time))
    output, total = block_attention(*inputs.values(), index, block=block, key_block=key_block, window=window)
    expected, sums = by_mask(*inputs.values(), seen)
    near(output, expected, 2e-6)
    near(total, sums, 2e-6)


def test_positions_move_and_hide_keys(agree, near):
    inputs = draw(40, 30)
    positions = torch.randint(0, 60, (30,))
    index = lists(20, 40, 8, 30, 4, 5)
    sizes = {"block": 8, "key_block": 4, "first": 20, "positions": positions, "window": 25}
    agree(call(index, **sizes), inputs)
    expected, _ = by_mask(*inputs.values(), seen_by(index, 40, 30, **sizes))
    near(block_attention(*inputs.values(), index, **sizes)[0], expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_rows_that_see_nothing_are_nought_and_give_no_gradient(backend):
    leaves = [x.requires_grad_() for x in draw(20).values()]
    index = torch.tensor([[0], [-1], [-1], [2]])
    output, total = block_attention(*leaves, index, block=5, key_block=5, backend=backend)
    assert torch.equal(output[:, 5:15], torch.zeros(2, 10, 4, 20))
    assert (total[:, 5:15] == -torch.inf).all() and total[:, :5].isfinite().all()
    joint, _ = merge([output, output[:, :, :, :] * 0], [total, torch.full_like(total, -torch.inf)])
    for x in torch.autograd.grad(joint.square().sum(), leaves):
        assert x.isfinite().all()
    grads = torch.autograd.grad(joint_of(leaves, index, backend)[:, 5:15].sum(), leaves)
    assert all(x.abs().max() == 0 for x in grads)


def joint_of(leaves, index, backend):
    output, total = block_attention(*leaves, index, block=5, key_block=5, backend=backend)
    return merge([output, output], [total, total])[0]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e2, 1e4])
def test_extreme_scores(near, size):
    """In float64, so that what is told apart is the method and not the rounding of the scores."""
    inputs = draw(70, dtype=torch.float64)
    inputs["q"] *= size
    index = every(0, 70, 16, 70, 8)
    leaves = [x.requires_grad_() for x in inputs.values()]
    results = []
    for backend in ("reference", "chunked"):
        output, total = block_attention(*leaves, index, block=16, key_block=8, backend=backend)
        grads = torch.autograd.grad(output.sin().sum() + total.sin().sum() / size, leaves)
        results.append([output, total, *grads])
    for actual, expected in zip(results[1], results[0], strict=True):
        near(actual, expected, 1e-8)
    narrow = [x.detach().float() for x in leaves]
    output, total = block_attention(*narrow, index, block=16, key_block=8)
    assert output.isfinite().all() and total.isfinite().all()
    assert (output <= narrow[2].amax() + 1e-5).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("many", [None, 2])
def test_gradients_in_float64(backend, many):
    inputs = draw(7, 9, batch=1, heads=2, groups=2 if many else 1, key=2, value=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    index = torch.tensor([[0, -1], [1, 0], [3, 4]])
    index = torch.stack([index, index.flip(0)]) if many else index

    def attend(*x):
        output, total = block_attention(
            *x, index, block=3, key_block=2, first=2, window=4, scale=0.7, backend=backend
        )
        return output, total.masked_fill(total == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_scale(near, backend):
    inputs = draw(30)
    index, sizes = every(0, 30, 8, 30, 8), {"block": 8, "key_block": 8}
    expected, _ = block_attention(*inputs.values(), index, **sizes)
    inputs["q"] = inputs["q"] * 3
    output, _ = block_attention(*inputs.values(), index, scale=12**-0.5 / 3, backend=backend, **sizes)
    near(output, expected, 2e-6)
    _, total = block_attention(*inputs.values(), index, scale=0.0, backend=backend, **sizes)
    near(total, torch.arange(1, 31.0).log()[:, None].expand(2, 30, 4), 1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merged_parts_are_the_whole(near, parts):
    """With gradients, and with rows that one part or all of them leave empty."""
    leaves = [x.requires_grad_() for x in draw(50).values()]
    blocks = torch.arange(7).expand(7, -1)
    blocks = blocks.masked_fill(blocks == 0, -1)
    sizes = {"block": 8, "key_block": 8}
    whole, sums = block_attention(*leaves, blocks, **sizes)
    pieces = [
        block_attention(*leaves, blocks.masked_fill(blocks % parts != part, -1), **sizes)
        for part in range(parts)
    ]
    output, total = merge([piece[0] for piece in pieces], [piece[1] for piece in pieces])
    assert torch.equal(total == -torch.inf, sums == -torch.inf) and (sums[:, :8] == -torch.inf).all()
    results = []
    for one, other in ((output, total), (whole, sums)):
        other = other[:, 8:]
        results.append([one, other, *torch.autograd.grad(one.sin().sum() + other.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        near(actual, expected, 2e-6)


def test_merging_says_what_does_not_fit():
    output, total = torch.zeros(2, 3, 5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="2 outputs with 1 sums"):
        merge([output, output], [total])
    with pytest.raises(ValueError, match="0 outputs"):
        merge([], [])
    with pytest.raises(ValueError, match=r"sums has shape \[2, 2\]"):
        merge([output, output], [total, total[:, :2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("many", [None, 2, 4])
def test_a_step_is_the_last_query(agree, near, many, dtype):
    inputs = draw(1, 40)
    keys = torch.stack([torch.randperm(40)[:9] for _ in range(many or 1)])
    keys[:, 4] = -1
    slots = keys if many else keys[0]
    positions = torch.arange(40)
    index = keys[:, None] if many else keys
    expected, sums = block_attention(
        *inputs.values(), index, block=1, key_block=1, first=99, positions=positions, backend="reference"
    )
    narrow = [inputs["q"][:, 0], inputs["k"].to(dtype), inputs["v"].to(dtype)]
    for backend in ("reference", "chunked"):
        output, total = block_attention_step(*narrow, slots, backend=backend)
        assert output.dtype == dtype and total.dtype == torch.float32
        near(output, expected[:, 0], 2e-6 if dtype == torch.float32 else 1e-2)
        near(total, sums[:, 0], 2e-6 if dtype == torch.float32 else 1e-2)
    agree(lambda backend, q, k, v: block_attention_step(q[:, 0], k, v, slots, backend=backend), inputs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_step_over_nothing_is_nought(backend):
    inputs = draw(1, 5)
    for slots in (torch.tensor([-1, -1]), torch.zeros(0, dtype=torch.long), torch.full((2, 1), -1)):
        output, total = block_attention_step(
            inputs["q"][:, 0], inputs["k"], inputs["v"], slots, backend=backend
        )
        assert torch.equal(output, torch.zeros(2, 4, 20)) and (total == -torch.inf).all()


@pytest.mark.parametrize("many", [None, 2])
def test_a_step_touches_what_is_listed_and_copies_no_more(near, largest_bytes, many):
    inputs = draw(1, 4000, key=16, value=16)
    listed = torch.arange(7, 4000, 100)
    slots = torch.stack([listed, listed + 3]) if many else listed
    expected, _ = block_attention_step(inputs["q"][:, 0], inputs["k"], inputs["v"], slots)
    for name in "kv":
        x = inputs[name]
        kept = x.clone()
        x.fill_(torch.nan)
        if many:
            for group in range(2):
                x[:, slots[group], group] = kept[:, slots[group], group]
        else:
            x[:, listed] = kept[:, listed]
    output, _ = block_attention_step(inputs["q"][:, 0], inputs["k"], inputs["v"], slots)
    near(output, expected, 0.0)
    used = largest_bytes(lambda: block_attention_step(inputs["q"][:, 0], inputs["k"], inputs["v"], slots))
    assert used <= 2 * 40 * 2 * 16 * 4


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_future_does_not_reach_the_past(backend):
    inputs = draw(60)
    index, sizes = every(0, 60, 16, 60, 16), {"block": 16, "key_block": 16, "backend": backend}
    before, sums = block_attention(*inputs.values(), index, **sizes)
    for t, future in itertools.product((0, 31, 58), (1e3, torch.nan)):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = future
        after, totals = block_attention(*changed, index, **sizes)
        bound = 1e-5 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        torch.testing.assert_close(totals[:, : t + 1], sums[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types_and_autocast(near, backend, dtype):
    inputs = draw(40, dtype=dtype)
    index, sizes = every(0, 40, 16, 40, 16), {"block": 16, "key_block": 16, "backend": backend}
    output, total = block_attention(*inputs.values(), index, **sizes)
    assert output.dtype == dtype
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = by_mask(*(x.double() for x in inputs.values()), torch.ones(40, 40, dtype=torch.bool).tril())
    near(output, expected, {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}.get(dtype, 2e-6))
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, _ = block_attention(*leaves, index, **sizes)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tile", [1, 5000, 2**30])
def test_tiles_do_not_show(agree, monkeypatch, tile):
    monkeypatch.setattr(chunked, "TILE_SCORES", tile)
    inputs = draw(65)
    agree(call(lists(0, 65, 8, 65, 8, 4, 2), block=8, key_block=8), inputs, floor=0.1)


def test_work_and_memory_follow_the_lists(largest_bytes):
    def work(time, listed):
        inputs = [x.requires_grad_() for x in draw(time, batch=1, key=16, value=16).values()]
        index = (torch.arange(time // 32)[:, None] - torch.arange(listed)).clamp(min=-1)

        def run():
            block_attention(*inputs, index, block=32, key_block=32)[0].sum().backward()

        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops(), largest_bytes(run)

    (small, _), (long, memory), (wide, _) = work(512, 2), work(2048, 2), work(512, 4)
    assert long == 4 * small > 0 and wide == 2 * small
    assert memory < 2048 * 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 4)}, r"q has shape \[2, 5, 4\].*\[B, T, H, K\]"),
        ({"k": (2, 5, 2, 11)}, r"k has shape .*\[B, S, G, K\] = \[2, 5, 2, 12\]"),
        ({"v": (2, 6, 2, 20)}, r"v has shape .*\[2, 5, 2, 20\]"),
        ({"q": (2, 5, 3, 12)}, "3 heads cannot share 2 groups evenly"),
        ({"index": (2, 1)}, r"index has shape \[1, 2, 1\].*\[1, 3, 1\]"),
        ({"index": (3, 3, 1)}, "index holds 3 lists.*2 groups.*4 heads"),
        ({"index": (3, 0)}, "index has shape"),
        ({"positions": (4,)}, r"positions has shape \[4\].*\[5\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = draw(5) | {"index": torch.zeros(3, 1, dtype=torch.long), "positions": torch.arange(5)}
    inputs |= {
        name: torch.zeros(shape, dtype=torch.long if name in ("index", "positions") else torch.float32)
        for name, shape in change.items()
    }
    with pytest.raises(ValueError, match=f"block_attention: {message}"):
        block_attention(**inputs, block=2, key_block=2)


def test_wrong_settings_are_named():
    q, k, v = draw(5).values()
    index, sizes = torch.zeros(3, 1, dtype=torch.long), {"block": 2, "key_block": 2}
    for name, value in (("block", 0), ("key_block", 0), ("first", -1), ("window", 0)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            block_attention(q, k, v, index, **(sizes | {name: value}))
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=r"index holds numbers outside -1 … 2"):
            block_attention(q, k, v, index + wrong, **sizes)
        with pytest.raises(ValueError, match=r"slots holds numbers outside -1 … 4"):
            block_attention_step(q[:, 0], k, v, torch.tensor([0, 2 * wrong]))
    with pytest.raises(ValueError, match="slots holds 3 lists"):
        block_attention_step(q[:, 0], k, v, torch.zeros(3, 1, dtype=torch.long))

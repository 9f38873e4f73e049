"""Attention over keys by name: the search against brute force, blocks against single queries, gradients, extremes."""

import math

import pytest
import torch

from kernels.retrieved_attention.ops import nearest_keys, retrieved_attention
from kernels.softmax_attention.ops import merge, softmax_attention

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "chunked"])


def draw(time, keys=None, batch=2, heads=4, groups=2, key=8, value=6, dtype=torch.float32):
    keys = time if keys is None else keys
    inputs = {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, keys, groups, key),
        "v": torch.randn(batch, keys, groups, value),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def name_places(time, keys, named=5, batch=2, heads=4):
    """Random keys, a quarter left out, and for every third query all of them."""
    places = torch.rand(batch, time, heads, keys).argsort(-1)[..., :named]
    places = places.masked_fill(torch.rand(places.shape) < 0.25, -1)
    places[:, ::3, 1] = -1
    return places


def call(places, bias=None, scale=None):
    """Outputs and sums, the sums of nothing by a number: a test of closeness cannot take an infinity."""

    def run(backend, *x):
        output, sums = retrieved_attention(*x, places, bias=bias, scale=scale, backend=backend)
        return output, sums.masked_fill(sums == -torch.inf, -1.0)

    return run


def by_mask(q, k, v, places, bias=None):
    """The whole square of scores with repeated heads, hidden where no key is named, written out."""
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    added = torch.full((*q.shape[:3], k.shape[1] + 1), -torch.inf, dtype=q.dtype)
    given = torch.zeros(places.shape, dtype=q.dtype) if bias is None else bias
    added.scatter_(-1, places.masked_fill(places < 0, k.shape[1]), given)
    scores = torch.einsum("bthk,bshk->bths", q, k) / math.sqrt(q.shape[-1]) + added[..., :-1]
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bths,bshv->bthv", weights, v), scores.logsumexp(-1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("more", [0, 21])
@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_is_the_reference_and_the_square(agree, near, time, more, groups):
    inputs = draw(time, time + more, groups=groups)
    # Few keys are all compared, of many the named ones are gathered.
    places = name_places(time, time + more, named=5 if groups < 4 else 2)
    for bias in (None, torch.randn(places.shape)):
        agree(call(places, bias), inputs, floor=0.1)
        output, sums = retrieved_attention(*inputs.values(), places, bias=bias)
        wanted, wanted_sums = by_mask(*inputs.values(), places, bias)
        near(output, wanted, 3e-6, floor=0.1)
        none = sums == -torch.inf
        assert torch.equal(none, wanted_sums == -torch.inf)
        near(sums.masked_fill(none, 0), wanted_sums.masked_fill(none, 0), 3e-6, floor=0.1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("keep", [1, 4, 200])
@pytest.mark.parametrize("time", [1, 2, 17, 65])
def test_the_nearest_are_found_by_brute_force(time, keep, groups):
    # Rows that are long beside what is kept of them are folded.
    keys = time + (9 if time < 65 else 300)
    inputs = draw(time, keys, groups=groups)
    visible = (torch.arange(time) * keys // time + torch.randint(-6, 10, (time,))).clamp(0, keys)
    # Whole numbers make ties as well.
    for q, k in ((inputs["q"], inputs["k"]), (inputs["q"].round(), inputs["k"].round())):
        repeated = k.repeat_interleave(4 // groups, dim=2)
        products = torch.einsum("bthk,bshk->bths", q.double(), repeated.double())
        for backend in ("reference", "chunked"):
            places, scores = nearest_keys(q, k, visible, keep=keep, backend=backend)
            assert places.shape == scores.shape == (2, time, 4, min(keep, keys))
            for t in range(0, time, 1 + time // 20):
                end = int(visible[t])
                row = products[:, t, :, :end]
                # Before every other key of its score comes the later.
                order = sorted(range(end), reverse=True)
                for b in range(2):
                    for h in range(4):
                        best = sorted(order, key=lambda s, own=row[b, h]: -float(own[s]))[:keep]
                        got = [p for p in places[b, t, h].tolist() if p >= 0]
                        assert got == best
            real = places >= 0
            assert torch.equal(real, scores > -torch.inf)
            wanted = products.gather(-1, places.clamp(min=0)).float()
            torch.testing.assert_close(scores[real], wanted[real], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_of_equal_keys_the_last_are_found(backend):
    q, k = torch.randn(2, 20, 4, 8), torch.randn(2, 1, 2, 8).expand(2, 20, 2, 8)
    places, _ = nearest_keys(q, k, torch.arange(20), keep=3, backend=backend)
    for t in range(20):
        wanted = [s if s >= 0 else -1 for s in range(t - 1, t - 4, -1)]
        assert (places[:, t] == torch.tensor(wanted)).all()


@BACKENDS
def test_a_search_does_not_look_at_what_is_not_visible(backend):
    q, k, _ = draw(30).values()
    visible = torch.arange(30) // 2
    before = nearest_keys(q, k, visible, keep=4, backend=backend)
    for t in (0, 12, 28):
        changed = k.clone()
        changed[:, t // 2 :] = torch.nan
        after = nearest_keys(q, changed, visible, keep=4, backend=backend)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[:, : t + 1], old[:, : t + 1])


def test_a_search_holds_a_block_of_queries(largest_bytes):
    def largest(time):
        q, k, _ = draw(time, batch=1).values()
        return largest_bytes(lambda: nearest_keys(q, k, torch.arange(time), keep=4))

    assert largest(4096) <= 2**19 * 8
    assert largest(4096) < 4 * 4096 * 4096


@BACKENDS
@pytest.mark.parametrize("time", [1, 17, 64])
def test_all_keys_named_are_full_attention(near, time, backend):
    inputs = draw(time).values()
    key = torch.arange(time)
    places = torch.where(key <= key[:, None], key, -1)[None, :, None].expand(2, time, 4, time)
    output, _ = retrieved_attention(*inputs, places.flip(-1), backend=backend)
    near(output, softmax_attention(*inputs), 2e-6)


def test_sums_join_disjoint_keys(near):
    inputs = draw(40).values()
    places = torch.rand(2, 40, 4, 40).argsort(-1)[..., :9]
    whole = retrieved_attention(*inputs, places)
    parts = [retrieved_attention(*inputs, some) for some in places.split(4, dim=-1)]
    for got, wanted in zip(merge(*zip(*parts, strict=True)), whole, strict=True):
        near(got, wanted, 2e-6)


@BACKENDS
def test_a_head_that_names_nothing_reads_nothing(backend):
    inputs = {name: x.requires_grad_() for name, x in draw(6).items()}
    output, sums = retrieved_attention(*inputs.values(), torch.full((2, 6, 4, 3), -1), backend=backend)
    assert torch.equal(output, torch.zeros_like(output)) and (sums == -torch.inf).all()
    (output.sum() + sums.exp().sum()).backward()
    assert all(x.grad.abs().max() == 0 for x in inputs.values())


@pytest.mark.parametrize("keys", [40, 60])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(agree, size, keys):
    inputs = draw(40, keys, key=4)
    inputs["q"] *= size
    agree(call(name_places(40, keys)), inputs, bound=1e-4 if size > 1e3 else 1e-5)


@BACKENDS
@pytest.mark.parametrize(("time", "keys"), [(5, 7), (17, 7)])
def test_gradients_in_float64(backend, time, keys):
    inputs = draw(time, keys, batch=1, heads=2, groups=1, key=2, value=3, dtype=torch.float64)
    places = name_places(time, keys, named=3, batch=1, heads=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    run = call(places, torch.randn(places.shape), 0.7)
    assert torch.autograd.gradcheck(lambda *x: run(backend, *x), leaves)


@BACKENDS
def test_no_other_key_is_touched(backend):
    q, k, v = draw(1, 64).values()
    places = torch.tensor([[[[3, 40]] * 4], [[[-1, 6]] * 4]])
    expected = retrieved_attention(q, k, v, places, backend=backend)
    for x in (k, v):
        kept = x[0, [3, 40]].clone(), x[1, 6].clone()
        x.fill_(torch.nan)
        x[0, [3, 40]], x[1, 6] = kept
    for got, wanted in zip(retrieved_attention(q, k, v, places, backend=backend), expected, strict=True):
        assert torch.equal(got, wanted)


def test_one_query_gathers_what_it_reads(largest_bytes):
    q, k, v = draw(1, 4096, key=64, value=64, batch=1).values()
    places = torch.arange(8).expand(1, 1, 4, 8) * 500
    assert largest_bytes(lambda: retrieved_attention(q, k, v, places)) == 4 * 8 * 64 * 4


def test_memory_grows_with_the_length(largest_bytes):
    def largest(time):
        inputs = [x.requires_grad_() for x in draw(time, batch=1).values()]
        # Eight keys apart from each other, without a square of random numbers.
        places = (torch.randint(time, (1, time, 4, 1)) + torch.arange(8) * (time // 8)) % time
        return largest_bytes(lambda: retrieved_attention(*inputs, places)[0].sum().backward())

    assert largest(4096) <= max(2.1 * largest(2048), 2**19 * 8)


@pytest.mark.usefixtures("rescue")
@BACKENDS
def test_the_future_does_not_reach_the_past(backend):
    inputs = draw(40)
    places = name_places(40, 40)
    places = places.masked_fill(places > torch.arange(40)[:, None, None], -1)
    before = retrieved_attention(*inputs.values(), places, backend=backend)
    for t in (0, 20, 38):
        for future in (1e3, torch.nan):
            changed = [x.clone() for x in inputs.values()]
            for x in changed:
                x[:, t + 1 :] = future
            after = retrieved_attention(*changed, places, backend=backend)
            for old, new in zip(before, after, strict=True):
                torch.testing.assert_close(new[:, : t + 1], old[:, : t + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@BACKENDS
def test_types_and_autocast(near, dtype, backend):
    inputs = draw(50, dtype=dtype).values()
    places = name_places(50, 50)
    with torch.autocast("cpu", torch.bfloat16):
        output, sums = retrieved_attention(*inputs, places, backend=backend)
        _, scores = nearest_keys(*list(inputs)[:2], torch.arange(50), keep=3, backend=backend)
    assert output.dtype == dtype
    assert sums.dtype == scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = by_mask(*(x.double() for x in inputs), places)
    near(output, expected, {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 3e-6))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 8), r"q has shape .*\[B, T, H, K\]"),
        ("k", (2, 5, 2, 7), r"k has shape .*\[B, S, G, K\]"),
        ("v", (2, 6, 2, 6), r"v has shape"),
        ("q", (2, 5, 3, 8), r"3 heads cannot share 2 groups evenly|places has shape"),
        ("places", (2, 5, 4), r"places has shape"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5) | {"places": torch.zeros(2, 5, 4, 1, dtype=torch.int64)}
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=f"retrieved_attention: ({message})"):
        retrieved_attention(*inputs.values())


def test_wrong_numbers_are_named():
    q, k, v = draw(5).values()
    places = torch.zeros(2, 5, 4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="places run from 0 to 5; name keys from 0 to 4"):
        retrieved_attention(q, k, v, places.index_fill(1, torch.tensor([3]), 5))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        retrieved_attention(q, k, v, places.float())
    with pytest.raises(ValueError, match="bias has shape"):
        retrieved_attention(q, k, v, places, bias=torch.zeros(2, 5, 4, 2))
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        nearest_keys(q, k, torch.arange(5), keep=0)
    with pytest.raises(ValueError, match="visible runs from 0 to 6; there are 5 keys"):
        nearest_keys(q, k, torch.tensor([0, 1, 2, 3, 6]), keep=1)
    with pytest.raises(ValueError, match="visible has shape"):
        nearest_keys(q, k, torch.arange(4), keep=1)

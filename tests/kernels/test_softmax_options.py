"""Softmax attention beyond the plain case: caps, slopes, sinks of both kinds, spans by head, merged parts."""

import itertools
import math

import pytest
import torch

from kernels.softmax_attention.ops import (
    merge,
    softmax_attention,
    softmax_attention_step,
    softmax_attention_with_sums,
)

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
SLOPES = torch.tensor([0.5, 0.1, 0.02, 0.0])
LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0])
OPTIONS = {
    "cap": {"soft_cap": 2.0},
    "slopes": {"slopes": SLOPES},
    "sinks": {"sinks": 3},
    "logits": {"sink_logits": LOGITS},
    "all": {"soft_cap": 3.0, "slopes": SLOPES, "sinks": 5, "sink_logits": LOGITS},
}


def draw(time, keys=None, batch=2, heads=4, groups=2, key=12, value=20, dtype=torch.float32):
    keys = time if keys is None else keys
    shapes = {
        "q": (batch, time, heads, key), "k": (batch, keys, groups, key), "v": (batch, keys, groups, value)
    }  # fmt: skip
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def written_out(
    q, k, v, window=None, spans=None, soft_cap=None, slopes=None, sinks=0, skipped=0, sink_logits=None
):
    """The whole square of scores, head by head in float64; and the logarithms of the denominators."""
    q, k, v = q.double(), k.double(), v.double()
    time, keys, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    where = torch.tensor([key if key < sinks else key + skipped for key in range(keys)])
    here = where[keys - time :, None]
    outputs, sums = [], []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // shared].mT / math.sqrt(q.shape[-1])
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if slopes is not None:
            scores = scores - slopes[head].double() * (here - where)
        span = spans[head] if spans else window
        seen = where <= here
        if span is not None:
            seen &= (here - where < span) | (torch.arange(keys) < sinks)
        weights = torch.where(seen, scores, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if sink_logits is not None:
            total = total + sink_logits[head].double().exp()
        outputs.append(weights / total @ v[:, :, head // shared])
        sums.append(total[..., 0].log())
    return torch.stack(outputs, dim=2), torch.stack(sums, dim=2)


def call(**options):
    """With slopes and logits as inputs too, so that their gradients are compared."""
    learned = [name for name in ("slopes", "sink_logits") if name in options]

    def made(backend, q, k, v, *rest):
        own = options | dict(zip(learned, rest, strict=True))
        return softmax_attention_with_sums(q, k, v, backend=backend, **own)

    return made, {name: options[name] for name in learned}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("time", LENGTHS)
def test_each_option_is_its_formula(agree, near, time, name):
    for more, window in itertools.product((0, 9, 150), (None, 1, 7, 80)):
        inputs, options = draw(time, time + more), OPTIONS[name] | {"window": window}
        output, sums = softmax_attention_with_sums(*inputs.values(), **options)
        wanted, wanted_sums = written_out(*inputs.values(), **options)
        near(output, wanted, 2e-6)
        near(sums, wanted_sums, 2e-6, floor=1.0)
        assert torch.equal(softmax_attention(*inputs.values(), **options), output)
        if more != 150 and window != 80:
            made, learned = call(**options)
            agree(made, inputs | learned, floor=0.3)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("time", [1, 40, 200])
def test_tokens_left_out_behind_the_sinks_count_in_distances_only(near, time, backend):
    inputs = draw(time, time + 12)
    for window, name in itertools.product((None, 9), ("slopes", "all")):
        options = OPTIONS[name] | {"sinks": 5, "skipped": 30, "window": window}
        output = softmax_attention(*inputs.values(), **options, backend=backend)
        near(output, written_out(*inputs.values(), **options)[0], 2e-6)
        assert not torch.equal(
            output, softmax_attention(*inputs.values(), **options | {"skipped": 0}, backend=backend)
        )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("time", [20, 150])
@pytest.mark.parametrize(("groups", "spans"), [(2, [9, 9, 40, 40]), (2, [40, 9, 9, 1]), (4, [3, 70, 3, 200])])
def test_spans_are_windows_by_head(near, time, groups, spans, backend):
    inputs = draw(time, groups=groups)
    for options in ({}, OPTIONS["all"]):
        wanted, sums = written_out(*inputs.values(), spans=spans, **options)
        output = softmax_attention_with_sums(*inputs.values(), spans=spans, backend=backend, **options)
        near(output[0], wanted, 2e-6)
        near(output[1], sums, 2e-6, floor=1.0)
        near(softmax_attention(*inputs.values(), spans=spans, backend=backend, **options), wanted, 2e-6)
    same = softmax_attention(*inputs.values(), spans=[9] * 4, backend=backend)
    near(same, softmax_attention(*inputs.values(), window=9), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_an_option_that_asks_for_nothing_changes_nothing(near, backend):
    inputs = draw(150).values()
    for window in (None, 20):
        plain, (q, k, v) = softmax_attention(*inputs, window=window), inputs
        for nothing in (
            {"soft_cap": 1e6}, {"slopes": torch.zeros(4)}, {"sink_logits": torch.full((4,), -torch.inf)},
            {"sinks": 1 if window is None else 0},
        ):  # fmt: skip
            near(softmax_attention(*inputs, window=window, backend=backend, **nothing), plain, 2e-6)
            if window is None and "sinks" not in nothing:
                step = softmax_attention_step(
                    q[:, -1],
                    k,
                    v,
                    visible=150,
                    backend=backend,
                    distance=torch.arange(149, -1, -1),
                    **nothing,
                )
                near(step, plain[:, -1], 2e-6)


def test_a_sink_logit_is_one_more_key_without_a_value(near):
    q, k, v = draw(70).values()
    # One more channel lets the key's score be anything for each head.
    extra = LOGITS.view(1, 1, 4, 1).expand(2, 70, 4, 1) * 12**0.5
    wider = torch.cat([q, extra], dim=-1)
    first = torch.zeros(2, 1, 2, 13)
    first[..., -1] = 1.0
    keys = torch.cat([first, torch.cat([k, torch.zeros(2, 70, 2, 1)], dim=-1)], dim=1)
    values = torch.cat([torch.zeros(2, 1, 2, 20), v], dim=1)
    near(
        softmax_attention(q, k, v, sink_logits=LOGITS),
        softmax_attention(wider, keys, values, scale=12**-0.5),
        2e-6,
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("window", [None, 9])
def test_steps_over_a_ring_with_pinned_slots_equal_forward(near, name, window, backend):
    inputs = draw(40)
    options = dict(OPTIONS[name])
    expected = softmax_attention(*inputs.values(), window=window, **options)
    sinks = options.pop("sinks", 0)
    slots = sinks + window if window else 40
    keys, values = torch.full((2, slots, 2, 12), torch.nan), torch.full((2, slots, 2, 20), torch.nan)
    place, outputs = torch.zeros(slots, dtype=torch.long), []
    for t in range(40):
        slot = t if t < sinks or not window else sinks + (t - sinks) % window
        keys[:, slot], values[:, slot], place[slot] = inputs["k"][:, t], inputs["v"][:, t], t
        outputs.append(
            softmax_attention_step(
                inputs["q"][:, t], keys, values, visible=min(t + 1, slots), distance=t - place,
                backend=backend, **options,
            )
        )  # fmt: skip
    near(torch.stack(outputs, 1), expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_steps_with_spans_hide_what_lies_too_far(near, backend, dtype):
    q, k, v = draw(60).values()
    spans, distance = [1, 9, 70, 30], torch.arange(59, -1, -1)
    for sinks in (0, 4):
        wanted = written_out(q, k.to(dtype), v.to(dtype), spans=spans, sinks=sinks)[0][:, -1]
        output = softmax_attention_step(
            q[:, -1], k.to(dtype), v.to(dtype), visible=60, spans=spans, sinks=sinks, distance=distance,
            backend=backend,
        )  # fmt: skip
        near(output, wanted, 2e-6 if dtype == torch.float32 else 5e-3)
    query = q[:, -1].clone().requires_grad_()
    nothing = softmax_attention_step(
        query, k, v, visible=60, spans=spans, distance=distance + 20, backend=backend
    )
    assert nothing[:, 0].abs().max() == nothing[:, 1].abs().max() == 0
    assert torch.autograd.grad(nothing.sum(), query)[0].isfinite().all()


def test_parts_merge_into_the_whole(near):
    q, k, v = draw(50, 90).values()
    for options in ({}, {"soft_cap": 2.0}):
        whole, sums = softmax_attention_with_sums(q, k, v, **options)
        # Each query over the last ten keys, and over all that came before them.
        near_part = softmax_attention_with_sums(q, k, v, window=10, **options)
        far_part = softmax_attention_with_sums(
            q, k[:, :80], v[:, :80], **options
        )  # its queries stand ten keys earlier
        merged, merged_sums = merge([near_part[0], far_part[0]], [near_part[1], far_part[1]])
        near(merged, whole, 2e-6)
        near(merged_sums, sums, 2e-6)


def test_merging_nothing_gives_nothing_and_finite_gradients(near):
    outputs = [torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(2)]
    sums = [torch.full((1, 3, 2), -torch.inf, requires_grad=True), torch.zeros(1, 3, 2)]
    near(merge(outputs, sums)[0], outputs[1])
    sums[1] = torch.full((1, 3, 2), -torch.inf, requires_grad=True)
    output, total = merge(outputs, sums)
    assert output.abs().max() == 0 and (total == -torch.inf).all()
    for gradient in torch.autograd.grad(output.sum(), [*outputs, *sums]):
        assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="merge: 1 outputs and 2 sums"):
        merge(outputs[:1], sums)
    with pytest.raises(ValueError, match=r"merge: sums has shape .* \[B, T, H\]"):
        merge(outputs, [sums[0], sums[1][:, :2]])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_in_float64(window, backend):
    q, k, v = draw(5, 6, batch=1, heads=2, groups=1, key=2, value=3, dtype=torch.float64).values()
    rest = [torch.tensor([0.3, 0.01], dtype=torch.float64), torch.tensor([0.5, -1.0], dtype=torch.float64)]

    def made(q, k, v, slopes, logits):
        parts = softmax_attention_with_sums(
            q, k, v, window=window, soft_cap=1.5, slopes=slopes, sinks=1, sink_logits=logits, backend=backend
        )
        merged = merge([parts[0], parts[0] + 1], [parts[1], parts[1].square()])
        return *parts, *merged

    leaves = [x.requires_grad_() for x in (q, k, v, *rest)]
    assert torch.autograd.gradcheck(made, leaves)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(near, size):
    inputs = draw(75, key=4)
    inputs["q"] *= size / 4
    for options in ({"sink_logits": torch.tensor([-1e4, 1e4, 0.0, -torch.inf])}, {"soft_cap": 50.0}):
        made, learned = call(window=9, **options)
        for tensor in made("chunked", *inputs.values(), *learned.values())[:1]:
            assert tensor.isfinite().all()
            near(tensor, written_out_safely(*inputs.values(), 9, **options), 1e-3)
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        output = made("chunked", *leaves, *learned.values())[0]
        for gradient in torch.autograd.grad(output.square().sum(), leaves):
            assert gradient.isfinite().all()


def written_out_safely(q, k, v, window, soft_cap=None, sink_logits=None):
    """As `written_out`, by a softmax that numbers of this size do not overflow."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k) / q.shape[-1] ** 0.5
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    seen &= ~torch.ones_like(seen).tril(-window)
    scores = scores.masked_fill(~seen, -torch.inf)
    sink = torch.full((4,), -torch.inf) if sink_logits is None else sink_logits
    sink = sink.double().view(1, 4, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("window", [None, 7])
def test_the_future_does_not_reach_the_past(window, name):
    inputs = draw(150)
    before = softmax_attention(*inputs.values(), window=window, **OPTIONS[name])
    for t, future in itertools.product((0, 63, 140), (1e3, torch.nan)):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = future
        after = softmax_attention(*changed, window=window, **OPTIONS[name])
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-5)


def test_a_window_with_options_holds_no_square(largest_bytes):
    def largest(time, **options):
        inputs = [x.requires_grad_() for x in draw(time, batch=1).values()]
        return largest_bytes(lambda: softmax_attention(*inputs, **options).sum().backward())

    for options in ({"window": 32, **OPTIONS["all"]}, {"spans": [8, 8, 32, 32]}):
        assert largest(2048, **options) <= 2.1 * largest(1024, **options)
        assert largest(1024, **options) < 1024 * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(near, dtype):
    inputs = draw(75, dtype=dtype).values()
    output = softmax_attention(*inputs, window=20, **OPTIONS["all"])
    assert output.dtype == dtype and output.is_contiguous()
    near(output, written_out(*inputs, window=20, **OPTIONS["all"])[0], 1e-2)
    wide = [x.float() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        inside = softmax_attention(*wide, **OPTIONS["all"])
    assert torch.equal(inside, softmax_attention(*wide, **OPTIONS["all"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": -1}, "sinks=-1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
        ({"slopes": torch.zeros(3)}, r"slopes has shape \[3\].*\[H\] = \[4\]"),
        ({"sink_logits": torch.zeros(3, 4)}, r"sink_logits has shape \[3, 4\].*\[B, H\] = \[2, 4\]"),
        ({"spans": [4, 4]}, "one window of at least 1 for each of 4 heads"),
        ({"spans": [4, 4, 4, 0]}, "at least 1"),
        ({"spans": [4] * 4, "window": 4}, "leave window out"),
        ({"sinks": 3, "skipped": 5}, "skipped=5 tokens lie behind 3 sinks"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"softmax_attention: .*{message}"):
        softmax_attention(*draw(5).values(), **options)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("others", [{}, {"window": 5, "sinks": 2}, {"spans": [3, 9, 3, 20]}], ids=str)
def test_sink_logits_by_batch_entry_are_those_of_each(near, backend, others):
    """Under vmap, where models share a batch, a model's logits are those of its entries."""
    inputs, logits = [x.requires_grad_() for x in draw(9, 12).values()], torch.randn(2, 4, requires_grad=True)
    leaves = [*inputs, logits]

    def call(q, k, v, logits):
        return softmax_attention_with_sums(q, k, v, sink_logits=logits, backend=backend, **others)

    def alone(q, k, v, logits):
        return tuple(part[0] for part in call(q[None], k[None], v[None], logits))

    apart = [alone(*(x[n] for x in leaves)) for n in range(2)]
    expected = [torch.stack(column) for column in zip(*apart, strict=True)]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in expected), leaves)
    for results in (call(*leaves), torch.func.vmap(alone)(*leaves)):
        for actual, wanted in zip(results, expected, strict=True):
            near(actual, wanted)
        found = torch.autograd.grad(sum(x.square().sum() for x in results), leaves)
        for actual, wanted in zip(found, gradients, strict=True):
            near(actual, wanted, 1e-4)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@torch.no_grad()
def test_a_step_takes_sink_logits_by_batch_entry(near, backend):
    q, k, v = draw(1, 12).values()
    logits = torch.randn(2, 4)
    got = softmax_attention_step(q[:, 0], k, v, visible=11, sink_logits=logits, backend=backend)
    for n in range(2):
        own = (x[n : n + 1] for x in (q[:, 0], k, v))
        near(got[n : n + 1], softmax_attention_step(*own, visible=11, sink_logits=logits[n]))


def test_a_step_asks_for_the_distances_that_it_needs():
    q, k, v = draw(5).values()
    for options in ({"slopes": SLOPES}, {"spans": [2] * 4}):
        with pytest.raises(ValueError, match="softmax_attention_step: slopes and spans need the distance"):
            softmax_attention_step(q[:, 0], k, v, visible=5, **options)
    with pytest.raises(ValueError, match=r"softmax_attention_step: distance has shape \[4\]"):
        softmax_attention_step(q[:, 0], k, v, visible=5, distance=torch.arange(4), slopes=SLOPES)

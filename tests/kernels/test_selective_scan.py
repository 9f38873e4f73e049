"""Mamba's selective scan: chunks against steps, known equalities, causality, hard gates, memory, an oracle."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.scalar_decay.ops import scalar_decay
from kernels.selective_scan import chunked
from kernels.selective_scan.ops import selective_scan, selective_scan_step

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
STEPS = {
    "mild": lambda *shape: 0.05 * torch.rand(shape),
    "tiny": lambda *shape: torch.full(shape, 1e-8),
    "hard": lambda *shape: 25 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, 50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(50.0), 0.02 * torch.rand(shape)
    ),
}
RATED = ("x", "delta", "write", "read")


def draw(time, gate="mild", batch=2, channels=6, size=5, dtype=torch.float32):
    """Inputs by name, in the order of the call; rates about one, so that the step alone says how hard a gate is."""
    inputs = {
        "x": torch.randn(batch, time, channels),
        "delta": STEPS[gate](batch, time, channels),
        "rate": -0.5 - torch.rand(channels, size),
        "write": torch.randn(batch, time, size),
        "read": torch.randn(batch, time, size),
        "skip": torch.randn(channels),
        "state": torch.randn(batch, channels, size),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(backend, *inputs):
    return selective_scan(*inputs, backend=backend)


def part(inputs, where):
    """The same call with some of the tokens, without its state."""
    return [x[:, where] if name in RATED else x for name, x in inputs.items() if name != "state"]


@pytest.mark.parametrize("gate", STEPS)
@pytest.mark.parametrize("time", LENGTHS)
def test_chunks_equal_steps(agree, time, gate):
    agree(call, draw(time, gate))


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_gradient_of_one_result_alone(agree, ask):
    agree(call, draw(75), ask=ask)


@pytest.mark.parametrize("time", [1, 48, 75])
def test_no_state_is_a_state_of_zeros(agree, time):
    inputs = draw(time)
    del inputs["state"]
    agree(call, inputs)
    output, last = selective_scan(*inputs.values())
    expected, expected_last = selective_scan(*inputs.values(), torch.zeros(2, 6, 5))
    assert torch.equal(output, expected)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("size", [1, 2, 20, 33, 100])
def test_any_chunk_will_do(agree, size):
    def cut(backend, *inputs):
        if backend == "reference":
            return selective_scan(*inputs, backend=backend)
        return chunked.selective_scan(*inputs, size)

    agree(cut, draw(75, "mild behind hard"))


@settings(deadline=None, max_examples=15)
@given(
    time=st.integers(1, 50),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    size=st.integers(1, 9),
    chunk=st.integers(1, 50),
    gate=st.sampled_from(sorted(STEPS)),
)
def test_random_shapes(time, batch, channels, size, chunk, gate):
    inputs = draw(time, gate, batch, channels, size).values()
    output, last = chunked.selective_scan(*inputs, chunk)
    expected, expected_last = call("reference", *inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_each_number_of_the_state_is_a_loop_of_its_own(near, backend):
    x, delta, rate, write, read, skip, state = (y.double() for y in draw(30).values())
    output = torch.empty_like(x)
    for b in range(2):
        for c in range(6):
            held = state[b, c].tolist()
            for t in range(30):
                here = delta[b, t, c].item()
                for n in range(5):
                    held[n] *= math.exp(here * rate[c, n].item())
                    held[n] += here * write[b, t, n].item() * x[b, t, c].item()
                seen = sum(held[n] * read[b, t, n].item() for n in range(5))
                output[b, t, c] = seen + skip[c] * x[b, t, c]
    actual, _ = call(backend, *draw_again(x, delta, rate, write, read, skip, state))
    near(actual, output)


def draw_again(*inputs):
    return [x.float() for x in inputs]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_with_one_rate_a_head_it_is_scalar_decay(near, backend):
    """Rates tied over the state and over a head's channels, one step a head: Mamba-2's recurrence, arXiv:2405.21060."""
    inputs = draw(75, batch=2, channels=12, size=8)
    delta = inputs["delta"][..., ::4]
    rate = inputs["rate"][::4, :1]
    output, last = selective_scan(
        inputs["x"],
        delta.repeat_interleave(4, dim=2),
        rate.repeat_interleave(4, dim=0).expand(-1, 8),
        inputs["write"],
        inputs["read"],
        torch.zeros(12),
        inputs["state"],
        backend=backend,
    )
    heads = inputs["x"].unflatten(2, (3, 4))
    expected, expected_last = scalar_decay(
        inputs["read"].unsqueeze(2),
        inputs["write"].unsqueeze(2),
        heads * delta.unsqueeze(-1),
        delta * rate[:, 0],
        inputs["state"].unflatten(1, (3, 4)).mT,
    )
    near(output, expected.flatten(2))
    near(last, expected_last.mT.flatten(1, 2))


def fixed(time=60):
    """One step, one write and one read vector for all tokens, in float64."""
    inputs = {name: x.double() for name, x in draw(time).items()}
    for name in ("delta", "write", "read"):
        inputs[name] = inputs[name][:1, :1].expand_as(inputs[name]).contiguous()
    inputs["delta"] += 0.2
    return inputs


def convolved(inputs, scale):
    """Σ_s K_{t-s} x_s with K_l = Σ_n C_n exp(l Δ A_n) B̄_n, and the skip; scale [C, N] is B̄ over B."""
    x, delta, rate, write, read, skip, _ = inputs.values()
    time = x.shape[1]
    modes = (torch.arange(time).double()[:, None, None] * delta[0, 0, :, None] * rate).exp()
    kernel = (modes * scale * write[0, 0] * read[0, 0]).sum(-1)
    output = skip * x
    for lag in range(time):
        output[:, lag:] += kernel[lag] * x[:, : time - lag]
    return output


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_with_fixed_steps_it_is_a_convolution_by_euler_and_not_by_zero_order_hold(near, backend):
    inputs = fixed()
    output, _ = selective_scan(*(x.float() for x in part(inputs, slice(None))), backend=backend)
    step, rate = inputs["delta"][0, 0, :, None], inputs["rate"]
    near(output, convolved(inputs, step.expand_as(rate)), 1e-6)
    held = convolved(inputs, torch.expm1(step * rate) / rate)
    assert (output - held).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 74])
def test_cut_anywhere(near, cut, backend):
    inputs = draw(75)
    expected, expected_last = selective_scan(*inputs.values(), backend="reference")
    first, state = selective_scan(*part(inputs, slice(cut)), inputs["state"], backend=backend)
    rest, state = selective_scan(*part(inputs, slice(cut, None)), state, backend=backend)
    near(torch.cat([first, rest], 1), expected)
    near(state, expected_last)


def test_steps_equal_forward(near):
    inputs = draw(20)
    expected, expected_last = selective_scan(*inputs.values())
    state, outputs = inputs["state"], []
    for t in range(20):
        output, state = selective_scan_step(*part(inputs, t), state)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 15, 16, 63, 74])
def test_the_future_does_not_reach_the_past(backend, t):
    inputs = draw(76)
    before, _ = call(backend, *inputs.values())
    for future in (0.5, 1e3, torch.nan):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in RATED:
            changed[name][:, t + 1 :] = future
        after, _ = call(backend, *changed.values())
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_no_gradient_reaches_the_future():
    inputs = {name: x.requires_grad_() for name, x in draw(75).items()}
    output, _ = selective_scan(*inputs.values())
    for x in torch.autograd.grad(output[:, :30].square().sum(), [inputs[name] for name in RATED]):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize("size", [1, 4, 64])
def test_gradients_in_float64(size):
    inputs = draw(7, batch=2, channels=2, size=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: chunked.selective_scan(*x, size), leaves)
    assert torch.autograd.gradcheck(lambda *x: call("reference", *x), leaves)


def test_gates_beyond_every_exponent_stay_finite():
    inputs = draw(75)
    inputs["delta"] = 1e4 * torch.rand_like(inputs["delta"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = selective_scan(*leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_types(near, backend, dtype):
    inputs = part(draw(40, dtype=dtype), slice(None))
    output, last = selective_scan(*inputs, backend=backend)
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = selective_scan(*(x.double() for x in inputs), backend="reference")
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    # What is carried keeps nothing else alive.
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()


def test_the_layout_of_the_memory_does_not_matter(agree):
    inputs = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in draw(20).items()}
    agree(call, inputs)


def test_autocast_leaves_the_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75).values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = selective_scan(*inputs)
            loss = output.square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_no_tensor_holds_a_state_for_every_token(largest_bytes):
    def both_ways(time):
        inputs = [x.requires_grad_() for x in draw(time, channels=32, size=16).values()]
        output, last = selective_scan(*inputs)
        (output.sum() + last.sum()).backward()

    one_token = 2 * 32 * 16 * 4
    assert largest_bytes(lambda: both_ways(64)) == largest_bytes(lambda: both_ways(192)) == 16 * one_token


def test_states_before_the_chunks_are_kept_only_for_a_gradient(monkeypatch):
    seen, alive = [], []

    def walk(decays, tiles, state):
        seen.append(weakref.ref(state))
        alive.append(sum(ref() is not None for ref in seen))
        return chunked_walk(decays, tiles, state)

    chunked_walk = chunked._walk
    monkeypatch.setattr(chunked, "_walk", walk)
    inputs = [x.requires_grad_() for x in draw(64).values()]
    with torch.no_grad():
        selective_scan(*inputs)
    assert max(alive) <= 2
    seen.clear()
    alive.clear()
    output, _ = selective_scan(*inputs)
    assert alive == [1, 2, 3, 4]
    assert output.requires_grad


def test_oracle_mamba(near):
    pytest.importorskip("transformers")
    from transformers.models.mamba import modeling_mamba

    inputs = draw(75)
    x, delta, rate, write, read, skip, _ = inputs.values()
    expected, expected_last = modeling_mamba.mamba_selective_scan(
        x.mT, delta.mT, rate, write.mT, read.mT, D=skip, return_last_state=True
    )
    state = inputs["state"].clone()
    once = modeling_mamba.mamba_selective_state_update(
        state, x[:, 0], delta[:, 0], rate, write[:, 0], read[:, 0], D=skip
    )
    for backend in ("reference", "chunked"):
        output, last = selective_scan(*part(inputs, slice(None)), backend=backend)
        near(output, expected.mT)
        near(last, expected_last)
        stepped, after = selective_scan_step(*part(inputs, 0), inputs["state"], backend=backend)
        near(stepped, once)
        near(after, state)


def test_documents_are_texts_of_their_own(agree):
    spans = (slice(0, 1), slice(1, 21), slice(21, 37))
    inputs = draw(37, batch=1)
    inputs["state"] = torch.randn(3, 6, 5)
    cu_seqlens = torch.tensor([0, 1, 21, 37], dtype=torch.int32)

    def packed(backend, *inputs):
        return selective_scan(*inputs, cu_seqlens=cu_seqlens, backend=backend)

    agree(packed, inputs)
    output, last = packed("chunked", *inputs.values())
    apart = [selective_scan(*part(inputs, span), inputs["state"][n : n + 1]) for n, span in enumerate(spans)]
    assert torch.equal(output, torch.cat([y for y, _ in apart], 1))
    assert torch.equal(last, torch.cat([state for _, state in apart]))


def by_entry(time, *names):
    """Inputs of a batch whose entries have parameters of their own."""
    inputs = draw(time)
    drawn = {"rate": -0.5 - torch.rand(2, 6, 5), "skip": torch.randn(2, 6)}
    return {**inputs, **{name: drawn[name] for name in names}}


OWN = pytest.mark.parametrize("own", [("rate",), ("skip",), ("rate", "skip")], ids="+".join)


@OWN
@pytest.mark.parametrize("time", [1, 17])
def test_parameters_by_entry_equal_steps(agree, near, time, own):
    inputs = by_entry(time, *own)
    agree(call, inputs)
    pairs = zip(derived("triton", inputs.values()), derived("reference", inputs.values()), strict=True)
    for actual, expected in pairs:
        near(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_parameters_by_entry_are_models_side_by_side(near, backend):
    inputs = by_entry(9, "rate", "skip")
    output, last = selective_scan(*inputs.values(), backend=backend)
    first = [x[:, 0] if name in RATED else x for name, x in inputs.items()]
    stepped, after = selective_scan_step(*first, backend=backend)
    for b in range(2):
        own = [x[b] if name in ("rate", "skip") else x[b : b + 1] for name, x in inputs.items()]
        alone, alone_last = selective_scan(*own)
        near(output[b : b + 1], alone)
        near(last[b : b + 1], alone_last)
        own = [
            x[b] if name in ("rate", "skip") else y[b : b + 1]
            for (name, x), y in zip(inputs.items(), first, strict=True)
        ]
        alone, alone_last = selective_scan_step(*own)
        near(stepped[b : b + 1], alone)
        near(after[b : b + 1], alone_last)


@OWN
def test_members_of_a_stack_are_entries_of_one_batch(near, own):
    inputs = [torch.stack(pair) for pair in zip(draw(9).values(), draw(9).values(), strict=True)]
    leaves = [x.requires_grad_() for x in inputs]
    shared = {"rate", "skip"} - set(own)
    dims = [None if name in shared else 0 for name in draw(1)]
    given = [x[0] if dim is None else x for x, dim in zip(leaves, dims, strict=True)]
    stacked = torch.func.vmap(lambda *x: selective_scan(*x, backend="triton"), tuple(dims))(*given)
    members = [[x if dim is None else x[m] for x, dim in zip(given, dims, strict=True)] for m in range(2)]
    alone = [torch.stack(pair) for pair in zip(*(selective_scan(*x) for x in members), strict=True)]
    found = []
    for y, last in (stacked, alone):
        loss = y.square().sum() + last.square().sum()
        found.append([y, last, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*found, strict=True):
        near(actual, expected)


def test_triton_keeps_states_before_chunks_only_for_a_gradient(largest_bytes):
    inputs = [x.requires_grad_() for x in draw(64, size=16).values()]
    whole = inputs[0].numel() * 4
    with torch.no_grad():
        assert largest_bytes(lambda: call("triton", *inputs)) == whole
    assert largest_bytes(lambda: call("triton", *inputs)) == 16 / 8 * whole


def derived(backend, inputs, ask=(0, 1)):
    """Outputs and gradients of all inputs for a loss of the outputs asked for."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = selective_scan(*leaves, backend=backend)
    loss = sum(outputs[i].square().sum() for i in ask)
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@pytest.mark.parametrize("ask", [[0], [1]], ids=["output", "state"])
def test_triton_derives_either_result_alone(near, ask):
    inputs = draw(9).values()
    pairs = zip(derived("triton", inputs, ask), derived("reference", inputs, ask), strict=True)
    for actual, expected in pairs:
        near(actual, expected)


@pytest.mark.parametrize("gate", ["hard", "mild behind hard", "beyond"])
def test_triton_forgets_as_steps_do(near, gate):
    """Each gradient for itself: those of long steps are as much larger as the steps are."""
    inputs = draw(20, "mild behind hard" if gate == "beyond" else gate)
    if gate == "beyond":
        inputs["delta"] = torch.where(inputs["delta"] == 50, 1e4, inputs["delta"])
    inputs["x"] /= 1 + inputs["delta"]
    pairs = zip(derived("triton", inputs.values()), derived("reference", inputs.values()), strict=True)
    for place, (actual, expected) in enumerate(pairs):
        scale = 1 + inputs["delta"] if place == 2 else 1.0
        near(actual / scale, expected / scale)


def test_triton_reads_slices_and_many_tiles(near):
    """Write and read vectors are slices of a wider projection, as in the model; channels fill more than one tile."""
    inputs = draw(9, channels=600, size=16)
    wide = torch.randn(2, 9, 40)
    inputs.update(write=wide[..., 3:19], read=wide[..., 20:36])
    pairs = zip(derived("triton", inputs.values()), derived("reference", inputs.values()), strict=True)
    for actual, expected in pairs:
        near(actual, expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 30), r"x has shape \[2, 30\], but must be \[B, T, C\]"),
        ("delta", (2, 5, 1), r"delta has shape .*\[B, T, C\] = \[2, 5, 6\]"),
        ("rate", (6,), r"rate has shape .*\[C, N\]"),
        ("rate", (5, 6), r"rate has shape .*\[C, N\] = \[6, 6\]"),
        ("write", (2, 5, 6), r"write has shape .*\[2, 5, 5\]"),
        ("read", (2, 4, 5), r"read has shape .*\[2, 5, 5\]"),
        ("skip", (5,), r"skip has shape .*\[C\] = \[6\]"),
        ("state", (2, 5, 6), r"state has shape .*\[B, C, N\] = \[2, 6, 5\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs = draw(5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5)
    with pytest.raises(ValueError, match="selective_scan: backend='cuda' is not one of"):
        selective_scan(*inputs.values(), backend="cuda")
    with pytest.raises(ValueError, match="selective_scan: cu_seqlens packs documents in one row"):
        selective_scan(*inputs.values(), cu_seqlens=torch.tensor([0, 5]))
    wide = draw(5, size=300)
    with pytest.raises(ValueError, match="selective_scan_step: no configuration serves N=300"):
        selective_scan_step(*part(wide, 0), wide["state"], backend="triton")
    with pytest.raises(ValueError, match="selective_scan_step: state has shape"):
        selective_scan_step(*part(inputs, 0), inputs["state"].mT)

"""Log-linear attention: chunks against steps and against the matrix form, any position, causality, equalities."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.utils.flop_counter import FlopCounterMode

from kernels.log_linear.ops import log_linear, log_linear_step
from kernels.scalar_decay.ops import scalar_decay

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
BASES = ("decay", "delta")
GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "zero": lambda *shape: torch.zeros(shape),
    "hard": lambda *shape: -50 * torch.rand(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
}


def draw(time, base="decay", gate="mild", batch=2, heads=4, key=12, value=20, levels=9, dtype=torch.float32):
    """Inputs by name, in the order of the call; the delta rule has its own keys in each head, and no group."""
    groups = heads if base == "delta" else heads // 2
    inputs = {
        "q": torch.randn(batch, time, groups, key),
        "k": normalize(torch.randn(batch, time, groups, key), dim=-1),
        "v": torch.randn(batch, time, heads, value),
        "log_decay": GATES[gate](batch, time, heads),
        "weights": softplus(torch.randn(batch, time, heads, levels)),
    }
    if base == "delta":
        inputs["beta"] = 2 * torch.rand(batch, time, heads)
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(backend, *inputs, levels=None, length=0, chunk=64):
    """inputs are q, k, v, log_decay, weights and beta, or all but the last."""
    inputs = (*inputs, None)[:6]
    return log_linear(*inputs, levels, length, chunk=chunk, backend=backend)


def cut(inputs, start, end=None):
    return [x[:, start:end] for x in inputs.values()]


def by_matrix(q, k, v, log_decay, weights, beta=None):
    """The matrix written out, one pair of tokens after another, in the order in which the paper defines it."""
    time, heads = v.shape[1:3]
    q, k = (x.double().repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    output = torch.zeros(v.shape, dtype=torch.float64)
    for s in range(time):
        # What token s wrote, carried to t by the transitions between them.
        written = torch.einsum("bhk,bhv->bhkv", k[:, s], v[:, s].double())
        if beta is not None:
            written = written * beta[:, s].double()[..., None, None]
        for t in range(s, time):
            if t > s:
                if beta is not None:
                    recalled = (
                        torch.einsum("bhk,bhkv->bhv", k[:, t], written) * beta[:, t].double()[..., None]
                    )
                    written = written - torch.einsum("bhk,bhv->bhkv", k[:, t], recalled)
                written = written * log_decay[:, t].double().exp()[..., None, None]
            # The blocks of the prefix of t, the longest first: those of the ones in its binary form.
            level, start = 0, 0
            for bit in reversed(range(t.bit_length())):
                if t >> bit & 1:
                    if start <= s < start + 2**bit:
                        level = bit + 1
                    start += 2**bit
            assert start == t
            weight = weights[:, t, :, min(level, weights.shape[-1] - 1)].double()
            output[:, t] += weight[..., None] * torch.einsum("bhk,bhkv->bhv", q[:, t], written)
    return output


@pytest.mark.parametrize("levels", [3, 6])
@pytest.mark.parametrize("base", BASES)
def test_both_forms_are_the_matrix(near, base, levels):
    inputs = draw(37, base, batch=1, heads=2, key=4, value=3, levels=levels).values()
    expected = by_matrix(*inputs).float()
    for backend, chunk in (("reference", 64), ("chunked", 64), ("chunked", 8), ("chunked", 1)):
        near(call(backend, *inputs, chunk=chunk)[0], expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("base", BASES)
def test_chunks_equal_steps(agree, base, time, gate):
    agree(call, draw(time, base, gate))


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 128])
@pytest.mark.parametrize("levels", [2, 3, 9])
@pytest.mark.parametrize("base", BASES)
def test_any_chunk_and_any_number_of_levels_will_do(agree, base, levels, chunk):
    inputs = draw(75, base, "mild behind hard", levels=levels)
    agree(lambda backend, *x: call(backend, *x, chunk=chunk), inputs)


@pytest.mark.parametrize("levels", [4, 9])
@pytest.mark.parametrize("base", BASES)
def test_the_text_may_be_cut_at_every_place(near, base, levels):
    inputs = draw(75, base, levels=levels)
    expected, expected_last = call("reference", *inputs.values())
    for place in range(1, 75):
        for end in {min(place + 1, 75), min(place + 20, 75), 75}:
            first, state = call("chunked", *cut(inputs, 0, place), chunk=16)
            more, state = call("chunked", *cut(inputs, place, end), levels=state, length=place, chunk=16)
            near(torch.cat([first, more], 1), expected[:, :end])
            if end < 75:
                rest, state = call("chunked", *cut(inputs, end), levels=state, length=end, chunk=16)
                near(rest, expected[:, end:])
            near(state, expected_last)


@pytest.mark.parametrize("ask", [None, [0], [1]], ids=["both", "output", "state"])
@pytest.mark.parametrize("length", [1, 7, 64, 100, 191])
@pytest.mark.parametrize("base", BASES)
def test_gradients_from_any_position(agree, base, length, ask):
    """Of the carried levels as well, those that hold something."""
    _, levels = call("reference", *draw(length, base).values())
    inputs = draw(40, base) | {"levels": levels}

    def continued(backend, *x):
        *tokens, carried = x
        output, last = call(backend, *tokens, levels=carried * (levels != 0), length=length, chunk=16)
        return output, last

    agree(continued, inputs, ask=ask)


@pytest.mark.parametrize("base", BASES)
def test_equal_weights_are_the_base(near, base):
    inputs = draw(75, base, heads=4)
    inputs["weights"] = torch.ones_like(inputs["weights"])
    output, last = call("chunked", *inputs.values())
    q, k, v, log_decay, _, *beta = inputs.values()
    if base == "decay":
        expected, state = scalar_decay(q, k, v, log_decay)
    else:
        state, rows = torch.zeros(2, 4, 12, 20), []
        for t in range(75):
            state = state * log_decay[:, t].exp()[..., None, None]
            error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t] * beta[0][:, t, :, None], error)
            rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        expected = torch.stack(rows, 1)
    near(output, expected)
    near(last.sum(2), state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("base", BASES)
def test_a_level_holds_its_own_tokens(base, backend):
    """After t tokens those of the ones in t - 1 hold something, and level 0."""
    inputs = draw(75, base)
    for time in (1, 2, 3, 8, 9, 63, 64, 65, 75):
        _, last = call(backend, *cut(inputs, 0, time))
        live = {0} | {bit + 1 for bit in range(7) if time - 1 >> bit & 1}
        assert {level for level in range(9) if last[:, :, level].abs().max() > 0} == live


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("levels", [3, 9])
@pytest.mark.parametrize("base", BASES)
def test_steps_equal_forward(near, base, levels, backend):
    inputs = draw(70, base, levels=levels)
    expected, expected_last = call("reference", *inputs.values())
    state, outputs = torch.zeros(2, 4, levels, 12, 20), []
    for t in range(70):
        token = ([x[:, t] for x in inputs.values()] + [None])[:6]
        output, state = log_linear_step(*token, state, t, backend=backend)
        outputs.append(output)
    near(torch.stack(outputs, 1), expected)
    near(state, expected_last)


@pytest.mark.parametrize("base", BASES)
def test_a_step_can_be_learnt_through(near, base):
    """Where a gradient is asked for nothing is overwritten, and it is the one of the loop."""
    inputs = draw(12, base)
    results = []
    for backend in ("reference", "chunked"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        state, total = torch.zeros(2, 4, 9, 12, 20), torch.zeros(())
        for t in range(12):
            before = state.clone()
            output, after = log_linear_step(
                *([x[:, t] for x in leaves] + [None])[:6], state, t, backend=backend
            )
            assert torch.equal(state, before)
            state, total = after, total + output.square().sum()
        results.append(torch.autograd.grad(total, leaves))
    for actual, expected in zip(*reversed(results), strict=True):
        near(actual, expected)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [0, 16, 63, 64, 74])
@pytest.mark.parametrize("base", BASES)
def test_the_future_does_not_reach_the_past(base, backend, t):
    inputs = draw(76, base)
    before, _ = call(backend, *inputs.values())
    for future in (0.1, 0.5, torch.nan):
        changed = [x.clone() for x in inputs.values()]
        for x in changed:
            x[:, t + 1 :] = -future
        after, _ = call(backend, *changed)
        bound = 1e-4 if math.isnan(future) else 0.0
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=bound)
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("base", BASES)
def test_no_gradient_reaches_the_future(base):
    inputs = [x.requires_grad_() for x in draw(75, base).values()]
    output, _ = call("chunked", *inputs, chunk=16)
    for x in torch.autograd.grad(output[:, :30].square().sum(), inputs):
        assert x[:, 30:].abs().max() == 0
        assert x[:, :30].abs().max() > 0


@pytest.mark.parametrize(("backend", "chunk"), [("reference", 64), ("chunked", 64), ("chunked", 2)])
@pytest.mark.parametrize("base", BASES)
def test_gradients_in_float64(base, backend, chunk):
    inputs = draw(7, base, batch=1, heads=2, key=2, value=3, levels=4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: call(backend, *x, chunk=chunk), leaves)


@pytest.mark.parametrize("base", BASES)
def test_gates_beyond_every_exponent_stay_finite(base):
    inputs = draw(75, base)
    inputs["log_decay"] = -1e4 * torch.rand_like(inputs["log_decay"])
    leaves = [x.requires_grad_() for x in inputs.values()]
    output, last = call("chunked", *leaves)
    for x in (output, last, *torch.autograd.grad(output.sum() + last.sum(), leaves)):
        assert x.isfinite().all()


def test_strong_writes_to_one_key_stay_exact(near):
    """A triangle of ones: a power series of it would grow beyond all digits, the inverse does not."""
    inputs = draw(64, "delta", "zero")
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).clone()
    inputs["beta"] = torch.ones_like(inputs["beta"])
    near(call("chunked", *inputs.values())[0], call("reference", *inputs.values())[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("base", BASES)
def test_types(near, base, backend, dtype):
    inputs = draw(40, base, dtype=dtype)
    output, last = call(backend, *inputs.values())
    assert output.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.is_contiguous()
    assert last.is_contiguous()
    expected, expected_last = call("reference", *(x.double() for x in inputs.values()))
    near(output, expected, {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5))
    near(last, expected_last)
    token = ([x[:, 0] for x in inputs.values()] + [None])[:6]
    stepped, _ = log_linear_step(*token, torch.zeros_like(last), 0, backend=backend)
    assert stepped.dtype == dtype


def test_autocast_leaves_the_arithmetic_alone():
    inputs = [x.requires_grad_() for x in draw(75, "delta").values()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, last = call("chunked", *inputs)
            loss = output.float().square().sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("base", BASES)
def test_work_grows_by_a_level_where_the_length_doubles(base):
    """T log T: each doubling of the length adds the same work a token, the reads of one level more."""

    def flops(time):
        with FlopCounterMode(display=False) as counter:
            call("chunked", *draw(time, base, levels=12).values(), chunk=16)
        return counter.get_total_flops()

    # Without what one chunk does, which is done once where the last levels are made.
    each = [(flops(time) - flops(16)) / (time - 16) for time in (128, 256, 512, 1024)]
    added = [longer - shorter for shorter, longer in pairwise(each)]
    assert 0 < max(added) < 1.2 * min(added)


@pytest.mark.parametrize("base", BASES)
def test_a_step_touches_only_the_levels_that_hold_something(base):
    """Numbers in an empty level would show in the output if it were read."""
    inputs = draw(9, base)
    _, state = call("chunked", *cut(inputs, 0, 8))
    token = ([x[:, 8] for x in inputs.values()] + [None])[:6]
    expected, _ = log_linear_step(*token, state.clone(), 8)
    state[:, :, 5:] = torch.nan
    output, after = log_linear_step(*token, state, 8)
    assert torch.equal(output, expected)
    assert after.data_ptr() == state.data_ptr()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 4, 11), r"q has shape \[2, 5, 4, 11\].*\[B, T, G, K\] = \[2, 5, 4, 12\]"),
        ("k", (2, 5, 24), r"k has shape .*\[B, T, G, K\]"),
        ("v", (2, 4, 4, 20), r"v has shape .*\[2, 5, 4, 20\]"),
        ("v", (2, 5, 3, 20), r"3 heads cannot share 4 groups evenly"),
        ("log_decay", (2, 5, 4, 1), r"log_decay has shape"),
        ("weights", (2, 5, 9), r"weights has shape .*\[B, T, H, L\]"),
        ("weights", (2, 5, 3, 9), r"weights has shape .*\[2, 5, 4, 9\]"),
        ("weights", (2, 5, 4, 1), r"weights for 1 level are too few"),
        ("beta", (2, 5), r"beta has shape"),
        ("levels", (2, 4, 8, 12, 20), r"levels has shape .*\[2, 4, 9, 12, 20\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    inputs: dict[str, Tensor] = draw(5, "delta") | {"levels": torch.zeros(2, 4, 9, 12, 20)}
    inputs[name] = torch.zeros(shape)
    if name == "weights" and shape[-1] == 1:
        del inputs["levels"]
    with pytest.raises(ValueError, match=f"log_linear: {message}"):
        log_linear(*inputs.values())


def test_wrong_settings_are_named():
    inputs = draw(5, "delta")
    with pytest.raises(ValueError, match="chunk=-1 must be at least 1"):
        log_linear(*inputs.values(), chunk=-1)
    with pytest.raises(ValueError, match="chunk=48 must be a power of two"):
        log_linear(*inputs.values(), chunk=48)
    with pytest.raises(ValueError, match="length=-3 must be at least 0"):
        log_linear(*inputs.values(), length=-3)
    with pytest.raises(
        ValueError, match=r"log_linear: no configuration serves K=129, V=20 in float32 .*K ≤ 128"
    ):
        log_linear(*draw(5, "delta", key=129).values(), backend="triton")
    state, token = torch.zeros(2, 4, 9, 12, 20), [x[:, 0] for x in inputs.values()]
    with pytest.raises(ValueError, match=r"log_linear_step: a tensor is torch\.float64"):
        log_linear_step(*token, state.double(), 0, backend="triton")
    with pytest.raises(ValueError, match="log_linear_step: levels has shape"):
        log_linear_step(*token, state.mT, 0)


def test_a_step_in_triton_erases_too(near):
    """Where no token came before, where full levels merge, and in the last level, which holds all that is older."""
    for length in (0, 1, 6, 8, 40):
        inputs, levels = draw(1, "delta", levels=5), torch.zeros(2, 4, 5, 12, 20)
        token = [x[:, 0] for x in inputs.values()]
        if length:
            _, levels = log_linear(*draw(length, "delta", levels=5).values())
        expected = log_linear_step(*token, levels.clone(), length, backend="reference")
        for actual, wanted in zip(
            log_linear_step(*token, levels.clone(), length, backend="triton"), expected, strict=True
        ):
            near(actual, wanted)


def kernels_agree(near, inputs, bound=1e-5, levels=None, length=0):
    """Outputs and gradients of the kernels in float32 and those of the loop in float64."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs.values()]
        carried = [] if levels is None else [levels.to(dtype).requires_grad_()]
        # An empty level's gradient is the loop's alone.
        held = None if levels is None else carried[0] * (levels != 0)
        outputs = call(backend, *leaves, levels=held, length=length)
        torch.manual_seed(1)
        cotangents = [torch.randn(x.shape).to(x) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, [*leaves, *carried], cotangents)])
    names = ("output", "levels", *(f"gradient of {name}" for name in (*inputs, "levels")))
    for name, actual, expected in zip(names, *found, strict=False):
        near(actual, expected, bound, floor=1e-4, name=name)


@pytest.mark.parametrize("gate", ["zero", "mild behind hard"])
@pytest.mark.parametrize("time", [1, 16, 33, 96])
def test_erasing_kernels_equal_the_loop(near, time, gate):
    kernels_agree(near, draw(time, "delta", gate, batch=1, heads=2))


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_erasing_kernels_tell_few_levels_apart(near, levels):
    """Fewer than a chunk has, as many, and one walk's more: the last holds all that is older."""
    kernels_agree(near, draw(70, "delta", batch=1, heads=2, levels=levels))


def test_erasing_kernels_share_keys_among_heads(near):
    inputs = draw(40, "delta", batch=2, heads=4)
    inputs |= {name: inputs[name][:, :, :2].clone() for name in ("q", "k")}
    kernels_agree(near, inputs)


@pytest.mark.parametrize("length", [16, 48, 128, 176])
def test_erasing_kernels_go_on_with_whole_chunks(near, length):
    """Walks begin in the middle of a block, or with one, or read what came before."""
    _, levels = call("reference", *draw(length, "delta", batch=1, heads=2).values())
    kernels_agree(near, draw(50, "delta", batch=1, heads=2), levels=levels, length=length)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_erasing_kernels_take_any_chunk_that_the_table_may_hold(near, monkeypatch, chunk):
    from kernels import delta
    from kernels.log_linear import triton

    configure = triton.configure

    def of_chunk(operator, kernel, widths, like):
        row = configure(operator, kernel, widths, like)
        return replace(row, blocks={**row.blocks, "CHUNK": chunk}) if kernel == "prepare_delta" else row

    monkeypatch.setattr(delta, "configure", of_chunk)
    monkeypatch.setattr(triton, "configure", of_chunk)
    kernels_agree(near, draw(75, "delta", "mild behind hard", batch=1, heads=2))


def test_erasing_kernels_keep_equal_keys_and_reflections_exact(near):
    """β = 2 with one key again and again flips the state at each token: each adds to the error, but none multiplies it."""
    inputs = draw(64, "delta", "zero", batch=1, heads=2)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    kernels_agree(near, inputs, 1e-4)


def test_erasing_kernels_keep_no_states_for_a_backward_pass():
    """They are many, one for every walk before every chunk, and made anew where a gradient is asked for."""
    inputs = [x.requires_grad_() for x in draw(128, "delta", batch=1, heads=1, key=32, value=32).values()]
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes) or x, lambda x: x):
        call("triton", *inputs)
    # The outputs of three walks are the most of it.
    assert max(held) <= 3 * 128 * 32 * 4


@pytest.mark.parametrize("base", BASES)
def test_kernels_go_on_in_the_middle_of_a_chunk(near, base):
    """The rest of the chunk is the chunk form's, what follows the kernels', and gradients reach what came before."""
    inputs = draw(150, base, batch=1, heads=2, levels=9)
    found = []
    for backend in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        first, levels = call(backend, *(x[:, :70] for x in leaves))
        rest, last = call(backend, *(x[:, 70:] for x in leaves), levels=levels, length=70)
        output = torch.cat([first, rest], 1)
        found.append([output, last, *torch.autograd.grad(output.sin().sum() + last.sin().sum(), leaves)])
    for place, (actual, expected) in enumerate(zip(found[1], found[0], strict=True)):
        near(actual, expected, name=str(place))

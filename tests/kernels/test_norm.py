"""Norms: backends against each other, the calls that results rest on, groups, entries, gates, types, irregular rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels.norm.ops import rms_norm, unit_norm
from kernels.norm.triton import _rows

BACKENDS = ("reference", "chunked", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {"weighted": weighted, "gate": gate, "groups": groups}
    for weighted, gate, groups in itertools.product(
        ("no", "one", "each"), ("none", "after", "before"), (1, 3)
    )
]


def draw(*shape, weighted="one", gate="none"):
    """x, and a weight and a gate where there is one, by name."""
    inputs = {"x": 3 * torch.randn(shape)}
    if weighted != "no":
        inputs["weight"] = 1 + torch.randn(shape[-1:] if weighted == "one" else (shape[0], shape[-1]))
    if gate != "none":
        inputs["gate"] = 2 * torch.randn(shape)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def norm(backend, x, weight=None, gate=None, **options):
    return (rms_norm(x, weight, eps=1e-5, gate=gate, backend=backend, **options),)


def derive(call, inputs):
    """The output, and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    (output,) = call(**leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    return output.detach(), *torch.autograd.grad(output, list(leaves.values()), cotangent)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_backends_agree(near, options, activation):
    inputs = draw(2, 3, 15, weighted=options["weighted"], gate=options["gate"])
    named = {"groups": options["groups"], "before": options["gate"] == "before", "activation": activation}
    expected = derive(
        lambda **x: norm("reference", **x, **named), {name: x.double() for name, x in inputs.items()}
    )
    for backend in ("chunked", "triton"):
        actual = derive(lambda backend=backend, **x: norm(backend, **x, **named), inputs)
        for one, wanted in zip(actual, expected, strict=True):
            near(one, wanted)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_backends_agree_on_length(near, scale):
    inputs = draw(2, 3, 15, weighted="no")
    expected = derive(
        lambda x: (unit_norm(x, scale=scale, backend="reference"),), {"x": inputs["x"].double()}
    )
    near(expected[0].norm(dim=-1), torch.full((2, 3), scale, device=DEVICE))
    for backend in ("chunked", "triton"):
        actual = derive(lambda x, backend=backend: (unit_norm(x, scale=scale, backend=backend),), inputs)
        for one, wanted in zip(actual, expected, strict=True):
            near(one, wanted)


def test_the_chunk_form_is_what_stored_results_were_made_with():
    x, weight, gate = (one.cpu() for one in draw(4, 7, 32, gate="after").values())
    normed = F.rms_norm(x, (32,), weight, 1e-5)
    assert torch.equal(norm("chunked", x, weight)[0], normed)
    assert torch.equal(norm("chunked", x, weight, gate)[0], normed * F.silu(gate))
    half = x.bfloat16()
    assert torch.equal(
        norm("chunked", half, weight)[0], F.rms_norm(half.float(), (32,), weight, 1e-5).bfloat16()
    )
    narrow = gate.bfloat16()
    assert torch.equal(norm("chunked", x, weight, narrow)[0], normed.bfloat16() * F.silu(narrow))
    opened = x * F.silu(gate)
    grouped = opened.unflatten(-1, (4, 8))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + 1e-5)
    actual = norm("chunked", x, weight, gate, before=True, groups=4)[0]
    assert torch.equal(actual, grouped.flatten(-2) * weight)
    assert torch.equal(
        unit_norm(x, backend="chunked"), x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    )


def test_it_is_torchs_own_norm(near):
    x, weight = draw(5, 40).values()
    theirs = torch.nn.RMSNorm(40, eps=1e-5, device=DEVICE)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    for backend in BACKENDS:
        near(norm(backend, x, weight)[0], theirs(x))
        near(unit_norm(x, backend=backend), F.normalize(x, dim=-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_entries_are_calls_of_their_own(near, backend):
    x, weight, gate = draw(3, 4, 24, weighted="each", gate="after").values()
    whole = norm(backend, x, weight, gate, groups=2)[0]
    for b in range(3):
        for part in (slice(None, 12), slice(12, None)):
            alone = norm(backend, x[b, :, part], weight[b, part], gate[b, :, part])[0]
            near(whole[b, :, part], alone, 1e-6)


@pytest.mark.parametrize(
    ("x_type", "gate_type", "asked", "given"),
    [
        (torch.float16, None, None, torch.float16),
        (torch.float16, None, torch.float32, torch.float32),
        (torch.float32, torch.float16, None, torch.float16),
        (torch.float16, torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float32, None, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_types(near, backend, x_type, gate_type, asked, given):
    inputs = draw(3, 5, 20, gate="none" if gate_type is None else "after")
    typed = {**inputs, "x": inputs["x"].to(x_type)}
    if gate_type is not None:
        typed["gate"] = inputs["gate"].to(gate_type)
    output, *gradients = derive(lambda **x: norm(backend, **x, dtype=asked), typed)
    assert output.dtype == given
    expected, *wanted = derive(
        lambda **x: norm("reference", **x), {name: x.double() for name, x in typed.items()}
    )
    near(output, expected, 5e-3)
    for x, gradient, exact in zip(typed.values(), gradients, wanted, strict=True):
        assert gradient.dtype == x.dtype
        near(gradient, exact, 8e-3)
    assert unit_norm(typed["x"], dtype=asked, backend=backend).dtype == (asked or x_type)


def test_parts_of_a_projection_are_read_where_they_lie():
    wide = torch.randn(2, 5, 100, device=DEVICE)
    x, gate = wide[..., 10:42], wide[..., 60:92]
    assert _rows(x, 32).data_ptr() == x.data_ptr()
    assert torch.equal(
        norm("triton", x, None, gate)[0], norm("triton", x.contiguous(), None, gate.contiguous())[0]
    )
    heads = x.unflatten(-1, (4, 8))
    for own in (heads, heads.transpose(1, 2), heads[:, :, :, ::2], x[:1].expand(3, -1, -1)):
        leaf, copy = (one.detach().requires_grad_() for one in (own, own.contiguous()))
        actual, expected = unit_norm(leaf, backend="triton"), unit_norm(copy, backend="triton")
        assert torch.equal(actual, expected)
        assert torch.equal(
            *(torch.autograd.grad(y.sum(), z)[0] for y, z in ((actual, leaf), (expected, copy)))
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nought_stays_nought(backend):
    x = torch.zeros(2, 6, device=DEVICE, requires_grad=True)
    for call in (lambda: unit_norm(x, backend=backend), lambda: norm(backend, x)[0]):
        y = call()
        assert y.abs().max() == 0
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all() and gradient.min() > 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (1, 1, 1, 130)])
def test_odd_shapes(near, backend, shape):
    x = draw(*shape, weighted="no")["x"]
    near(norm(backend, x)[0], norm("reference", x.double())[0])
    near(unit_norm(x, backend=backend), unit_norm(x.double(), backend="reference"))


def test_nothing_gives_nothing():
    for backend in ("auto", "chunked"):
        assert norm(backend, torch.zeros(0, 8, device=DEVICE), torch.ones(8, device=DEVICE))[0].shape == (
            0,
            8,
        )
        assert unit_norm(torch.zeros(2, 0, 8, device=DEVICE), backend=backend).shape == (2, 0, 8)
    with pytest.raises(ValueError, match="norm: there is nothing to normalise"):
        norm("triton", torch.zeros(0, 8, device=DEVICE))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_in_float64(backend, before):
    inputs = {name: x.double().requires_grad_() for name, x in draw(2, 2, 6, gate="after").items()}
    call = lambda *x: norm(backend, *x, before=before, groups=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradcheck(lambda x: unit_norm(x, backend=backend), (inputs["x"],))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"weight": (11,)}, {}, r"weight has shape \[11\].*\[G·D\] = \[12\]"),
        ({"weight": (5, 12)}, {}, r"weight has shape \[5, 12\].*\[B, G·D\] = \[2, 12\]"),
        ({"gate": (2, 12)}, {}, r"gate has shape \[2, 12\].*as x = \[2, 5, 12\]"),
        ({}, {"groups": 5}, r"5 groups cannot share a width of 12 evenly"),
        ({}, {"activation": "gelu"}, r"activation='gelu' is not one of silu, sigmoid"),
        ({"x": (2, 0)}, {}, r"x has shape \[2, 0\], but must have a last dimension"),
    ],
)
def test_wrong_calls_are_named(change, options, message):
    inputs = draw(2, 5, 12, gate="after") | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        norm("auto", **inputs, **options)


def test_wrong_settings_are_named():
    x = draw(2, 12)["x"]
    with pytest.raises(ValueError, match="rms_norm: before=True needs a gate"):
        norm("auto", x, before=True)
    with pytest.raises(ValueError, match=r"unit_norm: eps=0\.0 must be above 0"):
        unit_norm(x, eps=0.0)
    for call in (norm, lambda backend, x: unit_norm(x, backend=backend)):
        with pytest.raises(ValueError, match="norm: backend='cuda' is not one of auto"):
            call("cuda", x)

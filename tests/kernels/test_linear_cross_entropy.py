"""Mean cross-entropy of a linear map: backends against each other, parts, silent tokens, bad targets, what is kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_cross_entropy import chunked, triton
from kernels.linear_cross_entropy.ops import linear_cross_entropy

BACKENDS = ("reference", "chunked", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens=20, width=12, vocabulary=30, models=None, silent=0.3):
    """x, weight and targets, of which some are silent and the first is not."""
    lead = () if models is None else (models,)
    targets = torch.randint(vocabulary, (*lead, tokens))
    targets[torch.rand(targets.shape) < silent] = -100
    targets[..., 0] = 0
    x, weight = torch.randn(*lead, tokens, width), torch.randn(*lead, vocabulary, width)
    return x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def derive(x, weight, targets, backend, **options):
    """The loss, and the gradients of its sum over models that weigh differently."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, backend=backend, **options)
    cotangent = torch.arange(1.0, 1 + loss.numel(), device=loss.device).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, cotangent)


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"), [(1, 1, 1), (1, 5, 33), (37, 12, 7), (20, 64, 100)]
)
def test_chunks_equal_steps(agree, tokens, width, vocabulary, models):
    x, weight, targets = (one.cpu() for one in draw(tokens, width, vocabulary, models))
    inputs = {"x": x, "weight": weight}
    agree(
        lambda backend, *own: (linear_cross_entropy(*own, targets, backend=backend),),
        inputs,
        floor=1e-3,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_under_vmap_are_models_in_front(monkeypatch, backend):
    """One product for all, whether they share their targets or not."""
    x, weight, targets = draw(models=3)
    asked = []
    module, name = (triton, "linear_cross_entropy") if backend == "triton" else (chunked, "losses")
    real = getattr(module, name)

    def spy(*tensors):
        asked.append(tensors[0].shape)
        return real(*tensors)

    monkeypatch.setattr(module, name, spy)
    call = partial(linear_cross_entropy, backend=backend)
    for own, at in ((targets, 0), (targets[1], None)):
        losses = torch.func.vmap(call, in_dims=(0, 0, at))(x, weight, own)
        expected = [call(x[m], weight[m], own if at is None else own[m]) for m in range(3)]
        torch.testing.assert_close(losses, torch.stack(expected))
    if backend != "reference":
        assert [shape for shape in asked if len(shape) == 3] == [x.shape] * 2


def test_the_chunk_form_is_what_stored_results_were_made_with():
    x, weight, targets = draw()
    asked = targets != -100
    expected = F.cross_entropy(F.linear(x[asked], weight).float(), targets[asked])
    assert torch.equal(linear_cross_entropy(x, weight, targets, backend="chunked"), expected)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = F.cross_entropy(F.linear(x[asked], weight).float(), targets[asked])
        assert torch.equal(linear_cross_entropy(x, weight, targets, backend="chunked"), expected)


@pytest.mark.parametrize("models", [None, 2])
def test_parts_make_a_whole(near, monkeypatch, models):
    inputs = draw(tokens=150, vocabulary=40, models=models)
    expected = derive(*inputs, "reference")
    whole = derive(*inputs, "triton")
    monkeypatch.setattr(triton, "MOST_LOGITS", 64 * 40)
    monkeypatch.setattr(triton, "STEP", 8)
    parts = derive(*inputs, "triton")
    for actual, other, wanted in zip(parts, whole, expected, strict=True):
        near(actual, wanted)
        near(other, wanted)
    half = [one.half() if one.is_floating_point() else one for one in inputs]
    for actual, wanted in zip(derive(*half, "triton"), derive(*half, "reference"), strict=True):
        near(actual, wanted, 8e-3)


def test_the_logits_are_never_there_at_once(largest_bytes, monkeypatch):
    monkeypatch.setattr(triton, "MOST_LOGITS", 64 * 100)
    inputs = draw(tokens=256, width=8, vocabulary=100)
    assert largest_bytes(lambda: derive(*inputs, "triton")) <= 64 * 100 * 4
    assert largest_bytes(lambda: derive(*inputs, "chunked")) > 64 * 100 * 4


def test_models_side_by_side_are_models_alone(near):
    inputs = draw(models=3)
    for backend in BACKENDS:
        together = derive(*inputs, backend)
        for m in range(3):
            alone = derive(*(one[m] for one in inputs), backend)
            for actual, expected, scale in zip(together, alone, (1, m + 1, m + 1), strict=True):
                near(actual[m], scale * expected, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_tokens_play_no_part(backend):
    x, weight, targets = draw()
    silent = targets == -100
    assert silent.any() and not silent.all()
    loss, d_x, d_weight = derive(x, weight, targets, backend)
    assert d_x[silent].abs().max() == 0 < d_x[~silent].abs().sum(1).min()
    torch.testing.assert_close(
        linear_cross_entropy(x[~silent], weight, targets[~silent], backend=backend), loss
    )
    other = torch.where(silent[:, None], torch.randn_like(x), x)
    again = derive(other, weight, targets, backend)
    assert torch.equal(again[0], loss) and torch.equal(again[2], d_weight)
    named = targets.clamp(max=28)
    expected = linear_cross_entropy(x, weight, named, backend=backend)
    renamed = named.masked_fill(silent, 29)
    assert torch.equal(linear_cross_entropy(x, weight, renamed, ignore_index=29, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_asked_there_is_no_mean(backend):
    x, weight, targets = draw()
    assert linear_cross_entropy(x, weight, targets.fill_(-100), backend=backend).isnan()


@pytest.mark.parametrize("target", [30, 31, -1, 10**9])
def test_a_target_outside_of_the_vocabulary_is_no_number(target):
    x, weight, targets = draw()
    targets[3] = target
    assert linear_cross_entropy(x, weight, targets, backend="triton").isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_loud_and_quiet_logits_stay_finite(near, backend, scale):
    x, weight, targets = draw()
    for actual, expected in zip(
        derive(scale * x, weight, targets, backend),
        derive((scale * x).double(), weight.double(), targets, "reference"),
        strict=True,
    ):
        near(actual, expected)


def test_without_a_gradient_one_product_is_made():
    def flops(gradient, frozen=False):
        x, weight, targets = draw(32, 16, 64)
        x.requires_grad_()
        weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            linear_cross_entropy(x, weight, targets, backend="triton")
        return counter.get_total_flops() / (2 * 32 * 16 * 64)

    assert flops(gradient=False) == 1
    assert flops(gradient=True) == 3
    assert flops(gradient=True, frozen=True) == 2


def test_autocast_chooses_the_type_of_the_products(near):
    x, weight, targets = draw()
    expected = derive(x, weight, targets, "reference")
    with torch.autocast(DEVICE, torch.float16):
        actual = derive(x, weight, targets, "triton")
    plain = derive(x, weight, targets, "triton")
    for one, other, wanted in zip(actual, plain, expected, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        near(one, wanted, 8e-3)


def test_a_loss_may_be_weighed_and_asked_again(near):
    x, weight, targets = draw()
    for leaf in (x, weight):
        leaf.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, backend="triton")
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for actual, expected in zip(torch.autograd.grad(3 * loss, (x, weight)), once, strict=True):
        near(actual, 3 * expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_in_float64(backend):
    x, weight, targets = draw(5, 3, 4)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *own: linear_cross_entropy(*own, targets, backend=backend), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (20,)}, r"x has shape \[20\].*\[N, D\]"),
        ({"x": (0, 12)}, r"x has shape \[0, 12\].*at least 1"),
        ({"weight": (30, 11)}, r"weight has shape \[30, 11\].*\[V, D\] = \[30, 12\]"),
        ({"x": (2, 20, 12)}, r"weight has shape \[30, 12\].*\[M, V, D\]"),
        ({"targets": (19,)}, r"targets has shape \[19\].*\[N\] = \[20\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = dict(zip(("x", "weight", "targets"), draw(), strict=True))
    inputs.update({name: inputs[name].new_zeros(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**inputs)


def test_wrong_settings_are_named():
    x, weight, targets = draw()
    with pytest.raises(ValueError, match=r"targets are torch.int32, but must be int64"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match=r"linear_cross_entropy: backend='cuda' is not one of auto"):
        linear_cross_entropy(x, weight, targets, backend="cuda")

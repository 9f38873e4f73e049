"""Retention, lightning attention, mLSTM and performer: their formulas written out, other implementations, prices."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.cost import layout_cost
from search_space.frame import Frame, Place
from search_space.mixers.lightning import Lightning, LightningMixer
from search_space.mixers.mlstm import MLSTM, MLSTMMixer
from search_space.mixers.performer import BOUND, Performer, PerformerMixer, orthogonal_features
from search_space.mixers.retnet import RetNet, RetNetMixer
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
LENGTH = 75


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def stepped(mixer: Any, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def randomise(module: nn.Module, size: float = 1.0) -> None:
    for weight in module.parameters():
        if weight.dim() >= 2:
            weight.copy_(size * torch.randn_like(weight) / weight.shape[-1] ** 0.5)
        else:
            weight.copy_(1 + 0.3 * torch.randn_like(weight))


def cost_of(text: str, frame: Frame) -> Any:
    return mixer_of(read(text).layers[0].branches[0]).cost(frame)


def imported(model: str, *names: str) -> Any:
    """Parts of one model's module and its configuration, with the warnings of their import kept away."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module(f"transformers.models.{model}.modeling_{model}")
        configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    return [getattr(modelling, name) for name in names[:-1]] + [getattr(configuration, names[-1])]


@pytest.mark.parametrize("exponent", [5, 3, 7])
@pytest.mark.parametrize("rotary", [True, False])
def test_retention_is_its_quadratic_form(small: Frame, rotary: bool, exponent: int, far: Far) -> None:
    spec = RetNet(heads=3, head_dim=16, value_dim=24, rotary=rotary, exponent=exponent)
    mixer = spec.build(small)
    assert isinstance(mixer, RetNetMixer)
    randomise(mixer)
    x = x_of()
    q, k, v = (heads(layer(x), 3) for layer in (mixer.query, mixer.key, mixer.value))
    if rotary:
        # Neighbouring channels are one complex number, and a position is a power of its own turn.
        turn = 10000.0 ** -torch.linspace(0, 1, 8, dtype=torch.float64)
        angle = torch.arange(LENGTH, dtype=torch.float64)[:, None, None] * turn
        q, k = (
            torch.view_as_complex(y.double().unflatten(-1, (8, 2)))
            * torch.polar(torch.ones_like(angle), angle)
            for y in (q, k)
        )
        scores = torch.einsum("bthk,bshk->bhts", q, k.conj()).real.float() / 4
    else:
        scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    gamma = 1 - 2.0 ** -(exponent + torch.arange(3))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    kept = (gamma[:, None, None] ** distance.clamp(min=0)).tril()
    found = torch.einsum("bhts,bshv->bthv", scores * kept, v)
    normed = found / (found.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = mixer.out(normed.flatten(2) * F.silu(mixer.gate(x)))
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(stepped(mixer, x), wanted) < 1e-5


def test_retention_sees_distances_not_positions(small: Frame, far: Far) -> None:
    mixer = RetNet(heads=2).build(small)
    x = x_of()
    state = replace(mixer.start(2, 200), length=100)
    assert far(mixer(x, state)[0], mixer(x)[0]) < 1e-3
    plain = RetNet(heads=2, rotary=False).build(small)
    plain.load_state_dict(mixer.state_dict())
    assert far(plain(x)[0], mixer(x)[0]) > 1e-2


def test_published_retnets_by_hand() -> None:
    # 24 layers of 2048 keys and 32 of 4096, 432 values each, in float32.
    for layers, width, head_count, published in ((24, 2048, 8, 84934656), (32, 4096, 16, 226492416)):
        network = read(f"{layers}*retnet[heads={head_count},head_dim=256,value_dim=432]")
        cost = layout_cost(network, Frame(width=width, context=8192))
        assert cost.stored_bytes == cost.read_bytes == published == layers * width * 432 * 4
    cost = cost_of("retnet", Frame(width=2048))
    assert cost.params == 2048 * 2048 * 2 + 2048 * 4096 * 3
    assert cost.flops_decode == 2 * cost.params + 5 * 8 * 256 * 512
    assert cost.flops_prefill == 2 * cost.params + 8 * (2 * 64 * (256 + 512) + 4 * 256 * 512)


@pytest.mark.parametrize(("index", "depth"), [(0, 8), (3, 8), (7, 8), (0, 1)])
@pytest.mark.filterwarnings("ignore")
def test_lightning_is_minimaxs(index: int, depth: int, far: Far) -> None:
    theirs_class, config_class = imported("minimax", "MiniMaxLightningAttention", "MiniMaxConfig")
    config = config_class(
        hidden_size=64, num_attention_heads=4, head_dim=24, num_hidden_layers=depth, block_size=16
    )
    theirs = theirs_class(config, index).eval()
    randomise(theirs)
    frame = Frame(width=64, context=128, dtype="float32", place=Place(index=index, depth=depth))
    ours = Lightning(heads=4, head_dim=24).build(frame)
    assert isinstance(ours, LightningMixer)
    # Theirs keeps the query, key and value of a head side by side.
    ours.enter.weight.copy_(theirs.qkv_proj.weight.view(4, 3, 24, 64).transpose(0, 1).reshape(288, 64))
    ours.gate.weight.copy_(theirs.output_gate.weight)
    ours.norm_weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)
    x = x_of()
    wanted = theirs(x, None, None)[0]
    assert far(ours(x)[0], wanted) < 1e-5
    assert far(stepped(ours, x), wanted) < 1e-5


def test_lightning_is_its_loop_written_out(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = Lightning(heads=4, head_dim=16, groups=2, rotary=0.5).build(
        replace(small, place=Place(index=2, depth=5))
    )
    assert isinstance(mixer, LightningMixer)
    shake(mixer)
    x = x_of()
    q, k, v = (heads(part, 4) for part in F.silu(mixer.enter(x)).chunk(3, dim=-1))

    def turned(y: Tensor) -> Tensor:
        angle = torch.arange(LENGTH)[:, None] * 1e4 ** (-torch.arange(4) / 4)
        pairs = torch.complex(y[..., :4], y[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag, y[..., 8:]], dim=-1)

    q, k, matrix, rows = turned(q), turned(k), torch.zeros(2, 4, 16, 16), []
    slope = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * (1 - 2 / (4 + 1e-5) + 1e-5)
    for t in range(LENGTH):
        matrix = torch.exp(-slope)[:, None, None] * matrix + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * matrix).sum(2))
    y = torch.stack(rows, dim=1).flatten(2).unflatten(-1, (2, 32))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(2) * mixer.norm_weight
    assert far(mixer(x)[0], mixer.out(y * torch.sigmoid(mixer.gate(x)))) < 1e-5


def test_deeper_layers_forget_more_slowly(small: Frame) -> None:
    assert "depth" in Lightning.needs
    rates = [
        Lightning(heads=4).build(replace(small, place=Place(index=index, depth=4))).log_decay
        for index in range(4)
    ]
    for near, deep in pairwise(rates):
        assert (near < deep).all() and (deep < 0).all()
    cost = cost_of("lightning[heads=64,head_dim=128]", Frame(width=6144))
    # MiniMax-01: 70 such layers keep 293,601,280 bytes.
    assert cost.stored_bytes == 64 * 128 * 128 * 4 == 293601280 // 70
    assert cost.params == 5 * 6144 * 8192 + 8192
    with pytest.raises(ValueError, match="lightning: groups=3 does not divide its 4 heads"):
        Lightning(heads=4, groups=3).sized(small)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.filterwarnings("ignore")
def test_mlstm_is_xlstms_layer(share: float, far: Far) -> None:
    theirs_class, config_class = imported("xlstm", "xLSTMLayer", "xLSTMConfig")
    config = config_class(
        hidden_size=64, num_heads=4, qk_dim_factor=share, mode="inference", autocast_kernel_dtype="float32"
    )
    theirs = theirs_class(config).eval()
    randomise(theirs)
    # Gates that open and close, so that the running maximum moves.
    for layer in (theirs.igate_preact, theirs.fgate_preact):
        layer.weight.mul_(2)
    ours = MLSTM(heads=4, head_dim=16, key_share=share).build(Frame(width=64, context=128, dtype="float32"))
    assert isinstance(ours, MLSTMMixer)
    names = {"query": "q", "key": "k", "value": "v", "gate": "ogate_preact", "out": "out_proj"}
    for own, other in (names | {"write": "igate_preact", "keep": "fgate_preact"}).items():
        getattr(ours, own).load_state_dict(getattr(theirs, other).state_dict())
    ours.norm_weight.copy_(theirs.multihead_norm.weight)
    x = x_of()
    wanted = theirs(x)[0]
    assert far(ours(x)[0], wanted) < 1e-5
    assert far(stepped(ours, x), wanted) < 1e-5


def mlstm_written_out(mixer: MLSTMMixer, x: Tensor) -> Tensor:
    """Every weight exp(F_t − F_s + i_s) in float64 and without a maximum: the gates are capped, so nothing overflows."""
    q, k, v = (heads(layer(x), mixer.heads).double() for layer in (mixer.query, mixer.key, mixer.value))
    write, keep = (15 * torch.tanh(layer(x) / 15).double() for layer in (mixer.write, mixer.keep))
    total = F.logsigmoid(keep).cumsum(1).mT
    exponent = total[..., None] - total[:, :, None] + write.mT[:, :, None]
    weight = exponent.masked_fill(
        ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf
    ).exp()
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5 * weight
    found = torch.einsum("bhts,bshv->bthv", scores, v) / scores.sum(-1).abs().clamp(min=1).mT[..., None]
    normed = (found - found.mean(-1, keepdim=True)) / (
        found.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    y = normed.float().flatten(2) * mixer.norm_weight
    return mixer.out(y * torch.sigmoid(mixer.gate(x)))


@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_the_maximum_of_the_mlstm_changes_nothing(small: Frame, strength: float, far: Far) -> None:
    mixer = MLSTM(heads=4, head_dim=16).build(small)
    assert isinstance(mixer, MLSTMMixer)
    for layer in (mixer.write, mixer.keep):
        layer.weight.normal_(std=strength / 8)
        layer.bias.normal_(std=strength / 4)
    x = x_of()
    assert far(mixer(x)[0], mlstm_written_out(mixer, x)) < 1e-4
    assert far(stepped(mixer, x), mlstm_written_out(mixer, x)) < 1e-4


def test_the_mlstms_gradient_is_that_of_its_formula(small: Frame, far: Far) -> None:
    mixer = MLSTM(heads=2, head_dim=32).build(small)
    assert isinstance(mixer, MLSTMMixer)
    for layer in (mixer.write, mixer.keep):
        layer.weight.normal_(std=0.3)
    x, cotangent = x_of(length=40), torch.randn(2, 40, 64)
    with torch.enable_grad():
        weights = list(mixer.parameters())
        found = torch.autograd.grad((mixer(x)[0] * cotangent).sum(), weights)
        wanted = torch.autograd.grad((mlstm_written_out(mixer, x) * cotangent).sum(), weights)
    for a, b in zip(found, wanted, strict=True):
        assert far(a, b) < 1e-3


def test_mlstm_by_hand() -> None:
    # xLSTM 7B: 4096 wide, 8 heads of 256 keys and 512 values.
    cost = cost_of("mlstm", Frame(width=4096, context=9))
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "sums": 8 * 256 * 513 * 4,
        "peak": 8 * 4,
    }
    assert cost.params == 4096 * (2 * 2048 + 3 * 4096 + 16) + 16 + 4096


def softmax_attention(mixer: PerformerMixer, x: Tensor) -> Tensor:
    """What a performer estimates: scores c · cos(q, k), in float64."""
    q, k, v = (heads(layer(x), mixer.heads).double() for layer in (mixer.query, mixer.key, mixer.value))
    scale = BOUND * torch.sigmoid(mixer.sharpness.double())
    scores = torch.einsum("bthk,bshk->bhts", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    scores = scores * scale[:, None, None]
    masked = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("bhts,bshk->bthk", masked.softmax(-1), v).flatten(2)


def performer(features: int, frame: Frame, sharpness: float = 0.0) -> PerformerMixer:
    torch.manual_seed(3)
    mixer = Performer(heads=4, head_dim=16, features=features).build(frame)
    assert isinstance(mixer, PerformerMixer)
    assert mixer.sharpness is not None
    mixer.sharpness.fill_(sharpness)
    mixer.out.weight.copy_(torch.eye(64))
    return mixer


def test_more_features_come_nearer_to_softmax_by_the_root_of_their_number(small: Frame) -> None:
    x = x_of()
    errors = {}
    for features in (64, 1024, 16384):
        mixer = performer(features, small, sharpness=-2.0)
        wanted = softmax_attention(mixer, x)
        errors[features] = ((mixer(x)[0] - wanted).norm() / wanted.norm()).item()
    # A floor that no number of features goes below would show in the last.
    assert 2.5 < errors[64] / errors[1024] < 6.5
    assert 2.5 < errors[1024] / errors[16384] < 6.5
    assert errors[16384] < 0.02


def test_features_are_unbiased_because_the_basis_is_uniform() -> None:
    direction = 0.5 * torch.ones(8)

    def mean(draw: Callable[[], Tensor]) -> tuple[float, float]:
        """Of exp(w·x − x²/2), which is one for a Gaussian w, and the error of that mean."""
        values = torch.stack(
            [(draw() @ direction - direction.square().sum() / 2).exp().mean() for _ in range(3000)]
        )
        return values.mean().item(), (values.std() / 3000**0.5).item()

    found, error = mean(lambda: orthogonal_features(8, 8))
    assert abs(found - 1) < 4 * error

    def without_signs() -> Tensor:
        return torch.linalg.qr(torch.randn(8, 8)).Q.mT * torch.randn(8, 8).norm(dim=-1, keepdim=True)

    found, error = mean(without_signs)
    assert abs(found - 1) > 4 * error


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones() -> None:
    rows = orthogonal_features(20, 8)
    assert rows.shape == (20, 8)
    for block in (rows[:8], rows[8:16], rows[16:]):
        product = F.normalize(block) @ F.normalize(block).mT
        torch.testing.assert_close(product, torch.eye(len(block)), rtol=0, atol=1e-5)
    assert orthogonal_features(4096, 8).square().sum(-1).mean().item() == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("sharpness", [-3.0, 0.0, 9.0])
def test_the_running_maximum_changes_nothing(small: Frame, sharpness: float, far: Far) -> None:
    mixer = performer(64, small, sharpness)
    x = x_of()
    q, k, v = (heads(layer(x), 4).double() for layer in (mixer.query, mixer.key, mixer.value))
    scale = (BOUND * torch.sigmoid(mixer.sharpness.double())).sqrt()[:, None]
    # No maximum, no constant for stability: float64 holds these exponentials.
    q, k = (
        (F.normalize(y, dim=-1) * scale @ mixer.directions.double().mT - scale.square() / 2).exp()
        for y in (q, k)
    )
    weights = torch.einsum("bthm,bshm->bhts", q, k).tril()
    wanted = torch.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4


def test_the_rectified_kernel_written_out(small: Frame, far: Far) -> None:
    mixer = Performer(heads=4, head_dim=16, features=64, kernel="relu").build(small)
    assert isinstance(mixer, PerformerMixer)
    x = x_of()
    q, k, v = (heads(layer(x), 4) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = F.relu(q @ mixer.directions.mT), F.relu(k @ mixer.directions.mT)
    weights = torch.einsum("bthm,bshm->bhts", q, k).tril()
    found = torch.einsum("bhts,bshk->bthk", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    assert far(mixer(x)[0], mixer.out(found.flatten(2))) < 1e-4


def test_features_are_drawn_anew_when_asked_for(small: Frame) -> None:
    for redraw, at in ((0, None), (1000, 1000)):
        mixer = Performer(redraw=redraw).build(small)
        first = mixer.directions.clone()
        assert "directions" in mixer.state_dict()
        changes = []
        for number in range(1, 1003):
            mixer.after_step()
            if not torch.equal(first, mixer.directions):
                changes.append(number)
                first = mixer.directions.clone()
        assert changes == ([at] if at else [])


def test_performer_by_hand() -> None:
    cost = cost_of("performer[heads=8,head_dim=64,features=256]", Frame(width=512))
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "sums": 8 * 256 * 65 * 4,
        "peak": 8 * 4,
    }
    assert cost.params == 4 * 512 * 512 + 8
    assert cost.flops_decode == 2 * 4 * 512 * 512 + 4 * 8 * 256 * 64 + 4 * 8 * 256 * 65
    assert Performer(head_dim=64).sized(Frame(width=512)).features == 8 * round(64 * math.log(64) / 8)
    plain = cost_of("performer[heads=8,head_dim=64,features=256,kernel=relu]", Frame(width=512))
    assert [tensor.name for tensor in plain.cache] == ["sums"] and plain.params == 4 * 512 * 512

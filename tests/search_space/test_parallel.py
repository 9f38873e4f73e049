"""Mixers side by side: how their outputs become one, what shares of the width mean, what joining costs, Falcon-H1's layer."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.cost import build_mixer, layer_cost
from search_space.frame import Frame
from search_space.layout import JOINS, Branch, Layer
from search_space.notation import LayoutError
from search_space.parallel import Parallel
from search_space.vocabulary import VOCABULARY, branch_frames, check, mixer_of, plain, read, shrink_layout

Far = Callable[[Tensor, Tensor], float]
BRANCHES = "window[size=8]|mamba2"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def built(text: str, frame: Frame, shake: Callable[[nn.Module], None]) -> Parallel:
    made = build_mixer(read(f"{text}/none").layers[0], frame)
    assert isinstance(made, Parallel)
    shake(made)
    return made


def normed(y: Tensor, norm: Any) -> Tensor:
    result: Tensor = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    return result


def test_a_sum_has_a_factor_for_each_and_leaves_one_alone(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    both = built(f"{BRANCHES}&sum", small, shake)
    one, two = both.branches
    x = torch.randn(2, 33, 64)
    factors = both.factors
    assert factors is not None and both.norms is None
    assert far(both(x)[0], factors[0] * one(x)[0] + factors[1] * two(x)[0]) < 1e-6
    factors.copy_(torch.tensor([1.0, 0.0]))
    assert far(both(x)[0], one(x)[0]) < 1e-6


def test_a_gate_starts_as_the_mean_and_chooses_by_token(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    gated = built(f"{BRANCHES}&gate", small, shake)
    mean = built(BRANCHES, small, shake)
    assert gated.choose is not None
    missing = mean.load_state_dict(gated.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys == ["choose.weight"]
    x = torch.randn(2, 33, 64)
    assert far(gated(x)[0], mean(x)[0]) < 1e-6
    gated.choose.weight.copy_(torch.randn(2, 64))
    scores = x @ gated.choose.weight.T
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert gated.norms is not None
    parts = [normed(branch(x)[0], norm) for branch, norm in zip(gated.branches, gated.norms, strict=True)]
    assert far(gated(x)[0], weights[..., :1] * parts[0] + weights[..., 1:] * parts[1]) < 1e-5


@pytest.mark.parametrize("join", JOINS)
def test_shares_deal_out_one_projection_and_gather_in_another(
    join: str, small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    both = built(f"window[size=8]@1|mamba2@3&{join}", small, shake)
    assert both.widths == (16, 48) and both.enter is not None and both.leave is not None
    x = torch.randn(2, 33, 64)
    dealt = x @ both.enter.weight.T
    outputs = [
        branch(part)[0]
        for branch, part in zip(both.branches, (dealt[..., :16], dealt[..., 16:]), strict=True)
    ]
    if both.norms is not None:
        outputs = [normed(y, norm) for y, norm in zip(outputs, both.norms, strict=True)]
    if both.factors is not None:
        outputs = [y * factor for y, factor in zip(outputs, both.factors, strict=True)]
    assert far(both(x)[0], torch.cat(outputs, dim=-1) @ both.leave.weight.T) < 1e-5


@pytest.mark.parametrize(
    ("shares", "width", "widths"),
    [
        ((1, 1), 64, (32, 32)),
        ((1, 3), 64, (16, 48)),
        ((1, 3), 16, (8, 8)),
        ((1, 4), 2048, (408, 1640)),
        ((64, 1, 1), 32, (16, 8, 8)),
        ((1, 1, 1), 64, (24, 24, 16)),
        ((64, 1), 32, (24, 8)),
    ],
)
def test_shares_add_up_to_the_width(shares: tuple[int, ...], width: int, widths: tuple[int, ...]) -> None:
    layer = Layer(tuple(Branch("full", share=share) for share in shares))
    assert tuple(own.width for own in branch_frames(layer, Frame(width=width))) == widths
    assert sum(widths) == width


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="width 8 cannot be shared by 2 mixers: each has at least 8"):
        check(read("full@1|mamba2@1"), Frame(width=8))
    with pytest.raises(ValueError, match="rwkv7 reads a value as wide as the network"):
        check(read("full@1|rwkv7@1"), Frame(width=64))
    check(read("full|rwkv7"), Frame(width=64))


@pytest.mark.parametrize("name", [name for name, spec in VOCABULARY.items() if "width" not in spec.needs])
@pytest.mark.parametrize("width", [16, 64])
def test_every_word_takes_a_share(name: str, width: int) -> None:
    frame = Frame(width=width, train_length=32, context=32, dtype="float32")
    layer = read(f"{name}@1|full@1&gate/none").layers[0]
    made = build_mixer(layer, frame)
    # The layer's own norm stands before the mixers.
    assert sum(weight.numel() for weight in made.parameters()) == layer_cost(layer, frame).params - width
    y, _ = made(torch.randn(2, 9, width))
    assert y.shape == (2, 9, width) and y.isfinite().all()


@pytest.mark.parametrize(
    ("text", "weights", "gains"),
    [
        ("window|mamba2/none", 0, 2 * 512),
        ("window|mamba2&sum/none", 0, 2),
        ("window|mamba2&gate/none", 2 * 512, 2 * 512),
        ("window@1|mamba2@3/none", 2 * 512 * 512, 512),
        ("window@1|mamba2@3&sum/none", 2 * 512 * 512, 2),
        ("window@1|mamba2@3&gate/none", 2 * 512 * 512 + 2 * 512, 512),
    ],
)
def test_joining_has_its_price(text: str, weights: int, gains: int) -> None:
    frame = Frame(width=512, context=1000)
    layer = read(text).layers[0]
    own = [
        mixer_of(branch).cost(inside)
        for branch, inside in zip(layer.branches, branch_frames(layer, frame), strict=True)
    ]
    price = layer_cost(layer, frame)
    assert price.params == sum(cost.params for cost in own) + weights + gains + 512
    assert price.flops_decode == pytest.approx(sum(cost.flops_decode for cost in own) + 2 * weights)
    assert price.flops_prefill == pytest.approx(sum(cost.flops_prefill for cost in own) + 2 * weights)
    assert price.stored_bytes == sum(cost.stored_bytes for cost in own)


def test_a_share_halves_the_cache_that_a_whole_mixer_keeps() -> None:
    frame = Frame(width=2048, context=32768)
    whole = layer_cost(read("full|mamba2").layers[0], frame)
    shared = layer_cost(read("full@1|mamba2@1").layers[0], frame)
    assert shared.cache[0].stored_bytes * 2 == whole.cache[0].stored_bytes
    assert shared.params < whole.params


def test_equal_shares_have_one_text() -> None:
    assert str(read("full@2|kda@6")) == "full@1|kda@3"
    assert str(read("2*( full @ 4 | kda @ 4 & sum / none )")) == "2*full@1|kda@1&sum/none"
    assert str(read("full|kda&mean")) == "full|kda"
    assert read("full@1|kda@1") != read("full|kda")


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("kda full@1", 4, "stands alone"),
        ("full&sum", 0, "stands alone"),
        ("full@1|mla", 0, "a share is given to some of the mixers only"),
        ("full|mla&some", 9, 'no join "some"'),
        ("full@0|mla@1", 5, "expected a share from 1 to 64"),
        ("full@65|mla@1", 5, "expected a share from 1 to 64"),
        ("full@1234|mla@1", 5, "expected a share from 1 to 64"),
        ("full|mla&", 9, "expected a join"),
    ],
)
def test_wrong_joins_are_pointed_at(text: str, position: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message) as caught:
        read(text)
    assert caught.value.position == position


def test_shares_and_joins_stay_when_a_layout_is_made_plain_or_smaller() -> None:
    target, proxy = Frame(width=2048, train_length=4096), Frame(width=64, train_length=64)
    layout = read("full@1|mamba2[state=128]@3&gate kda")
    text = str(shrink_layout(layout, target, proxy))
    assert text.startswith("full") and "@1|mamba2" in text and "@3&gate kda" in text
    # What the frame of its own width chooses anyway is not written.
    inside = branch_frames(layout.layers[0], target)[0]
    heads = mixer_of(Branch("full")).sized(inside)
    written = read(f"full[head_dim={heads.head_dim}]@1|mamba2@3")  # type: ignore[attr-defined]
    assert str(plain(written, target)) == "full@1|mamba2@3"


def test_falcon_h1_adds_attention_and_mamba_2_each_by_a_factor(far: Far) -> None:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module("transformers.models.falcon_h1.modeling_falcon_h1")
    config = modelling.FalconH1Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        mamba_d_ssm=96,
        mamba_n_heads=6,
        mamba_d_state=16,
        mamba_chunk_size=16,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        attention_out_multiplier=0.7,
        ssm_out_multiplier=1.6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        attn_implementation="eager",
    )
    theirs = modelling.FalconH1DecoderLayer(config, 0)
    theirs.mamba.mup_vector = modelling.compute_mup_vector(config)
    frame = Frame(width=64, train_length=128, context=128, dtype="float32", rotary_base=5e4)
    ours: Any = build_mixer(
        read("full[heads=4,kv_heads=2]|mamba2[state=16,heads=6,head_dim=16]&sum").layers[0], frame
    )
    attention, scan = ours.branches
    for weight in theirs.parameters():
        weight.copy_(
            torch.randn_like(weight) / weight[0].numel() ** 0.5
            if weight.dim() > 1
            else 1 + 0.3 * torch.randn_like(weight)
        )
    # Their channel mixer adds nothing, so that the layer is its input and what the mixers add.
    theirs.feed_forward.down_proj.weight.zero_()
    for own, other in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        getattr(attention, own).weight.copy_(getattr(theirs.self_attn, other).weight)
    scan.enter.weight.copy_(theirs.mamba.in_proj.weight)
    scan.taps.copy_(theirs.mamba.conv1d.weight[:, 0])
    scan.taps_bias.copy_(theirs.mamba.conv1d.bias)
    scan.log_rate.copy_(theirs.mamba.A_log)
    scan.step_bias.copy_(theirs.mamba.dt_bias)
    scan.skip.copy_(theirs.mamba.D)
    scan.norm_weight.copy_(theirs.mamba.norm.weight)
    scan.out.weight.copy_(theirs.mamba.out_proj.weight)
    ours.factors.copy_(torch.tensor([0.7, 1.6]))
    x = torch.randn(2, 75, 64)
    turns = modelling.FalconH1RotaryEmbedding(config)(x, torch.arange(75)[None])
    seen = torch.ones(75, 75, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 75, 75).masked_fill(~seen, float("-inf"))
    wanted = theirs(x, attention_mask=mask, position_embeddings=turns)[0] - x
    inside = F.rms_norm(x, (64,), theirs.input_layernorm.weight, config.rms_norm_eps)
    assert far(ours(inside)[0], wanted) < 1e-5
    state, rows = ours.start(2, 75), []
    for t in range(75):
        y, state = ours.step(inside[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), wanted) < 1e-5


def test_unequal_frames_still_know_their_place() -> None:
    frame = replace(Frame(width=64), context=77)
    assert [own.context for own in branch_frames(read("full@1|mla@3").layers[0], frame)] == [77, 77]

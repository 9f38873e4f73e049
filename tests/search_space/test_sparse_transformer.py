"""The Sparse Transformer's patterns: what each token sees, in two hops all, what they equal, and what a step reads."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame, Place
from search_space.grouped import dense, every, together
from search_space.mixers.fixed import Fixed
from search_space.mixers.full import Full
from search_space.mixers.strided import Strided, StridedMixer
from search_space.spec import shrink

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
LENGTH = 75
EVEN, ODD = Place(index=2, depth=5), Place(index=3, depth=5)
MODES = ("union", "layer", "head")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def patterns(spec: Strided | Fixed, length: int, kind: str) -> Tensor:
    """The definition [T, T]: of Child et al., section 4.2, with self among the tokens at hand."""
    assert spec.stride
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    if isinstance(spec, Strided):
        near, far = t - s < spec.stride, (t - s) % spec.stride == 0
    else:
        assert spec.summary
        near = s // spec.stride == t // spec.stride
        far = s % spec.stride >= spec.stride - spec.summary
        if kind == "both":
            # In one softmax with the own block, summaries of earlier blocks; the own one's are in the block.
            far = far & (s // spec.stride < t // spec.stride)
    return (s <= t) & {"near": near, "far": far, "both": near | far}[kind]


def shares(seen: Tensor) -> Tensor:
    """Equal weights over what is seen; nought where that is nothing."""
    return seen / seen.sum(1, keepdim=True).clamp(min=1)


SPECS: list[Strided | Fixed] = [
    Strided(stride=4),
    Strided(stride=12),
    Strided(stride=48),
    Fixed(stride=12, summary=8),
    Fixed(stride=8, summary=4),
    Fixed(stride=8, summary=8),
    Fixed(stride=20, summary=4),
]


@pytest.mark.parametrize(
    ("mode", "place", "heads", "head", "kind"),
    [
        ("union", ODD, 2, 1, "both"),
        ("layer", EVEN, 2, 1, "near"),
        ("layer", ODD, 2, 1, "far"),
        ("head", ODD, 3, 0, "near"),
        ("head", ODD, 3, 1, "near"),
        ("head", EVEN, 3, 2, "far"),
        ("head", EVEN, 1, 0, "both"),
    ],
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_head_sees_its_pattern(
    spec: Any, mode: str, place: Place, heads: int, head: int, kind: str, weights_of: Callable[..., Tensor]
) -> None:
    for length in (1, 5, 16, 41):
        weights = weights_of(replace(spec, mode=mode, heads=heads), length, head=head, place=place)
        torch.testing.assert_close(weights, shares(patterns(spec, length, kind)))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != Fixed(stride=8, summary=8)], ids=str)
def test_two_hops_reach_all_of_the_past(spec: Any, weights_of: Callable[..., Tensor]) -> None:
    """One layer at hand and one afar, in both orders where the pattern says so, as the mixers themselves show it."""
    length = 60
    near = (weights_of(replace(spec, mode="layer", heads=1), length, place=EVEN) > 0).float()
    far = (weights_of(replace(spec, mode="layer", heads=1), length, place=ODD) > 0).float()
    if isinstance(spec, Fixed):
        # Of the own block the summary may be yet to come: there the block itself is the first hop.
        far += torch.eye(length)
    triangle = torch.ones(length, length).tril() > 0
    assert torch.equal((near @ far > 0) if isinstance(spec, Strided) else (far @ near > 0), triangle)
    assert not torch.equal(near > 0, triangle) and not torch.equal(far > 0, triangle)
    if isinstance(spec, Strided):
        assert spec.stride
        t, s = torch.arange(length)[:, None], torch.arange(length)[None]
        shorter = near * (t - s < spec.stride - 1)
        assert not torch.equal(shorter @ far > 0, triangle)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("spec", "place"),
    [
        (Strided(stride=76), EVEN),
        (Strided(stride=200, mode="layer"), EVEN),
        (Fixed(stride=76, summary=4), EVEN),
        (Fixed(stride=200, summary=32, mode="layer"), EVEN),
        (Fixed(stride=4, summary=4), ODD),
        (Fixed(stride=16, summary=16, mode="layer"), ODD),
    ],
    ids=str,
)
def test_strides_as_long_as_the_text_or_whole_summaries_are_full_attention(
    spec: Any, place: Place, kv_heads: int, far: Far
) -> None:
    sizes = {"heads": 4, "kv_heads": kv_heads, "qk_norm": True, "rotary": 0.5}
    full, mixer = Full(**sizes).build(FRAME), replace(spec, **sizes).build(replace(FRAME, place=place))
    mixer.load_state_dict({f"attention.{name}": weight for name, weight in full.state_dict().items()})
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


def test_a_stride_of_one_is_full_attention(far: Far) -> None:
    """No spec may say so, but the distant half of the mixer can."""
    full = Full(heads=4).build(FRAME)
    mixer = Strided(stride=4, mode="layer", heads=4).build(replace(FRAME, place=ODD))
    assert isinstance(mixer, StridedMixer)
    mixer.load_state_dict({f"attention.{name}": weight for name, weight in full.state_dict().items()})
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], full(x)[0]) > 1e-2
    mixer.stride = 1
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


def test_taking_apart_and_putting_together() -> None:
    x = torch.arange(11.0).view(1, 11, 1, 1) + 7
    rows = every(x, 4, 7)
    assert rows.shape == (4, 4, 1, 1)
    assert rows[3, :, 0, 0].tolist() == [7, 11, 15, 0] and rows[2, :, 0, 0].tolist() == [0, 10, 14, 0]
    assert torch.equal(together(rows, 4, 7, 11), x)
    assert torch.equal(dense(x, x, x, first=0)[0], dense(x, x, x, first=0, positions=torch.arange(11))[0])


@pytest.mark.parametrize("spec", [Strided(stride=12), Fixed(stride=12, summary=4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_they_are_attention_over_their_patterns(spec: Any, mode: str, kv_heads: int, far: Far) -> None:
    """With real scores, through the mixer's own projections, one key head after another."""
    frame = replace(FRAME, place=ODD)
    mixer = replace(spec, mode=mode, heads=4, kv_heads=kv_heads).build(frame)
    kinds = {"union": ["both"] * kv_heads, "layer": ["far"] * kv_heads}.get(mode)
    kinds = kinds or (["near", "far"] if kv_heads == 2 else ["near", "near", "far", "far"][:kv_heads])
    kinds = ["both"] if kv_heads == 1 and mode == "head" else kinds
    seen = torch.stack([patterns(spec, LENGTH, kind) for kind in kinds]).repeat_interleave(4 // kv_heads, 0)
    x = torch.randn(2, LENGTH, 64)
    q, k, v = mixer.attention(x, 0)
    k, v = (y.repeat_interleave(4 // kv_heads, dim=2) for y in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(16)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = mixer.attention.finish(torch.einsum("bhts,bshv->bthv", weights, v), x)
    assert far(mixer(x)[0], expected) < 1e-5


@pytest.mark.parametrize("place", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("spec", [Strided(stride=8), Fixed(stride=8, summary=4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_any_cut_is_the_same_in_every_layer(spec: Any, mode: str, place: Place, far: Far) -> None:
    """The promises look at the first layer alone."""
    mixer = replace(spec, mode=mode, heads=4).build(replace(FRAME, place=place))
    x = torch.randn(2, 43, 64)
    whole, _ = mixer(x)
    for cut in (1, 4, 7, 8, 9, 15, 16, 30):
        first, state = mixer(x[:, :cut], mixer.start(2, 43))
        middle, state = mixer(x[:, cut : cut + 5], state)
        parts = [first, middle]
        for t in range(cut + 5, 43):
            y, state = mixer.step(x[:, t], state)
            parts.append(y[:, None])
        assert far(torch.cat(parts, dim=1), whole) < 1e-4
    mixer = replace(spec, mode=mode, heads=4).build(replace(FRAME, place=place))
    with pytest.raises(ValueError, match="larger max_len"):
        mixer(x, mixer.start(2, 6))


@pytest.mark.parametrize("place", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [2, 8, 9, 12, 33, 75])
def test_a_step_of_strided_reads_what_is_charged(
    context: int, mode: str, place: Place, bytes_touched: Callable[..., int]
) -> None:
    frame = replace(FRAME, context=context, batch=2, place=place)
    spec = Strided(stride=8, mode=mode, heads=4)
    assert bytes_touched(spec, frame) == spec.cost(frame).read_bytes


@pytest.mark.parametrize("place", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [2, 8, 9, 12, 33, 75])
def test_a_step_of_fixed_reads_what_is_charged(
    context: int, mode: str, place: Place, bytes_touched: Callable[..., int]
) -> None:
    """And, where its token belongs to a summary that only later ones read, the row that it writes."""
    frame = replace(FRAME, context=context, batch=2, place=place)
    spec = Fixed(stride=8, summary=4, mode=mode, heads=4)
    unread = mode == "union" and (context - 1) % 8 >= 4
    if mode == "layer" and place == ODD and context < 5:
        assert spec.cost(frame).read_bytes == 0
        return
    written = 2 * 2 * 64 * 4 if unread else 0
    assert bytes_touched(spec, frame) == spec.cost(frame).read_bytes + written


def seen_on_average(spec: Any, length: int, kinds: list[str]) -> float:
    return sum(float(patterns(spec, length, kind).sum()) for kind in kinds) / len(kinds) / length


@pytest.mark.parametrize(
    ("mode", "place", "kinds"),
    [
        ("union", EVEN, ["both"]),
        ("layer", EVEN, ["near"]),
        ("layer", ODD, ["far"]),
        ("head", EVEN, ["near", "far"]),
    ],
)
@pytest.mark.parametrize("spec", [Strided(stride=8), Fixed(stride=8, summary=4)], ids=str)
def test_prices_follow_the_patterns(spec: Any, mode: str, place: Place, kinds: list[str]) -> None:
    for length in (1, 3, 7, 8, 9, 61, 64, 70):
        frame = replace(FRAME, context=length, place=place)
        cost = replace(spec, mode=mode, heads=4).cost(frame)
        attended = seen_on_average(spec, length, kinds)
        assert cost.flops_prefill == pytest.approx(2 * 4 * 64 * 64 + 2 * 4 * 32 * attended, rel=1e-6)
        last = sum(float(patterns(spec, length, kind)[-1].sum()) for kind in kinds) / len(kinds)
        assert cost.flops_decode == pytest.approx(2 * 4 * 64 * 64 + 2 * 4 * 32 * last)
        assert cost.read_bytes == pytest.approx(2 * 4 * 16 * 4 * last)


def test_stored_bytes_by_hand() -> None:
    """16 heads of 128 at 32,768 tokens, strides of 128, summaries of 8."""
    frame = Frame(width=2048, context=32768)
    one = 2 * 16 * 128 * 2

    def stored(spec: Any, place: Place = EVEN) -> int:
        return int(spec.cost(replace(frame, place=place)).stored_bytes)

    assert stored(Strided(stride=128)) == one * 32768
    assert stored(Strided(stride=128, mode="layer")) == one * 128
    assert stored(Strided(stride=128, mode="layer"), ODD) == one * 32768
    assert stored(Strided(stride=128, mode="head")) == one * (32768 + 128) // 2
    assert stored(Fixed(stride=128, summary=8)) == one * (128 + 256 * 8)
    assert stored(Fixed(stride=128, summary=8, mode="layer")) == one * 128
    assert stored(Fixed(stride=128, summary=8, mode="layer"), ODD) == one * 256 * 8
    assert stored(Fixed(stride=128, summary=8, mode="head")) == one * (128 + 256 * 8) // 2
    assert Strided(stride=128).cost(frame).read_bytes == one * (128 + 255)
    assert Fixed(stride=128, summary=8).cost(frame).read_bytes == one * (128 + 255 * 8)


def test_sizes_that_do_not_fit_are_named_and_shrinking_keeps_them_fitting() -> None:
    with pytest.raises(ValueError, match="summary=16 is more than a block of stride=8"):
        Fixed(stride=8, summary=16).sized(FRAME)
    target = Frame(width=1024, train_length=4096)
    for stride, summary in ((32, 32), (128, 8), (512, 4), (4096, 4096), (4096, 4000)):
        for train in (4, 20, 32, 64):
            proxy = replace(FRAME, train_length=train)
            small = shrink(Fixed(stride=stride, summary=summary), target, proxy).sized(proxy)
            assert small.stride and small.summary and 4 <= small.summary <= small.stride


def test_settings_change_what_is_read(far: Far) -> None:
    x = torch.randn(1, LENGTH, 64)
    for base, changes in (
        (Strided(stride=8, heads=4), [{"stride": 12}, {"mode": "layer"}, {"mode": "head"}]),
        (
            Fixed(stride=8, summary=4, heads=4),
            [{"stride": 12}, {"summary": 8}, {"mode": "layer"}, {"mode": "head"}],
        ),
    ):
        made = base.build(FRAME)
        for change in (*changes, {"rotary": 0.5}):
            other = replace(base, **change).build(FRAME)
            other.load_state_dict(made.state_dict())
            assert far(other(x)[0], made(x)[0]) > 1e-3, change

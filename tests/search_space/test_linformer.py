"""Linformer in causal blocks: its formula written out, what it equals, both sides of a block's edge, and its price."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.linformer import Linformer, LinformerMixer
from search_space.spec import shrink

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
LENGTH = 75


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(spec: Linformer, frame: Frame = FRAME, noise: float = 0.0) -> LinformerMixer:
    mixer = spec.build(frame)
    assert isinstance(mixer, LinformerMixer)
    mixer.squeeze += noise * torch.randn_like(mixer.squeeze)
    return mixer


def turned(x: Tensor, position: int) -> Tensor:
    """x [B, N, K] by the rotary formula, in float64: pair i turns by position · 10000^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def by_hand(mixer: LinformerMixer, x: Tensor, block: int, *, rotary: bool, bonus: float = 0.0) -> Tensor:
    """One token after another, from the layer's matrices alone."""
    own = {name.removeprefix("attention."): weight.double() for name, weight in mixer.named_parameters()}
    size, squeeze, outputs = mixer.attention.head_dim, own["squeeze"], []
    q, k, v = (
        (x.double() @ own[f"{name}.weight"].T).unflatten(-1, (-1, size)) for name in ("query", "key", "value")
    )
    heads, groups = q.shape[2], k.shape[2]
    for t in range(x.shape[1]):
        read = []
        for head in range(heads):
            group = head * groups // heads
            keys, values, extra = [], [], []
            for number in range(t // block):
                inside = slice(number * block, (number + 1) * block)
                matrix = squeeze[:, group % squeeze.shape[1]]
                slots = matrix[0] @ k[:, inside, group]
                keys.append(turned(slots, (number + 1) * block - 1) if rotary else slots)
                values.append(matrix[-1] @ v[:, inside, group])
                extra += [bonus] * slots.shape[1]
            for s in range(t // block * block, t + 1):
                one = k[:, s : s + 1, group]
                keys.append(turned(one, s) if rotary else one)
                values.append(v[:, s : s + 1, group])
                extra.append(0.0)
            query = q[:, t : t + 1, head]
            query = turned(query, t) if rotary else query
            scores = query @ torch.cat(keys, dim=1).mT / math.sqrt(size) + torch.tensor(extra)
            read.append(scores.softmax(-1) @ torch.cat(values, dim=1))
        outputs.append(torch.cat(read, dim=-1) @ own["out.weight"].T)
    return torch.cat(outputs, dim=1).float()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "spec",
    [
        Linformer(block=8, slots=0.5),
        Linformer(block=8, slots=0.25, rotary=0.0),
        Linformer(block=20, slots=0.125, shared=False, rotary=0.0),
        Linformer(block=12, slots=0.25, per_head=True),
        Linformer(block=12, slots=0.5, per_head=True, shared=False, counted=True),
        Linformer(block=4, slots=1.0, counted=True),
        Linformer(block=40, slots=0.125, counted=True, rotary=0.0),
    ],
    ids=str,
)
def test_the_formula_written_out(spec: Linformer, kv_heads: int, far: Far) -> None:
    assert spec.block
    mixer = build(replace(spec, heads=4, kv_heads=kv_heads), noise=0.3)
    bonus = math.log(spec.block / spec.each()) if spec.counted else 0.0
    for length in (1, spec.block - 1, spec.block, spec.block + 1, 45):
        x = torch.randn(2, length, 64)
        assert far(mixer(x)[0], by_hand(mixer, x, spec.block, rotary=spec.rotary > 0, bonus=bonus)) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("change", [{}, {"shared": False}, {"per_head": True}, {"counted": True}], ids=str)
def test_as_many_slots_as_tokens_are_full_attention(change: dict[str, Any], kv_heads: int, far: Far) -> None:
    """Where positions are none: the matrix is the identity at first, and any order of the slots does as well."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": kv_heads, "qk_norm": True, "rotary": 0.0}
    full = Full(**sizes).build(FRAME)
    mixer = build(Linformer(block=8, slots=1.0, **sizes, **change))
    assert torch.equal(mixer.squeeze, torch.eye(8).expand_as(mixer.squeeze))
    mixer.load_state_dict({f"attention.{name}": w for name, w in full.state_dict().items()}, strict=False)
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], full(x)[0]) < 1e-5
    mixer.squeeze.copy_(mixer.squeeze[..., torch.randperm(8), :])
    assert far(mixer(x)[0], full(x)[0]) < 1e-5
    mixer.squeeze[:, :, 0] = 0.0
    assert far(mixer(x)[0][:, :8], full(x)[0][:, :8]) < 1e-5
    assert far(mixer(x)[0][:, 8:], full(x)[0][:, 8:]) > 1e-2


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("block", [76, 200])
def test_a_block_as_long_as_the_text_is_full_attention(block: int, kv_heads: int, far: Far) -> None:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": kv_heads, "rotary": 0.5, "qk_norm": True}
    full, mixer = Full(**sizes).build(FRAME), build(Linformer(block=block, **sizes), noise=1.0)
    mixer.load_state_dict({f"attention.{name}": w for name, w in full.state_dict().items()}, strict=False)
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


def shares(length: int, block: int, each: int) -> Tensor:
    """What weighs how much where all scores are equal and each slot is the mean of its tokens."""
    weights = torch.zeros(length, length)
    for t in range(length):
        over = t // block
        weights[t, : over * block] = each / block
        weights[t, over * block : t + 1] = 1.0
        weights[t] /= over * each + t - over * block + 1
    return weights


@pytest.mark.parametrize(("slots", "each"), [(0.0625, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_at_first_slots_are_means_of_blocks_that_are_over(
    slots: float, each: int, weights_of: Callable[..., Tensor]
) -> None:
    for length in (1, 7, 8, 9, 16, 17, 41):
        weights = weights_of(Linformer(block=8, slots=slots, heads=2), length, head=1)
        torch.testing.assert_close(weights, shares(length, 8, each))


def test_slots_that_do_not_divide_the_block_are_means_too() -> None:
    squeeze = build(Linformer(block=20, slots=0.125, heads=2)).squeeze[0, 0]
    assert squeeze.shape == (2, 20)
    squeeze = build(Linformer(block=12, slots=0.125, heads=2)).squeeze[0, 0]
    assert squeeze.shape == (2, 12)
    squeeze = build(Linformer(block=20, slots=0.25, heads=2)).squeeze[0, 0]
    assert squeeze.shape == (5, 20)
    torch.testing.assert_close(squeeze.sum(1), torch.ones(5))
    assert (squeeze > 0).sum(0).tolist() == [1] * 20


def test_a_counted_slot_weighs_as_its_tokens_do(weights_of: Callable[..., Tensor]) -> None:
    """Where all scores are equal, every token of the past then weighs alike."""
    for length in (8, 9, 33):
        triangle = torch.ones(length, length).tril()
        weights = weights_of(Linformer(block=8, slots=0.25, heads=2, counted=True), length)
        torch.testing.assert_close(weights, triangle / triangle.sum(1, keepdim=True))


def test_the_token_that_ends_a_block_reads_the_block_and_the_next_one_its_slots(far: Far) -> None:
    spec = Linformer(block=8, heads=4)
    mixer, other = build(spec), build(spec)
    other.load_state_dict(mixer.state_dict())
    other.squeeze += 1.0
    x = torch.randn(2, 20, 64)
    y, z = mixer(x)[0], other(x)[0]
    assert torch.equal(y[:, :8], z[:, :8])
    assert far(y[:, 8], z[:, 8]) > 1e-2
    # Of a block that is over, only what its slots hold can reach a later token.
    other.squeeze.zero_()
    changed = x.clone()
    changed[:, :8] = torch.randn(2, 8, 64)
    assert far(mixer(changed)[0][:, 8:], y[:, 8:]) > 1e-2
    assert torch.equal(other(changed)[0][:, 8:], other(x)[0][:, 8:])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 33, 47, 64, 65])
def test_a_step_reads_what_is_priced(length: int, kv_heads: int, bytes_touched: Callable[..., int]) -> None:
    spec = Linformer(block=8, slots=0.25, heads=4, kv_heads=kv_heads)
    frame = replace(FRAME, context=length, batch=2)
    # The step that ends a block writes two slots besides, which the next one reads.
    written = 2 * 2 * 2 * kv_heads * 16 * 4 if length % 8 == 0 else 0
    assert bytes_touched(spec, frame) == spec.cost(frame).read_bytes + written


def test_the_price_by_hand() -> None:
    """16 heads of 128, 4 key heads, at 32,768 tokens: 8 slots for each block of 128."""
    frame, spec = Frame(width=2048, context=32768), Linformer(block=128, slots=0.0625, kv_heads=4)
    cost, token = spec.cost(frame), 2 * 4 * (128 + 128)
    assert [(one.name, one.stored_bytes, one.read_bytes) for one in cost.cache] == [
        (f"{name} {what}", stored * token // 2, read * token // 2)
        for name, stored, read in (("block", 128, 128), ("slot", 8 * 256, 8 * 255))
        for what in ("keys", "values")
    ]
    weights = 2048 * 128 * (16 + 4 + 4 + 16)
    assert cost.params == weights + 8 * 128
    assert replace(spec, shared=False, per_head=True).cost(frame).params == weights + 2 * 4 * 8 * 128
    work = 2 * weights + 4 * 4 * 8 * 128
    assert cost.flops_decode == work + 2 * 16 * 256 * (128 + 8 * 255)
    assert cost.flops_prefill == work + 2 * 16 * 256 * (64.5 + 8 * 127.5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 61])
def test_prices_follow_what_is_seen(length: int) -> None:
    cost = Linformer(block=8, slots=0.25, heads=4).cost(replace(FRAME, context=length))
    seen = [t % 8 + 1 + t // 8 * 2 for t in range(length)]
    made = 4 * 4 * 2 * 16
    weights = 2 * 4 * 64 * 64
    assert cost.flops_prefill == pytest.approx(
        weights + 2 * 4 * 32 * sum(seen) / length + made * (length // 8 * 8) / length
    )
    assert cost.flops_decode == weights + 2 * 4 * 32 * seen[-1] + made
    assert cost.read_bytes == 2 * 4 * 16 * 4 * seen[-1]


def test_settings_change_what_is_read(far: Far) -> None:
    x, base = torch.randn(1, LENGTH, 64), Linformer(block=8, slots=0.25, heads=4)
    made = base.build(FRAME)
    for change in ({"block": 12}, {"slots": 0.5}, {"rotary": 0.5}, {"counted": True}, {"qk_norm": True}):
        other = replace(base, **change).build(FRAME)
        other.load_state_dict({k: w for k, w in made.state_dict().items() if k != "squeeze"}, strict=False)
        assert far(other(x)[0], made(x)[0]) > 1e-3, change


def test_shrinking_keeps_a_slot() -> None:
    target = Frame(width=1024, train_length=4096)
    for block in (16, 64, 4096):
        for train in (4, 20, 64):
            proxy = replace(FRAME, train_length=train)
            small = shrink(Linformer(block=block, slots=0.0625), target, proxy)
            assert small.block and 4 <= small.block and small.slots == 0.0625
            assert 1 <= small.each() <= small.block
            assert small.build(proxy)(torch.randn(1, 70, 64))[0].isfinite().all()

"""BigBird and Longformer made causal: what each token sees, what they equal, what a step reads, and other code's patterns."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame, Place
from search_space.mixers.bigbird import BigBird, block_table
from search_space.mixers.full import Full
from search_space.mixers.longformer import Longformer
from search_space.mixers.window import Window
from search_space.spec import MixerSpec, shrink

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
LENGTH = 75
LAYERS = (Place(), Place(index=3, depth=5))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def attention_of(mixer: Any, state: dict[str, Tensor], prefix: str = "attention.") -> None:
    """Give a mixer the weights of full attention."""
    missing, unexpected = mixer.load_state_dict(
        {prefix + name: weight for name, weight in state.items()}, strict=False
    )
    assert not unexpected and not [name for name in missing if name.startswith(prefix)]


def by_hand(mixer: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Attention through the mixer's own projections over exactly the pairs of `seen` [H or 1, T, T]."""
    q, k, v = mixer.attention(x, 0)
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for y in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    y: Tensor = mixer.attention.finish(torch.einsum("bhts,bshv->bthv", weights, v), x)
    return y


def pairs(length: int) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 75])
def test_without_chance_and_first_blocks_it_is_a_window_of_blocks(
    length: int, weights_of: Callable[..., Tensor]
) -> None:
    t, s = pairs(length)
    seen = (s <= t) & (s // 8 > t // 8 - 2)
    weights = weights_of(BigBird(block=8, first=0, near=2, random=0, heads=1), length)
    torch.testing.assert_close(weights, seen / seen.sum(1, keepdim=True))


@pytest.mark.parametrize("spec", [BigBird(block=20, near=4), BigBird(block=4, near=8, first=2, random=6)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_where_all_blocks_are_read_it_is_full_attention(spec: BigBird, kv_heads: int, far: Far) -> None:
    """With random blocks too, as long as no more blocks exist than are read."""
    sizes = {"heads": 4, "kv_heads": kv_heads, "qk_norm": True, "rotary": 0.5}
    full, mixer = Full(**sizes).build(FRAME), replace(spec, **sizes).build(FRAME)
    attention_of(mixer, full.state_dict())
    x = torch.randn(2, LENGTH, 64)
    read = 16 * 4 if spec.block == 4 else LENGTH
    assert far(mixer(x[:, :read])[0], full(x[:, :read])[0]) < 1e-5
    if spec.block == 4:
        assert far(mixer(x)[0], full(x)[0]) > 1e-2


@pytest.mark.parametrize("place", LAYERS)
@pytest.mark.parametrize(("first", "near", "random"), [(1, 3, 3), (2, 1, 6), (0, 2, 2), (1, 2, 0)])
def test_every_list_holds_first_near_and_random_blocks_once(
    first: int, near: int, random: int, place: Place
) -> None:
    spec = BigBird(block=4, first=first, near=near, random=random, heads=3).sized(FRAME)
    table = block_table(spec, place.index, 0, 40)
    assert table.shape == (3, 40, first + near + random)
    for head in range(3):
        for own in range(40):
            listed = [block for block in table[head, own].tolist() if block >= 0]
            fixed = set(range(min(first, own + 1))) | set(range(max(0, own - near + 1), own + 1))
            drawn = set(listed) - fixed
            assert len(listed) == len(set(listed)) == min(own + 1, first + near + random)
            assert fixed <= set(listed)
            assert all(first <= block <= own - near for block in drawn)


def test_chance_hangs_on_seed_layer_head_and_block_and_on_nothing_else() -> None:
    spec = BigBird(block=4, heads=3).sized(FRAME)
    table = block_table(spec, 2, 0, 50)
    for own in (0, 5, 49):
        assert torch.equal(block_table(spec, 2, own, own + 1)[:, 0], table[:, own])
    assert torch.equal(block_table(spec, 2, 0, 2000)[:, :50], table)
    assert not torch.equal(block_table(replace(spec, seed=1), 2, 0, 50), table)
    assert not torch.equal(block_table(spec, 3, 0, 50), table)
    assert not torch.equal(table[0], table[1])
    assert not torch.equal(table[:, 20], table[:, 21])


def test_chance_is_fair() -> None:
    """Over many heads and layers each of the eight blocks between is drawn equally often, within five deviations."""
    spec = replace(BigBird(block=4, first=1, near=3, random=3).sized(FRAME), kv_heads=500)
    drawn = torch.cat([block_table(spec, layer, 11, 12)[:, 0, 4:].flatten() for layer in range(20)])
    counts = drawn.bincount(minlength=12)
    share = 3 / 8
    assert counts[0] == 0 and counts[9:].sum() == 0
    assert (counts[1:9] - 10000 * share).abs().max() < 5 * math.sqrt(10000 * share * (1 - share))
    # Heads draw independently of one another: two agree on all three as often as chance says, 1 in 56.
    sets = drawn.view(-1, 3).sort(1).values
    same = (sets[::2] == sets[1::2]).all(1).float().mean()
    assert abs(same - 1 / 56) < 5 * math.sqrt(1 / 56 / 5000)


@pytest.mark.parametrize("place", LAYERS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bigbird_is_attention_over_its_lists(kv_heads: int, place: Place, far: Far) -> None:
    frame = replace(FRAME, place=place)
    mixer = BigBird(block=4, random=2, heads=4, kv_heads=kv_heads).build(frame)
    table = block_table(mixer.spec, place.index, 0, 19)
    t, s = pairs(LENGTH)
    listed = torch.zeros(kv_heads, 19, 20, dtype=torch.bool).scatter(2, table.where(table >= 0, 19), True)
    seen = listed[:, t // 4, s // 4] & (s <= t)
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], by_hand(mixer, x, seen.repeat_interleave(4 // kv_heads, 0))) < 1e-5


def test_bigbirds_settings_change_what_is_read(far: Far) -> None:
    x, base = torch.randn(1, LENGTH, 64), BigBird(block=4, heads=4)
    full = Full(heads=4).build(FRAME).state_dict()

    def outputs(spec: MixerSpec, frame: Frame = FRAME) -> Tensor:
        mixer = spec.build(frame)
        attention_of(mixer, full)
        return mixer(x)[0]

    before = outputs(base)
    for change in ({"block": 8}, {"first": 2}, {"near": 2}, {"random": 2}, {"seed": 1}, {"rotary": 0.0}):
        assert far(outputs(replace(base, **change)), before) > 1e-3, change
    assert far(outputs(base, replace(FRAME, place=LAYERS[1])), before) > 1e-3


@pytest.mark.parametrize("context", [1, 3, 4, 5, 31, 32, 33, 75])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_step_of_bigbird_reads_what_is_charged(
    context: int, kv_heads: int, bytes_touched: Callable[..., int]
) -> None:
    frame = replace(FRAME, context=context, batch=2)
    spec = BigBird(block=4, random=2, heads=4, kv_heads=kv_heads)
    cost = spec.cost(frame)
    assert bytes_touched(spec, frame) == cost.read_bytes
    assert cost.stored_bytes == 2 * context * 2 * kv_heads * 16 * 4
    assert (cost.read_bytes < cost.stored_bytes) == (context > 24)


def test_bigbirds_price_by_hand() -> None:
    """Seven blocks of 64 at a width of 2048: 16 heads of 128, 4 of them with keys."""
    frame = Frame(width=2048, context=65536 + 10)
    cost = BigBird(kv_heads=4).cost(frame)
    assert cost.params == 2048 * 128 * (16 + 16 + 4 + 4)
    assert cost.stored_bytes == 2 * 4 * 128 * 2 * (65536 + 10)
    assert cost.read_bytes == 2 * 4 * 128 * 2 * (6 * 64 + 10)
    assert cost.flops_decode == 2 * cost.params + 2 * 16 * 256 * (6 * 64 + 10)
    seen = sum(min(t // 64, 6) * 64 + t % 64 + 1 for t in range(65546)) / 65546
    assert cost.flops_prefill == pytest.approx(2 * cost.params + 2 * 16 * 256 * seen, rel=1e-12)


@pytest.fixture
def oracle() -> Callable[..., nn.Module]:
    """transformers' modules, imported without their warnings."""
    pytest.importorskip("transformers")
    import warnings
    from importlib import import_module

    def load(model: str, name: str, **settings: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modelling = import_module(f"transformers.models.{model}.modeling_{model}")
            config = getattr(modelling, name.split("Self")[0].split("Block")[0] + "Config")(**settings)
        made: nn.Module = (
            getattr(modelling, name)(config, 0) if "Self" in name else getattr(modelling, name)(config)
        )
        for weight in made.parameters():
            weight.normal_(std=0.3) if weight.dim() > 1 else weight.zero_()
        return made

    return load


@pytest.mark.filterwarnings("ignore")
def test_fixed_blocks_are_those_of_transformers_bigbird(
    oracle: Any, weights_of: Callable[..., Tensor]
) -> None:
    """Theirs looks ahead too, so its pattern is cut to the past; the last block, which there sees all, is left out.

    In training mode, because in evaluation theirs draws block 0 again and again and counts it each time.
    """
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    block, length = 8, 80
    theirs = oracle(
        "big_bird",
        "BigBirdBlockSparseAttention",
        hidden_size=length,
        num_attention_heads=1,
        block_size=block,
        num_random_blocks=2,
        use_bias=False,
        max_position_embeddings=length,
    ).train()
    theirs.query.weight.zero_()
    theirs.value.weight.copy_(torch.eye(length))
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, length), block
    )
    always = torch.ones(length, length, dtype=torch.bool)
    for seed in range(30):
        theirs.seed = seed
        weights = theirs(torch.eye(length)[None], band, from_mask, to_mask, blocked, blocked)[0][0]
        seen = weights > 0
        # All that is seen is counted once.
        torch.testing.assert_close(weights, seen / seen.sum(1, keepdim=True))
        always &= seen
    t, s = pairs(length)
    wanted = (always & (s <= t))[:-block]
    ours = weights_of(BigBird(block=block, first=1, near=2, random=0, heads=1), length)[:-block] > 0
    assert torch.equal(ours, wanted)
    assert wanted.sum() < (s <= t)[:-block].sum()


def longformer_sees(length: int, size: int, gap: int, prefix: int) -> Tensor:
    """The definition for one head [T, T]."""
    t, s = pairs(length)
    near = ((t - s) % gap == 0) & ((t - s) // gap < size)
    return (s <= t) & (near | (s < prefix) | (t < prefix))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("size", [4, 16, 80])
def test_longformer_without_gaps_and_prefix_is_a_window(size: int, kv_heads: int, far: Far) -> None:
    sizes = {"heads": 4, "kv_heads": kv_heads, "qk_norm": True, "rotary": 0.5}
    window = (Window(size=size, **sizes) if size < LENGTH else Full(**sizes)).build(FRAME)
    mixer = Longformer(size=size, prefix=0, **sizes).build(FRAME)
    attention_of(mixer, window.state_dict())
    x = torch.randn(2, LENGTH, 64)
    assert far(mixer(x)[0], window(x)[0]) < 1e-5


@pytest.mark.parametrize(("dilated", "head", "gap"), [(0.5, 1, 1), (0.5, 2, 4), (0.25, 2, 1), (0.25, 3, 4)])
@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize("length", [1, 9, 43, 80])
def test_longformer_sees_its_window_its_gaps_and_its_prefix(
    length: int, prefix: int, dilated: float, head: int, gap: int, weights_of: Callable[..., Tensor]
) -> None:
    spec = Longformer(size=4, dilation=4, dilated=dilated, prefix=prefix, heads=4)
    seen = longformer_sees(length, 4, gap, prefix)
    torch.testing.assert_close(weights_of(spec, length, head=head), seen / seen.sum(1, keepdim=True))


def test_a_single_key_head_is_not_dilated(weights_of: Callable[..., Tensor]) -> None:
    spec = Longformer(size=4, dilation=4, prefix=0, heads=2, kv_heads=1)
    assert torch.equal(weights_of(spec, 40, head=1) > 0, longformer_sees(40, 4, 1, 0))


@pytest.mark.filterwarnings("ignore")
def test_longformer_is_that_of_transformers_where_theirs_has_no_future(oracle: Any, far: Far) -> None:
    """The last row of theirs sees the past alone: an ordinary one, and one of the prefix where the text ends in it."""
    theirs = oracle(
        "longformer", "LongformerSelfAttention", hidden_size=64, num_attention_heads=4, attention_window=[14]
    ).eval()
    frame = replace(FRAME, train_length=256)
    mixer = Longformer(size=8, prefix=16, heads=4, rotary=0.0).build(frame)
    for ours, suffix in ((mixer.attention, ""), (mixer.own, "_global")):
        for name in ("query", "key", "value"):
            getattr(ours, name).weight.copy_(getattr(theirs, name + suffix).weight)
    mixer.attention.out.weight.copy_(torch.eye(64))
    x = torch.randn(2, 84, 64)
    whole, state, rows = mixer(x)[0], mixer.start(2, 84), []
    for t in range(84):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    for length in (14, 28, 42, 84):
        chosen = (torch.arange(length) < 16).expand(2, -1)
        expected = theirs(
            x[:, :length],
            attention_mask=torch.where(chosen, 10000.0, 0.0),
            is_index_masked=torch.zeros_like(chosen),
            is_index_global_attn=chosen,
            is_global_attn=True,
        )[0][:, -1]
        assert far(whole[:, length - 1], expected) < 1e-5
        assert far(rows[length - 1], expected) < 1e-5


@pytest.mark.parametrize("context", [9, 12, 13, 20, 75])
@pytest.mark.parametrize(
    "change", [{}, {"dilation": 4}, {"dilation": 2, "kv_heads": 2}, {"prefix": 0}], ids=str
)
def test_a_step_of_longformer_reads_what_is_charged(
    context: int, change: dict[str, int], bytes_touched: Callable[..., int]
) -> None:
    """Beyond the prefix, where no write goes unread."""
    frame = replace(FRAME, context=context, batch=2)
    spec = replace(Longformer(size=4, prefix=8, heads=4), **change)
    assert bytes_touched(spec, frame) == spec.cost(frame).read_bytes


def test_longformers_price_by_hand() -> None:
    """16 heads of 128, half of them reading one of two tokens: rings of 512 and 1,023, a prefix of 64, kept twice."""
    frame = Frame(width=2048, context=20000)
    spec = Longformer(size=512, dilation=2, prefix=64)
    cost = spec.cost(frame)
    one = 2 * 128 * 2
    assert cost.params == (4 + 3) * 2048 * 2048
    assert cost.stored_bytes == one * (8 * 512 + 8 * 1023 + 2 * 16 * 64)
    assert cost.read_bytes == one * 16 * (512 + 64)
    assert cost.idle_params == 3 * 2048 * 2048
    assert cost.flops_decode == 2 * 4 * 2048 * 2048 + 2 * 16 * 256 * (512 + 64)
    seen = [longformer_sees(200, 8, gap, 12).sum() / 200 for gap in (1, 4)]
    small = Frame(width=64, train_length=64, context=200)
    own = replace(spec, size=8, dilation=4, prefix=12, heads=4, head_dim=16).cost(small)
    wanted = 2 * 4 * 64 * 64 + 2 * 3 * 64 * 64 * 12 / 200 + 2 * 4 * 32 * float(sum(seen) / 2)
    assert own.flops_prefill == pytest.approx(wanted, rel=1e-6)
    # Within the prefix its own projections work, and its own keys are read.
    inside = spec.cost(replace(frame, context=60))
    assert inside.idle_params == 0 and inside.read_bytes == one * 16 * 60
    assert inside.flops_decode == 2 * 7 * 2048 * 2048 + 2 * 16 * 256 * 60


def test_longformers_settings_change_what_is_read(far: Far) -> None:
    x, base = torch.randn(1, LENGTH, 64), Longformer(size=8, dilation=2, prefix=8, heads=4)
    kept = base.build(FRAME).state_dict()

    def outputs(spec: MixerSpec) -> Tensor:
        mixer = spec.build(FRAME)
        mixer.load_state_dict(kept)
        return mixer(x)[0]

    for change in ({"size": 12}, {"dilation": 4}, {"dilated": 0.25}, {"prefix": 4}, {"rotary": 0.0}):
        assert far(outputs(replace(base, **change)), outputs(base)) > 1e-3, change


def test_longformers_prefix_shrinks_with_the_text_and_nothing_stays_nothing() -> None:
    target, proxy = Frame(width=256, train_length=4096), Frame(width=64, train_length=64)
    assert shrink(Longformer(prefix=1024), target, proxy).prefix == 16
    assert shrink(Longformer(prefix=2048), target, proxy).prefix == 32
    assert shrink(Longformer(prefix=0), target, proxy).prefix == 0
    with pytest.raises(ValueError, match="prefix=36 leaves too few other tokens to train on in 64"):
        Longformer(prefix=36).sized(proxy)

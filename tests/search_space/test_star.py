"""Star Attention as a way to prefill full attention: what a token reads, what is kept, what it costs, what others leave alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_space.cost import build_mixer
from search_space.frame import Frame
from search_space.mixers.full import Full, FullMixer
from search_space.positions import alibi_slopes
from search_space.spec import Stream
from search_space.vocabulary import VOCABULARY, mixer_of, read
from trainers.model import Stack

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
LENGTH, BLOCK = 75, 16
KINDS = (
    "full[heads=4]",
    "full[heads=4,kv_heads=2,qk_norm=true,gate=true]",
    "full[heads=4,kv_heads=1,rotary=0,soft_cap=30,gate=head]",
    "full[heads=4,learned_sink=true,rotary=0.5]",
    "full[heads=4,kv_heads=2,position=alibi]",
    "full[heads=4,kv_heads=2,position=alibi,learned_sink=true,soft_cap=30]",
    "full[heads=4,kv_heads=2,position=xpos]",
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(text: str, shake: Callable[[nn.Module], None]) -> FullMixer:
    mixer = build_mixer(read(text).layers[0], FRAME)
    assert isinstance(mixer, FullMixer)
    shake(mixer)
    # Larger scores, so that what is read shows.
    mixer.query.weight.mul_(4)
    return mixer


def visible(length: int, block: int) -> Tensor:
    """The definition [T, T]: the own block or the first, up to oneself."""
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    return (s <= t) & ((s // block == t // block) | (s < block))


def written_out(mixer: FullMixer, x: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen [T, T], with all that a layer may ask for."""
    q, k, v = mixer.project(x, 0)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2).double() for y in (k, v))
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    products = torch.einsum("bthk,bshk->bhtsk", q.double(), k)
    if mixer.plan.positions.kind == "xpos":
        pair = torch.arange(0, q.shape[3], 2, dtype=torch.float64) / q.shape[3]
        zeta = ((pair + 0.4) / 1.4).repeat(2)
        products = products * zeta ** (distance.clamp(min=0)[..., None] / 512)
    scores = products.sum(-1) / math.sqrt(q.shape[3])
    if mixer.plan.soft_cap:
        scores = mixer.plan.soft_cap * torch.tanh(scores / mixer.plan.soft_cap)
    if mixer.plan.positions.kind == "alibi":
        scores = scores - torch.tensor(alibi_slopes(q.shape[2])).view(-1, 1, 1) * distance
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if mixer.sink is not None:
        total = total + mixer.sink.double().exp().view(-1, 1, 1)
    read_ = torch.einsum("bhts,bshk->bthk", weights / total, v)
    return mixer.finish(read_.float(), x)


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize(("length", "block"), [(LENGTH, BLOCK), (64, 16), (65, 16), (33, 5), (9, 1)])
def test_a_token_reads_its_own_block_and_the_first(
    text: str, length: int, block: int, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer, x = build(text, shake), torch.randn(2, length, 64)
    got, state = mixer.prefill_star(x, None, block)
    assert state is None
    assert far(got, written_out(mixer, x, visible(length, block))) < 1e-5
    exact = written_out(mixer, x, torch.ones(length, length).tril() > 0)
    assert far(mixer(x)[0], exact) < 1e-5
    assert far(got, exact) > 1e-2


@pytest.mark.parametrize("text", KINDS)
def test_one_block_is_full_attention(text: str, far: Far, shake: Callable[[nn.Module], None]) -> None:
    mixer, x = build(text, shake), torch.randn(2, LENGTH, 64)
    for block in (LENGTH, LENGTH + 1, 4096):
        assert far(mixer.prefill_star(x, None, block)[0], mixer(x)[0]) < 1e-6
    # Two blocks hide nothing either: the first is the anchor of the second.
    assert far(mixer.prefill_star(x, None, -(-LENGTH // 2))[0], mixer(x)[0]) < 1e-5


@pytest.mark.parametrize("text", [KINDS[1], KINDS[5], KINDS[6]])
@pytest.mark.parametrize("cut", [1, 7, 15, 16, 17, 32, 50, 74])
def test_a_context_may_come_in_pieces(
    text: str, cut: int, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer, x = build(text, shake), torch.randn(2, LENGTH, 64)
    whole, _ = mixer.prefill_star(x, None, BLOCK)
    first, state = mixer.prefill_star(x[:, :cut], mixer.start(2, LENGTH), BLOCK)
    second, state = mixer.prefill_star(x[:, cut:], state, BLOCK)
    assert far(torch.cat([first, second], dim=1), whole) < 1e-5
    assert state.length == LENGTH


@pytest.mark.parametrize("text", KINDS)
def test_what_comes_behind_the_context_reads_all_of_it(
    text: str, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer, x = build(text, shake), torch.randn(2, LENGTH, 64)
    context = LENGTH - 5
    _, state = mixer.prefill_star(x[:, :context], mixer.start(2, LENGTH), BLOCK)
    _, kept = mixer(x[:, :context], mixer.start(2, LENGTH))
    # The keys and values of the context, once each: nothing of the anchor's copies.
    assert torch.equal(state.keys, kept.keys) and torch.equal(state.values, kept.values)
    assert state.length == kept.length == context
    exact = mixer(x)[0]
    query, state = mixer(x[:, context : context + 3], state)
    assert far(query, exact[:, context : context + 3]) < 1e-5
    for t in (LENGTH - 2, LENGTH - 1):
        answer, state = mixer.step(x[:, t], state)
        assert far(answer, exact[:, t]) < 1e-5


def test_a_pass_is_the_system_of_spread_blocks(far: Far) -> None:
    """Machines that each hold the anchor and one block make what one machine makes of the masked whole, in every layer.

    Without positions, since what a machine holds would be turned as if it stood side by side.
    """
    stack = Stack(read("3*full[heads=4,rotary=0]"), FRAME)
    x = torch.randn(2, LENGTH, 64)
    whole, _, _ = stack.forward_with(x, None, Stream(star_block=BLOCK))
    blocks = list(x.split(BLOCK, dim=1))
    spread = [stack(blocks[0])[0]] + [
        stack(torch.cat([blocks[0], block], dim=1))[0][:, BLOCK:] for block in blocks[1:]
    ]
    assert far(torch.cat(spread, dim=1), whole) < 1e-5
    assert far(stack(x)[0], whole) > 1e-3


def test_a_pass_tells_full_attention_and_nothing_else(far: Far) -> None:
    x, stream = torch.randn(2, LENGTH, 64), Stream(star_block=BLOCK)
    for name in VOCABULARY:
        mixer = build_mixer(read(name).layers[0], FRAME).eval()
        state = mixer.start(2, LENGTH)
        exact, got = mixer.forward_with(x, None, Stream())[0], mixer.forward_with(x, state, stream)[0]
        assert (far(got, exact) > 1e-3) == (name == "full"), name
    side = build_mixer(read("full[heads=4]|window[size=8]").layers[0], FRAME)
    assert far(side.forward_with(x, None, stream)[0], side(x)[0]) > 1e-3


def test_training_and_plain_prefills_do_not_know_of_it() -> None:
    frame = replace(FRAME, star_block=BLOCK)
    torch.manual_seed(0)
    star = Stack(read("2*full"), frame)
    torch.manual_seed(0)
    plain, x = Stack(read("2*full"), FRAME), torch.randn(2, LENGTH, 64)
    assert torch.equal(star(x)[0], plain(x)[0])


@pytest.mark.parametrize(("context", "block"), [(131072, 4096), (1000, 96), (96, 96), (50, 96), (192, 96)])
def test_the_price_is_that_of_the_mask(context: int, block: int) -> None:
    frame = Frame(width=4096, context=context)
    exact = Full(heads=32, kv_heads=8).cost(frame)
    star = Full(heads=32, kv_heads=8).cost(replace(frame, star_block=block))
    seen = sum(min(t // block, 1) * block + t % block + 1 for t in range(context)) / context
    weights = 4096 * 128 * 2 * (32 + 8)
    assert star.flops_prefill == pytest.approx(2 * weights + 4 * 32 * 128 * seen, rel=1e-12)
    # Spread over machines each block brings its own anchor: two blocks' triangle for every block.
    assert seen <= 2 * block * (2 * block + 1) / 2 / block
    assert replace(star, flops_prefill=exact.flops_prefill) == exact
    assert star.flops_prefill <= exact.flops_prefill


def test_no_other_mixer_is_priced_otherwise() -> None:
    frame = Frame(width=512, context=8192)
    for name in VOCABULARY:
        spec = mixer_of(read(name).layers[0].branches[0])
        assert (spec.cost(replace(frame, star_block=64)) == spec.cost(frame)) == (name != "full"), name


def test_the_work_follows_the_blocks() -> None:
    """No score for each pair of tokens: twice the text is twice the work, and not four times."""
    frame = replace(FRAME, context=2048)
    mixer: Any = Full(heads=4).build(frame)

    def flops(length: int) -> float:
        with FlopCounterMode(display=False) as counter:
            mixer.prefill_star(torch.randn(1, length, 64), None, 64)
        return counter.get_total_flops() / length

    assert flops(2048) < 1.1 * flops(512)
    projections = 2 * 4 * 64 * 64
    assert flops(2048) - projections <= 4 * 64 * 2 * 64


def test_a_block_of_less_than_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="star_block -1 is not valid"):
        replace(FRAME, star_block=-1)

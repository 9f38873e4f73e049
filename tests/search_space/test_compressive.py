"""The compressed memory: written out token by token, equal to Transformer-XL where it must be, its loss, reads and price."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.compressive import Compressive, CompressiveMixer
from search_space.mixers.transformer_xl import TransformerXL, TransformerXLMixer
from search_space.segments import mean_slots, slots_at
from search_space.spec import Stream
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
LENGTH = 75
SHAPES = [(8, 8, 4, 4), (8, 4, 8, 2), (12, 0, 4, 4), (4, 8, 20, 2), (16, 4, 4, 1)]
"""Segment, memory, slots and tokens of a slot."""


def x_of(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 64)


def built(frame: Frame, segment: int, memory: int, slots: int, each: int) -> CompressiveMixer:
    spec = Compressive(heads=2, head_dim=24, segment=segment, memory=memory, slots=slots, compression=each)
    mixer = spec.build(frame)
    assert isinstance(mixer, CompressiveMixer)
    with torch.no_grad():
        mixer.attention.content_bias.normal_()
        mixer.attention.position_bias.normal_()
        if mixer.squeeze is not None:
            mixer.squeeze.map.weight.add_(0.1 * torch.randn_like(mixer.squeeze.map.weight))
    return mixer.eval()


def heads(own: Any, layer: Any, x: Tensor) -> Tensor:
    return (x @ layer.weight.T).unflatten(-1, (own.heads, own.head_dim))


def seen_of(mixer: CompressiveMixer, x: Tensor, t: int) -> Tensor:
    """The row of inputs, slots first, that the token at t attends to."""
    begin = t // mixer.segment * mixer.segment - mixer.memory
    rows = []
    for slot in range(max(0, begin // mixer.each - mixer.slots), max(0, begin // mixer.each)):
        group = x[:, slot * mixer.each : (slot + 1) * mixer.each].flatten(1)
        rows.append(group @ mixer.squeeze.map.weight.T)
    return torch.stack([*rows, *x[:, max(0, begin) : t + 1].unbind(1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_over_slots_memory_and_segment(small: Frame, shape: Any, far: Far) -> None:
    mixer, x = built(small, *shape), x_of()
    own, y = mixer.attention, mixer(x)[0]
    for t in (0, 3, 8, 15, 16, 23, 24, 40, 47, 48, 63, 74):
        row = seen_of(mixer, x, t)
        q, k, v = heads(own, own.query, x[:, t]), heads(own, own.key, row), heads(own, own.value, row)
        distance = torch.arange(row.shape[1] - 1, -1, -1)
        angle = distance[:, None] / 1e4 ** (torch.arange(0, 64, 2) / 64)
        r = heads(own, own.position, torch.cat([angle.sin(), angle.cos()], dim=-1))
        scores = torch.einsum("bhk,blhk->bhl", q + own.content_bias, k)
        scores = scores + torch.einsum("bhk,lhk->bhl", q + own.position_bias, r)
        wanted = torch.einsum("bhl,blhk->bhk", (scores / 24**0.5).softmax(-1), v)
        assert far(y[:, t], own.out(wanted.flatten(1))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("slots", "each"), [(0, 4), (20, 1)])
def test_without_slots_or_with_slots_of_one_token_it_is_transformer_xl(
    small: Frame, slots: int, each: int, far: Far
) -> None:
    mixer, x = built(small, 8, 12, slots, each), x_of()
    if mixer.squeeze is not None:
        mixer.squeeze.map.weight.copy_(torch.eye(64))
    plain = TransformerXL(heads=2, head_dim=24, segment=8, memory=12 + slots).build(small)
    assert isinstance(plain, TransformerXLMixer)
    plain.attention.load_state_dict(mixer.attention.state_dict())
    assert far(mixer(x)[0], plain(x)[0]) < 1e-5
    if not slots:
        for length in (5, 75):
            frame = replace(small, context=length)
            ours = Compressive(heads=2, head_dim=24, segment=8, memory=12, slots=0).cost(frame)
            assert ours == TransformerXL(heads=2, head_dim=24, segment=8, memory=12).cost(frame)


def content(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bshk,blhk->bhsl", q, k / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhsl,blhk->bshk", weights, v)


@pytest.mark.parametrize("shape", [(8, 8, 4, 4), (8, 4, 8, 2), (12, 0, 4, 4)], ids=str)
def test_the_loss_teaches_the_slots_alone(small: Frame, shape: Any, far: Far) -> None:
    mixer, x = built(small, *shape).train(), x_of().requires_grad_()
    own, squeeze = mixer.attention, mixer.squeeze
    assert squeeze is not None
    y, _, stream = mixer.forward_with(x, None, Stream())
    assert len(stream.losses) == 1
    y.square().sum().backward(retain_graph=True)
    assert squeeze.map.weight.grad is None
    before = {name: weight.grad.clone() for name, weight in own.named_parameters()}
    x.grad = None
    stream.losses[0].backward()
    assert x.grad is None and all(
        torch.equal(weight.grad, before[name]) for name, weight in own.named_parameters()
    )
    # Written out, segment by segment: what left as it began, by its tokens and by its slots.
    segment, memory, _, each = shape
    learnt, errors = squeeze.map.weight.grad.clone(), []
    squeeze.zero_grad()
    inputs = x.detach()
    for begin in range(0, LENGTH, segment):
        low, high = max(0, begin - memory - segment), begin - memory
        if high <= 0:
            continue
        asked = heads(own, own.query, inputs[:, begin : begin + segment]).detach()
        tokens = inputs[:, low:high]
        slots = tokens.reshape(2, -1, each * 64) @ squeeze.map.weight.T
        both = [
            content(asked, heads(own, own.key, row), heads(own, own.value, row)) for row in (tokens, slots)
        ]
        errors.append((both[0] - both[1]).square().mean((-2, -1)))
    loss = torch.cat(errors, dim=1).mean()
    assert far(stream.losses[0].detach(), loss.detach()) < 1e-4
    loss.backward()
    assert far(squeeze.map.weight.grad, learnt) < 1e-4


def test_there_is_no_loss_without_training_or_where_nothing_has_left(small: Frame) -> None:
    mixer = built(small, 8, 8, 4, 4)
    assert mixer.forward_with(x_of(), None, Stream())[2].losses == ()
    mixer.train()
    assert mixer.forward_with(x_of(16), None, Stream())[2].losses == ()
    assert len(mixer.forward_with(x_of(17), None, Stream())[2].losses) == 1
    with torch.no_grad():
        assert mixer.forward_with(x_of(), None, Stream())[2].losses == ()


def test_no_gradient_flows_through_memory_and_slots(small: Frame) -> None:
    mixer, x = built(small, 8, 8, 8, 4), x_of().requires_grad_()
    mixer(x)[0][:, 44].sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :40] == 0).all() and (x.grad[:, 40:45].abs().amax(-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize(("distance", "seen"), [(4, True), (37, True), (49, False)])
def test_how_far_it_sees(small: Frame, distance: int, seen: bool) -> None:
    # The token at 64 opens a segment: 8 tokens of memory, and 8 slots of 4 before them, back to token 24.
    mixer, x = built(small, 8, 8, 8, 4), x_of()
    changed = x.clone()
    changed[:, 64 - distance] += 1
    assert ((mixer(changed)[0][:, 64] - mixer(x)[0][:, 64]).abs().max() > 1e-5) == seen


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 5, 16, 17, 24, 41, 75])
@pytest.mark.parametrize("each", [4, 2, 1])
def test_a_step_reads_what_it_is_priced_for(small: Frame, length: int, each: int) -> None:
    frame, x = replace(small, context=length, batch=2), x_of(length)
    spec = Compressive(heads=2, head_dim=24, segment=8, memory=8, slots=4, compression=each)
    mixer = spec.build(frame)
    _, state = mixer(x[:, :-1], mixer.start(2, length))
    copy = replace(
        state,
        recent=replace(state.recent, keys=state.recent.keys.clone(), values=state.recent.values.clone()),
        slots=replace(state.slots, keys=state.slots.keys.clone(), values=state.slots.values.clone()),
    )
    wanted, _ = mixer.step(x[:, -1], copy)
    edge = (length - 1) // 8 * 8 - 8
    recent = range(max(0, edge), length)
    slots = range(max(0, edge // each - 4), max(0, edge) // each)
    for ring, seen in ((state.recent, recent), (state.slots, slots)):
        for part in (ring.keys, ring.values):
            places = torch.tensor([s % part.shape[1] for s in seen], dtype=torch.long)
            kept = part[:, places].clone()
            part.fill_(torch.nan)
            part[:, places] = kept
    state.inputs[:, (length - 1) % each :] = torch.nan
    assert torch.equal(mixer.step(x[:, -1], state)[0], wanted)
    cache = {tensor.name: tensor.read_bytes for tensor in spec.cost(frame).cache}
    assert cache["keys"] == cache["values"] == 2 * len(recent) * 48 * 4
    assert cache["slot_keys"] == cache["slot_values"] == 2 * len(slots) * 48 * 4
    assert cache["inputs"] == 2 * ((length - 1) % each) * 64 * 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_counts_of_slots(shape: Any) -> None:
    segment, memory, slots, each = shape
    seen = [min(slots, max(0, t // segment * segment - memory) // each) for t in range(300)]
    assert [slots_at(t, *shape) for t in range(300)] == seen
    for context in (1, 8, 17, 40, 96, 300):
        assert mean_slots(context, *shape) == pytest.approx(sum(seen[:context]) / context)


def test_the_price_by_hand() -> None:
    frame = Frame(width=2048, context=10_000, batch=3)
    text = "compressive[segment=512,memory=512,slots=512,compression=4]"
    cost = mixer_of(read(text).layers[0].branches[0]).cost(frame)
    assert cost.params == 5 * 2048 * 2048 + 2 * 2048 + 4 * 2048 * 2048
    rows, slots = 512 + 512, 512 + (512 + 512) // 4
    assert cost.stored_bytes == 3 * (8192 * (rows + slots) + 3 * 2048 * 2)
    # 10,000 is token 272 of its segment; token 3 of its slot waits for none but three inputs.
    assert cost.read_bytes == 3 * (8192 * (272 + 512 + 512) + 3 * 2048 * 2)
    weights = 4 * 2048 * 2048 + 2048 * 2048 + 2 * 2048 * 2048 / 4
    assert cost.flops_decode == 2 * weights + 6 * 2048 * (272 + 512 + 512)

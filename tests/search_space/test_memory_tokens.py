"""Memory tokens by layer: written out slot by slot, their equalities, what they carry, what a step reads, the price."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.memory_tokens import MemoryTokens, MemoryTokensMixer
from search_space.state import state_bytes

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 43


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def made(frame: Frame, **settings: Any) -> MemoryTokensMixer:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "segment": 8, "slots": 4}
    mixer = MemoryTokens(**{**sizes, **settings}).build(frame)
    assert isinstance(mixer, MemoryTokensMixer)
    return mixer.eval()


def full_of(mixer: MemoryTokensMixer, frame: Frame, rotary: float) -> Any:
    """Full attention with the same projections."""
    full = Full(heads=4, kv_heads=2, head_dim=16, rotary=rotary).build(frame).eval()
    full.load_state_dict({name: mixer.projections.state_dict()[name] for name in full.state_dict()})
    return full


def stepped(mixer: MemoryTokensMixer, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def turned(x: Tensor, place: int) -> Tensor:
    """A vector [K] at a place, its first half the real and its second the imaginary parts of turning numbers."""
    half = len(x) // 2
    angle = place / 1e4 ** (torch.arange(half).double() / half)
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag])


def written_out(mixer: MemoryTokensMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence [T, D], one vector and one head at a time; and the slots at the end [M, D]."""
    own = mixer.projections
    weight = {name: value.double() for name, value in own.state_dict().items()}
    slots, x = mixer.first.double(), x.double()

    def normal(row: Tensor) -> Tensor:
        return row / (row.square().mean() + 1e-6).sqrt() * mixer.norm.weight.double()

    def head(name: str, row: Tensor, h: int, place: int) -> Tensor:
        part = (weight[f"{name}.weight"] @ row).view(-1, 16)[h]
        return part if name == "value" else turned(part, place)

    def attend(asking: tuple[Tensor, int], seen: list[tuple[Tensor, int]]) -> Tensor:
        heads = []
        for h in range(4):
            q = head("query", asking[0], h, asking[1])
            scores = torch.stack([head("key", row, h // 2, place) @ q for row, place in seen]) / 4
            values = torch.stack([head("value", row, h // 2, place) for row, place in seen])
            heads.append(scores.softmax(0) @ values)
        return weight["out.weight"] @ torch.cat(heads)

    rows: list[Tensor] = []
    for begin in range(0, len(x), mixer.segment):
        text = [(row, place) for place, row in enumerate(x[begin : begin + mixer.segment])]
        memory = [(normal(slot), 0) for slot in slots]
        rows += [attend(text[i], memory + text[: i + 1]) for i in range(len(text))]
        if len(text) == mixer.segment:
            asking = [(row, mixer.segment) for row, _ in memory]
            slots = torch.stack([s + attend(q, memory + text) for s, q in zip(slots, asking, strict=True)])
    return torch.stack(rows), slots


@torch.no_grad()
@pytest.mark.parametrize(("segment", "slots"), [(8, 4), (4, 8), (20, 4), (44, 4)])
def test_it_is_written_out(small: Frame, segment: int, slots: int, far: Far, shake: Shake) -> None:
    mixer, x = made(small, segment=segment, slots=slots), x_of(1)
    shake(mixer)
    wanted, memory = written_out(mixer, x[0])
    y, state = mixer(x, mixer.start(1, LENGTH))
    assert far(mixer(x)[0][0], wanted) < 1e-5
    assert far(y[0], wanted) < 1e-5 and far(state.hidden[0], memory) < 1e-5
    assert far(stepped(mixer, x)[0], wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rotary", [1.0, 0.0])
def test_without_slots_the_segments_are_alone(small: Frame, rotary: float, far: Far) -> None:
    mixer, x = made(small, slots=0, rotary=rotary), x_of()
    full = full_of(mixer, small, rotary)
    parts = torch.cat([full(part)[0] for part in x.split(8, dim=1)], dim=1)
    assert far(mixer(x)[0], parts) < 1e-5
    assert far(stepped(mixer, x), parts) < 1e-5
    whole = made(small, slots=0, segment=44, rotary=rotary)
    whole.load_state_dict(mixer.state_dict())
    assert far(whole(x)[0], full(x)[0]) < 1e-5
    assert {name for name, _ in mixer.named_parameters()} == {f"projections.{n}" for n in full.state_dict()}


@torch.no_grad()
def test_one_segment_is_full_attention_with_the_slots_before_the_text(small: Frame, far: Far) -> None:
    mixer, x = made(small, segment=44, rotary=0.0), x_of()
    slots = mixer.norm(mixer.first).expand(2, -1, -1)
    wanted = full_of(mixer, small, 0.0)(torch.cat([slots, x], dim=1))[0][:, 4:]
    assert far(mixer(x)[0], wanted) < 1e-5
    # What the slots hold matters, how large they are does not.
    mixer.first.mul_(1e3)
    assert far(mixer(x)[0], wanted) < 1e-4
    mixer.first.neg_()
    assert far(mixer(x)[0], wanted) > 1e-3


@torch.no_grad()
def test_slots_see_their_whole_segment_and_carry_it_on(small: Frame, far: Far) -> None:
    mixer, x = made(small), x_of(1)
    y = mixer(x)[0]
    for place in (0, 5, 7):
        changed = x.clone()
        changed[:, place] = torch.randn(1, 64)
        z = mixer(changed)[0]
        assert torch.equal(z[:, :place], y[:, :place])
        # From the second segment on nothing but the slots tells of the first.
        for begin in (8, 16, 40):
            assert far(z[:, begin : begin + 1], y[:, begin : begin + 1]) > 1e-5
        alone = made(small, slots=0)
        alone.projections.load_state_dict(mixer.projections.state_dict())
        assert torch.equal(alone(changed)[0][:, 8:], alone(x)[0][:, 8:])


def test_gradients_pass_through_all_segments(small: Frame) -> None:
    mixer, x = made(small), x_of(1).requires_grad_()
    mixer(x)[0][:, 42].sum().backward()
    assert x.grad is not None and mixer.first.grad is not None
    assert (x.grad[0].abs().amax(-1) > 0).all()
    assert (mixer.first.grad.abs().amax(-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 8, 9, 15, 16])
def test_a_step_reads_what_it_is_priced_for(small: Frame, length: int) -> None:
    spec = MemoryTokens(heads=4, kv_heads=2, head_dim=16, segment=8, slots=4)
    frame, x = replace(small, context=length), x_of(1, length)
    mixer = spec.build(frame)
    state = mixer.start(1, length)
    if length > 1:
        _, state = mixer(x[:, :-1], state)
    opened = (length - 1) % 8
    wanted, _ = mixer.step(
        x[:, -1], replace(state, opened=replace(state.opened, keys=state.opened.keys.clone()))
    )
    state.opened.keys[:, opened:] = torch.nan
    state.opened.values[:, opened:] = torch.nan
    if length % 8:
        state.hidden.fill_(torch.nan)
    y, after = mixer.step(x[:, -1], state)
    assert torch.equal(y, wanted)
    assert after.hidden.isfinite().all() == (length % 8 == 0)
    row = 2 * 16 * 4
    assert {own.name: (own.stored_bytes, own.read_bytes) for own in spec.cost(frame).cache} == {
        "keys": (row * min(length, 8), row * (opened + 1)),
        "values": (row * min(length, 8), row * (opened + 1)),
        "slot keys": (row * 4, row * 4),
        "slot values": (row * 4, row * 4),
        "hidden": (4 * 64 * 4, 0 if length % 8 else 4 * 64 * 4),
    }


def test_the_price_by_hand() -> None:
    frame = Frame(width=2048, context=131072)
    spec = MemoryTokens(segment=512, slots=16, heads=16, kv_heads=2, head_dim=128)
    cost = spec.cost(frame)
    weights = 2 * 2048 * 2048 + 2 * 2048 * 256
    assert cost.params == weights + 16 * 2048 + 2048
    # 528 keys and values of 256 numbers, in two bytes each; 16 slots of 2048 in four.
    assert cost.stored_bytes == cost.read_bytes == 2 * 528 * 256 * 2 + 16 * 2048 * 4
    assert spec.cost(replace(frame, context=10**6)).stored_bytes == cost.stored_bytes
    # A segment's writing: 16 tokens' projections, and 16 queries over 528 keys.
    write = 16 * 2 * weights + 4 * 2048 * 16 * 528
    assert cost.flops_decode == 2 * weights + 4 * 2048 * 528 + write / 512
    first = 16 * 2 * 2 * 2048 * 256 / 131072
    assert cost.flops_prefill == pytest.approx(2 * weights + 4 * 2048 * (513 / 2 + 16) + write / 512 + first)
    short = spec.cost(replace(frame, context=100))
    assert short.flops_prefill == pytest.approx(2 * weights + 4 * 2048 * (50.5 + 16) + first * 131072 / 100)
    none = MemoryTokens(segment=512, slots=0).cost(frame)
    assert none.params == 4 * 2048 * 2048 and none.stored_bytes == 2 * 512 * 2048 * 2


def test_what_is_kept_does_not_grow(small: Frame) -> None:
    mixer = made(small)
    assert state_bytes(mixer.start(1, 100)) == state_bytes(mixer.start(1, 8)) > state_bytes(mixer.start(1, 7))


def test_sizes_follow_the_frame() -> None:
    spec = MemoryTokens().sized(Frame(width=2048, train_length=4096))
    assert (spec.segment, spec.slots, spec.heads, spec.head_dim) == (512, 16, 16, 128)
    assert MemoryTokens(slots=0).sized(Frame(width=64)).slots == 0
    with pytest.raises(ValueError, match="memory_tokens: kv_heads=3 does not divide its 4 heads"):
        MemoryTokens(heads=4, kv_heads=3).sized(Frame(width=64))

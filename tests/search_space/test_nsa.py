"""Native sparse attention: its branches alone are other formulas, its selection, what a step touches, its price."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.nsa import NSA, NSAMixer
from search_space.mixers.window import Window
from search_space.slots import mean_slots, pointed, read_slots, slot_weights, slots_of
from search_space.spec import Mixer
from search_space.state import state_bytes

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def steps(mixer: Mixer, x: Tensor, state: Any) -> Tensor:
    rows = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def only(branch: int, mixer: Any, alone: Any) -> None:
    """One gate open and the others shut; that branch's weights from a mixer of one branch."""
    mixer.gate.weight.zero_()
    mixer.gate.bias.copy_(
        torch.full((3, mixer.heads), -200.0).index_fill(0, torch.tensor(branch), 200.0).flatten()
    )
    size = mixer.kv_heads * mixer.head_dim
    for name in ("query", "out"):
        getattr(mixer, name).weight.copy_(getattr(alone, name).weight)
    for name in ("key", "value"):
        getattr(mixer, name).weight[branch * size : (branch + 1) * size] = getattr(alone, name).weight


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selection_of_every_block_is_full_attention(small: Frame, far: Far, kv_heads: int) -> None:
    full = Full(kv_heads=kv_heads, rotary=0.5).build(small)
    for selected, same in ((80, True), (72, True), (32, False)):
        mixer = NSA(block=8, stride=4, selected=selected, kv_heads=kv_heads, rotary=0.5).build(small)
        only(1, mixer, full)
        x = x_of()
        assert (far(mixer(x)[0], full(x)[0]) < 1e-5) == same
        assert (far(steps(mixer, x, mixer.start(2, LENGTH)), full(x)[0]) < 1e-5) == same


def test_the_window_alone_is_a_window(small: Frame, far: Far) -> None:
    full, x = Full(rotary=0.5).build(small), x_of()
    for size in (20, LENGTH + 2):
        window, mixer = Window(size=size, rotary=0.5).build(small), NSA(window=size, rotary=0.5).build(small)
        window.load_state_dict(full.state_dict())
        only(2, mixer, full)
        assert far(mixer(x)[0], window(x)[0]) < 1e-5
        assert far(steps(mixer, x, mixer.start(2, LENGTH)), window(x)[0]) < 1e-5
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_slots_of_one_token_are_full_attention(small: Frame, far: Far, kv_heads: int) -> None:
    """Without positions, which slots do not have."""
    full = Full(kv_heads=kv_heads, rotary=0.0).build(small)
    mixer = NSA(compress="mean", kv_heads=kv_heads, rotary=0.0).build(small)
    assert isinstance(mixer, NSAMixer)
    for squeeze in (mixer.squeeze_key, mixer.squeeze_value):
        squeeze.length = squeeze.stride = 1
    only(0, mixer, full)
    x = x_of()
    assert far(mixer(x)[0], full(x)[0]) < 1e-5
    assert far(steps(mixer, x, mixer.start(2, LENGTH)), full(x)[0]) < 1e-5


@pytest.mark.parametrize(("compress", "overlap"), [("mean", 2), ("mlp", 2), ("mlp", 1)])
def test_slots_written_out(small: Frame, far: Far, compress: str, overlap: int) -> None:
    mixer = NSA(block=8, stride=4, overlap=overlap, compress=compress, kv_heads=2).build(small)
    assert isinstance(mixer, NSAMixer)
    only(0, mixer, Full(kv_heads=2).build(small))
    x, length = x_of(1, 30), 4 * overlap
    q = mixer.query(x).unflatten(-1, (4, 16))
    slots = []
    for layer, squeeze in ((mixer.key, mixer.squeeze_key), (mixer.value, mixer.squeeze_value)):
        tokens = layer(x)[..., :32].unflatten(-1, (2, 16))
        made = []
        for start in range(0, 30 - length + 1, 4):
            part = tokens[:, start : start + length]
            if compress == "mean":
                made.append(part.mean(1))
            else:
                flat = (part + squeeze.place[:, None]).transpose(1, 2).flatten(-2)
                made.append(squeeze.down(torch.nn.functional.silu(squeeze.up(flat))))
        slots.append(torch.stack(made, dim=1))
    wanted = torch.zeros(1, 30, 4, 16)
    for t in range(30):
        seen = [i for i in range(slots[0].shape[1]) if 4 * i + length - 1 <= t]
        for h in range(4):
            if seen:
                weights = (slots[0][0, seen, h // 2] @ q[0, t, h] / 4).softmax(0)
                wanted[0, t, h] = weights @ slots[1][0, seen, h // 2]
    assert wanted[0, : length - 1].abs().max() == 0 < wanted[0, length - 1].abs().max()
    wanted = mixer.out(wanted.flatten(2))
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(steps(mixer, x, mixer.start(1, 30)), wanted) < 1e-5


@pytest.mark.parametrize(("overlap", "strides"), [(1, 1), (2, 4), (2, 1), (1, 3)])
def test_weights_of_blocks_are_the_published_double_sum(far: Far, overlap: int, strides: int) -> None:
    weights, blocks = torch.rand(2, 3, 11), 4
    wanted = torch.zeros(2, 3, blocks)
    for j in range(blocks):
        for m in range(strides):
            for n in range(overlap):
                if 0 <= strides * j + m - n < 11:
                    wanted[..., j] += weights[..., strides * j + m - n]
    assert far(slot_weights(weights, overlap, strides, blocks), wanted) < 1e-6


def test_forced_blocks_come_first_and_ties_go_to_the_earlier() -> None:
    weights = torch.zeros(1, 24, 1, 6)
    weights[..., 3] = 0.5

    def at(time: int, count: int) -> list[int]:
        return pointed(weights, 0, 1, 1, 4, count)[0, time, 0].tolist()

    assert at(23, 6) == [5, 4, 0, 3, 1, 2]
    assert at(23, 2) == [5, 4] and at(23, 3) == [5, 4, 0] and at(23, 1) == [5]
    assert at(3, 3) == [0, -1, -1] and at(4, 3) == [1, 0, -1] and at(8, 3) == [2, 1, 0]


@pytest.mark.parametrize("overlap", [1, 2])
def test_no_future_under_selection(small: Frame, far: Far, overlap: int) -> None:
    mixer = NSA(block=8, stride=4, overlap=overlap, selected=32, window=8, kv_heads=2).build(small)
    x = 3 * x_of()
    y, _ = mixer(x)
    for t in (0, 6, 7, 8, 40, 63, 68):
        for future in (100.0 * torch.randn(2, LENGTH - t - 1, 64), torch.full((), torch.nan)):
            changed = x.clone()
            changed[:, t + 1 :] = future
            assert far(mixer(changed)[0][:, : t + 1], y[:, : t + 1]) < 1e-5


@pytest.mark.parametrize(("overlap", "stride"), [(1, 4), (2, 4), (2, 8)])
def test_a_prefill_may_be_cut_everywhere(small: Frame, far: Far, overlap: int, stride: int) -> None:
    mixer = NSA(block=8, stride=stride, overlap=overlap, selected=24, window=8).build(small)
    x = 3 * x_of(1, 40)
    whole, _ = mixer(x)
    for cut in range(1, 40):
        first, state = mixer(x[:, :cut], mixer.start(1, 40))
        assert far(torch.cat([first, steps(mixer, x[:, cut:], state)], 1), whole) < 1e-4
        again, state = mixer(x[:, :cut], mixer.start(1, 40))
        assert far(torch.cat([again, mixer(x[:, cut:], state)[0]], 1), whole) < 1e-4


@pytest.mark.parametrize("length", [5, 8, 9, 31, 64, 65])
def test_a_step_touches_the_selected_blocks_alone(
    small: Frame, far: Far, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = NSA(block=8, stride=4, selected=32, window=8, kv_heads=2)
    mixer, x = spec.build(small), x_of(1, length + 1)
    assert isinstance(mixer, NSAMixer)
    taken: list[Tensor] = []

    def remember(*given: Any) -> Any:
        read, blocks = read_slots(*given)
        taken.append(blocks)
        return read, blocks

    monkeypatch.setattr("search_space.mixers.nsa.read_slots", remember)
    _, state = mixer(x[:, :length], mixer.start(1, 96))
    wanted, _ = mixer.step(x[:, -1], state)
    _, state = mixer(x[:, :length], mixer.start(1, 96))
    seen = torch.zeros(96, 2, dtype=torch.bool)
    for group in range(2):
        for number in taken[1][0, 0, group].tolist():
            seen[number * 8 : min(length + 1, number * 8 + 8), group] |= number >= 0
    for cached in (state.cache.keys, state.cache.values):
        cached[0, ~seen] = torch.nan
    assert far(mixer.step(x[:, -1], state)[0], wanted) < 1e-6
    blocks = spec.cost(replace(small, context=length + 1)).cache[0]
    assert int(seen.sum()) * 16 * 4 * 2 == blocks.read_bytes


def test_nsa_by_hand() -> None:
    """Width 2048, 16 heads of 128, the published sizes: blocks of 64, slots of 32 each 16, 16 blocks, a window of 512."""
    frame = Frame(width=2048, context=65536)
    spec = NSA().sized(frame)
    assert (spec.block, spec.stride, spec.overlap, spec.selected, spec.window) == (64, 16, 2, 1024, 512)
    cost, slots = NSA().cost(frame), 65536 // 16 - 1
    assert cost.stored_bytes == 8192 * (65536 + slots + 512 + 32)
    assert cost.read_bytes == 8192 * (1024 + slots + 512 + 32)
    squeeze = 32 * 128 + 32 * 128 * 128 + 128 * 128
    assert cost.params == 8 * 2048**2 + 3 * 16 * 2049 + 2 * squeeze
    squeezing = 2 * 2 * 16 * (32 * 128 * 128 + 128 * 128) / 16
    weights = 2 * (8 * 2048**2 + 3 * 16 * 2048)
    assert cost.flops_decode == weights + squeezing + 4 * 2048 * (slots + 1024 + 512)
    assert mean_slots(77, 8, 4) == pytest.approx(sum(slots_of(t + 1, 8, 4) for t in range(77)) / 77)
    for context in (1, 7, 8, 90):
        small = replace(frame, width=64, train_length=64, context=context, dtype="float32")
        state = NSA(stride=4).build(small).start(3, context)
        assert state_bytes(state) == NSA(stride=4).cost(replace(small, batch=3)).stored_bytes

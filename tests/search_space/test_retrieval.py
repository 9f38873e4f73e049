"""Retrieval: written out token by token, its equalities, its bank, what a step reads, and its price by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.retrieval import Retrieval, RetrievalMixer
from search_space.mixers.window import Window
from search_space.state import state_bytes

Far = Callable[[Tensor, Tensor], float]
LENGTH = 40


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def made(frame: Frame, **settings: Any) -> RetrievalMixer:
    mixer = Retrieval(
        **{"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 8, "top_k": 4, **settings}
    ).build(frame)
    assert isinstance(mixer, RetrievalMixer)
    if mixer.gate is not None:
        torch.nn.init.normal_(mixer.gate)
    return mixer.eval()


def stepped(mixer: RetrievalMixer, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def turned_halves(x: Tensor) -> Tensor:
    """x [T, H, K] with its first half as the real and its second as the imaginary parts of turning numbers."""
    angle = torch.arange(len(x))[:, None] / 1e4 ** (torch.arange(8) / 8)
    pairs = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def written_out(
    mixer: RetrievalMixer, x: Tensor, *, turned: bool, bank: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """One sequence, one token and one head at a time: sorted scores, then one softmax or two."""
    q, k, v = (part[0].double() for part in mixer.project(x))
    near_q, near_k = q, k
    if turned:
        near_q, near_k = (turned_halves(part) for part in (q, k))
    bank_k, bank_v = bank if bank else (k[:0], v[:0])
    rows = []
    for t in range(x.shape[1]):
        heads = []
        for h in range(mixer.heads):
            g = h * mixer.kv_heads // mixer.heads
            first = max(0, t - mixer.window + 1)
            past_k = torch.cat([bank_k[:, g], k[:first, g]])
            past_v = torch.cat([bank_v[:, g], v[:first, g]])
            scores = (past_k @ q[t, h]).tolist()
            best = sorted(range(len(scores)), key=lambda s, own=scores: (-own[s], -s))[: mixer.top_k]
            near = near_k[first : t + 1, g] @ near_q[t, h] / 16**0.5
            distant = torch.tensor([scores[s] for s in best]).double() / 16**0.5
            if mixer.gate is None:
                weights = torch.cat([near, distant]).softmax(0)
                heads.append(weights @ torch.cat([v[first : t + 1, g], past_v[best]]))
                continue
            read = near.softmax(0) @ v[first : t + 1, g]
            if best:
                share = mixer.gate[h].double().sigmoid()
                read = share * (distant.softmax(0) @ past_v[best]) + (1 - share) * read
            heads.append(read)
        rows.append(torch.cat(heads))
    return mixer.out(torch.stack(rows).float())[None]


@torch.no_grad()
@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("rotary", [0.0, 1.0])
@pytest.mark.parametrize(("window", "top_k"), [(8, 4), (4, 12), (24, 4)])
def test_it_is_written_out(
    small: Frame, combine: str, rotary: float, window: int, top_k: int, far: Far
) -> None:
    mixer = made(small, combine=combine, rotary=rotary, window=window, top_k=top_k, qk_norm=window == 4)
    x = x_of(1)
    wanted = written_out(mixer, x, turned=rotary == 1)
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(stepped(mixer, x), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("top_k", [32, 36, 80])
def test_one_softmax_over_all_of_the_past_is_full_attention(small: Frame, top_k: int, far: Far) -> None:
    mixer = made(small, combine="joint", rotary=0.0, top_k=top_k)
    full = Full(heads=4, kv_heads=2, head_dim=16, rotary=0.0).build(small).eval()
    full.load_state_dict(mixer.state_dict())
    x = x_of()
    for own in (mixer(x)[0], stepped(mixer, x)):
        assert far(own, full(x)[0]) < 1e-5
    # One key fewer than there are is not the same.
    assert far(made(small, combine="joint", rotary=0.0, top_k=28)(x)[0], full(x)[0]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_a_window_as_long_as_the_text_is_full_attention(small: Frame, combine: str, far: Far) -> None:
    mixer = made(small, combine=combine, window=40)
    full = Full(heads=4, kv_heads=2, head_dim=16).build(small).eval()
    full.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name != "gate"})
    x = x_of()
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


@torch.no_grad()
def test_a_closed_gate_is_the_window_and_an_open_one_forgets_it(small: Frame, far: Far) -> None:
    mixer = made(small)
    assert mixer.gate is not None
    window = Window(heads=4, kv_heads=2, head_dim=16, size=8).build(small).eval()
    window.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name != "gate"})
    x = x_of()
    mixer.gate.fill_(-50)
    assert far(mixer(x)[0], window(x)[0]) < 1e-5
    mixer.gate.fill_(50)
    y, changed = mixer(x)[0], x.clone()
    assert far(y[:, :8], window(x)[0][:, :8]) < 1e-5
    changed[:, 30:38] = torch.randn(2, 8, 64)
    assert far(mixer(changed)[0][:, 38:], y[:, 38:]) > 1e-3
    # The last token's window lies open to nobody: what is in it changes nothing but the query itself.
    changed = x.clone()
    changed[:, 33:39] = torch.randn(2, 6, 64)
    torch.testing.assert_close(mixer(changed)[0][:, 39], y[:, 39])


@torch.no_grad()
@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_a_bank_is_searched_with_the_past(small: Frame, combine: str, far: Far) -> None:
    mixer, x = made(small, combine=combine), x_of(1)
    before, state = mixer(x)[0], state_bytes(mixer.start(1, LENGTH))
    names = set(mixer.state_dict())
    keys, values = torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    assert mixer.with_bank(keys, values) is mixer
    wanted = written_out(mixer, x, turned=True, bank=(keys.double(), values.double()))
    assert far(wanted[:, :1], before[:, :1]) > 1e-2
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(stepped(mixer, x), wanted) < 1e-5
    # It is neither saved, nor learnt, nor state.
    assert set(mixer.state_dict()) == names
    assert not {"bank_keys", "bank_values"} & {name for name, _ in mixer.named_parameters()}
    assert state_bytes(mixer.start(1, LENGTH)) == state


@torch.no_grad()
def test_the_entry_that_suits_is_what_is_read(small: Frame, far: Far) -> None:
    mixer, x = made(small, kv_heads=4), x_of(1)
    assert mixer.gate is not None
    mixer.gate.fill_(50)
    q, _, _ = mixer.project(x)
    keys, values = torch.randn(6, 4, 16), torch.randn(6, 4, 16)
    keys[3] = 1000 * q[0, 39]
    mixer.with_bank(keys, values)
    assert far(mixer(x)[0][:, 39], mixer.out(values[3].flatten())[None]) < 1e-5


@torch.no_grad()
def test_of_equal_scores_the_text_and_the_most_recent_come_first(small: Frame, far: Far) -> None:
    mixer = made(small, top_k=4, combine="gate")
    assert mixer.gate is not None
    mixer.query.weight.zero_()
    mixer.gate.fill_(50)
    x = x_of(1)
    _, _, v = mixer.project(x)
    mixer.with_bank(torch.randn(5, 2, 16), values := torch.randn(5, 2, 16))
    for t, bank in ((7, 4), (9, 2), (20, 0)):
        read = torch.cat([v[0, : t - 7][-4:], values[5 - bank :]]).mean(0)
        wanted = mixer.out(read.repeat_interleave(2, dim=0).flatten())
        assert far(mixer(x)[0][:, t], wanted[None]) < 1e-5


@pytest.mark.parametrize(
    "shapes", [((5, 2, 8), (5, 2, 16)), ((5, 2, 16), (4, 2, 16)), ((0, 2, 16), (0, 2, 16))]
)
def test_a_bank_of_another_shape_is_refused(small: Frame, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"retrieval: the bank's .* must be \[M, G, K\]"):
        made(small).with_bank(*(torch.zeros(shape) for shape in shapes))


def test_what_is_retrieved_learns(small: Frame) -> None:
    mixer = made(small)
    x = x_of(1).requires_grad_()
    mixer(x)[0][:, 39].sum().backward()
    assert x.grad is not None
    learnt = x.grad[0].abs().amax(-1) > 0
    assert learnt[32:].all() and 1 <= int(learnt[:32].sum()) <= 16


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 9, 10, 24, 40])
def test_a_step_reads_what_it_is_priced_for(small: Frame, length: int) -> None:
    frame = replace(small, context=length)
    spec = Retrieval(heads=4, kv_heads=4, head_dim=16, window=8, top_k=4)
    mixer, x = spec.build(frame), x_of(1, length)
    _, state = mixer(x[:, :-1], mixer.start(1, length))
    wanted, _ = mixer.step(x[:, -1], replace(state, keys=state.keys.clone(), values=state.values.clone()))
    read = 0
    for g in range(4):
        for s in range(length - 1):
            values = state.values.clone()
            values[0, s, g] += 1.0
            y, _ = mixer.step(x[:, -1], replace(state, keys=state.keys.clone(), values=values))
            if torch.equal(y, wanted):
                state.values[0, s, g] = torch.nan
            else:
                read += 1
    assert torch.equal(mixer.step(x[:, -1], state)[0], wanted)
    row = 16 * 4
    keys, values = spec.cost(frame).cache
    # The step's own row comes on top.
    assert values.read_bytes == (read + 4) * row == 4 * row * (min(length, 8) + min(4, max(0, length - 8)))
    assert keys.read_bytes == keys.stored_bytes == values.stored_bytes == 4 * row * length


def test_the_price_by_hand() -> None:
    frame = Frame(width=2048, context=32768)
    cost = Retrieval(window=512, top_k=32, heads=16, kv_heads=2, head_dim=128).cost(frame)
    weights = 2 * 2048 * 2048 + 2 * 2048 * 256
    assert cost.params == weights + 16
    # 544 tokens attended to by each head, and 32256 keys compared.
    assert cost.flops_decode == 2 * weights + 4 * 2048 * 544 + 2 * 2048 * 32256
    seen = sum(min(t + 1, 512) + min(max(0, t - 511), 32) for t in range(32768)) / 32768
    searched = sum(max(0, t - 511) for t in range(32768)) / 32768
    assert cost.flops_prefill == pytest.approx(2 * weights + 4 * 2048 * seen + 2 * 2048 * searched)
    keys, values = cost.cache
    assert keys.stored_bytes == keys.read_bytes == values.stored_bytes == 512 * 32768
    # Eight heads of a group may find 32 tokens each.
    assert values.read_bytes == 512 * (512 + 8 * 32)
    short = Retrieval(window=512, combine="joint").cost(replace(frame, context=100))
    assert short.read_bytes == short.stored_bytes
    assert short.params == 4 * 2048 * 2048


def test_sizes_follow_the_frame() -> None:
    spec = Retrieval().sized(Frame(width=2048, train_length=4096))
    assert (spec.window, spec.top_k, spec.heads, spec.head_dim) == (512, 32, 16, 128)
    with pytest.raises(ValueError, match="kv_heads=3 does not divide its 4 heads"):
        Retrieval(heads=4, kv_heads=3).sized(Frame(width=64))

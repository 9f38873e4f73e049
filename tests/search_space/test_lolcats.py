"""LoLCATs: the hybrid formula written out, its limits, its price, and the linearisation of a layer with softmax."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.linearise import attention_transfer_loss, linearise, transfer_parameters
from search_space.mixers.full import Full, FullMixer
from search_space.mixers.lolcats import LoLCATs, LoLCATsMixer
from search_space.mixers.window import Window, WindowMixer
from search_space.spec import shrink

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
SPECS = [
    LoLCATs(window=8, features=16, heads=4),
    LoLCATs(window=12, features=8, heads=4, kv_heads=2),
    LoLCATs(window=4, features=8, heads=4, kv_heads=2, tied=True),
    LoLCATs(window=8, features=24, heads=4, kv_heads=1, tied=True, complement=True, rotary=0.5),
    LoLCATs(window=20, features=8, heads=4, kv_heads=1, share=0.5, gate="head", rotary=0.0),
]


def build(spec: LoLCATs, frame: Frame = FRAME) -> LoLCATsMixer:
    mixer = spec.build(frame)
    assert isinstance(mixer, LoLCATsMixer)
    with torch.no_grad():
        mixer.share += 0.5 * torch.randn_like(mixer.share)
    return mixer


def teacher_of(spec: Full | Window, frame: Frame = FRAME) -> Any:
    mixer = spec.build(frame)
    assert isinstance(mixer, FullMixer | WindowMixer)
    with torch.no_grad():
        # Sharper scores than a fresh layer's, so that attention has something to pass on.
        mixer.query.weight.mul_(2.0)
        mixer.key.weight.mul_(2.0)
    return mixer


def hedgehog(x: Tensor, matrix: Tensor) -> Tensor:
    logits = x @ matrix.double()
    return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], dim=-1)


@torch.no_grad()
def heads_by_hand(mixer: LoLCATsMixer, x: Tensor, spec: LoLCATs) -> Tensor:
    """The formula with all pairs of tokens at once, in float64: [B, T, H, K]."""
    q, k, v = (part.double() for part in mixer.project(x, 0))
    assert spec.window
    heads, groups, size = q.shape[2], k.shape[2], q.shape[3]
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    near, old = (distance >= 0) & (distance < spec.window), distance >= spec.window
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        key, value = k[:, :, group], v[:, :, group]
        scores = (q[:, :, head] @ key.mT / math.sqrt(size)).masked_fill(~near, -torch.inf)
        share = torch.sigmoid(mixer.share[head].double())
        kernel = share * (scores - scores.amax(-1, keepdim=True)).exp()
        asked = hedgehog(q[:, :, head], mixer.query_map.weight[head])
        written = hedgehog(key, mixer.key_map.weight[group if spec.tied else head])
        linear = (asked @ written.mT) * old
        kernel = kernel + (linear * (1 - share) if spec.complement else linear)
        outputs.append(kernel @ value / kernel.sum(-1, keepdim=True))
    return torch.stack(outputs, dim=2)


def stepped(mixer: Any, x: Tensor) -> Tensor:
    state, outputs = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_formula_written_out(spec: LoLCATs, far: Far) -> None:
    mixer = build(spec)
    assert spec.window
    for length in (1, spec.window, spec.window + 1, 75):
        x = 2 * torch.randn(2, length, 64)
        with torch.no_grad():
            wanted = mixer.finish(heads_by_hand(mixer, x, spec).float(), x)
            assert far(mixer(x)[0], wanted) < 5e-6
            assert far(stepped(mixer, x), wanted) < 5e-6


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "change", [{}, {"qk_norm": True, "gate": True}, {"rotary": 0.25}, {"position": "none"}]
)
def test_a_window_as_long_as_the_text_is_full_attention(change: dict[str, Any], kv_heads: int) -> None:
    full = teacher_of(Full(heads=4, kv_heads=kv_heads, **change))
    for window, same in ((76, True), (200, True), (72, False)):
        mixer = linearise(full, LoLCATs(window=window))
        x = torch.randn(2, 75, 64)
        with torch.no_grad():
            wanted, got = full(x)[0], mixer(x)[0]
            error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert (error < 4e-7) if same else (error > 1e-4)
            torch.testing.assert_close(got[:, :72], wanted[:, :72], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_without_share_it_is_linear_attention_over_what_left_the_window(tied: bool, far: Far) -> None:
    spec = LoLCATs(window=8, features=8, heads=4, kv_heads=2, tied=tied)
    mixer, x = build(spec), torch.randn(2, 40, 64)
    with torch.no_grad():
        mixer.share.fill_(-40.0)
        q, k, v = mixer.project(x, 0)
        got, _ = mixer.attend(q, k, v, None)
        keys = k if tied else k.repeat_interleave(2, 2)
        written = mixer.key_map(keys).repeat_interleave(2 if tied else 1, 2)
        asked, values = mixer.query_map(q), v.repeat_interleave(2, 2)
        for t in (8, 9, 30, 39):
            weights = torch.einsum("bhf,bshf->bhs", asked[:, t], written[:, : t - 7])
            wanted = torch.einsum("bhs,bshv->bhv", weights, values[:, : t - 7]) / weights.sum(
                -1, keepdim=True
            )
            assert far(got[:, t], wanted) < 1e-5
        # What is in the window is not seen: neither the token itself nor those before it.
        other = v.clone()
        other[:, 23:31] += 5.0
        assert torch.equal(mixer.attend(q, k, other, None)[0][:, 30], got[:, 30])
        assert far(mixer.attend(q, k, other, None)[0][:, 31], got[:, 31]) > 1e-2
        # The whole share of what is near, and nothing old is.
        mixer.share.fill_(40.0)
        near = mixer.attend(1000 * q, k, v, None)[0]
        assert near.isfinite().all()


@pytest.mark.parametrize(("share", "logit"), [(0.1, -2.197), (0.5, 0.0)])
def test_shares_begin_as_published(share: float, logit: float) -> None:
    mixer = LoLCATs(share=share).build(FRAME)
    assert isinstance(mixer, LoLCATsMixer)
    assert mixer.share.tolist() == pytest.approx([logit] * len(mixer.share), abs=1e-3)


def test_features_are_positive_and_sum_to_two() -> None:
    mixer = build(LoLCATs(window=8, features=8, heads=4))
    made = mixer.query_map(100 * torch.randn(2, 5, 4, 16))
    assert made.shape == (2, 5, 4, 16) and made.min() >= 1e-12
    torch.testing.assert_close(made.sum(-1), torch.full((2, 5, 4), 2.0))


def test_the_price_at_the_published_size() -> None:
    """Llama-3-8B's layer: 32 heads of 128, 8 of them keys', a window of 64 and 128 features."""
    frame = Frame(width=4096, train_length=1024, context=8192)
    spec = LoLCATs(kv_heads=8)
    sized = spec.sized(frame)
    assert (sized.heads, sized.head_dim, sized.window, sized.features) == (32, 128, 64, 64)
    cost, tied = spec.cost(frame), replace(spec, tied=True).cost(frame)
    ring, sums = 2 * 8 * (128 + 128) * 64, 4 * 32 * (128 * 128 + 128)
    assert cost.stored_bytes == cost.read_bytes == ring + sums
    assert tied.stored_bytes == ring + sums // 4
    weights, maps = 4096 * 128 * (32 + 8 + 8 + 32), 2 * 32 * 128 * 64
    assert cost.params == weights + maps + 32
    assert tied.params == weights + 40 * 128 * 64 + 32
    near, far = 2 * 32 * 256 * 64, 4 * 32 * 128 * 129
    assert cost.flops_decode == 2 * weights + 2 * maps + near + far
    within = 32 * (128 + 129) * 64
    seen = 64 - 64 * 63 / (2 * 8192)
    assert cost.flops_prefill == pytest.approx(
        2 * weights + 2 * 32 * 256 * seen + (2 * maps + far + within) * (8192 - 64) / 8192
    )
    # Nothing has left the window yet.
    short = spec.cost(replace(frame, context=64))
    assert short.flops_decode == 2 * weights + near
    assert short.flops_prefill == 2 * weights + 2 * 32 * 256 * 32.5


@torch.no_grad()
def test_settings_change_what_is_read(far: Far) -> None:
    x, base = torch.randn(1, 75, 64), LoLCATs(window=8, features=16, heads=4)
    made = build(base)
    for change in ({"window": 12}, {"complement": True}, {"rotary": 0.5}, {"qk_norm": True}):
        other = replace(base, **change).build(FRAME)
        other.load_state_dict(made.state_dict(), strict=False)
        assert far(other(x)[0], made(x)[0]) > 1e-3, change


def test_shrinking_keeps_a_window_and_features() -> None:
    target = Frame(width=4096, train_length=4096)
    for window, features in ((64, 64), (2048, 8), (16, 128)):
        proxy = replace(FRAME, train_length=32)
        small = shrink(LoLCATs(window=window, features=features, kv_heads=8), target, proxy)
        assert small.window and 4 <= small.window < 32 and small.features and small.features >= 8
        assert small.build(proxy)(torch.randn(1, 40, 64))[0].isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        Full(heads=4, kv_heads=2, qk_norm=True, gate="head"),
        Full(heads=4),
        Window(size=32, heads=4, kv_heads=1, gate=True),
    ],
    ids=str,
)
def test_attention_transfer_learns_maps_and_shares_alone(spec: Any) -> None:
    teacher = teacher_of(spec)
    student = linearise(teacher, LoLCATs(window=8, features=16, tied=True))
    weights = transfer_parameters(student)
    own = teacher.state_dict()
    frozen = {name: w.clone() for name, w in student.state_dict().items() if name in own}
    assert frozen.keys() == own.keys()
    x, fresh = torch.randn(4, 64, 64), torch.randn(4, 64, 64)
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    with torch.no_grad():
        first = attention_transfer_loss(teacher, student, fresh).item()
    for number in range(60):
        loss = attention_transfer_loss(teacher, student, x)
        optimiser.zero_grad()
        loss.backward()
        assert number or all(w.grad is not None and w.grad.abs().max() > 0 for w in weights)
        optimiser.step()
    with torch.no_grad():
        last = attention_transfer_loss(teacher, student, fresh).item()
    assert last < 0.8 * first, (first, last)
    assert all(w.grad is None for w in teacher.parameters())
    assert sum(w.requires_grad for w in student.parameters()) == len(weights) == 3
    for name, weight in frozen.items():
        assert torch.equal(student.state_dict()[name], weight) and torch.equal(own[name], weight)


def test_the_transfer_loss_is_the_mean_square_of_what_heads_differ_by() -> None:
    teacher = teacher_of(Full(heads=4, kv_heads=2))
    spec = LoLCATs(window=8, features=16)
    student, x = linearise(teacher, spec), torch.randn(2, 30, 64)
    with torch.no_grad():
        q, k, v = (part.double() for part in teacher.project(x, 0))
        scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / 4
        scores = scores.masked_fill(torch.ones(30, 30).triu(1) > 0, -torch.inf)
        wanted = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v.repeat_interleave(2, 2))
        loss = (heads_by_hand(student, x, spec) - wanted).square().mean().item()
    assert attention_transfer_loss(teacher, student, x).item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Full(position="alibi"), "position=alibi"),
        (Full(position="xpos"), "position=xpos"),
        (Full(soft_cap=30), "soft cap"),
        (Full(learned_sink=True), "learned sink"),
        (Window(sinks=4), "sinks"),
        (Window(size=64, heads=4, spans="halving"), "windows by head"),
    ],
)
def test_what_the_hybrid_has_not_is_refused(teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearise(teacher.build(FRAME), LoLCATs())


def test_other_heads_and_short_texts_are_refused() -> None:
    teacher = teacher_of(Full(heads=4))
    with pytest.raises(ValueError, match="heads=8 is not valid: the teacher has 4"):
        linearise(teacher, LoLCATs(heads=8))
    student = linearise(teacher, LoLCATs(window=8, heads=4))
    with pytest.raises(ValueError, match="8 tokens fits the student's window of 8"):
        attention_transfer_loss(teacher, student, torch.randn(1, 8, 64))

"""Mamba-2's options, Mamba-3 and quasi-linear attention: loops and formulas written out, special cases, prices."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.scalar_decay.ops import scalar_decay
from search_space.frame import Frame
from search_space.mixers.mamba2 import Mamba2, Mamba2Mixer, signed
from search_space.mixers.mamba3 import Mamba3, Mamba3Mixer
from search_space.mixers.qla import QLA, QLAMixer
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def stepped(mixer: Any, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def cost_of(text: str, frame: Frame) -> Any:
    return mixer_of(read(text).layers[0].branches[0]).cost(frame)


def normed(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def mamba2_written_out(mixer: Mamba2Mixer, x: Tensor, decay: Callable[[Tensor], Tensor]) -> Tensor:
    """Token by token, without a convolution; decay makes a factor of the rate times the step."""
    entered = mixer.enter(x)
    z, mixed, dt = (
        entered[..., :96],
        F.silu(entered[..., 96:-4]),
        F.softplus(entered[..., -4:] + mixer.step_bias),
    )
    inputs, write, read_ = mixed[..., :96].unflatten(-1, (4, 24)), mixed[..., 96:112], mixed[..., 112:]
    matrix, rows = torch.zeros(2, 4, 16, 24), []
    for t in range(x.shape[1]):
        fade = decay(mixer.log_rate.exp() * dt[:, t])
        added = write[:, t, None, :, None] * inputs[:, t, :, None] * dt[:, t, :, None, None]
        matrix = fade[..., None, None] * matrix + added
        rows.append((read_[:, t, None, :, None] * matrix).sum(2) + mixer.skip[:, None] * inputs[:, t])
    y = torch.stack(rows, dim=1).flatten(2) * F.silu(z)
    return mixer.out(normed(y) * mixer.norm_weight)


@pytest.mark.parametrize("negative", [False, True])
def test_mamba2_without_convolution_written_out(small: Frame, negative: bool, far: Far, shake: Shake) -> None:
    mixer = Mamba2(state=16, heads=4, head_dim=24, taps=0, negative=negative).build(small)
    assert isinstance(mixer, Mamba2Mixer)
    shake(mixer)
    # Steps large enough for decays on both sides of nought.
    mixer.step_bias.copy_(torch.tensor([-4.0, -2.0, -1.0, 0.0]))
    x = x_of()
    decay = (lambda a: 2 * torch.exp(-a) - 1) if negative else (lambda a: torch.exp(-a))
    wanted = mamba2_written_out(mixer, x, decay)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4
    with torch.enable_grad():
        cotangent = torch.randn_like(x)
        found = torch.autograd.grad((mixer(x)[0] * cotangent).sum(), list(mixer.parameters()))
        exact = mamba2_written_out(mixer, x, decay)
        expected = torch.autograd.grad((exact * cotangent).sum(), list(mixer.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert far(a, b) < 1e-3


def test_a_signed_decay_spans_both_signs() -> None:
    wanted = torch.tensor([1.0, 0.9, 0.1, 1e-3, -1e-3, -0.1, -0.9, -1.0], dtype=torch.float64)
    magnitude, sign = signed((wanted / 2 + 0.5).clamp(min=1e-30).log())
    torch.testing.assert_close(magnitude.exp() * sign, wanted, rtol=0, atol=1e-6)
    assert (magnitude <= 0).all()
    at_nought, _ = signed(torch.tensor([-math.log(2.0)]))
    assert at_nought.isfinite().all() and at_nought < -13


def test_the_chunk_of_mamba2_is_its_price_and_not_its_meaning(small: Frame, far: Far) -> None:
    mixers = [Mamba2(chunk=chunk).build(small) for chunk in (None, 16, 32, 64, 128, 256)]
    x = x_of(length=140)
    for mixer in mixers[1:]:
        mixer.load_state_dict(mixers[0].state_dict())
        assert far(mixer(x)[0], mixers[0](x)[0]) < 1e-5
    one, two = (cost_of(f"mamba2[chunk={chunk}]", Frame(width=2048)) for chunk in (64, 128))
    assert two.flops_prefill - one.flops_prefill == 2 * 64 * (64 * 128 + 4096)
    assert two.flops_decode == one.flops_decode and two.params == one.params
    # The root of 128 × 64 numbers of a head, rounded down to a power of two; of 8 × 8, no less than 16.
    assert [Mamba2().sized(Frame(width=width)).chunk for width in (2048, 64)] == [64, 16]


def test_mamba2_without_convolution_by_hand() -> None:
    cost = cost_of("mamba2[taps=0]", Frame(width=2048))
    assert [tensor.name for tensor in cost.cache] == ["matrix"]
    assert cost.params == 2048 * (2 * 4096 + 256 + 64) + 3 * 64 + 4096 + 4096 * 2048


def mamba3_written_out(mixer: Mamba3Mixer, x: Tensor) -> Tensor:
    """The recurrence as its authors write it: S ← α S + (1 − λ) Δ α k' v'ᵀ + λ Δ k vᵀ, token by token and head by head."""
    ranks, count, width, size = mixer.rank, mixer.heads, mixer.head_dim, mixer.state_size
    inner, shared, turning = count * width, ranks * mixer.groups * size, mixer.widths[-1]
    entered = mixer.enter(x).split([inner, inner, shared, shared, count, count, count, turning], dim=-1)
    dt = F.softplus(entered[4] + mixer.step_bias)
    rate = torch.where(entered[5] >= 0, 1 + entered[5], 1 / (1 - entered[5]))
    share = torch.sigmoid(entered[6])
    ones = torch.ones(ranks, count, width)
    spread, gates, gather = (
        ones if weight is None else weight for weight in (mixer.spread, mixer.gate_spread, mixer.gather)
    )
    y = torch.zeros(x.shape[0], x.shape[1], count, width)
    for head in range(count):
        group = head * mixer.groups // count
        part = slice(head * width, (head + 1) * width)
        z, value = entered[0][..., part], entered[1][..., part]
        b, c = (entry.unflatten(-1, (ranks, mixer.groups, size))[..., group, :] for entry in entered[2:4])
        b = normed(b) * mixer.write_norm.weight + mixer.write_bias[:, head]
        c = normed(c) * mixer.read_norm.weight + mixer.read_bias[:, head]
        matrix, angle = torch.zeros(x.shape[0], size, width), torch.zeros(x.shape[0], turning)
        before = torch.zeros_like(matrix)
        for t in range(x.shape[1]):
            angle = angle + math.pi * torch.tanh(entered[7][:, t]) * dt[:, t, head, None]
            k, q = (turned(vector[:, t], angle) for vector in (b, c))
            v = value[:, t, None] * spread[:, head]
            now = torch.einsum("brn,brp->bnp", k, v)
            fade = torch.exp(-rate[:, t, head] * dt[:, t, head])[:, None, None]
            step, mix = dt[:, t, head, None, None], share[:, t, head, None, None]
            matrix = fade * matrix + (1 - mix) * step * fade * before + mix * step * now
            seen = torch.einsum("brn,bnp->brp", q, matrix) + mixer.skip[head] * v
            if mixer.norm_weight is not None:
                seen = normed(seen) * mixer.norm_weight[head]
            y[:, t, head] = (gather[:, head] * seen * F.silu(z[:, t, None] * gates[:, head])).sum(1)
            before = now
    return mixer.out(y.flatten(2))


def turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Neighbouring channels of [B, R, N] turned by angles [B, A]; the others stay."""
    vectors = vectors.clone()
    even, odd = (
        vectors[..., : 2 * angle.shape[-1] : 2].clone(),
        vectors[..., 1 : 2 * angle.shape[-1] : 2].clone(),
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    vectors[..., : 2 * angle.shape[-1] : 2] = even * cos - odd * sin
    vectors[..., 1 : 2 * angle.shape[-1] : 2] = even * sin + odd * cos
    return vectors


def mamba3(frame: Frame, **settings: Any) -> Mamba3Mixer:
    """A small one whose every parameter is off its initial value, and whose angles turn several times."""
    mixer = Mamba3(**{"state": 16, "heads": 4, "head_dim": 24, **settings}).build(frame)
    assert isinstance(mixer, Mamba3Mixer)
    for weight in mixer.parameters():
        if weight is not mixer.enter.weight and weight is not mixer.out.weight:
            weight.add_(0.3 * torch.randn_like(weight))
    mixer.step_bias.copy_(torch.linspace(-4, 1, mixer.heads))
    return mixer


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("rotary", "groups", "norm"), [(0.5, 1, False), (1.0, 2, True)])
def test_mamba3_is_its_recurrence_written_out(
    small: Frame, rank: int, rotary: float, groups: int, norm: bool, far: Far
) -> None:
    mixer = mamba3(small, rank=rank, rotary=rotary, groups=groups, norm=norm)
    x = x_of()
    wanted = mamba3_written_out(mixer, x)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4
    if norm:
        return
    with torch.enable_grad():
        cotangent = torch.randn_like(x)
        found = torch.autograd.grad((mixer(x)[0] * cotangent).sum(), list(mixer.parameters()))
        exact = mamba3_written_out(mixer, x)
        expected = torch.autograd.grad((exact * cotangent).sum(), list(mixer.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert far(a, b) < 1e-3


def test_mamba3_without_turns_and_late_writes_is_a_scalar_decay(small: Frame, far: Far) -> None:
    mixer = mamba3(small)
    x = x_of()
    x[..., 0] = 1
    starts = torch.tensor([0, *mixer.widths]).cumsum(0)
    # Every token's write comes at once, because its share is a sigmoid of 30; and no angle turns.
    mixer.enter.weight[starts[6] : starts[8]] = 0
    mixer.enter.weight[starts[6] : starts[7], 0] = 30
    gate, value, k, q, log_decay, late, fresh, turn = mixer.scan_inputs(x)
    assert late.abs().max() < 1e-6 and turn.abs().max() == 0
    scanned, _ = scalar_decay(q[:, :, 0], k[:, :, 0], value * fresh[..., None], log_decay)
    y = (scanned + value * mixer.skip[:, None]) * F.silu(gate)
    assert far(mixer(x)[0], mixer.out(y.flatten(2))) < 1e-4


def test_a_second_rank_that_writes_and_reads_nothing_changes_nothing(small: Frame, far: Far) -> None:
    one, two = mamba3(small), mamba3(small, rank=2)
    assert two.spread is not None and two.gather is not None and two.gate_spread is not None
    sizes = list(one.widths)
    parts = list(two.enter.weight.split(two.widths))
    for index, part in enumerate(one.enter.weight.split(sizes)):
        parts[index][: len(part)] = part
    for name in ("write_bias", "read_bias"):
        getattr(two, name)[:1] = getattr(one, name)
    for name in ("step_bias", "skip"):
        getattr(two, name).copy_(getattr(one, name))
    for name in ("write_norm", "read_norm", "out"):
        getattr(two, name).load_state_dict(getattr(one, name).state_dict())
    for weight in (two.spread, two.gate_spread, two.gather):
        weight[0], weight[1] = 1, 0
    x = x_of()
    assert far(two(x)[0], one(x)[0]) < 1e-5
    two.spread[1] = 1
    two.gather[1] = 1
    two.gate_spread[1] = 1
    assert far(two(x)[0], one(x)[0]) > 1e-2


def test_a_long_mamba3_keeps_its_angle(small: Frame) -> None:
    """After some thousand tokens and hundreds of turns, the angle is still exact."""
    mixer = mamba3(small, rotary=1.0)
    mixer.step_bias.fill_(2.0)
    x = x_of(batch=1, length=3000)
    _, whole = mixer(x, mixer.start(1, 3000))
    *_, turn = mixer.scan_inputs(x)
    exact = turn.double().sum(1)
    assert exact.abs().max() > 200
    wrong = torch.polar(torch.ones_like(exact), whole.angle.double() - exact)
    assert (wrong - 1).abs().max() < 1e-5
    assert ((whole.angle >= 0) & (whole.angle <= 2 * math.pi)).all()


def test_mamba3_by_hand() -> None:
    frame = Frame(width=2048)
    cost = cost_of("mamba3[rank=4]", frame)
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "matrix": 64 * 128 * 64 * 4,
        "angle": 64 * 32 * 4,
        "key": 4 * 64 * 128 * 2,
        "value": 4096 * 2,
    }
    enter = 2048 * (2 * 4096 + 2 * 4 * 128 + 3 * 64 + 32)
    assert cost.params == enter + 4096 * 2048 + 2 * 128 + 2 * 4 * 64 * 128 + 2 * 64 + 3 * 4 * 4096
    # A step: fade once, twice four rows written and four read, two FLOPs each.
    dense = 2 * (enter + 4096 * 2048)
    assert cost.flops_decode == dense + 64 * 128 * 64 * (1 + 16 + 8)
    one = cost_of("mamba3", frame)
    assert one.flops_decode - 2 * 2048 * (3 * 4096 + 2 * 128 + 3 * 64 + 32) == 64 * 128 * 64 * 7
    assert one.stored_bytes == 64 * (128 * 64 * 4 + 32 * 4 + 128 * 2 + 64 * 2)
    full, half = (Mamba3(state=64, rotary=share).sized(frame).widths[-1] for share in (1.0, 0.5))
    assert (full, half) == (32, 16)


def quasi_linear_inputs(mixer: QLAMixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (layer(x).unflatten(-1, (mixer.heads, -1)) for layer in (mixer.query, mixer.key, mixer.value))
    return q * torch.sigmoid(q), k * torch.sigmoid(k), v


def quasi_linear_out(mixer: QLAMixer, found: Tensor, x: Tensor) -> Tensor:
    y = (normed(found) * mixer.norm.weight).flatten(2)
    return mixer.out(y if mixer.gate is None else y * torch.sigmoid(mixer.gate(x)))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(
    ("block", "activation", "scaling"),
    [(1, "identity", "mean"), (16, "identity", "none"), (64, "identity", "mean"), (64, "silu", "none")],
)
def test_quasi_linear_attention_that_is_linear(
    small: Frame, block: int, activation: str, scaling: str, gate: bool, far: Far, shake: Shake
) -> None:
    spec = QLA(heads=4, block=block, activation=activation, scaling=scaling, gate=gate)
    mixer = spec.build(small)
    assert isinstance(mixer, QLAMixer)
    shake(mixer)
    # One block of 64 holds the text: nothing was folded that an activation could bend.
    x = x_of(length=64 if activation == "silu" else LENGTH)
    q, k, v = quasi_linear_inputs(mixer, x)
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril()
    wanted = quasi_linear_out(mixer, torch.einsum("bhts,bshk->bthk", weights, v), x)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("scaling", ["mean", "none", "decay"])
def test_quasi_linear_attention_written_out(
    small: Frame, block: int, scaling: str, far: Far, shake: Shake
) -> None:
    mixer = QLA(heads=4, block=block, scaling=scaling).build(small)
    assert isinstance(mixer, QLAMixer)
    shake(mixer)
    x = x_of()
    q, k, v = quasi_linear_inputs(mixer, x)
    gamma = torch.ones(4) if mixer.log_rate is None else torch.exp(-mixer.log_rate.exp())
    found = torch.zeros_like(v)
    for t in range(LENGTH):
        start = t // block * block
        age = gamma ** (t - torch.arange(t + 1.0))[:, None]
        # The history, as it stood when this block began, then the open block.
        sums = torch.einsum("bshk,sh,bshv->bhkv", k[:, :start], age[t + 1 - start : t + 1], v[:, :start])
        count = max(1, start) if scaling == "mean" else 1
        bent = count * F.silu(sums / count) * gamma[:, None, None] ** (t - start + 1)
        near = torch.einsum(
            "bhk,bshk,sh,bshv->bhv", q[:, t], k[:, start : t + 1], age[start:], v[:, start : t + 1]
        )
        found[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], bent) + near
    wanted = quasi_linear_out(mixer, found, x)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4


def test_quasi_linear_settings_change_something(small: Frame, far: Far) -> None:
    x = x_of()
    first = QLA(heads=4).build(small)
    for other in (QLA(heads=4, block=1), QLA(heads=4, activation="identity"), QLA(heads=4, scaling="none")):
        mixer = other.build(small)
        mixer.load_state_dict(first.state_dict())
        assert far(mixer(x)[0], first(x)[0]) > 1e-3


def test_quasi_linear_by_hand() -> None:
    cost = cost_of("qla[heads=16,head_dim=128,block=64]", Frame(width=2048, context=9, batch=3))
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "matrix": 3 * 16 * 128 * 128 * 4,
        "keys": 3 * 64 * 2048 * 2,
        "values": 3 * 64 * 2048 * 2,
    }
    assert cost.params == 5 * 2048 * 2048 + 128
    mixing = 4 * 16 * 128 * 128 + 2 * 16 * 256 * 65 / 2
    assert cost.flops_decode == 2 * 5 * 2048 * 2048 + mixing + 16 * 128 * 128
    assert cost.flops_prefill == 2 * 5 * 2048 * 2048 + mixing + 16 * 128 * 128 / 64
    assert cost_of("qla[gate=false,scaling=decay]", Frame(width=2048)).params == 4 * 2048 * 2048 + 128 + 16

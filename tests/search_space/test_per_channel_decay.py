"""Mixers whose state fades by key channel: their recurrences written out, what they have in common, their prices."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame, Place
from search_space.mixers.gla import GLA, GLAMixer
from search_space.mixers.hgrn2 import HGRN2, HGRN2Mixer
from search_space.mixers.rwkv6 import RWKV6, RWKV6Mixer
from search_space.spec import Mixer

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def scatter(module: nn.Module) -> None:
    """Move every parameter off its initial value, so that no small or constant one hides a fault."""
    for weight in module.parameters():
        weight.add_(0.1 * torch.randn_like(weight))


def at(frame: Frame, index: int, depth: int) -> Frame:
    return replace(frame, place=Place(index=index, depth=depth))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def naive_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ and o_t = S_tᵀ q_t / √K, one row and head at a time; α [B, T, H, K]."""
    read = torch.zeros_like(v)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            memory = torch.zeros(q.shape[-1], v.shape[-1])
            for t in range(q.shape[1]):
                at_t = row, t, head
                memory = torch.diag(decay[at_t]) @ memory + torch.outer(k[at_t], v[at_t])
                read[at_t] = q[at_t] @ memory / q.shape[-1] ** 0.5
    return read


def naive_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Token by token: SiLU of the taps times the last inputs, the last tap on the newest."""
    rows = []
    for t in range(x.shape[1]):
        total = sum(taps[:, -1 - back] * x[:, t - back] for back in range(min(taps.shape[1], t + 1)))
        assert isinstance(total, Tensor)
        rows.append(total * torch.sigmoid(total))
    return torch.stack(rows, dim=1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def stepped(mixer: Mixer, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def same_both_ways(mixer: Mixer, x: Tensor, wanted: Tensor, far: Far) -> None:
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4


def gla_inputs(mixer: GLAMixer, x: Tensor, temperature: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mixed = mixer.enter(x)
    if mixer.taps is not None:
        mixed = naive_convolution(mixed, mixer.taps)
    keys = mixer.heads * mixer.key_dim
    decay = torch.sigmoid(mixer.forget_up(mixer.forget_down(x))) ** (1 / temperature)
    parts = mixed[..., :keys], mixed[..., keys : 2 * keys], mixed[..., 2 * keys :], decay
    q, k, v, decay = (heads(part, mixer.heads) for part in parts)
    return q, k, v, decay


def gla_out(mixer: GLAMixer, read: Tensor, x: Tensor) -> Tensor:
    gate = mixer.gate(x)
    return mixer.out(rms(read, mixer.norm.weight).flatten(2) * gate * torch.sigmoid(gate))


@pytest.mark.parametrize("taps", [0, 4])
@pytest.mark.parametrize("key_ratio", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [4, 16])
def test_gla_is_its_recurrence_written_out(
    small: Frame, taps: int, key_ratio: float, temperature: int, far: Far
) -> None:
    spec = GLA(heads=3, head_dim=24, key_ratio=key_ratio, temperature=temperature, taps=taps, rank=8)
    mixer = spec.build(small)
    assert isinstance(mixer, GLAMixer)
    scatter(mixer)
    x = x_of()
    q, k, v, decay = gla_inputs(mixer, x, temperature)
    assert q.shape[-1] == 24 * key_ratio and v.shape[-1] == 24
    same_both_ways(mixer, x, gla_out(mixer, naive_gla(q, k, v, decay), x), far)


def test_gla_with_a_uniform_gate_has_one_decay_a_head(small: Frame, far: Far) -> None:
    """o_t = Σ_s exp(Λ_t − Λ_s) (q_t·k_s) v_s / √K, with Λ the running sum of one log-decay a head."""
    mixer = GLA(heads=4, head_dim=16).build(small)
    assert isinstance(mixer, GLAMixer)
    mixer.forget_up.weight.copy_(
        mixer.forget_up.weight.view(4, 8, 16)[:, :1].expand(-1, 8, -1).reshape(32, 16)
    )
    mixer.forget_up.bias.copy_(mixer.forget_up.bias.view(4, 8)[:, :1].expand(-1, 8).reshape(32))
    x = x_of()
    q, k, v, decay = gla_inputs(mixer, x, 16)
    assert (decay - decay[..., :1]).abs().max() == 0 < (decay[..., 0] - decay[:, :, :1, 0]).abs().max()
    sums = decay[..., 0].double().log().cumsum(1).transpose(1, 2)
    fade = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril().float()
    weights = torch.einsum("bthk,bshk->bhts", q, k) * fade / 8**0.5
    read = torch.einsum("bhts,bshv->bthv", weights, v)
    assert far(mixer(x)[0], gla_out(mixer, read, x)) < 1e-4


def hgrn2_parts(mixer: HGRN2Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, f, i = (heads(part, mixer.heads) for part in mixer.enter(x).chunk(3, dim=-1))
    return q * torch.sigmoid(q), f, i


@pytest.mark.parametrize(("index", "depth"), [(0, 1), (0, 6), (1, 6), (5, 6)])
def test_hgrn2_is_gla_whose_keys_are_what_the_decay_leaves(
    small: Frame, index: int, depth: int, far: Far
) -> None:
    mixer = HGRN2(heads=3, head_dim=16).build(at(small, index, depth))
    assert isinstance(mixer, HGRN2Mixer)
    scatter(mixer)
    x = x_of()
    q, f, i = hgrn2_parts(mixer, x)
    # The paper's table where its parameters are still noughts: softmax over layers, summed up, less its first entry.
    table = torch.zeros(depth).softmax(0).cumsum(0) - torch.zeros(depth).softmax(0)[0]
    bound = table[index]
    log_decay = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(f))
    read = naive_gla(q, 1 - log_decay.exp(), i, log_decay.exp())
    same_both_ways(mixer, x, mixer.out(rms(read.flatten(2), mixer.norm.weight)), far)


def test_hgrn2_forgets_everything_in_the_first_layer_and_never_below_its_bound_in_later_ones(
    small: Frame,
) -> None:
    x = torch.zeros(1, 12, 64)
    x[..., 0] = 1
    x[:, 1:, 1] = torch.randn(11)
    for index, depth in ((0, 4), (1, 4), (3, 4)):
        mixer = HGRN2(heads=4, head_dim=16).build(at(small, index, depth))
        assert isinstance(mixer, HGRN2Mixer)
        # Gates wide shut by the first input; what was first written fades by the bound at each token and no more.
        mixer.enter.weight[64:128, 0] = -200
        mixer.enter.weight[64:128, 1:] = 0
        bound = index / depth
        _, k, v, log_decay = mixer.scan_inputs(x)
        torch.testing.assert_close(log_decay.exp(), torch.full_like(k, bound))
        torch.testing.assert_close(k, torch.full_like(k, 1 - bound))
        _, state = mixer(x, mixer.start(1, 12))
        past = sum((1 - bound) * bound ** (11 - t) * v[0, t] for t in range(12))
        torch.testing.assert_close(state.matrix[0], past[:, None, :].expand(-1, 16, -1), rtol=1e-4, atol=1e-5)


def test_hgrn2_keeps_a_weighted_mean_of_its_values(small: Frame, far: Far) -> None:
    """Decay and key sum to one: of a value that never changes, all is there but for what the start still holds."""
    mixer = HGRN2(heads=2, head_dim=32).build(at(small, 1, 3))
    assert isinstance(mixer, HGRN2Mixer)
    mixer.enter.weight[128:, 1:] = 0
    x = x_of()
    x[..., 0] = 1
    q, f, i = hgrn2_parts(mixer, x)
    assert (i - i[:1, :1]).abs().max() == 0
    decay = 1 / 3 + 2 / 3 * torch.sigmoid(f)
    read = (q * (1 - decay.cumprod(1))).sum(-1, keepdim=True) * i / 32**0.5
    assert far(mixer(x)[0], mixer.out(rms(read.flatten(2), mixer.norm.weight))) < 1e-4


@pytest.mark.parametrize("rank_ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("index", "depth"), [(0, 1), (3, 4)])
def test_rwkv6_is_its_loop_written_out(
    small: Frame, rank_ratio: float, index: int, depth: int, far: Far
) -> None:
    mixer = RWKV6(heads=3, head_dim=16, rank_ratio=rank_ratio).build(at(small, index, depth))
    assert isinstance(mixer, RWKV6Mixer)
    scatter(mixer)
    x = x_of()
    rank = int(8 * rank_ratio)
    w = dict(mixer.named_parameters())
    assert w["shift_up"].shape == (5, rank, 64) and w["decay_down.weight"].shape == (2 * rank, 64)
    wanted = torch.zeros_like(x)
    for row in range(2):
        memory, last = torch.zeros(3, 16, 16), torch.zeros(64)
        for t in range(LENGTH):
            now = x[row, t]
            low = torch.tanh(w["shift_down.weight"] @ (now + (last - now) * w["shift"]))
            seen = [
                now + (last - now) * (w["shifts"][i] + low[i * rank : (i + 1) * rank] @ w["shift_up"][i])
                for i in range(5)
            ]
            d = w["decay"] + w["decay_up.weight"] @ torch.tanh(w["decay_down.weight"] @ seen[0])
            k, v, r = (
                (w[f"{name}.weight"] @ seen[i]).view(3, 16)
                for name, i in (("key", 1), ("value", 2), ("query", 3))
            )
            gate = w["gate.weight"] @ seen[4]
            decay, read = torch.exp(-torch.exp(d)).view(3, 16), torch.zeros(3, 16)
            for head in range(3):
                outer = torch.outer(k[head], v[head])
                read[head] = r[head] @ (memory[head] + w["bonus"][head][:, None] * outer)
                memory[head] = decay[head][:, None] * memory[head] + outer
            normed = F.group_norm(read.view(1, 48), 3, w["norm_weight"], w["norm_bias"], eps=64e-5)[0]
            wanted[row, t] = w["out.weight"] @ (normed * gate * torch.sigmoid(gate))
            last = now
    same_both_ways(mixer, x, wanted, far)


def test_rwkv6_starts_with_the_published_values_of_its_place(small: Frame) -> None:
    layers, width = 8, 64
    for index in range(layers):
        mixer = RWKV6(heads=4, head_dim=16).build(at(small, index, layers))
        assert isinstance(mixer, RWKV6Mixer)
        up, down = index / (layers - 1), 1 - index / layers
        for n in (0, 1, 17, width - 1):
            share = 1 - (n / width) ** down
            half = 1 - (n / width) ** (0.5 * down)
            mixtures = mixer.shifts[:, n].tolist()
            assert mixtures == pytest.approx([share, share, share - 0.3 * up, half, half], abs=1e-6)
            assert mixer.shift[n].item() == pytest.approx(share, abs=1e-6)
            speed = -6 + 5 * (n / (width - 1)) ** (0.7 + 1.3 * up)
            assert mixer.decay[n].item() == pytest.approx(speed, abs=1e-5)
            bonus = up * (1 - n / (width - 1)) + ((n + 1) % 3 - 1) * 0.1
            assert mixer.bonus.flatten()[n].item() == pytest.approx(bonus, abs=1e-6)


def test_rwkv6_stands_any_decay(small: Frame) -> None:
    """Beyond every exponent nothing is left of a channel, and gradients stay numbers."""
    mixer = RWKV6(heads=4, head_dim=16).build(small)
    assert isinstance(mixer, RWKV6Mixer)
    for bias in (4.0, 9.0, 100.0):
        mixer.decay.fill_(bias)
        x = x_of()
        with torch.enable_grad():
            y, state = mixer(x.requires_grad_(), mixer.start(2, LENGTH))
            grads = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
        assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        # Only the last token is in the state.
        _, k, v, log_decay, _ = mixer.scan_inputs(x[:, -1], x[:, -2])
        assert log_decay.max() < -10
        torch.testing.assert_close(state.matrix, k[..., None] * v[..., None, :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        (GLA(rank=8), GLA(rank=8, temperature=4)),
        (GLA(rank=8), GLA(rank=24)),
        (GLA(rank=8), GLA(rank=8, key_ratio=1.0)),
        (GLA(rank=8), GLA(rank=8, taps=4)),
        (HGRN2(), HGRN2(head_dim=32)),
        (RWKV6(), RWKV6(rank_ratio=2.0)),
        (RWKV6(), RWKV6(head_dim=32)),
    ],
    ids=str,
)
def test_every_setting_changes_something(small: Frame, spec: Any, other: Any, far: Far) -> None:
    outputs = []
    x = x_of()
    for each in (spec, other):
        torch.manual_seed(3)
        outputs.append(each.build(small)(x)[0])
    assert far(outputs[0], outputs[1]) > 1e-2


def test_the_place_changes_hgrn2s_decay_and_where_rwkv6_starts(small: Frame, far: Far) -> None:
    x = x_of()
    first, last = at(small, 0, 4), at(small, 3, 4)
    bounded, free = HGRN2().build(last), HGRN2().build(first)
    bounded.load_state_dict(free.state_dict())
    assert far(bounded(x)[0], free(x)[0]) > 1e-1
    late, early = RWKV6().build(last), RWKV6().build(first)
    assert not torch.equal(late.state_dict()["decay"], early.state_dict()["decay"])
    late.load_state_dict(early.state_dict())
    assert torch.equal(late(x)[0], early(x)[0])
    for spec in (HGRN2(), RWKV6()):
        assert "depth" in spec.needs and spec.cost(first) == spec.cost(last)


@pytest.mark.parametrize("width", [16, 24, 32, 40, 48, 64, 72, 80, 96])
@pytest.mark.parametrize("spec", [GLA(), GLA(taps=4, key_ratio=1.0), HGRN2(), RWKV6()], ids=str)
def test_narrow_layers_run(width: int, spec: Any) -> None:
    frame = Frame(width=width, train_length=16, context=16, dtype="float32")
    mixer = spec.build(frame)
    assert sum(weight.numel() for weight in mixer.parameters()) == spec.cost(frame).params
    sized = spec.sized(frame)
    assert sized.heads * sized.head_dim == width
    assert mixer(torch.randn(1, 5, width))[0].shape == (1, 5, width)


@pytest.mark.parametrize(
    ("width", "spec", "sizes"),
    [
        (1024, GLA(), {"heads": 4, "head_dim": 256, "rank": 16}),
        (2048, GLA(), {"heads": 4, "head_dim": 512, "rank": 16, "key_dim": 256}),
        (2304, GLA(), {"heads": 4, "head_dim": 576}),
        (2048, GLA(heads=16, key_ratio=1.0), {"heads": 16, "head_dim": 128, "key_dim": 128}),
        (2048, GLA(head_dim=256), {"heads": 8}),
        (64, GLA(), {"heads": 4, "head_dim": 16, "key_dim": 8}),
        (24, GLA(), {"heads": 3, "head_dim": 8, "key_dim": 4}),
        (2048, HGRN2(), {"heads": 16, "head_dim": 128}),
        (2304, HGRN2(), {"heads": 18, "head_dim": 128}),
        (2048, RWKV6(), {"heads": 32, "head_dim": 64}),
        (2560, RWKV6(), {"heads": 40, "head_dim": 64}),
        (4096, RWKV6(), {"heads": 64, "head_dim": 64}),
        (64, RWKV6(), {"heads": 8, "head_dim": 8}),
    ],
)
def test_the_frame_fills_in_the_published_sizes(width: int, spec: Any, sizes: dict[str, int]) -> None:
    sized = spec.sized(Frame(width=width))
    assert {name: getattr(sized, name) for name in sizes} == sizes


def test_gla_by_hand() -> None:
    # The published layer of width 2048: 4 heads, keys of 256 and values of 512, rank 16.
    frame = Frame(width=2048, context=5, batch=3)
    cost = GLA().cost(frame)
    weights = 2 * 2048 * 1024 + 3 * 2048 * 2048 + 2048 * 16 + 16 * 1024
    assert cost.params == weights + 1024 + 512
    assert [(tensor.name, tensor.stored_bytes) for tensor in cost.cache] == [("matrix", 3 * 2 * 2**20)]
    assert cost.flops_decode == 2 * weights + 5 * 4 * 256 * 512
    assert cost.flops_prefill == 2 * weights + 4 * (2 * 64 * (256 + 512) + 4 * 256 * 512)
    convolved = GLA(taps=4).cost(frame)
    assert convolved.params - cost.params == 4 * 4096
    assert convolved.flops_decode - cost.flops_decode == 2 * 4 * 4096
    assert [(tensor.name, tensor.stored_bytes) for tensor in convolved.cache][1:] == [
        ("tail", 3 * 3 * 4096 * 2)
    ]


def test_hgrn2_by_hand() -> None:
    cost = HGRN2().cost(Frame(width=2048, context=7))
    assert cost.params == 4 * 2048 * 2048 + 2048
    assert cost.stored_bytes == cost.read_bytes == 4 * 2048 * 128
    assert cost.flops_decode == 8 * 2048 * 2048 + 5 * 16 * 128 * 128
    assert cost.flops_prefill == 8 * 2048 * 2048 + 16 * (2 * 64 * 256 + 4 * 128 * 128)


@pytest.mark.parametrize(
    ("width", "layers", "shift", "decay", "billions"),
    [(2048, 24, 32, 64, 1.600), (2560, 32, 32, 64, 3.100), (4096, 32, 64, 128, 7.636)],
)
def test_rwkv6_by_hand(width: int, layers: int, shift: int, decay: int, billions: float) -> None:
    cost = RWKV6().cost(Frame(width=width, context=9))
    weights = 5 * width**2 + 2 * 5 * shift * width + 2 * decay * width
    assert cost.params == weights + 6 * width + 4 * width
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "matrix": 256 * width,
        "tail": 2 * width,
    }
    assert cost.flops_decode == 2 * weights + 5 * 64 * width
    assert cost.flops_prefill == 2 * weights + width // 64 * (2 * 64 * 128 + 4 * 64 * 64)
    # The published models: a channel mixer of 3.5 widths with a gate, a vocabulary of 65536 on both ends.
    whole = layers * (cost.params + 8 * width**2) + 2 * 65536 * width
    assert whole == pytest.approx(billions * 1e9, rel=2e-3)

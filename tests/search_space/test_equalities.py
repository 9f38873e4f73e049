"""What must be equal: special cases of one mixer that are another formula, written here on its own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.full import Full, FullMixer
from search_space.mixers.kda import KDA, KDAMixer
from search_space.mixers.linear import Linear, LinearMixer
from search_space.mixers.mamba2 import Mamba2, Mamba2Mixer
from search_space.mixers.mla import MLA, MLAMixer
from search_space.mixers.window import Window, WindowMixer
from search_space.parallel import Parallel
from search_space.positions import Positions, Scaling

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))


@pytest.mark.parametrize("size", [LENGTH + 2, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_window_as_long_as_the_text_is_full_attention(
    small: Frame, size: int, kv_heads: int, far: Far
) -> None:
    full = Full(kv_heads=kv_heads, qk_norm=True, rotary=0.5).build(small)
    window = Window(size=size, kv_heads=kv_heads, qk_norm=True, rotary=0.5).build(small)
    window.load_state_dict(full.state_dict())
    x = x_of()
    assert far(window(x)[0], full(x)[0]) < 1e-5
    shorter = Window(size=LENGTH - 2, kv_heads=kv_heads, qk_norm=True, rotary=0.5).build(small)
    shorter.load_state_dict(full.state_dict())
    y, z = shorter(x)[0], full(x)[0]
    assert far(y[:, : LENGTH - 2], z[:, : LENGTH - 2]) < 1e-5
    assert far(y[:, -1:], z[:, -1:]) > 1e-3


def test_a_window_sees_exactly_its_last_tokens(small: Frame) -> None:
    mixer = Window(size=8).build(small)
    x = x_of()
    y, _ = mixer(x)
    for distance, seen in ((7, True), (8, False), (9, False)):
        changed = x.clone()
        changed[:, 40 - distance] += 1
        assert ((mixer(changed)[0][:, 40] - y[:, 40]).abs().max() > 1e-5) == seen


def test_a_window_of_one_layer_is_full_attention_over_its_last_tokens(small: Frame, far: Far) -> None:
    window, full = Window(size=16, rotary=0.0).build(small), Full(rotary=0.0).build(small)
    window.load_state_dict(full.state_dict())
    x = x_of()
    y, _ = window(x)
    for t in (3, 15, 16, 40, 69):
        assert far(y[:, t], full(x[:, max(0, t - 15) : t + 1])[0][:, -1]) < 1e-5


def test_grouped_keys_are_repeated_keys(small: Frame, far: Far) -> None:
    grouped, whole = Full(kv_heads=2).build(small), Full(kv_heads=4).build(small)
    assert isinstance(grouped, FullMixer) and isinstance(whole, FullMixer)
    weights = dict(grouped.state_dict())
    for name in ("key.weight", "value.weight"):
        weights[name] = weights[name].view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64)
    whole.load_state_dict(weights)
    x = x_of()
    assert far(grouped(x)[0], whole(x)[0]) < 1e-5


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, K] each; one query at a time."""
    rows = []
    for t in range(q.shape[1]):
        scores = (q[:, t, None] * k[:, : t + 1]).sum(-1) / q.shape[-1] ** 0.5
        rows.append((scores.softmax(dim=1)[..., None] * v[:, : t + 1]).sum(1))
    return torch.stack(rows, dim=1)


def naive_turn(x: Tensor, fraction: float, base: float) -> Tensor:
    """Rotary positions by complex numbers; channel i pairs with channel i + half."""
    width = int(x.shape[-1] * fraction) // 2 * 2
    half = width // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:width].double())
    angle = torch.arange(x.shape[1]).double()[:, None] * base ** (
        -2 * torch.arange(half).double() / max(width, 1)
    )
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real.float(), turned.imag.float(), x[..., width:]], dim=-1)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.0])
def test_full_is_attention_written_out(
    small: Frame, fraction: float, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = Full(rotary=fraction, qk_norm=True, gate=True).build(small)
    assert isinstance(mixer, FullMixer) and mixer.gate is not None
    shake(mixer)
    x = x_of()

    def normed(y: Tensor, norm: nn.Module) -> Tensor:
        y = heads(y, 16)
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    q = naive_turn(normed(mixer.query(x), mixer.query_norm), fraction, 1e4)
    k = naive_turn(normed(mixer.key(x), mixer.key_norm), fraction, 1e4)
    seen = naive_attention(q, k, heads(mixer.value(x), 16)).flatten(2)
    assert far(mixer(x)[0], mixer.out(seen * mixer.gate(x).sigmoid())) < 1e-4


def test_an_open_gate_is_no_gate(small: Frame, far: Far) -> None:
    gated, plain = Full(gate=True).build(small), Full().build(small)
    plain.load_state_dict(
        {name: weight for name, weight in gated.state_dict().items() if name != "gate.weight"}
    )
    assert isinstance(gated, FullMixer) and gated.gate is not None
    gated.gate.weight.zero_()
    x = x_of()
    assert far(2 * gated(x)[0], plain(x)[0]) < 1e-5


def test_without_positions_the_order_of_the_past_is_not_seen(small: Frame, far: Far) -> None:
    x = x_of()
    order = torch.cat([torch.randperm(LENGTH - 1), torch.tensor([LENGTH - 1])])
    for spec in (Full(rotary=0.0), MLA(rotary=0.0), Linear()):
        mixer = spec.build(small)
        assert far(mixer(x[:, order])[0][:, -1], mixer(x)[0][:, -1]) < 1e-4
    for spec in (Full(), Full(rotary=0.25), MLA(), Mamba2(), KDA()):
        mixer = spec.build(small)
        assert far(mixer(x[:, order])[0][:, -1], mixer(x)[0][:, -1]) > 1e-3, spec


def rotate(x: Tensor, start: int, *, fraction: float, base: float) -> Tensor:
    return Positions(kind="rope", fraction=fraction, base=base, scaling=Scaling()).turn(x, start)


def test_rotary_positions_are_relative(far: Far) -> None:
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)

    def score(here: int, there: int) -> Tensor:
        turn = {"fraction": 1.0, "base": 1e4}
        return (rotate(q, here, **turn) * rotate(k, there, **turn)).sum(-1)

    assert far(score(40, 33), score(7, 0)) < 1e-5
    assert far(score(40, 33), score(8, 0)) > 1e-3
    # Starting at a position is the same as being there in a longer text.
    x = torch.randn(1, 9, 2, 16)
    assert (
        far(rotate(x[:, 5:], 5, fraction=0.5, base=1e4), rotate(x, 0, fraction=0.5, base=1e4)[:, 5:]) < 1e-6
    )


def test_rotary_is_exact_far_out_and_in_low_precision(far: Far) -> None:
    x = torch.randn(1, 4, 1, 64)
    far_out = rotate(x, 100_000, fraction=1.0, base=1e4)
    angle = (100_000 + torch.arange(4).double())[:, None] * 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
    turned = torch.complex(x[0, :, 0, :32].double(), x[0, :, 0, 32:].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    # A float32 product of position and frequency is off by up to a few thousandths of a turn here.
    assert far(far_out[0, :, 0], torch.cat([turned.real, turned.imag], dim=-1)) < 2e-2
    low = rotate(x.bfloat16(), 100_000, fraction=1.0, base=1e4)
    assert low.dtype == torch.bfloat16
    assert far(low, far_out) < 5e-2


@pytest.mark.parametrize("rotary", [0.0, 1.0])
def test_absorbed_steps_are_the_expanded_forward(
    small: Frame, rotary: float, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = MLA(rank=24, shared=8, heads=3, head_dim=16, rotary=rotary).build(small)
    shake(mixer)
    x = x_of()
    state, rows = mixer.start(2, LENGTH), []
    for t in range(LENGTH):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), mixer(x)[0]) < 1e-5


def test_mla_is_latent_attention_written_out(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = MLA(rank=24, shared=8, heads=3, head_dim=16).build(small)
    assert isinstance(mixer, MLAMixer)
    shake(mixer)
    x = x_of()
    q = heads(mixer.query(x), 24)
    down = mixer.down(x)
    latent = (
        down[..., :24] / (down[..., :24].square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    )
    up = mixer.up.weight.view(3, 2, 16, 24)
    key = torch.einsum("btc,hkc->bthk", latent, up[:, 0])
    value = torch.einsum("btc,hkc->bthk", latent, up[:, 1])
    shared = naive_turn(down[..., None, 24:], 1.0, 1e4).expand(-1, -1, 3, -1)
    q = torch.cat([q[..., :16], naive_turn(q[..., 16:], 1.0, 1e4)], dim=-1)
    seen = naive_attention(q, torch.cat([key, shared], dim=-1), value)
    assert far(mixer(x)[0], mixer.out(seen.flatten(2))) < 1e-4


def test_a_query_latent_is_normalised_between_its_two_matrices(small: Frame, far: Far) -> None:
    low, whole = MLA(query_rank=16).build(small), MLA().build(small)
    assert isinstance(low, MLAMixer) and isinstance(whole, MLAMixer)
    low.query_norm.weight.copy_(1 + 0.3 * torch.randn(16))
    for name in ("down", "norm", "up", "out"):
        getattr(whole, name).load_state_dict(getattr(low, name).state_dict())
    # Inputs whose latents have one length: there the norm is a factor.
    x = x_of()
    x = x / (x @ low.query_down.weight.T).square().mean(-1, keepdim=True).sqrt()
    whole.query.weight.copy_(low.query.weight @ torch.diag(low.query_norm.weight) @ low.query_down.weight)
    assert far(low(x)[0], whole(x)[0]) < 1e-4
    low.query_norm = nn.Identity()
    assert far(low(2 * x)[0], whole(2 * x)[0]) > 1e-3


def test_a_latent_that_loses_nothing_is_attention_without_positions(small: Frame, far: Far) -> None:
    full = Full(kv_heads=2, rotary=0.0).build(small)
    mla = MLA(rank=64, shared=8, heads=4, head_dim=16, rotary=0.0).build(small)
    assert isinstance(full, FullMixer) and isinstance(mla, MLAMixer)
    mla.norm = nn.Identity()  # type: ignore[assignment]
    # The latent is the two key heads and the two value heads; each head picks its own.
    mla.down.weight.zero_()
    mla.down.weight[:64] = torch.cat([full.key.weight, full.value.weight])
    up = torch.zeros(4, 2, 16, 4, 16)
    for head in range(4):
        up[head, 0, :, head // 2] = torch.eye(16)
        up[head, 1, :, 2 + head // 2] = torch.eye(16)
    mla.up.weight.copy_(up.reshape(128, 64))
    # The scale counts the shared part too, so the queries make up for it.
    query = torch.zeros(4, 24, 64)
    query[:, :16] = full.query.weight.view(4, 16, 64) * (24 / 16) ** 0.5
    mla.query.weight.copy_(query.reshape(96, 64))
    mla.out.load_state_dict(full.out.state_dict())
    x = x_of()
    assert far(mla(x)[0], full(x)[0]) < 1e-4


def naive_convolution(x: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Token by token: SiLU of the taps times the last inputs, the last tap on the newest."""
    width, rows = taps.shape[1], []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0]).clone()
        for back in range(min(width, t + 1)):
            total = total + taps[:, width - 1 - back] * x[:, t - back]
        rows.append(total * torch.sigmoid(total))
    return torch.stack(rows, dim=1)


def kda_inputs(mixer: KDAMixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, decays [B, T, H, K] and write strengths [B, T, H] from the paper's formulas."""
    q, k, v = (
        heads(part, mixer.head_dim) for part in naive_convolution(mixer.enter(x), mixer.taps).chunk(3, dim=-1)
    )
    q, k = F.normalize(q, dim=-1) / mixer.head_dim**0.5, F.normalize(k, dim=-1)
    step = F.softplus(mixer.forget_up(mixer.forget_down(x)) + mixer.step_bias)
    decay = torch.exp(-mixer.log_rate.exp()[:, None] * heads(step, mixer.head_dim))
    return q, k, v, decay, torch.sigmoid(mixer.write(x))


def kda_out(mixer: KDAMixer, read: Tensor, x: Tensor) -> Tensor:
    normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return mixer.out(normed.flatten(2) * torch.sigmoid(mixer.gate_up(mixer.gate_down(x))))


def test_kda_is_its_recurrence_written_out(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = KDA(heads=3, head_dim=16).build(small)
    assert isinstance(mixer, KDAMixer)
    shake(mixer)
    x = x_of()
    q, k, v, decay, beta = kda_inputs(mixer, x)
    matrix, rows = torch.zeros(2, 3, 16, 16), []
    for t in range(LENGTH):
        # S = (I - beta k k^T) Diag(a) S + beta k v^T
        erase = torch.eye(16) - beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None]
        matrix = (
            erase @ (decay[:, t, ..., None] * matrix)
            + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        )
        rows.append((q[:, t, :, None] @ matrix)[:, :, 0])
    assert far(mixer(x)[0], kda_out(mixer, torch.stack(rows, dim=1), x)) < 1e-4


def test_kda_with_a_uniform_gate_is_the_gated_delta_rule(small: Frame, far: Far) -> None:
    mixer = KDA(heads=4, head_dim=16).build(small)
    assert isinstance(mixer, KDAMixer)
    # One row of the gate for all channels of a head.
    mixer.forget_up.weight.copy_(
        mixer.forget_up.weight.view(4, 16, 16)[:, :1].expand(-1, 16, -1).reshape(64, 16)
    )
    mixer.step_bias.copy_(mixer.step_bias.view(4, 16)[:, :1].expand(-1, 16).reshape(64))
    x = x_of()
    q, k, v, decay, beta = kda_inputs(mixer, x)
    fade = decay[..., 0]
    torch.testing.assert_close(fade[..., None].expand_as(decay), decay)
    # The gated delta rule, head by head: fade the memory, correct what it holds under this key.
    read = torch.zeros(2, LENGTH, 4, 16)
    for row in range(2):
        for head in range(4):
            memory = torch.zeros(16, 16)
            for t in range(LENGTH):
                memory = fade[row, t, head] * memory
                wrong = v[row, t, head] - k[row, t, head] @ memory
                memory = memory + beta[row, t, head] * torch.outer(k[row, t, head], wrong)
                read[row, t, head] = q[row, t, head] @ memory
    assert far(mixer(x)[0], kda_out(mixer, read, x)) < 1e-4


@pytest.mark.parametrize("feature", ["elu", "relu"])
def test_linear_attention_is_its_quadratic_form(small: Frame, feature: str, far: Far) -> None:
    mixer = Linear(heads=3, head_dim=24, feature=feature).build(small)
    assert isinstance(mixer, LinearMixer)
    x = x_of()
    q, k = (heads(y, 24) for y in (mixer.query(x), mixer.key(x)))
    q, k = (F.relu(q), F.relu(k)) if feature == "relu" else (F.elu(q) + 1, F.elu(k) + 1)
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    read = torch.einsum("bhts,bshk->bthk", weights, heads(mixer.value(x), 24))
    assert far(mixer(x)[0], mixer.out(read.flatten(2))) < 1e-4


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_its_loop_written_out(
    small: Frame, groups: int, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer = Mamba2(state=16, heads=4, head_dim=24, groups=groups).build(small)
    assert isinstance(mixer, Mamba2Mixer)
    shake(mixer)
    x = x_of()
    inner, shared = 96, 16 * groups
    entered = mixer.enter(x)
    z, dt = entered[..., :inner], F.softplus(entered[..., -4:] + mixer.step_bias)
    mixed = naive_convolution(entered[..., inner:-4], mixer.taps, mixer.taps_bias)
    inputs = mixed[..., :inner].unflatten(-1, (4, 24))
    write = mixed[..., inner : inner + shared].unflatten(-1, (groups, 16))
    read = mixed[..., inner + shared :].unflatten(-1, (groups, 16))
    y = torch.zeros(2, LENGTH, 4, 24)
    for head in range(4):
        group, matrix = head * groups // 4, torch.zeros(2, 16, 24)
        for t in range(LENGTH):
            fade = torch.exp(-mixer.log_rate[head].exp() * dt[:, t, head])
            matrix = fade[:, None, None] * matrix + dt[:, t, head, None, None] * (
                write[:, t, group, :, None] * inputs[:, t, head, None]
            )
            y[:, t, head] = (read[:, t, group, :, None] * matrix).sum(1) + mixer.skip[head] * inputs[
                :, t, head
            ]
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * mixer.norm_weight
    assert far(mixer(x)[0], mixer.out(normed)) < 1e-4


def test_branches_side_by_side_are_the_mean_of_their_normalised_outputs(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    one, two = Window(size=8).build(small), Mamba2().build(small)
    both = Parallel([one, two], 64)
    shake(both)
    x = x_of()
    gains = [norm.weight for norm in both.norms]
    outputs = [
        y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        for y, gain in zip((one(x)[0], two(x)[0]), gains, strict=True)
    ]
    assert far(both(x)[0], (outputs[0] + outputs[1]) / 2) < 1e-5


def test_a_fixed_mixer_ignores_the_frame_around_it(small: Frame) -> None:
    spec = KDA(heads=2, head_dim=8)
    torch.manual_seed(1)
    here = spec.build(small)
    torch.manual_seed(1)
    there = spec.build(replace(small, context=7, train_length=4096, batch=3))
    x = x_of(length=9)
    assert torch.equal(here(x)[0], there(x)[0])


def test_windows_know_their_own_type(small: Frame) -> None:
    assert isinstance(Window().build(small), WindowMixer)

"""Delta rules: the mixers against their recurrences written out, their published sizes, and other implementations."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.low_rank_delta.ops import low_rank_delta
from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.mixers.deltanet import DeltaNet, DeltaNetMixer
from search_space.mixers.gated_delta import GatedDelta, GatedDeltaMixer
from search_space.mixers.kda import KDA, KDAMixer
from search_space.spec import Mixer, MixerSpec
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 70
BOUND = 1e-5
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32")


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def x_of(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 64)


def convolved(mixer: Any, x: Tensor) -> Tensor:
    """What enters, under SiLU: each channel's taps over its last inputs, the last tap on the newest."""
    entered = mixer.enter(x)
    if mixer.taps is not None:
        taps = mixer.taps.shape[1]
        before = torch.cat([torch.zeros_like(entered[:, :taps]), entered], dim=1)
        entered = sum(
            mixer.taps[:, taps - 1 - back] * before[:, taps - back : taps - back + x.shape[1]]
            for back in range(taps)
        )
    return entered * torch.sigmoid(entered)


def parts_of(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries over √K, unit keys and values, [B, T, heads, *], before heads share anything."""
    values = mixer.heads * mixer.value_dim
    mixed = convolved(mixer, x)
    keys = (mixed.shape[-1] - values) // 2
    q, k = (part.unflatten(-1, (-1, mixer.head_dim)) for part in mixed[..., : 2 * keys].chunk(2, dim=-1))
    v = mixed[..., 2 * keys :].unflatten(-1, (mixer.heads, mixer.value_dim))
    return F.normalize(q, dim=-1) / mixer.head_dim**0.5, F.normalize(k, dim=-1), v


def recur(q: Tensor, k: Tensor, v: Tensor, fade: Tensor, beta: Tensor) -> Tensor:
    """S ← (1 − β k kᵀ) Diag(α) S + β k vᵀ, o = Sᵀ q; fade [B, T, H, K or 1], beta [B, T, H]; keys are shared in order."""
    shared = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(shared, dim=2), k.repeat_interleave(shared, dim=2)
    memory, rows = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for t in range(v.shape[1]):
        key, strength = k[:, t, :, :, None], beta[:, t, :, None, None]
        memory = (torch.eye(k.shape[-1]) - strength * key @ key.mT) @ (fade[:, t, ..., None] * memory)
        memory = memory + strength * key @ v[:, t, :, None]
        rows.append((q[:, t, :, None] @ memory)[:, :, 0])
    return torch.stack(rows, dim=1)


def finished(mixer: Any, read: Tensor, gate: Tensor | None, kind: str) -> Tensor:
    normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    normed = normed.flatten(2)
    if gate is not None:
        normed = normed * {"silu": gate * torch.sigmoid(gate), "sigmoid": torch.sigmoid(gate)}[kind]
    return mixer.out(normed)


def naive(mixer: Any, x: Tensor) -> Tensor:
    """Any of the three, from its weights alone."""
    spec: Any = mixer.spec
    q, k, v = parts_of(mixer, x)
    beta = (2 if spec.negative else 1) / (1 + torch.exp(-mixer.write(x)))
    fade, gate = torch.ones(1, 1, 1, 1).expand(2, x.shape[1], 1, 1), None
    if isinstance(mixer, KDAMixer):
        step = mixer.forget_up(mixer.forget_down(x)) + mixer.step_bias
        step, rate = step.unflatten(-1, (mixer.heads, -1)), mixer.log_rate.exp()[:, None]
        fade = torch.exp(-5 / (1 + torch.exp(-rate * step)) if spec.bound else -rate * F.softplus(step))
        gate = None if spec.gate == "none" else mixer.gate_up(mixer.gate_down(x))
    else:
        gate = None if mixer.gate is None else mixer.gate(x)
    if isinstance(mixer, GatedDeltaMixer):
        step = torch.log1p(torch.exp(mixer.forget(x) + mixer.step_bias))
        fade = torch.exp(-mixer.log_rate.exp() * step)[..., None]
    return finished(mixer, recur(q, k, v, fade, beta), gate, spec.gate)


VARIANTS: list[MixerSpec] = [
    DeltaNet(heads=3, head_dim=16),
    DeltaNet(heads=2, head_dim=16, value_heads=2, gate="silu", negative=True),
    DeltaNet(heads=2, head_dim=8, value_ratio=2, gate="sigmoid", taps=0),
    GatedDelta(heads=3, head_dim=16),
    GatedDelta(heads=2, head_dim=16, value_heads=2, value_ratio=1, negative=True),
    GatedDelta(heads=2, head_dim=8, value_heads=2, gate="sigmoid", taps=0),
    GatedDelta(heads=2, head_dim=24, gate="none"),
    KDA(heads=3, head_dim=16),
    KDA(heads=3, head_dim=16, value_ratio=2, rank_ratio=0.5, gate="silu", negative=True),
    KDA(heads=2, head_dim=16, rank_ratio=0.25, bound=5, gate="none", taps=0),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_a_mixer_is_its_recurrence_written_out(spec: MixerSpec, far: Far, shake: Shake) -> None:
    mixer = spec.build(FRAME)
    shake(mixer)
    x = x_of()
    assert far(mixer(x)[0], naive(mixer, x)) < 1e-4


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *itertools.product(["deltanet", "gated_delta"], ["value_heads"], [2]),
        *itertools.product(["deltanet", "gated_delta", "kda"], ["taps"], [0]),
        *itertools.product(["deltanet", "gated_delta", "kda"], ["negative"], [True]),
        *itertools.product(["gated_delta", "kda"], ["gate"], ["none"]),
        ("deltanet", "value_ratio", 2),
        ("gated_delta", "value_ratio", 1),
        ("kda", "rank_ratio", 0.5),
        ("kda", "bound", 5),
    ],
)
def test_every_setting_changes_the_layer(name: str, setting: str, value: Any) -> None:
    spec: Any = mixer_of(read(name).layers[0].branches[0])
    torch.manual_seed(3)
    plain = spec.build(FRAME)
    torch.manual_seed(3)
    other = replace(spec, **{setting: value}).build(FRAME)
    x = x_of(length=9)
    assert (plain(x)[0] - other(x)[0]).abs().max() > 1e-3


def test_without_a_decay_the_gated_rule_is_the_delta_rule(far: Far) -> None:
    sizes = {"heads": 2, "head_dim": 16, "value_heads": 2, "value_ratio": 2, "gate": "silu", "negative": True}
    gated, plain = GatedDelta(**sizes).build(FRAME), DeltaNet(**sizes).build(FRAME)
    assert isinstance(gated, GatedDeltaMixer)
    rest = {
        name: weight
        for name, weight in gated.state_dict().items()
        if not name.startswith(("forget", "log_rate", "step_bias"))
    }
    plain.load_state_dict(rest)
    x = x_of()
    assert far(gated(x)[0], plain(x)[0]) > 1e-2
    gated.log_rate.fill_(-200.0)
    assert far(gated(x)[0], plain(x)[0]) < 1e-5


@pytest.mark.parametrize("negative", [False, True])
def test_kda_with_a_uniform_gate_is_the_gated_delta_rule(negative: bool, far: Far, shake: Shake) -> None:
    kda = KDA(heads=4, head_dim=16, value_ratio=2, negative=negative).build(FRAME)
    gated = GatedDelta(heads=4, head_dim=16, gate="sigmoid", negative=negative).build(FRAME)
    assert isinstance(kda, KDAMixer) and isinstance(gated, GatedDeltaMixer)
    shake(kda)
    assert gated.gate is not None and kda.gate_up is not None and kda.gate_down is not None
    # One row of the gate for all channels of a head.
    rows = kda.forget_up.weight.view(4, 16, 16)[:, 0]
    kda.forget_up.weight.copy_(rows.repeat_interleave(16, dim=0))
    biases = kda.step_bias.view(4, 16)[:, 0].clone()
    kda.step_bias.copy_(biases.repeat_interleave(16))
    for name in ("enter.weight", "taps", "log_rate", "write.weight", "norm.weight", "out.weight"):
        gated.get_parameter(name).copy_(kda.get_parameter(name))
    gated.forget.weight.copy_(rows @ kda.forget_down.weight)
    gated.step_bias.copy_(biases)
    gated.gate.weight.copy_(kda.gate_up.weight @ kda.gate_down.weight)
    x = x_of()
    assert far(gated(x)[0], kda(x)[0]) < 1e-4


@pytest.mark.parametrize("negative", [False, True])
def test_kda_is_a_generalised_delta_rule(negative: bool, far: Far) -> None:
    mixer = KDA(heads=3, head_dim=16, negative=negative).build(FRAME)
    assert isinstance(mixer, KDAMixer)
    x = x_of()
    q, k, v = parts_of(mixer, x)
    step = (mixer.forget_up(mixer.forget_down(x)) + mixer.step_bias).unflatten(-1, (3, 16))
    log_decay = -mixer.log_rate.exp()[:, None] * F.softplus(step)
    beta = mixer.write(x).sigmoid()[..., None] * (2 if negative else 1)
    assert beta.max() > 1 or not negative
    read, _ = low_rank_delta(q, beta * k, v, log_decay, -k * log_decay.exp(), beta * k)
    gate = mixer.gate_up(mixer.gate_down(x))
    assert far(mixer(x)[0], finished(mixer, read, gate, "sigmoid")) < 1e-4


@pytest.mark.parametrize("make", [DeltaNet, GatedDelta, KDA])
def test_a_strong_negative_write_turns_a_memory_around(make: Any) -> None:
    """At β = 2 the eigenvalue along the key is −1: without decay and values a memory alternates, and so tracks parity."""
    mixer = make(heads=1, head_dim=8, value_ratio=1, negative=True, taps=0).build(FRAME)
    mixer.write.weight.zero_()
    x = torch.randn(1, 1, 64)
    # A token whose inner products are large and positive makes σ one.
    mixer.write.weight[0] = 100 * x[0, 0]
    mixer.enter.weight[8 + 8 :].zero_()
    if not isinstance(mixer, DeltaNetMixer):
        mixer.log_rate.fill_(-200.0)
    key = F.normalize(F.silu(mixer.enter(x)[0, 0, 8:16]), dim=-1)
    state = mixer.start(1, 8)
    state.matrix[0, 0] = torch.outer(key, torch.ones(8))
    for sign in (-1, 1, -1):
        _, state = mixer.step(x[:, 0], state)
        torch.testing.assert_close(
            state.matrix[0, 0], sign * torch.outer(key, torch.ones(8)), rtol=0, atol=1e-4
        )


def test_a_bound_holds_whatever_comes_in() -> None:
    mixer = KDA(heads=2, head_dim=8, bound=5).build(FRAME)
    assert isinstance(mixer, KDAMixer)
    for scale in (1.0, 1e4):
        mixed = torch.randn(2, 9, 48)
        *_, log_decay, _ = mixer.delta_inputs(mixed, scale * x_of(length=9))
        assert -5 <= log_decay.min() <= log_decay.max() <= 0
    assert log_decay.min() < -4.9
    free = KDA(heads=2, head_dim=8).build(FRAME)
    assert isinstance(free, KDAMixer)
    assert free.delta_inputs(mixed, 1e4 * x_of(length=9))[3].min() < -5


def cost_of(text: str, frame: Frame):
    return mixer_of(read(text).layers[0].branches[0]).cost(frame)


@pytest.mark.parametrize("context", [1, 8192, 131072])
def test_published_states_to_the_byte(context: int) -> None:
    qwen = Frame(width=2048, context=context)
    cost = cost_of("gated_delta[heads=16,head_dim=128,value_heads=2,value_ratio=1]", qwen)
    assert 36 * cost.cache[0].stored_bytes == 75497472 == 36 * 32 * 128**2 * 4
    assert 36 * cost.cache[1].stored_bytes == 1769472 == 36 * 8192 * 3 * 2
    olmo = Frame(width=3840, context=context)
    cost = cost_of("gated_delta[heads=30,head_dim=96,negative=true]", olmo)
    assert 24 * cost.cache[0].stored_bytes == 53084160 == 24 * 30 * 96 * 192 * 4
    assert 24 * cost.cache[1].stored_bytes == 1658880 == 24 * 11520 * 3 * 2


def test_the_gated_rule_has_six_squares_of_the_width() -> None:
    spec = GatedDelta().sized(Frame(width=2048))
    assert (spec.heads, spec.head_dim) == (6, 256)
    cost = spec.cost(Frame(width=2048))
    # Keys and queries of three quarters, values, gate and output of one and a half, two numbers a head, taps, vectors.
    assert cost.params == 6 * 2048**2 + 2 * 6 * 2048 + 4 * 6144 + 2 * 6 + 512
    assert cost.cache[0].stored_bytes == 786_432 * 4
    assert DeltaNet().cost(Frame(width=2048)).params == 4 * 2048**2 + 16 * 2048 + 4 * 6144 + 128


def test_flops_by_hand() -> None:
    frame = Frame(width=2048)
    cost = cost_of("gated_delta[heads=16,head_dim=128,value_heads=2,value_ratio=1]", frame)
    weights = 2048 * (8192 + 4096 + 64) + 4096 * 2048
    assert cost.flops_decode == 2 * (weights + 4 * 8192) + 7 * 32 * 128 * 128
    mixing = 32 * (6 * 64 * 128 + 4 * 64 * 128 + 6 * 128 * 128 + 2 * 64 * 64 / 3)
    assert cost.flops_prefill == pytest.approx(2 * (weights + 4 * 8192) + mixing)
    kda = cost_of("kda[heads=32,head_dim=128,value_ratio=2,rank_ratio=0.5,taps=0]", Frame(width=2304))
    weights = 2304 * (4 * 4096 + 8192 + 32 + 2 * 64) + 64 * (4096 + 8192)
    assert kda.flops_decode == 2 * weights + 7 * 32 * 128 * 256
    assert kda.params == weights + 32 + 4096 + 256
    assert [tensor.stored_bytes for tensor in kda.cache] == [32 * 128 * 256 * 4, 0]


def test_qwen3_next_has_its_published_parameters_in_these_layers() -> None:
    layer = "gated_delta[heads=16,head_dim=128,value_heads=2,value_ratio=1]/none"
    cost = layout_cost(read(f"36*{layer}"), Frame(width=2048))
    # In: queries, keys, values and gate, write and decay of each value head; taps; rates; norms; out.
    one = 2048 * (4096 + 4096 + 4096 + 64) + 4 * 8192 + 2 * 32 + 128 + 4096 * 2048 + 2048
    assert cost.params == 36 * one


def imported(model: str, *names: str) -> list[Any]:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module(f"transformers.models.{model}.modeling_{model}")
        configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    return [getattr(modelling, names[0]), getattr(configuration, names[1])]


def randomise(module: nn.Module) -> Any:
    for name, weight in module.named_parameters():
        # Rates of e would forget within a token, and the head's norm would then magnify rounding.
        noise, scale = torch.randn_like(weight), weight[0].numel() ** 0.5
        weight.copy_(noise / scale if weight.dim() >= 2 else 1 + 0.3 * noise - 3 * ("A_log" in name))
    return module.eval()


def same_both_ways(mixer: Mixer, wanted: Tensor, x: Tensor, far: Far) -> None:
    assert far(mixer(x)[0], wanted) < BOUND
    state, rows = mixer.start(x.shape[0], LENGTH), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), wanted) < BOUND


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("keys", "values", "wide"), [(2, 4, 1), (3, 3, 2), (3, 3, 1), (2, 4, 2)])
def test_gated_delta_is_qwen3_nexts(keys: int, values: int, wide: int, far: Far) -> None:
    theirs_class, config_class = imported("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig")
    config = config_class(
        hidden_size=64,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=16,
        linear_value_head_dim=16 * wide,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = randomise(theirs_class(config, 0))
    shared = values // keys
    ours = GatedDelta(heads=keys, head_dim=16, value_heads=shared, value_ratio=wide).build(FRAME)
    assert isinstance(ours, GatedDeltaMixer) and ours.gate is not None and ours.taps is not None
    # Their rows go key head by key head: query, key, its values, its gates; and its writes, then its decays.
    value = 16 * wide * shared
    rows = theirs.in_proj_qkvz.weight.view(keys, 32 + 2 * value, 64).split([16, 16, value, value], dim=1)
    q, k, v, gate = (part.flatten(0, 1) for part in rows)
    ours.enter.weight.copy_(torch.cat([q, k, v]))
    ours.gate.weight.copy_(gate)
    write, forget = theirs.in_proj_ba.weight.view(keys, 2, shared, 64).unbind(1)
    ours.write.weight.copy_(write.flatten(0, 1))
    ours.forget.weight.copy_(forget.flatten(0, 1))
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    ours.log_rate.copy_(theirs.A_log)
    ours.step_bias.copy_(theirs.dt_bias)
    ours.norm.weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)
    x = x_of()
    same_both_ways(ours, theirs(x), x, far)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negative", [True, False])
def test_gated_delta_is_olmo_hybrids(negative: bool, far: Far) -> None:
    theirs_class, config_class = imported("olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridConfig")
    config = config_class(
        hidden_size=64,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        linear_allow_neg_eigval=negative,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = randomise(theirs_class(config, 0))
    ours = GatedDelta(heads=3, head_dim=16, negative=negative).build(FRAME)
    assert isinstance(ours, GatedDeltaMixer) and ours.gate is not None and ours.taps is not None
    ours.enter.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    for own, other in (("forget", "a_proj"), ("write", "b_proj"), ("gate", "g_proj"), ("out", "o_proj")):
        getattr(ours, own).weight.copy_(getattr(theirs, other).weight)
    ours.log_rate.copy_(theirs.A_log)
    ours.step_bias.copy_(theirs.dt_bias)
    ours.norm.weight.copy_(theirs.o_norm.weight)
    x = x_of()
    same_both_ways(ours, theirs(x), x, far)


@pytest.mark.filterwarnings("ignore")
def test_bounded_kda_is_glm5_nexts(far: Far) -> None:
    theirs_class, config_class = imported("glm5_next", "Glm5NextTextLinearAttention", "Glm5NextTextConfig")
    config = config_class(hidden_size=64, linear_num_heads=3, linear_head_dim=16, num_hidden_layers=2)
    assert config.linear_lower_bound == -5.0
    theirs = randomise(theirs_class(config, 0))
    theirs.forget_gate.A_log.add_(2)
    theirs.forget_gate.dt_bias.sub_(4)
    ours = KDA(heads=3, head_dim=16, bound=5).build(FRAME)
    assert isinstance(ours, KDAMixer) and ours.taps is not None
    assert ours.gate_down is not None and ours.gate_up is not None
    ours.enter.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    ours.forget_down.weight.copy_(theirs.forget_gate.f_a_proj.weight)
    ours.forget_up.weight.copy_(theirs.forget_gate.f_b_proj.weight)
    ours.log_rate.copy_(theirs.forget_gate.A_log)
    ours.step_bias.copy_(theirs.forget_gate.dt_bias)
    ours.write.weight.copy_(theirs.b_proj.weight)
    ours.gate_down.weight.copy_(theirs.g_a_proj.weight)
    ours.gate_up.weight.copy_(theirs.g_b_proj.weight)
    ours.norm.weight.copy_(theirs.o_norm.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    x = x_of()
    same_both_ways(ours, theirs(x), x, far)

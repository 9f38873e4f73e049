"""The mixers against independent implementations: the same weights must give the same outputs."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.full import Full, FullMixer
from search_space.mixers.kda import KDA, KDAMixer
from search_space.mixers.mamba2 import Mamba2, Mamba2Mixer
from search_space.mixers.mla import MLA, MLAMixer
from search_space.mixers.window import Window

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32", rotary_base=5e4)
LENGTH = 75
BOUND = 1e-5


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def imported(model: str, *names: str) -> Any:
    """Parts of one model's module and its configuration, with the warnings of their import kept away."""
    from importlib import import_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module(f"transformers.models.{model}.modeling_{model}")
        configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    return [getattr(modelling, name) for name in names[:-1]] + [getattr(configuration, names[-1])]


def randomise(module: nn.Module) -> nn.Module:
    for name, weight in module.named_parameters():
        if weight.dim() >= 2 and "A_log" not in name:
            weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
        else:
            weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return module.eval()


def causal(length: int = LENGTH, window: int | None = None) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    return torch.zeros(1, 1, length, length).masked_fill(~seen, float("-inf"))


def same_both_ways(mixer: Any, wanted: Tensor, x: Tensor, far: Far) -> None:
    """Whole and stepped, both against the other implementation."""
    assert far(mixer(x)[0], wanted) < BOUND
    state, rows = mixer.start(x.shape[0], LENGTH), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), wanted) < BOUND


def test_kda_is_kimi_linears_delta_attention(far: Far) -> None:
    theirs_class, config_class = imported("kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig")
    config = config_class(
        hidden_size=64,
        linear_num_heads=3,
        linear_head_dim=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = randomise(theirs_class(config, 0))
    # Rates of e would forget within a token, and the head's norm would then magnify rounding.
    theirs.forget_gate.A_log.sub_(3)
    ours = KDA(heads=3, head_dim=16).build(FRAME)
    assert isinstance(ours, KDAMixer)
    ours.enter.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    ours.forget_down.weight.copy_(theirs.forget_gate.f_a_proj.weight)
    ours.forget_up.weight.copy_(theirs.forget_gate.f_b_proj.weight)
    ours.log_rate.copy_(theirs.forget_gate.A_log.flatten())
    ours.step_bias.copy_(theirs.forget_gate.dt_bias)
    ours.write.weight.copy_(theirs.b_proj.weight)
    ours.gate_down.weight.copy_(theirs.g_a_proj.weight)
    ours.gate_up.weight.copy_(theirs.g_b_proj.weight)
    ours.norm.weight.copy_(theirs.o_norm.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, LENGTH, 64)
    same_both_ways(ours, theirs(x), x, far)


def latent_weights(ours: MLAMixer, theirs: Any, order: Tensor | None = None) -> None:
    """Copy; `order` says where our shared channels lie among theirs."""
    heads, own, shared, rank = ours.heads, ours.head_dim, ours.shared, ours.rank
    order = torch.arange(shared) if order is None else order
    if theirs.q_lora_rank is None:
        query = theirs.q_proj.weight.view(heads, own + shared, -1)
    else:
        query = theirs.q_b_proj.weight.view(heads, own + shared, -1)
        ours.query_down.weight.copy_(theirs.q_a_proj.weight)
        ours.query_norm.weight.copy_(theirs.q_a_layernorm.weight)
    ours.query.weight.copy_(torch.cat([query[:, :own], query[:, own:][:, order]], dim=1).flatten(0, 1))
    down = theirs.kv_a_proj_with_mqa.weight
    ours.down.weight.copy_(torch.cat([down[:rank], down[rank:][order]]))
    ours.norm.weight.copy_(theirs.kv_a_layernorm.weight)
    ours.up.weight.copy_(theirs.kv_b_proj.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)


def test_mla_without_positions_is_kimi_linears_attention(far: Far) -> None:
    theirs_class, config_class = imported("kimi_linear", "KimiLinearAttention", "KimiLinearConfig")
    config = config_class(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        attn_implementation="eager",
    )
    theirs = randomise(theirs_class(config, 0))
    ours = MLA(rank=24, shared=8, heads=4, head_dim=16, rotary=0.0).build(FRAME)
    assert isinstance(ours, MLAMixer)
    latent_weights(ours, theirs)
    x = torch.randn(2, LENGTH, 64)
    same_both_ways(ours, theirs(x, causal())[0], x, far)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("query_rank", [0, 40])
def test_rotary_mla_is_deepseeks_attention(query_rank: int, interleaved: bool, far: Far) -> None:
    theirs_class, rotary_class, config_class = imported(
        "deepseek_v3", "DeepseekV3Attention", "DeepseekV3RotaryEmbedding", "DeepseekV3Config"
    )
    config = config_class(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=query_rank or None,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_hidden_layers=1,
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        attn_implementation="eager",
    )
    theirs = randomise(theirs_class(config, 0))
    ours = MLA(rank=24, query_rank=query_rank, shared=8, heads=4, head_dim=16).build(FRAME)
    assert isinstance(ours, MLAMixer)
    # Their pairs are neighbours; ours lie half the width apart.
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)]) if interleaved else None
    latent_weights(ours, theirs, order)
    x = torch.randn(2, LENGTH, 64)
    turns = rotary_class(config)(x, torch.arange(LENGTH)[None])
    same_both_ways(ours, theirs(x, turns, causal())[0], x, far)


def test_gated_attention_is_qwen3_nexts(far: Far) -> None:
    theirs_class, rotary_class, config_class = imported(
        "qwen3_next", "Qwen3NextAttention", "Qwen3NextRotaryEmbedding", "Qwen3NextConfig"
    )
    config = config_class(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        partial_rotary_factor=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )
    theirs = randomise(theirs_class(config, 0))
    ours = Full(heads=4, kv_heads=2, head_dim=32, rotary=0.25, qk_norm=True, gate=True).build(FRAME)
    assert isinstance(ours, FullMixer) and ours.gate is not None
    # Their query and gate alternate by head, and their norms count gains from one.
    query, gate = theirs.q_proj.weight.view(4, 2, 32, 64).unbind(1)
    ours.query.weight.copy_(query.flatten(0, 1))
    ours.gate.weight.copy_(gate.flatten(0, 1))
    ours.key.weight.copy_(theirs.k_proj.weight)
    ours.value.weight.copy_(theirs.v_proj.weight)
    ours.query_norm.weight.copy_(1 + theirs.q_norm.weight)
    ours.key_norm.weight.copy_(1 + theirs.k_norm.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, LENGTH, 64)
    turns = rotary_class(config)(x, torch.arange(LENGTH)[None])
    assert turns[0].shape[-1] == 8
    same_both_ways(ours, theirs(x, turns, causal())[0], x, far)


@pytest.mark.parametrize("window", [None, 12])
def test_grouped_attention_is_llamas_and_with_a_window_mistrals(window: int | None, far: Far) -> None:
    theirs_class, rotary_class, config_class = imported(
        "llama", "LlamaAttention", "LlamaRotaryEmbedding", "LlamaConfig"
    )
    config = config_class(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        attn_implementation="eager",
    )
    theirs = randomise(theirs_class(config, 0))
    spec = Full(heads=4, kv_heads=2) if window is None else Window(heads=4, kv_heads=2, size=window)
    ours: Any = spec.build(FRAME)
    for own, other in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        getattr(ours, own).weight.copy_(getattr(theirs, other).weight)
    x = torch.randn(2, LENGTH, 64)
    turns = rotary_class(config)(x, torch.arange(LENGTH)[None])
    same_both_ways(ours, theirs(x, turns, causal(window=window))[0], x, far)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_the_mixer_of_the_same_name(groups: int, far: Far) -> None:
    theirs_class, config_class = imported("mamba2", "Mamba2Mixer", "Mamba2Config")
    config = config_class(
        hidden_size=64,
        num_heads=4,
        head_dim=32,
        state_size=16,
        n_groups=groups,
        expand=2,
        num_hidden_layers=1,
        chunk_size=16,
    )
    theirs = randomise(theirs_class(config, 0))
    ours = Mamba2(state=16, heads=4, head_dim=32, groups=groups).build(FRAME)
    assert isinstance(ours, Mamba2Mixer)
    ours.enter.weight.copy_(theirs.in_proj.weight)
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    ours.taps_bias.copy_(theirs.conv1d.bias)
    ours.log_rate.copy_(theirs.A_log)
    ours.step_bias.copy_(theirs.dt_bias)
    ours.skip.copy_(theirs.D)
    ours.norm_weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, LENGTH, 64)
    same_both_ways(ours, theirs(x), x, far)

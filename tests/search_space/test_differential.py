"""Differential attention: its formula, its special case, its price by hand, and another implementation."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame, Place
from search_space.mixers.differential import Differential

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32", rotary_base=5e4)
LENGTH = 75


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def at(layer: int) -> Frame:
    return replace(FRAME, place=Place(index=layer, depth=8))


def stepped(mixer: Any, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], LENGTH), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def pattern(q: Tensor, k: Tensor) -> Tensor:
    """The weights of causal attention, [B, T, T]."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def written_out(mixer: Any, x: Tensor, share: float, first_share: float) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (mixer.query, mixer.key, mixer.value))
    outputs, heads = [], q.shape[2] // 2
    for head in range(heads):
        group = head * (k.shape[2] // 2) // heads
        one = pattern(q[:, :, 2 * head], k[:, :, 2 * group])
        two = pattern(q[:, :, 2 * head + 1], k[:, :, 2 * group + 1])
        read = (one - share * two) @ v[:, :, 2 * group : 2 * group + 2].flatten(2)
        normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        outputs.append(normed * (1 - first_share))
    wanted: Tensor = mixer.out(torch.cat(outputs, dim=-1))
    return wanted


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_its_formula(kv_heads: int, layer: int, far: Far) -> None:
    mixer: Any = Differential(heads=4, kv_heads=kv_heads, head_dim=16, rotary=0.0).build(at(layer))
    mixer.norm.weight.add_(0.3 * torch.randn(32))
    mixer.share_query.mul_(4)
    first = 0.8 - 0.6 * math.exp(-0.3 * layer)
    dots = [float(torch.dot(mixer.share_query[row], mixer.share_key[row])) for row in (0, 1)]
    share = math.exp(dots[0]) - math.exp(dots[1]) + first
    x = torch.randn(2, 40, 64)
    wanted = written_out(mixer, x, share, first)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4
    assert far(written_out(mixer, x, first, first), wanted) > 1e-3


def test_without_a_share_it_is_ordinary_attention(far: Far) -> None:
    mixer: Any = Differential(heads=2, head_dim=16, rotary=0.0).build(FRAME)
    mixer.share_query.zero_()
    mixer.share_query[1, 0], mixer.share_key[1, 0] = math.log(1.2), 1.0
    assert float(mixer.share) == pytest.approx(0.0, abs=1e-6)
    x = torch.randn(2, 40, 64)
    y = mixer(x)[0]
    # The second query then plays no part.
    mixer.query.weight.view(2, 2, 16, 64)[:, 1].normal_()
    assert far(mixer(x)[0], y) < 1e-5
    mixer.query.weight.view(2, 2, 16, 64)[:, 0].normal_()
    assert far(mixer(x)[0], y) > 1e-2


def test_the_price_by_hand() -> None:
    frame = Frame(width=2048, context=10_000, batch=3)
    cost = Differential(kv_heads=2).cost(frame)
    # Eight heads of two queries of 128; two key heads of two keys of 128; values of 256.
    weights = 2048 * (8 * 256 + 2 * 256 + 2 * 256 + 8 * 256)
    assert cost.params == weights + 4 * 128 + 256
    assert cost.stored_bytes == cost.read_bytes == 3 * 10_000 * 2 * (2 * 256) * 2
    # Sixteen patterns: a product of 128 with each key, and each value of 256 weighed.
    assert cost.flops_decode == 2 * weights + 2 * 16 * (128 + 256) * 10_000
    assert cost.flops_prefill == 2 * weights + 2 * 16 * (128 + 256) * 10_001 / 2


@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 80, 2304, 4096])
def test_heads_fill_the_width_where_they_can(width: int) -> None:
    spec = Differential().sized(Frame(width=width))
    assert spec.heads is not None and spec.head_dim is not None
    assert 2 * spec.heads * spec.head_dim == max(16, width // 16 * 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_diff_llamas(groups: int, layer: int, far: Far) -> None:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.diffllama.configuration_diffllama import DiffLlamaConfig
        from transformers.models.diffllama.modeling_diffllama import (
            DiffLlamaAttention,
            DiffLlamaRotaryEmbedding,
        )
    config = DiffLlamaConfig(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2 * groups,
        head_dim=16,
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
        lambda_std_dev=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        attn_implementation="eager",
    )
    theirs = DiffLlamaAttention(config, layer).eval()
    ours: Any = Differential(heads=4, kv_heads=groups, head_dim=16).build(at(layer))
    for name in ("query", "key", "value"):
        # Their two halves are the first and the second half of the heads; ours lie side by side.
        weight = getattr(theirs, f"{name[0]}_proj").weight.view(2, -1, 16, 64)
        getattr(ours, name).weight.copy_(weight.transpose(0, 1).flatten(0, 2))
    ours.out.weight.copy_(theirs.o_proj.weight)
    ours.share_query.copy_(torch.stack([theirs.lambda_q1, theirs.lambda_q2]))
    ours.share_key.copy_(torch.stack([theirs.lambda_k1, theirs.lambda_k2]))
    x = torch.randn(2, LENGTH, 64)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~torch.ones(LENGTH, LENGTH).bool().tril(), -torch.inf)
    turns = DiffLlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    wanted = theirs(x, turns, mask[None, None])[0]
    assert far(ours(x)[0], wanted) < 1e-5
    assert far(stepped(ours, x), wanted) < 1e-5

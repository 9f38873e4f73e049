"""Prices against figures worked out by hand and against published models, to the byte."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from search_space.cost import (
    at_depth,
    build_mixer,
    cache_bytes,
    layer_cost,
    layout_cost,
)
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.state import state_bytes
from search_space.vocabulary import VOCABULARY, channel_of, mixer_of, read


def cost_of(text: str, frame: Frame):
    return mixer_of(read(text).layers[0].branches[0]).cost(frame)


@pytest.mark.parametrize("rotary", [0, 1])
@pytest.mark.parametrize("context", [1, 1000, 131072])
def test_latent_attention_keeps_1152_bytes_a_token(rotary: int, context: int) -> None:
    for width in (2304, 7168):
        cost = cost_of(f"mla[rank=512,shared=64,rotary={rotary}]", Frame(width=width, context=context))
        assert cost.stored_bytes == cost.read_bytes == 1152 * context


@pytest.mark.parametrize("context", [1, 4096, 131072])
def test_kda_keeps_the_same_bytes_whatever_the_context(context: int) -> None:
    cost = cost_of("kda[heads=32,head_dim=128]", Frame(width=2304, context=context))
    assert {tensor.name: tensor.stored_bytes for tensor in cost.cache} == {
        "matrix": 2_097_152,
        "tail": 73_728,
    }


def test_full_attention_keeps_keys_and_values() -> None:
    for context in (1, 8192):
        cost = cost_of("full[heads=16,head_dim=128]", Frame(width=2048, context=context))
        assert cost.stored_bytes == 8192 * context
        assert [tensor.stored_bytes for tensor in cost.cache] == [4096 * context] * 2
    assert cost_of("full[kv_heads=2]", Frame(width=2048, context=100)).stored_bytes == 1024 * 100


def test_a_window_stops_growing() -> None:
    frame = Frame(width=2048, context=1)
    for context, tokens in ((1, 1), (511, 511), (512, 512), (513, 512), (131072, 512)):
        assert cost_of("window[size=512]", replace(frame, context=context)).stored_bytes == 8192 * tokens


def test_other_states_by_hand() -> None:
    frame = Frame(width=2048, context=5)
    assert cost_of("mamba2", frame).stored_bytes == 4096 * 128 * 4 + 3 * (4096 + 2 * 128) * 2
    assert cost_of("mamba2[groups=8]", frame).stored_bytes == 4096 * 128 * 4 + 3 * (4096 + 16 * 128) * 2
    assert cost_of("linear", frame).stored_bytes == 16 * 128 * 129 * 4


@pytest.mark.parametrize("name", VOCABULARY)
def test_bytes_follow_the_batch_and_the_type(name: str) -> None:
    frame = Frame(width=512, context=300)
    one = cost_of(name, frame)
    many = cost_of(name, replace(frame, batch=7))
    assert many.stored_bytes == 7 * one.stored_bytes
    assert many.params == one.params and many.flops_decode == one.flops_decode
    wide = cost_of(name, replace(frame, dtype="float32"))
    for low, high in zip(one.cache, wide.cache, strict=True):
        recurrent = low.name in ("matrix", "sums", "peak", "angle", "hidden", "cell", "modes", "counts")
        assert high.stored_bytes == low.stored_bytes * (1 if recurrent else 2)


def test_a_layer_is_its_branches_its_channel_and_its_norms() -> None:
    frame = Frame(width=512, context=1000)
    window, mamba = cost_of("window[size=128]", frame), cost_of("mamba2", frame)
    channel = channel_of(Branch("swiglu")).cost(frame)
    assert channel.params == 3 * 512 * 1368
    both = layer_cost(read("window[size=128]|mamba2").layers[0], frame)
    assert both.params == window.params + mamba.params + channel.params + 2 * 512 + 2 * 512
    assert both.stored_bytes == window.stored_bytes + mamba.stored_bytes
    assert both.flops_decode == window.flops_decode + mamba.flops_decode + channel.flops_decode
    assert layer_cost(read("mamba2/none").layers[0], frame).params == mamba.params + 512


def test_a_network_is_the_sum_of_its_layers() -> None:
    frame = Frame(width=512, context=1000)
    layout = read("2*(kda/none full) mla")
    parts = [layer_cost(layer, frame) for layer in layout.layers]
    whole = layout_cost(layout, frame)
    assert whole.params == sum(part.params for part in parts)
    assert whole.stored_bytes == sum(part.stored_bytes for part in parts)
    assert whole.flops_prefill == pytest.approx(sum(part.flops_prefill for part in parts))
    assert len(whole.cache) == 2 * (2 + 2) + 1
    assert cache_bytes(layout, frame, 77) == layout_cost(layout, replace(frame, context=77)).stored_bytes


def test_patterns_are_brought_to_the_targets_depth() -> None:
    pattern = read("kda mla")
    assert at_depth(pattern, Frame(width=64)) == pattern
    assert at_depth(pattern, Frame(width=64, depth=5)) == read("2*(kda mla) kda")
    assert at_depth(pattern, Frame(width=64, depth=5), "stretch") == read("3*kda 2*mla")
    with pytest.raises(ValueError, match="stack, stretch"):
        at_depth(pattern, Frame(width=64), "tile")


@pytest.mark.parametrize(
    "text", ["full[kv_heads=2,gate=true]", "window[size=16,kv_heads=2]", "mla", "linear", "mamba2", "kda"]
)
def test_prefill_flops_are_those_of_the_weights_and_the_past(text: str) -> None:
    frame = Frame(width=64, train_length=64, context=64, dtype="float32")
    layer = read(f"{text}/none").layers[0]
    mixer = build_mixer(layer, frame)
    # Matrices that each token meets once, counted by the library.
    matrices = [module for module in mixer.modules() if isinstance(module, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for linear in matrices:
            linear(torch.randn(1, 64, linear.in_features))
    dense = counter.get_total_flops() / 64
    cost = layer_cost(layer, frame)
    assert dense <= cost.flops_prefill < 4 * dense
    assert cost.flops_decode > dense


def test_attention_flops_by_hand() -> None:
    frame = Frame(width=2048, context=8192)
    projections = 2 * 2048 * (2 * 2048 + 2 * 256)
    full = cost_of("full[kv_heads=2]", frame)
    # Two products of 16 heads of 128 with every key, two FLOPs a multiply-add; on average half the text is seen.
    assert full.flops_decode == projections + 2 * 2 * 16 * 128 * 8192
    assert full.flops_prefill == projections + 2 * 2 * 16 * 128 * 8193 / 2
    window = cost_of("window[kv_heads=2,size=512]", frame)
    seen = sum(min(t + 1, 512) for t in range(8192)) / 8192
    assert window.flops_decode == projections + 2 * 2 * 16 * 128 * 512
    assert window.flops_prefill == pytest.approx(projections + 2 * 2 * 16 * 128 * seen)
    short = cost_of("window[kv_heads=2,size=512]", replace(frame, context=100))
    assert short.flops_prefill == pytest.approx(projections + 2 * 2 * 16 * 128 * 50.5)


def test_latent_attention_flops_by_hand() -> None:
    # DeepSeek-V3's heads: 128 of 128 + 64, rank 512; absorbed 278.5k FLOPs a cached token, expanded 81.9k.
    frames = [Frame(width=7168, context=context) for context in (1000, 2000)]
    costs = [cost_of("mla[rank=512,shared=64,heads=128,head_dim=128]", frame) for frame in frames]
    assert (costs[1].flops_decode - costs[0].flops_decode) / 1000 == 2 * 128 * (2 * 512 + 64)
    assert (costs[1].flops_prefill - costs[0].flops_prefill) / 500 == 2 * 128 * (128 + 64 + 128)
    weights = 7168 * (128 * 192 + 576) + 512 * 128 * 256 + 128 * 128 * 7168
    assert costs[0].params == weights + 512


def test_deepseek_v3s_attention_layer_by_hand() -> None:
    frame = Frame(width=7168, context=4096)
    cost = cost_of("mla[rank=512,query_rank=1536,shared=64,heads=128,head_dim=128]", frame)
    assert cost.stored_bytes == cost.read_bytes == 1152 * 4096
    # q_a 11,010,048; q_b 37,748,736; kv_a 4,128,768; kv_b 16,777,216; o 117,440,512; two norms 1536 + 512.
    weights = 11_010_048 + 37_748_736 + 4_128_768 + 16_777_216 + 117_440_512
    assert cost.params == weights + 2048 == 187_107_328
    assert cost.flops_decode == 2 * weights + 278_528 * 4096
    assert cost.flops_prefill == 2 * weights + 81_920 * 4097 / 2
    assert cost_of("mla[query_rank=0]", frame) == cost_of("mla", frame)


def test_recurrent_flops_by_hand() -> None:
    frame = Frame(width=2304)
    kda = cost_of("kda[heads=32,head_dim=128]", frame)
    weights = 2304 * (4 * 4096 + 32 + 256) + 2 * 128 * 4096
    convolution = 2 * 3 * 4096 * 4
    assert kda.flops_decode == 2 * weights + convolution + 7 * 32 * 128 * 128
    assert kda.params == weights + 3 * 4096 * 4 + 32 + 4096 + 128
    assert kda.flops_prefill - 2 * weights - convolution == pytest.approx(
        32 * (10 * 64 * 128 + 6 * 128 * 128 + 2 * 64 * 64 / 3)
    )
    mamba = cost_of("mamba2", Frame(width=2048))
    weights = 2048 * (2 * 4096 + 256 + 64) + 4096 * 2048
    assert mamba.flops_decode == 2 * weights + 2 * 4 * (4096 + 256) + 5 * 4096 * 128
    assert mamba.flops_prefill == 2 * weights + 2 * 4 * (4096 + 256) + 64 * (
        2 * 64 * (128 + 64) + 4 * 128 * 64
    )


@pytest.mark.parametrize("text", ["window[size=8]|mamba2", "full|linear|kda"])
def test_side_by_side_is_priced_to_the_byte(text: str) -> None:
    frame = Frame(width=64, context=50, batch=2)
    layer = Layer(read(text).layers[0].branches, Branch("none"))
    mixer = build_mixer(layer, frame)
    cost = layer_cost(layer, frame)
    assert sum(weight.numel() for weight in mixer.parameters()) == cost.params - 64
    assert state_bytes(mixer.start(2, 50)) == cost.stored_bytes
    assert layout_cost(Layout((layer, layer)), frame).stored_bytes == 2 * cost.stored_bytes

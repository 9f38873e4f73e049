"""Figures that papers and vendors state of their caches, from the prices of the layouts that they name."""

from dataclasses import replace

import pytest

from search_space.cost import cache_bytes, layout_cost
from search_space.frame import Frame
from search_space.presets import PRESETS
from search_space.vocabulary import read

GIB = 2**30


def kept(network: str, context: int) -> int:
    """Bytes of a network whose heads are all written, so that its width does not matter."""
    return cache_bytes(read(network), Frame(width=4096, context=context), context)


def attention_bytes(name: str, context: int) -> int:
    """Bytes of a preset's attention layers alone, the states of the others left out."""
    preset = PRESETS[name]
    cost = layout_cost(preset.layout, replace(preset.frame, context=context))
    return sum(tensor.stored_bytes for tensor in cost.cache if tensor.name in ("keys", "values", "latents"))


@pytest.mark.parametrize(
    ("who", "network", "gib"),
    [
        ("Mixtral", "32*full[heads=32,kv_heads=8,head_dim=128]", 32),
        ("Llama-2-7B", "32*full[heads=32,kv_heads=32,head_dim=128]", 128),
        ("Llama-3.1-8B", "32*full[heads=32,kv_heads=8,head_dim=128]", 32),
        ("Jamba-1.5-Mini", "4*full[heads=32,kv_heads=8,head_dim=128]", 4),
        ("Jamba-1.5-Large", "9*full[heads=64,kv_heads=8,head_dim=128]", 9),
    ],
)
def test_jambas_table_at_256k(who: str, network: str, gib: int) -> None:
    assert who and kept(network, 262144) == gib * GIB


def test_jamba_keeps_four_gib_of_keys_and_values_at_256k() -> None:
    assert attention_bytes("jamba", 262144) == 4 * GIB


@pytest.mark.parametrize(
    ("network", "bytes_a_token"),
    [
        ("61*mla[heads=128,head_dim=128,rank=512,shared=64]", 70272),
        ("126*full[heads=128,kv_heads=8,head_dim=128]", 516096),
        ("80*full[heads=64,kv_heads=8,head_dim=128]", 327680),
    ],
)
def test_deepseeks_insights_name_bytes_a_token(network: str, bytes_a_token: int) -> None:
    assert kept(network, 1001) - kept(network, 1000) == bytes_a_token


def test_a_token_of_gpt_2_xl_takes_300_kib() -> None:
    assert kept("48*full[heads=25,head_dim=64]", 1) == 300 * 1024


def test_v3_at_160k_takes_10_72_gib() -> None:
    preset = PRESETS["deepseek-v3"]
    assert cache_bytes(preset.layout, preset.frame, 163840) / GIB == pytest.approx(10.72, abs=0.005)


def test_kimi_keeps_three_quarters_less() -> None:
    preset = PRESETS["kimi-linear"]
    full = next(
        f"27*{layer.branches[0]}" for layer in preset.layout.layers if layer.branches[0].mixer == "mla"
    )
    for context, less in ((8192, 57.0), (131072, 73.0)):
        whole = cache_bytes(read(full), preset.frame, context)
        saved = 100 * (1 - cache_bytes(preset.layout, preset.frame, context) / whole)
        assert saved == pytest.approx(less, abs=0.05)
    # Its keys and values alone, which the paper's "up to 75 %" counts.
    assert 100 * (1 - attention_bytes("kimi-linear", 131072) / whole) == pytest.approx(74.1, abs=0.05)


def test_mistral_keeps_an_eighth_at_32k() -> None:
    preset = PRESETS["mistral"]
    assert cache_bytes(preset.layout, preset.frame, 32768) * 8 == kept(
        "32*full[heads=32,kv_heads=8,head_dim=128]", 32768
    )


def test_gemma_3_keeps_a_fifth_of_global_attention_at_32k() -> None:
    preset = PRESETS["gemma-3-12b"]
    everywhere = kept("48*full[heads=16,kv_heads=8,head_dim=256]", 32768)
    assert cache_bytes(preset.layout, preset.frame, 32768) / everywhere == pytest.approx(0.193, abs=0.0005)


def test_hymba_keeps_eleven_to_twelve_times_less_than_llama_3_2() -> None:
    llama = kept("28*full[heads=24,kv_heads=8,head_dim=128]", 8000)
    assert llama / attention_bytes("hymba-1.5b", 8000) == pytest.approx(11.80, abs=0.005)

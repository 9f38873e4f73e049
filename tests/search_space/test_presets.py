"""Published models: their cache to the byte at two lengths, their parameters, and their ideas at other sizes."""

from dataclasses import replace

import pytest

from search_space.cost import cache_bytes, layout_cost
from search_space.frame import Frame
from search_space.presets import PRESETS, pattern_for
from search_space.vocabulary import check, read, shrink_layout

# Bytes of cache of one sequence at 8,192 and 131,072 tokens, from the models' published sizes by hand: keys and values of
# two bytes, states of four bytes a number (eight where it is complex), tails of two.
PUBLISHED = {
    "llama-3": (1073741824, 17179869184),
    "mistral": (536870912, 536870912),
    "kimi-linear": (109477888, 1100382208),
    "mamba-2": (169836544, 169836544),
    "nemotron-h": (236355584, 2249621504),
    "nemotron-nano": (277766144, 2291032064),
    "qwen3-next": (278593536, 3298492416),
    "olmo-hybrid": (1061376000, 16160870400),
    "minimax-01": (629145600, 5662310400),
    "ring-mini-linear": (83886080, 1090519040),
    "ring-flash-linear": (125829120, 1132462080),
    "granite-4-h-small": (287037440, 2300303360),
    "granite-4-h-tiny": (124450816, 1131083776),
    "jamba": (150274048, 2163539968),
    "zamba2": (1582428672, 24231670272),
    "samba": (28606464, 28606464),
    "mamba": (22937600, 22937600),
    "recurrent-gemma-2b": (17238016, 17238016),
    "recurrent-gemma-9b": (26230784, 26230784),
    "griffin-7b": (6481920, 6481920),
    "lfm2": (100745216, 1610694656),
    "retnet": (84934656, 84934656),
    "retnet-7b": (226492416, 226492416),
    "rwkv-7": (21299200, 21299200),
    "striped-hyena": (538312704, 8591376384),
    "evo": (411680768, 6451478528),
    "gemma-2-9b": (2113929216, 23253221376),
    "gemma-3-4b": (289406976, 2805989376),
    "gemma-3-12b": (872415232, 8925478912),
    "gpt-oss-20b": (204472320, 3224371200),
    "deepseek-v3": (575668224, 9210691584),
    "deepseek-v3.2": (703594496, 11257511936),
    # Its texts end at 1,024 tokens.
    "gpt-2": (37748736, 37748736),
    # Keys and values of 1,600 tokens of memory and 128 of the segment; the release keeps hidden states of the memory.
    "transformer-xl": (18 * 2 * 1024 * 2 * (1600 + 128),) * 2,
    # The last 32 of every 128 tokens, and the 128 of the block at hand.
    "sparse-transformer": (30 * 2 * 512 * 2 * (32 * 64 + 128), 30 * 2 * 512 * 2 * (32 * 1024 + 128)),
    "falcon-h1-1.5b": (277340160, 3297239040),
    "falcon-h1-7b": (508456960, 6044938240),
    "hymba-1.5b": (86056960, 793845760),
    "phi-4-mini-flash": (66140160, 695285760),
}
ENCODERS = {"longformer", "bigbird"}
"""They generate nothing, so that nobody publishes a cache of theirs."""

# Parameters in thousands of millions: as published, or as the published sizes add up where only a rounded name is known.
PARAMS = {
    "llama-3": 8.03,
    "mistral": 7.24,
    "kimi-linear": 49.1,
    "mamba-2": 2.70,
    "nemotron-h": 8.10,
    "nemotron-nano": 8.89,
    "qwen3-next": 79.7,
    "olmo-hybrid": 7.42,
    "minimax-01": 456.0,
    "ring-mini-linear": 16.4,
    "ring-flash-linear": 104.2,
    "granite-4-h-small": 32.2,
    "granite-4-h-tiny": 6.94,
    "jamba": 51.6,
    "samba": 1.74,
    "mamba": 2.77,
    "recurrent-gemma-2b": 2.68,
    "recurrent-gemma-9b": 8.58,
    "lfm2": 1.17,
    "retnet": 1.32,
    "retnet-7b": 6.7,
    "rwkv-7": 2.95,
    "striped-hyena": 7.24,
    "evo": 6.45,
    "gemma-2-9b": 9.24,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.77,
    "gpt-oss-20b": 20.91,
    "deepseek-v3": 671.0,
    "gpt-2": 0.124,
    "sparse-transformer": 0.095,
    "falcon-h1-1.5b": 1.55,
    "falcon-h1-7b": 7.59,
    "phi-4-mini-flash": 3.85,
}


@pytest.mark.parametrize("name", PARAMS)
def test_presets_have_the_published_parameters(name: str) -> None:
    assert PRESETS[name].params == pytest.approx(PARAMS[name] * 1e9, rel=0.015)


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [
        ("kimi-linear", 27, [3, 7, 11, 15, 19, 23, 26]),
        ("nemotron-h", 28, [4, 10, 16, 22]),
        ("jamba", 32, [4, 12, 20, 28]),
        ("granite-4-h-small", 40, [5, 15, 25, 35]),
        ("zamba2", 63, [6, 13, 20, 27, 34, 41, 48, 54, 59]),
        ("lfm2", 16, [2, 5, 8, 10, 12, 14]),
        ("evo", 32, [8, 16, 24]),
        ("ring-mini-linear", 20, [4, 9, 14, 19]),
        ("ring-flash-linear", 32, [7, 15, 23, 31]),
        ("minimax-01", 80, list(range(7, 80, 8))),
        ("qwen3-next", 48, list(range(3, 48, 4))),
    ],
)
def test_attention_stands_where_it_is_published(name: str, layers: int, attention: list[int]) -> None:
    kinds = [layer.branches[0].mixer for layer in PRESETS[name].layout.layers]
    assert len(kinds) == layers
    assert [place for place, kind in enumerate(kinds) if kind in ("full", "mla")] == attention


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_bytes(name: str) -> None:
    preset = PRESETS[name]
    lengths = [min(length, preset.frame.context) for length in (8192, 131072)]
    for context, published in zip(lengths, PUBLISHED[name], strict=True):
        assert cache_bytes(preset.layout, preset.frame, context) == published
        frame = replace(preset.frame, context=context, batch=3)
        assert layout_cost(preset.layout, frame).stored_bytes == 3 * published


def test_a_token_of_deepseek_costs_what_is_published() -> None:
    for name, stored in (("deepseek-v3", 1152), ("deepseek-v3.2", 1152 + 256)):
        preset = PRESETS[name]
        assert cache_bytes(preset.layout, preset.frame, 10001) - cache_bytes(
            preset.layout, preset.frame, 10000
        ) == (61 * stored)
    sparse = PRESETS["deepseek-v3.2"]
    cost = layout_cost(sparse.layout, replace(sparse.frame, context=131072))
    # The index reads all of its small keys, the attention no more than 2,048 latents.
    assert cost.read_bytes == 61 * (256 * 131072 + 1152 * 2048)


def test_every_preset_is_checked() -> None:
    assert PUBLISHED.keys() | ENCODERS == PRESETS.keys() and not PUBLISHED.keys() & ENCODERS


def test_kimi_linears_bytes_by_part() -> None:
    preset = PRESETS["kimi-linear"]
    by_name: dict[str, int] = {}
    for tensor in layout_cost(preset.layout, replace(preset.frame, context=8192)).cache:
        by_name[tensor.name] = by_name.get(tensor.name, 0) + tensor.stored_bytes
    assert by_name == {"latents": 8064 * 8192, "matrix": 41943040, "tail": 1474560}
    kinds = [layer.branches[0].mixer for layer in preset.layout.layers]
    assert len(kinds) == 27
    assert [place for place, kind in enumerate(kinds, start=1) if kind == "mla"] == [4, 8, 12, 16, 20, 24, 27]


def test_nemotron_h_has_the_published_layers() -> None:
    layers = PRESETS["nemotron-h"].layout.layers
    kinds = [layer.branches[0].mixer for layer in layers]
    assert (len(kinds), kinds.count("full"), kinds.count("mamba2")) == (28, 4, 24)
    assert sum(1 + (layer.channel.mixer != "none") for layer in layers) == 52


def test_llama_3_has_its_published_parameters() -> None:
    preset = PRESETS["llama-3"]
    assert preset.params == 8_030_261_248


def test_mistral_has_its_published_parameters() -> None:
    preset = PRESETS["mistral"]
    assert preset.params == 7_241_732_096


def test_mamba2_has_its_published_parameters() -> None:
    preset = PRESETS["mamba-2"]
    tied = preset.frame.vocabulary * preset.frame.width + preset.frame.width
    total = preset.params
    assert total == pytest.approx(2.70e9, rel=2e-3)
    # One layer by hand: in, convolution with bias, three numbers a head, two norms, out.
    layer = 2560 * (2 * 5120 + 256 + 80) + 5 * (5120 + 256) + 3 * 80 + 5120 + 2560 + 5120 * 2560
    assert total == 64 * layer + tied


def test_preset_networks_fit_their_frames() -> None:
    for preset in PRESETS.values():
        check(preset.layout, preset.frame)
        assert preset.title and ("arXiv" in preset.source or preset.name == "gpt-2")
        small = Frame(width=64, train_length=64, dtype="float32")
        check(shrink_layout(preset.layout, preset.frame, small), small)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("width", [64, 512, 2048, 2304])
def test_preset_patterns_fit_other_frames(name: str, width: int) -> None:
    frame = Frame(width=width, train_length=1024)
    idea = len(read(PRESETS[name].pattern.format(quarter=1, half=4)))
    for layers in range(1, 13):
        pattern = pattern_for(PRESETS[name], frame, layers)
        assert (pattern is not None) == (layers % idea == 0)
        if pattern is not None:
            assert len(pattern) == layers
            check(pattern, frame)

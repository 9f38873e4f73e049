"""Frames: their rules, and the sizes that they choose where nothing is written."""

import math
from typing import Any

import pytest

from search_space.cost import frames_of
from search_space.frame import Frame, Place, nearest_divisor, round_to
from search_space.mixers.full import Full
from search_space.mixers.kda import KDA
from search_space.mixers.linear import Linear
from search_space.mixers.mamba2 import Mamba2
from search_space.mixers.mla import MLA
from search_space.mixers.window import Window
from search_space.spec import Spec
from search_space.vocabulary import CHANNELS, VOCABULARY, read


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 0}, "width 0"),
        ({"width": -64}, "width -64"),
        ({"width": 100}, "such as 104"),
        ({"depth": 0}, "depth 0"),
        ({"train_length": 0}, "train_length 0"),
        ({"context": 0}, "context 0"),
        ({"batch": 0}, "batch 0"),
        ({"vocabulary": 0}, "vocabulary 0"),
        ({"dtype": "bf16"}, "bfloat16"),
    ],
)
def test_wrong_sizes_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Frame(**{"width": 64, **wrong})


@pytest.mark.parametrize(
    ("width", "spec", "sizes"),
    [
        (2048, Full(), {"heads": 16, "kv_heads": 16, "head_dim": 128}),
        (4096, Full(kv_heads=8), {"heads": 32, "kv_heads": 8, "head_dim": 128}),
        (2304, Full(), {"heads": 18, "kv_heads": 18, "head_dim": 128}),
        (2304, Full(heads=36), {"heads": 36, "head_dim": 64}),
        (2304, Full(head_dim=64), {"heads": 36, "head_dim": 64}),
        (2304, KDA(heads=32, head_dim=128), {"heads": 32, "head_dim": 128}),
        (64, KDA(), {"heads": 4, "head_dim": 16}),
        (2048, Mamba2(), {"heads": 64, "head_dim": 64, "state": 128, "groups": 1}),
        (2560, Mamba2(), {"heads": 80, "head_dim": 64, "state": 128, "groups": 1}),
        (2048, MLA(), {"rank": 512, "shared": 64, "heads": 16, "head_dim": 128}),
        (4096, MLA(), {"rank": 512, "shared": 64, "heads": 32, "head_dim": 128}),
        (64, MLA(), {"rank": 16, "shared": 8, "heads": 4, "head_dim": 16}),
        (2048, Window(), {"size": 512, "heads": 16}),
        (2048, Linear(), {"heads": 16, "head_dim": 128}),
    ],
)
def test_the_frame_fills_in_what_is_not_written(width: int, spec: Spec, sizes: dict[str, int]) -> None:
    sized = spec.sized(Frame(width=width, train_length=4096))
    assert {name: getattr(sized, name) for name in sizes} == sizes


@pytest.mark.parametrize(
    "width", [8, 24, 40, 48, 64, 72, 96, 128, 200, 256, 512, 1000, 1024, 2304, 2560, 4096, 5120]
)
def test_every_word_is_valid_at_every_width_without_any_size(width: int) -> None:
    frame = Frame(width=width, train_length=128)
    for spec in (*VOCABULARY.values(), *CHANNELS.values()):
        sized = spec().sized(frame)
        assert sized.sized(frame) == sized
        assert sized.cost(frame) == spec().cost(frame)


def test_default_heads_fill_the_width() -> None:
    for width in range(8, 4097, 8):
        full = Full().sized(Frame(width=width))
        assert full.heads is not None and full.head_dim is not None
        assert full.heads * full.head_dim == width


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    frame = Frame(width=64)
    for spec in (Full(kv_heads=8), Window(kv_heads=8), Full(heads=6, kv_heads=4), Mamba2(heads=6, groups=4)):
        with pytest.raises(ValueError, match="does not divide"):
            spec.sized(frame)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KDA(head_dim=100), "kda: head_dim=100 is not valid"),
        (lambda: Window(size=6), "window: size=6"),
        (lambda: Full(rotary=0.3), "full: rotary=0.3"),
        (lambda: Full(qk_norm=1), "full: qk_norm=1"),
        (lambda: Full(heads=True), "full: heads=true"),
        (lambda: Linear(feature="gelu"), "linear: feature=gelu"),
    ],
)
def test_a_spec_refuses_wrong_values_at_once(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_misspelt_setting_is_an_error() -> None:
    with pytest.raises(TypeError):
        KDA(headdim=64)  # type: ignore[call-arg]


def test_rounding_goes_to_the_nearest_step_and_halves_go_up() -> None:
    assert [round_to(value, 8) for value in (0, 3, 11.9, 12, 20, 23)] == [8, 8, 8, 16, 24, 24]


def test_the_nearest_divisor_is_near_by_ratio() -> None:
    for total in range(8, 600, 8):
        for ideal in (5, 8, 11, 16, 22.6, 45, 128):
            options = [size for size in range(8, total + 1, 8) if total % size == 0]
            best = min(abs(math.log(size / ideal)) for size in options)
            found = nearest_divisor(total, ideal)
            assert found in options
            assert abs(math.log(found / ideal)) == pytest.approx(best)
    with pytest.raises(ValueError, match="no divisor"):
        nearest_divisor(4, 16)


def test_a_place_is_one_of_the_networks_layers() -> None:
    assert Frame(width=64).place == Place(index=0, depth=1)
    for index, depth in ((1, 1), (-1, 2), (4, 3)):
        with pytest.raises(ValueError, match=f"layer {index} is not valid"):
            Place(index=index, depth=depth)


def test_the_longest_text_is_what_a_network_is_built_for() -> None:
    assert Frame(width=64, train_length=32, context=48).longest == 48
    assert Frame(width=64, train_length=64, context=48).longest == 64
    assert Frame(width=64, train_length=64, context=48, max_length=256).longest == 256
    with pytest.raises(ValueError, match="must fit into it"):
        Frame(width=64, train_length=64, context=48, max_length=63)


def test_every_layer_knows_what_came_before_it() -> None:
    frame = Frame(width=64, train_length=32, context=48)
    places = [own.place for own in frames_of(read("kda|full mla 2*kda"), frame)]
    assert [place.index for place in places] == [0, 1, 2, 3]
    assert {place.depth for place in places} == {4}
    assert [set(place.earlier) for place in places] == [
        set(),
        {"kda", "full"},
        {"kda", "full", "mla"},
        {"kda", "full", "mla"},
    ]

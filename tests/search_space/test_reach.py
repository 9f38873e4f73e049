"""How far back a token sees: what every mixer declares is tried on its module, and its state grows as that says.

Letters: T time, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.spec import REACHES, MixerSpec, Stream, shrink
from search_space.vocabulary import VOCABULARY, mixer_of, read

WIDTH, TRAINED = 16, 64
TARGET = Frame(width=1024, train_length=4096, context=4096)
PROXY = Frame(width=WIDTH, train_length=TRAINED, context=2 * TRAINED, dtype="float32")
TELLING = {
    "fixed": "fixed[stride=16,summary=4]",
    "mosa": "mosa[size=16,heads=4,kv_heads=4,head_dim=8]",
}
"""Settings for words whose proxy of this size has a single head that reads all, or no gap in its pattern."""
BOUNDS: Mapping[str, Callable[[Any], int]] = {
    "window": lambda spec: spec.size,
    "shortconv": lambda spec: spec.taps,
    "transformer_xl": lambda spec: spec.memory + spec.segment,
    "compressive": lambda spec: spec.slots * spec.compression + spec.memory + spec.segment,
}
"""Tokens that the last one of a text of whole segments sees, itself among them, by the settings."""
NEAR = 12
"""Fading is no matter of reach: over so many tokens no gate at its initial values has rounded everything away."""


def small(name: str, trained: int = TRAINED) -> MixerSpec:
    """The word as a proxy of this training length has it."""
    if name in TELLING:
        return mixer_of(read(TELLING[name]).layers[0].branches[0]).sized(PROXY)
    return shrink(VOCABULARY[name](), TARGET, replace(PROXY, train_length=trained))


def seen(spec: MixerSpec, length: int, *, text: int = 0, push: float = 1.0) -> Tensor:
    """Which tokens [T] change what the last one gives when they alone are pushed; the last one stands first."""
    torch.manual_seed(0)
    mixer = spec.build(PROXY).double().eval()
    x = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(text)).double()
    pushes = torch.diag_embed(torch.full((WIDTH, length), push, dtype=torch.float64)).permute(1, 2, 0)
    with torch.no_grad():
        y = mixer.forward_with(torch.cat([x[None], x + pushes]), None, Stream())[0][:, -1]
    change = (y[1:] - y[0]).abs().amax(-1) / y[0].square().mean().sqrt()
    return (change > 1e-12).flip(0)


def stored(name: str, context: int) -> int:
    return VOCABULARY[name]().cost(Frame(width=2048, context=context)).stored_bytes


def of(*reaches: str) -> list[str]:
    return [name for name, spec in VOCABULARY.items() if getattr(spec, "reach", None) in reaches]


@pytest.mark.parametrize("name", VOCABULARY)
def test_every_mixer_says_how_far_back_it_sees(name: str) -> None:
    reach = getattr(VOCABULARY[name], "reach", None)
    assert reach in REACHES, f"{name} says reach {reach!r}: give it one of {', '.join(REACHES)}"


@pytest.mark.parametrize("name", of("all"))
def test_all_is_every_earlier_token_in_a_cache_that_grows(name: str) -> None:
    assert seen(small(name), TRAINED).all()
    assert stored(name, 131072) > 8 * stored(name, 8192)


@pytest.mark.parametrize("name", of("state"))
def test_a_state_holds_every_earlier_token_and_hardly_grows(name: str) -> None:
    assert seen(small(name, NEAR), NEAR).all()
    assert stored(name, 131072) < 2 * stored(name, 8192)


@pytest.mark.parametrize("name", of("window"))
def test_a_window_ends_where_its_settings_say(name: str) -> None:
    assert name in BOUNDS, f"{name} says reach window: name its bound by its settings in BOUNDS"
    spec = small(name)
    bound = BOUNDS[name](spec)
    assert 1 < bound < TRAINED
    for length in (TRAINED, 2 * TRAINED):
        assert torch.equal(seen(spec, length), torch.arange(length) < bound)
    assert stored(name, 131072) == stored(name, 8192)


@pytest.mark.parametrize("name", of("pattern"))
def test_a_pattern_is_the_same_in_every_text_and_leaves_tokens_out(name: str) -> None:
    spec = small(name)
    for length in (TRAINED, 2 * TRAINED):
        first = seen(spec, length)
        assert torch.equal(seen(spec, length, text=1, push=1e-3), first)
        assert first[0] and first[length // 2 :].any() and not first.all()


@pytest.mark.parametrize("name", of("chosen"))
def test_a_choice_is_another_in_another_text_and_leaves_tokens_out(name: str) -> None:
    spec = small(name)
    texts = torch.stack([seen(spec, 2 * TRAINED, text=text, push=1e-3) for text in range(6)])
    assert not texts.all(dim=1).any()
    assert (texts.any(dim=0) & ~texts.all(dim=0)).any()
    # Far ones are among them.
    assert texts[:, TRAINED // 2 :].any()


@pytest.mark.parametrize("name", of("none"))
def test_no_reach_is_the_token_alone(name: str) -> None:
    assert torch.equal(seen(small(name), TRAINED), torch.arange(TRAINED) < 1)
    assert stored(name, 131072) == 0


def test_the_bounds_are_those_of_windows() -> None:
    assert set(BOUNDS) == set(of("window"))

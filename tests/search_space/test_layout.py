"""Layouts as values: folding to the shortest text, JSON, keys, stacking and stretching."""

import copy
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_space.layout import Branch, Layer, Layout, fold, from_json, stack, stretch


def expand(text: str) -> list[str]:
    """The tokens that a folded text stands for, by plain rewriting and independent of the parser."""
    innermost = re.compile(r"(\d+)\*(?:\(([^()]*)\)|([a-z]+))")
    while found := innermost.search(text):
        inside = found.group(2) or found.group(3)
        # Inside parentheses a run may still be folded; it is rewritten first, because it holds no parentheses.
        if "*" in inside:
            text = f"{text[: found.start(2)]}{' '.join(expand(inside))}{text[found.end(2) :]}"
        else:
            text = f"{text[: found.start()]}{' '.join([inside] * int(found.group(1)))}{text[found.end() :]}"
    return text.split()


@cache
def least(tokens: tuple[str, ...]) -> int:
    """The length of the shortest notation, by trying every split and every repeat."""
    if len(tokens) == 1:
        return len(tokens[0])
    best = min(least(tokens[:cut]) + 1 + least(tokens[cut:]) for cut in range(1, len(tokens)))
    for times in range(2, len(tokens) + 1):
        unit = tokens[: len(tokens) // times]
        if unit * times == tokens:
            inside = len(unit[0]) if len(unit) == 1 else least(unit) + 2
            best = min(best, len(f"{times}*") + inside)
    return best


@given(st.lists(st.sampled_from(["kda", "mla", "full"]), min_size=1, max_size=40))
def test_a_fold_says_the_same_layers_and_is_never_longer(tokens: list[str]) -> None:
    text = fold(tokens)
    assert expand(text) == tokens
    assert len(text) <= len(" ".join(tokens))
    assert "(" not in text or not re.search(r"\*\d|\(\)", text)


@given(st.data())
def test_nested_repeats_fold(data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.sampled_from(["kda", "mla"]), min_size=1, max_size=3))
    middle = inner * data.draw(st.integers(1, 4)) + data.draw(st.lists(st.just("full"), max_size=2))
    tokens = (middle * data.draw(st.integers(1, 4)))[:40]
    text = fold(tokens)
    assert expand(text) == tokens
    assert len(text) == least(tuple(tokens))


@pytest.mark.parametrize("words", [("a", "b"), ("full", "m"), ("window", "mamba")])
def test_no_shorter_text_exists_for_any_short_sequence(words: tuple[str, str]) -> None:
    for length in range(1, 11):
        for tokens in itertools.product(words, repeat=length):
            assert len(fold(tokens)) == least(tokens), tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("kda", "kda"),
        ("kda kda", "2*kda"),
        ("kda kda kda mla", "3*kda mla"),
        ("kda kda kda mla " * 6, "6*(3*kda mla)"),
        ("kda " + "kda kda kda mla " * 6, "kda 6*(3*kda mla)"),
        ("full " + "kda kda kda mla " * 3, "full 3*(3*kda mla)"),
        ("mm mm none full " * 3 + "mm mm", "3*(2*mm none full) 2*mm"),
        ("kda mla " * 2 + "kda", "2*(kda mla) kda"),
        ("kda mla kda mla full " * 2, "2*(2*(kda mla) full)"),
    ],
)
def test_runs_and_nested_repeats(tokens: str, text: str) -> None:
    assert fold(tokens.split()) == text
    assert len(text) == least(tuple(tokens.split()))


def test_a_deep_network_without_any_pattern_folds_too() -> None:
    rng = random.Random(5)
    tokens = [rng.choice(["kda", "mla", "full"]) for _ in range(200)]
    text = fold(tokens)
    assert expand(text) == tokens
    assert len(text) < len(" ".join(tokens))


def layer(name: str, *branches: str, channel: str = "swiglu", **settings: int | float | bool) -> Layer:
    first = Branch(name, tuple(sorted(settings.items())))
    return Layer((first, *map(Branch, branches)), Branch(channel))


def test_a_layer_prints_its_branches_settings_and_channel() -> None:
    assert str(layer("full")) == "full"
    assert str(layer("full", channel="none")) == "full/none"
    assert str(layer("window", "mamba2", size=512, rotary=0.5)) == "window[rotary=0.5,size=512]|mamba2"
    assert str(layer("full", gate=True, qk_norm=False)) == "full[gate=true,qk_norm=false]"


def test_json_round_trip() -> None:
    layout = Layout(
        (layer("window", "mamba2", size=512), layer("full", channel="none", gate=True, rotary=0.25)) * 2
    )
    plain = json.loads(layout.dump())
    assert plain[1] == {
        "branches": [{"mixer": "full", "settings": {"gate": True, "rotary": 0.25}}],
        "channel": {"mixer": "none", "settings": {}},
    }
    assert from_json(plain) == layout
    assert from_json(plain).key == layout.key


def test_keys_are_the_same_forever() -> None:
    # These literals may never change: results are stored under them.
    assert Layout((layer("full"),)).key == "a18b869b2e81c0c5"
    assert Layout((layer("kda"), layer("kda"), layer("kda"), layer("mla")) * 6).key == "5c84250e0d105280"
    assert (
        Layout((layer("window", "mamba2", size=512), layer("full", channel="none"))).key == "93992e2cce118a9c"
    )


def test_equal_layouts_share_a_key_and_different_ones_do_not() -> None:
    one = Layout((layer("kda"),) * 4)
    two = Layout(tuple(layer("kda") for _ in range(4)))
    assert one == two and one.key == two.key and hash(one) == hash(two)
    others = [
        Layout((layer("kda"),) * 3),
        Layout((layer("kda", channel="none"),) * 4),
        Layout((layer("kda", head_dim=64),) * 4),
        Layout((layer("kda", "kda"),) * 2),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5


ELSEWHERE = """
import pickle, sys
from search_space.layout import Branch, Layer
made = Layer((Branch("kda", (("head_dim", 64),)),), Branch("none"))
sent = pickle.loads(sys.stdin.buffer.read())
assert sent == made and hash(sent) == hash(made) and sent in {made: 1} and sent.branches[0] in {made.branches[0]}
"""


def test_a_hash_does_not_travel() -> None:
    """Words hash differently in another process, and a layer that took its hash along would not be found there."""
    sent = layer("kda", channel="none", head_dim=64)
    assert hash(sent) == hash(copy.deepcopy(sent)) and {sent: 1}[copy.copy(sent)] == 1
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", ELSEWHERE], input=pickle.dumps(sent), env=env, check=True)


def test_no_layer_is_no_layout() -> None:
    with pytest.raises(ValueError, match="at least one mixer"):
        Layout(())


def test_stack_repeats_and_cuts_and_stretch_keeps_relative_places() -> None:
    a, b, c = layer("a"), layer("b"), layer("c")
    pattern = Layout((a, b, c))
    assert stack(pattern, 7).layers == (a, b, c, a, b, c, a)
    assert stack(pattern, 2).layers == (a, b)
    assert stretch(pattern, 6).layers == (a, a, b, b, c, c)
    assert stretch(pattern, 7).layers == (a, a, a, b, b, c, c)
    assert stretch(pattern, 3) == stack(pattern, 3) == pattern
    for fill in (stack, stretch):
        with pytest.raises(ValueError, match="depth 0"):
            fill(pattern, 0)

"""The notation: what is written is what is read, in one canonical form, and every fault is shown at its place."""

import math
import random
import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_space.layout import JOINS, Branch, Layer, Layout, from_json
from search_space.notation import MOST_LAYERS, LayoutError
from search_space.setting import UNITS, Setting, Value, settings_of
from search_space.vocabulary import CHANNELS, VOCABULARY, read

SETTINGS = {name: settings_of(spec) for name, spec in {**VOCABULARY, **CHANNELS}.items()}


def written(value: Value, thousands: bool) -> str:
    """A value as a person might write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if thousands and isinstance(value, int) and value % 512 == 0:
        return f"{value / 1024:g}k"
    return str(value)


@st.composite
def values(draw: st.DrawFn, setting: Setting) -> Value:
    if setting.unit is not None and draw(st.booleans()):
        step = UNITS[setting.unit].step
        return step * draw(st.integers(1, 5000 // step))
    return draw(st.sampled_from(setting.options))


@st.composite
def branches(draw: st.DrawFn, names: list[str]) -> tuple[str, Branch]:
    name = draw(st.sampled_from(names))
    chosen = (
        draw(st.lists(st.sampled_from(SETTINGS[name]), unique=True, max_size=3)) if SETTINGS[name] else []
    )
    given_values = [(setting, draw(values(setting))) for setting in chosen]
    blank = draw(st.sampled_from(["", "", " "]))
    inside = f",{blank}".join(
        f"{setting.name}{blank}={blank}{written(value, draw(st.booleans()))}"
        for setting, value in given_values
    )
    kept = sorted((setting.name, value) for setting, value in given_values if value != setting.default)
    return f"{name}[{inside}]" if inside else name, Branch(name, tuple(kept))


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, Layer]:
    made = draw(st.lists(branches(sorted(VOCABULARY)), min_size=1, max_size=2))
    join = JOINS[0]
    if len(made) > 1:
        join = draw(st.sampled_from(JOINS))
        if draw(st.booleans()):
            shares = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
            common, blank = math.gcd(*shares), draw(st.sampled_from(["", " "]))
            made = [
                (f"{said}{blank}@{blank}{share}", replace(branch, share=share // common))
                for (said, branch), share in zip(made, shares, strict=True)
            ]
    text = draw(st.sampled_from(["|", " | "])).join(said for said, _ in made)
    if join != JOINS[0] or (len(made) > 1 and draw(st.booleans())):
        text = f"{text}{draw(st.sampled_from(['&', ' & ']))}{join}"
    channel = Branch("swiglu")
    if draw(st.booleans()):
        said, channel = draw(branches(sorted(CHANNELS)))
        text = f"{text}/{said}"
    return text, Layer(tuple(branch for _, branch in made), channel, join)


def items(depth: int) -> st.SearchStrategy[tuple[str, list[Layer]]]:
    single = st.tuples(st.integers(1, 4), layers()).map(
        lambda both: (
            f"{both[0]}*{both[1][0]}" if both[0] > 1 else both[1][0],
            [both[1][1]] * both[0],
        )
    )
    if depth == 0:
        return single
    group = st.tuples(st.integers(1, 3), st.lists(items(depth - 1), min_size=1, max_size=3)).map(
        lambda both: (
            f"{both[0]} * ( {' '.join(text for text, _ in both[1])})",
            [layer for _, inside in both[1] for layer in inside] * both[0],
        )
    )
    return st.one_of(single, group)


networks = st.lists(items(2), min_size=1, max_size=4).map(
    lambda parts: (" ".join(text for text, _ in parts), [layer for _, inside in parts for layer in inside])
)


@given(networks)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_and_prints_canonically(network: tuple[str, list[Layer]]) -> None:
    text, meant = network
    layout = read(text)
    assert list(layout.layers) == meant
    printed = str(layout)
    assert read(printed) == layout
    assert str(read(printed)) == printed
    assert printed == str(Layout(tuple(meant)))
    assert len(printed) <= len(" ".join(str(layer) for layer in meant))
    assert from_json(layout.to_json()) == layout
    assert from_json(layout.to_json()).key == layout.key


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full[rotary=1,qk_norm=false,gate=false]", "full"),
        ("full[rotary=1.0]", "full"),
        ("full[rotary=0.5,kv_heads=2]", "full[kv_heads=2,rotary=0.5]"),
        ("full/swiglu", "full"),
        ("full/swiglu[ratio=2.66667]", "full"),
        ("full/swiglu[ratio=2]", "full/swiglu[ratio=2]"),
        ("kda kda kda mla", "3*kda mla"),
        ("(((kda)))", "kda"),
        ("2*(3*kda)", "6*kda"),
        ("3*kda mla 3*(3*kda mla) 2*(kda kda kda mla)", "6*(3*kda mla)"),
        ("2*(window[size=512]|mamba2 full/none)", "2*(window[size=512]|mamba2 full/none)"),
        ("  kda\n\tmla  ", "kda mla"),
        ("window[size=32k]", "window[size=32768]"),
        ("window[size=0.5K]", "window[size=512]"),
        ("linear[feature=elu]", "linear"),
        ("linear[feature=relu]", "linear[feature=relu]"),
    ],
)
def test_one_text_for_each_layout(text: str, canonical: str) -> None:
    assert str(read(text)) == canonical


def test_branches_keep_their_order() -> None:
    assert read("window|mamba2") != read("mamba2|window")


FAULTS = [
    # The caret under each text stands where the error must point.
    ("", 0, "empty"),
    ("()", 0, "empty"),
    ("kda ()", 4, "empty"),
    ("3*()", 2, "empty"),
    ("(kda", 0, "never closed"),
    ("2*(kda (mla)", 2, "never closed"),
    ("kda)", 3, "closes nothing"),
    ("(kda)) mla", 5, "closes nothing"),
    ("0*kda", 0, "count 0"),
    ("mla 0*kda", 4, "count 0"),
    ("99999999*kda", 0, "count 99999999"),
    (f"{MOST_LAYERS + 1}*kda", 0, "count"),
    (f"2*({MOST_LAYERS}*kda)", 0, "no network is that deep"),
    (f"{MOST_LAYERS}*kda mla", len(f"{MOST_LAYERS}*kda "), "no network is that deep"),
    ("full kad", 5, "did you mean kda"),
    ("full widnow[size=4]", 5, "did you mean window"),
    ("Full", 0, "did you mean full"),
    ("full full[kv_head=2]", 10, "did you mean kv_heads"),
    ("kda[heads=2,headdim=8]", 12, "did you mean head_dim"),
    ("kda/none[ratio=2]", 9, "it has none"),
    ("full/swigul", 5, "did you mean swiglu"),
    ("full/kda", 5, 'no channel mixer "kda"'),
    ("swiglu", 0, 'no mixer "swiglu"'),
    ("kda[head_dim=100]", 13, "multiple of 8"),
    ("kda[head_dim=0]", 13, "multiple of 8"),
    ("kda[head_dim=-8]", 13, "multiple of 8"),
    ("kda[head_dim=64.5]", 13, "multiple of 8"),
    ("kda[head_dim=true]", 13, "multiple of 8"),
    ("kda[head_dim=wide]", 13, "multiple of 8"),
    ("window[size=1.0001k]", 12, "multiple of 4"),
    ("window[size=1e999]", 12, "multiple of 4"),
    ("window[size=1e999k]", 12, "multiple of 4"),
    ("full[rotary= 0.3]", 13, "choose one of 1, 0.5, 0.25, 0"),
    ("full[rotary=true]", 12, "choose one of"),
    ("full[gate=1]", 10, "choose one of false, true"),
    ("linear[feature=rulu]", 15, "choose one of elu, relu"),
    ("full/swiglu[ratio=2.6]", 18, "choose one of"),
    ("full[kv_heads=2,rotary=1,kv_heads=2]", 25, "given twice"),
    ("full[kv_heads 2]", 14, 'expected "="'),
    ("full[kv_heads]", 13, 'expected "="'),
    ("full[kv_heads=]", 14, "expected a value"),
    ("full[]", 5, "expected a setting"),
    ("full[kv_heads=2,]", 16, "expected a setting"),
    ("full[kv_heads=2", 4, "never closed"),
    ("full[kv_heads=2; rotary=0]", 15, 'expected "," or "]"'),
    ("full[kv_heads=2kk]", 16, 'expected "," or "]"'),
    ("full [kv_heads=2]", 5, 'found "["'),
    ("3*", 2, "found the end"),
    ("3 kda", 0, 'found "3"'),
    ("3**kda", 2, 'found "*"'),
    ("2*3*kda", 2, 'found "3"'),
    ("kda % mla", 4, 'found "%"'),
    ("kda,mla", 3, 'found ","'),
    ("|kda", 0, 'found "|"'),
    ("kda|", 4, "found the end"),
    ("kda||mla", 4, 'found "|"'),
    ("kda/", 4, "expected a channel mixer"),
    ("(kda)/none", 5, 'found "/"'),
    ("kda/none/none", 8, 'found "/"'),
    ("kda/none|mla", 8, 'found "|"'),
    ("кda", 0, 'found "к"'),
]


@pytest.mark.parametrize(("text", "position", "says"), FAULTS)
def test_faults_are_shown_at_their_place(text: str, position: int, says: str) -> None:
    with pytest.raises(LayoutError) as caught:
        read(text)
    assert caught.value.position == position
    assert caught.value.text == text
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000,
        "(" * 5000 + "kda" + ")" * 5000,
        "1*(" * 100_000,
        "kda[" * 5000,
        "window[size=" + "9" * 5000 + "]",
        "window[size=" + "4" * 5000 + "k]",
        "window[size=1e" + "9" * 5000 + "]",
        "9" * 5000 + "*kda",
        "k" * 1_000_000,
        "kda " * 200_000,
        ")" * 100_000,
        "64*(64*(64*(kda)))",
        "\x00",
        "kda\ufeff",
        "٣*kda[",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_texts_are_refused_as_any_other_fault(text: str) -> None:
    with pytest.raises(LayoutError):
        read(text)


def read_or_refuse(text: str) -> Layout | LayoutError:
    try:
        return read(text)
    except LayoutError as error:
        return error


PIECES = [
    *VOCABULARY,
    *CHANNELS,
    *"()[]|/*=,  ",
    "2",
    "64",
    "k",
    "1e9",
    "size",
    "heads",
    "rotary",
    "true",
    "-",
    ".",
]


@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet=string.printable, max_size=60),
        st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    )
)
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_layout_or_a_layout_error(text: str) -> None:
    answer = read_or_refuse(text)
    if isinstance(answer, LayoutError):
        assert 0 <= answer.position <= len(text)
    else:
        assert read(str(answer)) == answer


def test_one_changed_character_is_refused_or_read_but_never_crashes() -> None:
    rng = random.Random(3)
    text = "2*(3*kda[head_dim=64]/none window[size=1k,rotary=0.5]|mamba2) mla[rank=256]/swiglu[ratio=4]"
    for _ in range(1500):
        place = rng.randrange(len(text))
        changed = text[:place] + rng.choice(string.printable) + text[place + rng.randrange(2) :]
        answer = read_or_refuse(changed)
        if isinstance(answer, LayoutError):
            assert 0 <= answer.position <= len(changed)
        else:
            assert str(read(str(answer))) == str(answer)


def test_nesting_that_people_write_is_read() -> None:
    assert read("(" * 20 + "kda" + ")" * 20) == read("kda")

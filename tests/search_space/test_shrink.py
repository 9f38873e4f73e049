"""Shrinking: every setting of every word stays valid, keeps its meaning, and costs stay the target's."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.kda import KDA
from search_space.mixers.mamba2 import Mamba2
from search_space.mixers.mla import MLA
from search_space.mixers.window import Window
from search_space.setting import UNITS, settings_of
from search_space.spec import Spec, shrink
from search_space.vocabulary import (
    CHANNELS,
    VOCABULARY,
    branch_of,
    check,
    mixer_of,
    plain,
    read,
    shrink_layout,
)

TARGETS = [
    Frame(width=width, train_length=length)
    for width, length in ((512, 2048), (1024, 8192), (2048, 4096), (2304, 32768), (4096, 5000))
]
PROXIES = [
    Frame(width=width, train_length=length, context=length, dtype="float32")
    for width, length in ((48, 40), (64, 64), (96, 256), (128, 100))
]
WORDS = {**VOCABULARY, **CHANNELS}


def one_setting_each(name: str, frame: Frame) -> Iterator[Spec]:
    """The word alone, then with every option of every setting that fits the frame."""
    yield WORDS[name]()
    for setting in settings_of(WORDS[name]):
        for option in setting.options:
            spec = WORDS[name](**{setting.name: option})
            try:
                spec.sized(frame)
            except ValueError:
                # Groups divide the heads, and what weighs shared experts asks for some.
                assert setting.unit == "groups" or setting.name == "shared_gate"
                continue
            yield spec


def test_the_examples_of_the_design() -> None:
    target = Frame(width=2048, train_length=4096)
    proxy = Frame(width=64, train_length=64)
    assert shrink(Window(size=1024), target, proxy).size == 16
    kda = shrink(KDA(head_dim=128), target, proxy)
    assert (kda.heads, kda.head_dim) == (4, 16)
    assert shrink(MLA(rank=512), target, proxy).rank == 16
    assert str(shrink_layout(read("window[size=1024] kda[head_dim=128] mla[rank=512]"), target, proxy)) == (
        "window[size=16] kda mla"
    )
    far_target, long_proxy = Frame(width=2048, train_length=32768), Frame(width=64, train_length=256)
    assert shrink(Window(size=1024), far_target, long_proxy).size == 8


def test_what_has_no_unit_stays() -> None:
    target, proxy = Frame(width=2048), Frame(width=64, train_length=64)
    small = shrink(Full(rotary=0.25, qk_norm=True, gate=True), target, proxy)
    assert (small.rotary, small.qk_norm, small.gate) == (0.25, True, True)
    assert str(shrink_layout(read("linear[feature=relu]/swiglu[ratio=4]"), target, proxy)) == (
        "linear[feature=relu]/swiglu[ratio=4]"
    )


def test_how_a_layer_is_computed_stays_as_written_or_left_to_the_frame() -> None:
    target, proxy = Frame(width=2048, train_length=8192), Frame(width=64, train_length=32)
    assert shrink(Mamba2(chunk=128), target, proxy).chunk == 128
    assert Mamba2().sized(target).chunk == 64
    assert shrink(Mamba2(), target, proxy).chunk == Mamba2(state=24).sized(proxy).chunk == 16


def test_a_fixed_pattern_leaves_tokens_out_of_the_proxys_texts_too() -> None:
    target, proxy = Frame(width=1024, train_length=4096), Frame(width=32, train_length=32)
    for stride, summary, kept in ((128, 32, 16), (128, 4, 16), (64, 32, 8), (32, 32, 4)):
        small = shrink(VOCABULARY["fixed"](stride=stride, summary=summary), target, proxy)
        assert (small.stride, small.summary) == (kept, 4)
    assert shrink(VOCABULARY["fixed"](), target, target) == VOCABULARY["fixed"]().sized(target)


def test_groups_keep_their_share_of_the_heads() -> None:
    target, proxy = Frame(width=4096), Frame(width=128)
    assert shrink(Full(kv_heads=8), target, proxy).kv_heads == shrink(Full(), target, proxy).heads // 4
    assert shrink(Full(kv_heads=1), target, proxy).kv_heads == 1
    assert shrink(Full(), target, proxy).kv_heads == shrink(Full(), target, proxy).heads
    assert shrink(Mamba2(heads=128, head_dim=64, groups=8), target, proxy).groups == 2
    # Where the share is no whole number of groups, there are fewer, never more: a cache is not flattered.
    for groups in (1, 2, 4, 8, 16, 32):
        for width in range(32, 512, 8):
            small = shrink(Full(kv_heads=groups), target, Frame(width=width))
            assert small.kv_heads is not None and small.heads is not None
            assert small.kv_heads == 1 or small.kv_heads / small.heads <= groups / 32
    for heads in range(1, 200):
        for groups in (size for size in range(1, heads + 1) if heads % size == 0):
            spec = Full(heads=heads, kv_heads=groups, head_dim=8)
            assert shrink(spec, target, target).kv_heads == groups


def test_larger_settings_stay_larger() -> None:
    target, proxy = Frame(width=2048, train_length=4096), Frame(width=128, train_length=256)
    for name, setting in (("window", "size"), ("mla", "rank"), ("mamba2", "state"), ("kda", "head_dim")):
        options = next(item.options for item in settings_of(VOCABULARY[name]) if item.name == setting)
        sizes = [
            getattr(shrink(VOCABULARY[name](**{setting: option}), target, proxy), setting)
            for option in options
        ]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) >= len(options) - 1, (name, sizes)


@pytest.mark.parametrize("name", WORDS)
def test_shrinking_stays_valid_for_every_option(name: str) -> None:
    for target, proxy in itertools.product(TARGETS, PROXIES):
        for spec in one_setting_each(name, target):
            small = shrink(spec, target, proxy)
            assert small.sized(proxy) == small
            assert small.cost(proxy).params >= 0
            for setting in settings_of(type(spec)):
                value = getattr(small, setting.name)
                if value is None:
                    # A ratio stands in for the size, in either frame.
                    assert getattr(spec, setting.name) is None and "ratio" in vars(spec)
                    continue
                assert setting.read(value) == value
                if setting.unit is None:
                    assert value == getattr(spec.sized(target), setting.name)
                else:
                    assert value % UNITS[setting.unit].step == 0
                    # Nought says that the part is absent, and stays so.
                    assert (value > 0) == (getattr(spec.sized(target), setting.name) > 0)
                if setting.unit == "groups":
                    assert getattr(small, "heads") % value == 0  # noqa: B009


COUNTED = [name for name, spec in VOCABULARY.items() if "heads" in {item.name for item in settings_of(spec)}]


@pytest.mark.parametrize("name", COUNTED)
def test_the_total_width_of_the_heads_keeps_its_share(name: str) -> None:
    for target, proxy in itertools.product(TARGETS, PROXIES):
        for spec in one_setting_each(name, target):
            large, small = spec.sized(target), shrink(spec, target, proxy)
            share = large.heads * large.head_dim / target.width
            kept = small.heads * small.head_dim / proxy.width
            exact = large.heads * large.head_dim * proxy.width % (8 * target.width) == 0
            # Where no whole number of heads gives the share, it is missed by less than half a head.
            slack = 0 if exact else max(0.5, 1 - share) * small.head_dim / proxy.width
            assert abs(kept - share) <= slack + 1e-9, (spec, target.width, proxy.width, kept, share)


def test_heads_that_are_not_counted_fill_the_width() -> None:
    uncounted = [
        name for name, spec in VOCABULARY.items() if name not in COUNTED and hasattr(spec, "head_dim")
    ]
    assert "rwkv7" in uncounted
    for name, width in itertools.product(uncounted, (8, 48, 56, 64, 200, 320, 1000)):
        for spec in one_setting_each(name, Frame(width=2560)):
            small = shrink(spec, Frame(width=2560), Frame(width=width))
            assert width % small.head_dim == 0 and small.head_dim % 8 == 0
    small = shrink(VOCABULARY["rwkv7"](head_dim=64), Frame(width=2560), Frame(width=320))
    # 64 over the square root of eight is 22.6; 24 does not divide the width.
    assert small.head_dim == 16


@pytest.mark.parametrize("name", WORDS)
def test_a_frame_shrunk_to_itself_changes_nothing(name: str) -> None:
    for target in TARGETS:
        for spec in one_setting_each(name, target):
            assert shrink(spec, target, target) == spec.sized(target)


@given(
    size=st.integers(1, 2500).map(lambda n: 4 * n),
    more=st.one_of(st.integers(-10, 10), st.integers(-5000, 5000)),
    proxy_length=st.integers(8, 512),
)
def test_a_window_covers_the_proxy_text_only_if_it_covers_the_targets(
    size: int, more: int, proxy_length: int
) -> None:
    length = max(64, size + more)
    target, proxy = Frame(width=1024, train_length=length), Frame(width=64, train_length=proxy_length)
    small = shrink(Window(size=size), target, proxy).size
    assert small is not None and small % 4 == 0
    if size < length:
        assert small < proxy_length
    elif proxy_length % 4 == 0 and proxy_length <= length:
        assert small >= proxy_length


@given(
    heads=st.integers(1, 200),
    share=st.integers(1, 12),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    proxy=st.sampled_from([8, 48, 64, 96, 128, 2048]),
)
def test_any_head_sizes_shrink_to_valid_ones(heads: int, share: int, head_dim: int, proxy: int) -> None:
    target, small_frame = Frame(width=2048), Frame(width=proxy, train_length=64)
    spec = Full(heads=heads * share, kv_heads=heads, head_dim=head_dim)
    small = shrink(spec, target, small_frame)
    assert small.sized(small_frame) == small
    if proxy == 2048:
        assert small == spec


def test_layouts_shrink_layer_by_layer_and_stay_valid() -> None:
    target, proxy = Frame(width=2048, train_length=4096), Frame(width=64, train_length=64)
    layout = read(
        "2*(3*kda[head_dim=256]/none window[size=512]|mamba2[state=256]) mla[rank=256] full[kv_heads=2]"
    )
    small = shrink_layout(layout, target, proxy)
    assert len(small) == len(layout)
    check(small, proxy)
    assert [layer.channel.mixer for layer in small.layers] == [layer.channel.mixer for layer in layout.layers]
    for large, tiny in zip(layout.layers, small.layers, strict=True):
        for before, after in zip(large.branches, tiny.branches, strict=True):
            assert mixer_of(after).sized(proxy) == shrink(mixer_of(before), target, proxy)


def test_plain_leaves_out_what_the_frame_chooses_anyway() -> None:
    frame = Frame(width=2048, train_length=4096)
    same = read(
        "kda[head_dim=128] full[heads=16,kv_heads=16] mla[rank=512,shared=64] window[size=512] mamba2[groups=1]"
    )
    assert str(plain(same, frame)) == "kda full mla window mamba2"
    kept = "kda[head_dim=64] full[kv_heads=4] window[size=256]"
    assert str(plain(read(kept), frame)) == kept


def test_plain_writes_one_network_in_one_way() -> None:
    frame = Frame(width=2048)
    assert plain(read("full[heads=32]"), frame) == plain(read("full[head_dim=64]"), frame)
    assert plain(read("full[heads=32,head_dim=64]"), frame) == plain(read("full[head_dim=64]"), frame)


@given(st.data())
def test_plain_keeps_the_network_whatever_sizes_are_written(data: st.DataObject) -> None:
    frame = Frame(width=data.draw(st.sampled_from([64, 2048])), train_length=1024)
    heads = data.draw(st.sampled_from([None, 1, 2, 3, 6, 16]))
    head_dim = data.draw(st.sampled_from([None, 8, 16, 64, 128]))
    kv_heads = data.draw(st.sampled_from([None, 1, 2, 3]))
    spec = Full(heads=heads, head_dim=head_dim, kv_heads=kv_heads)
    try:
        full = spec.sized(frame)
    except ValueError:
        return
    layout = read(str(branch_of(spec)))
    shorter = plain(layout, frame)
    assert mixer_of(shorter.layers[0].branches[0]).sized(frame) == full
    assert plain(shorter, frame) == shorter

"""Quantities are printed as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards import quantities
from search_space.quantity import read_count, read_quantity


@pytest.mark.parametrize(
    ("name", "x", "text"),
    [
        ("kv_bytes", 64 * 2**20, "64 MiB"),
        ("kv_bytes@8192", 0, "0 B"),
        ("kv_bytes", 1023.9 * 2**20, "1 GiB"),
        ("latency_ms", 3.1, "3.1 ms"),
        ("latency_ms_whole", 0.85, "850 µs"),
        ("latency_ms", 1250, "1.25 s"),
        ("params", 201e6, "201 M"),
        ("params", 999_900, "1 M"),
        ("quality", 0.951, ".951"),
        ("quality", 1, "1.000"),
        ("quality", -0.05, "−.050"),
        ("recall", 0.5, ".500"),
        ("energy", 12.5, "12.5 J"),
        ("bytes", 0.25, ".250"),
        ("latency_ms[phase=prefill,batch=8]", 1250, "1.25 s"),
        ("quality", float("nan"), "–"),
        ("quality", None, "–"),
    ],
)
def test_values_have_units(name, x, text):
    assert quantities.value(name, x, "J" if name == "energy" else "") == text


def test_lengths_durations_and_ages():
    assert [quantities.tokens(n) for n in (48, 8192, 131072, 2**20, 1000)] == [
        "48",
        "8k",
        "128k",
        "1M",
        "1,000",
    ]
    assert [quantities.duration(s) for s in (1.234, 42, 150, 3600, 11100)] == [
        "1.23 s",
        "42 s",
        "2 min 30 s",
        "1 h",
        "3 h 5 min",
    ]
    assert [quantities.age(s) for s in (1, 45, 300, 86400, 3 * 86400)] == [
        "just now",
        "45 s ago",
        "5 min ago",
        "1 day ago",
        "3 days ago",
    ]


def test_titles_name_the_context():
    assert quantities.title("kv_bytes@8192") == "cache at 8k"
    assert quantities.title("kv_bytes", 131072) == "cache at 128k"
    assert quantities.title("some_task") == "some task"
    assert (
        quantities.title("latency_ms[phase=prefill,batch=8,context=4096]") == "prefill latency, batch 8 at 4k"
    )
    assert quantities.title("tokens_per_s[batch=8]") == "tokens a second, batch 8"


def test_changes_are_shares_for_costs_and_differences_for_qualities():
    assert quantities.change("kv_bytes", 100, 78, log=True) == "−22 %"
    assert quantities.change("quality", 0.90, 0.95, log=False) == "+.050"


@pytest.mark.parametrize(("low", "high"), [(0.41, 0.88), (2.0, 2.4), (0.1, 900.0), (5.0, 5.0)])
def test_logarithmic_axes_have_ticks(low, high):
    for name in ("kv_bytes", "latency_ms"):
        places, words = quantities.ticks(name, low * 2**20, high * 2**20, log=True)
        assert places
        assert len(places) == len(words)
        assert places == sorted(places)


@given(st.floats(min_value=1, max_value=2**39))
def test_sizes_read_back(count: float) -> None:
    shown = quantities.size(count)
    assert "e+" not in shown
    if not shown.endswith(" B"):
        assert read_quantity(shown) == pytest.approx(count, rel=6e-3)


@pytest.mark.parametrize("count", [1024, 8192, 131072, 1024**2])
def test_lengths_read_back(count: int) -> None:
    assert read_count(quantities.tokens(count)) == count

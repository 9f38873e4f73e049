"""Quantities read and shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_space.quantity import (
    read_count,
    read_quantity,
    show_bytes,
    show_count,
    show_ms,
    show_seconds,
    show_tokens,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32768", 32768),
        ("32k", 32768),
        ("32K", 32768),
        ("1.5k", 1536),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("2M", 2e6),
        ("4GiB", 4 * 2**30),
        ("1g", 1e9),
        ("70.272kB", 70272),
        ("3MB", 3e6),
        ("1GB", 1e9),
        ("1.5ms", 1.5),
        ("2s", 2000),
        ("250us", 0.25),
        ("1e3", 1000),
        ("2.5E-1ms", 0.25),
        (" 7 ", 7),
        ("0", 0),
    ],
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert read_quantity(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "k", "-3", "3 4", "3 parsecs", "1,5", "inf", "nan", "1e400", "9" * 400, "٣", "0x10", "1..2"]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        read_quantity(text)


def test_counts_are_whole_and_positive() -> None:
    assert read_count("128k") == 131072
    assert read_count("1M") == 1024**2
    assert read_count("1e3") == 1000
    assert isinstance(read_count("0.5k"), int)
    for text in ("0", "1.5", "0.1k", "1e400", "12 apples"):
        with pytest.raises(ValueError, match="is not"):
            read_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2170880, "2.07 MiB"),
        (1000 * 1024, "1000 KiB"),
        (999.7 * 1024, "1000 KiB"),
        (16 * 2**30, "16 GiB"),
        (5 * 2**40, "5 TiB"),
    ],
)
def test_bytes_are_shown(count: float, text: str) -> None:
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (201_000_000, "201 M"),
        (8_030_261_248, "8.03 G"),
        (3.2e12, "3.2 T"),
    ],
)
def test_counts_are_shown(count: float, text: str) -> None:
    assert show_count(count) == text


def test_times_and_tokens_are_shown() -> None:
    assert show_ms(1.2345) == "1.23 ms"
    assert show_ms(12) == "12 ms"
    assert show_ms(999.8) == "1000 ms"
    assert show_ms(1234.5) == "1234 ms"
    assert [show_seconds(s) for s in (45, 59.6, 150, 3600, 3905, 90000)] == [
        "45 s",
        "1 min 00 s",
        "2 min 30 s",
        "1 h 00 min",
        "1 h 05 min",
        "25 h 00 min",
    ]
    assert [show_tokens(n) for n in (8192, 1000, 1024, 131072, 1025)] == ["8k", "1000", "1k", "128k", "1025"]


@given(st.floats(min_value=0.001, max_value=1e15))
def test_shown_sizes_never_fall_into_powers_of_ten_and_read_back(count: float) -> None:
    for shown in (show_bytes(max(1.0, count)), show_count(count), show_ms(count)):
        assert "e+" not in shown
    if count >= 1 and "TiB" not in show_bytes(count):
        assert read_quantity(show_bytes(count).removesuffix(" B")) == pytest.approx(count, rel=6e-3)


@given(st.integers(1, 2**40))
def test_tokens_read_back(count: int) -> None:
    assert read_count(show_tokens(count)) == count

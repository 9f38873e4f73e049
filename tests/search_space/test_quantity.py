"""Quantities read and shown."""

import pytest

from search_space.quantity import read_count, read_quantity


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

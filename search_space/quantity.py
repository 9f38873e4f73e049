"""Quantities as people write and read them: 32k, 64MiB, 1.5ms, 201 M; pure text, no torch."""

import math
import re

_SUFFIX = {
    "": 1.0,
    "k": 1024.0,
    "kib": 1024.0,
    "m": 1e6,
    "mib": 1024.0**2,
    "g": 1e9,
    "gib": 1024.0**3,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "ms": 1.0,
    "s": 1e3,
    "us": 1e-3,
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)")


def read_quantity(text: str) -> float:
    """A number with an optional suffix: k is 1024, as lengths are counted; KiB, MiB, GiB are
    powers of 1024; M, G and kB, MB, GB of 1000; ms, s, us.

    Raises:
        ValueError: the text is no such quantity.
    """
    found = _QUANTITY.fullmatch(text.strip())
    if (
        not found
        or found.group(2).lower() not in _SUFFIX
        or not math.isfinite(float(found.group(1)) * 1024**3)
    ):
        raise ValueError(f"{text!r} is not a quantity: write it like 32768, 32k, 64MiB or 1.5ms")
    return float(found.group(1)) * _SUFFIX[found.group(2).lower()]


def read_count(text: str) -> int:
    """A whole number such as 128k or, for lengths a power of 1024 too, 1M; raises ValueError if it is none, or below 1."""
    value = read_quantity(text) * (1024**2 / 1e6 if text.strip()[-1:] in ("m", "M") else 1)
    if value != int(value) or value < 1:
        raise ValueError(f"{text!r} is not valid: it must be a whole number, at least 1")
    return int(value)


def show_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{_digits(count)} {unit}"
        count /= 1024
    return f"{_digits(count)} TiB"


def show_count(count: float) -> str:
    """A large number by thousands: 950, 12.3 k, 201 M, 8.03 G."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{_digits(count)}{unit}"
        count /= 1000
    return f"{_digits(count)} T"


def show_tokens(count: int) -> str:
    """A length in tokens: 8192 is 8k, 1000 stays 1000."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def show_ms(value: float) -> str:
    """Milliseconds to three digits."""
    return f"{_digits(value)} ms"


def show_seconds(value: float) -> str:
    """A duration: 45 s, 2 min 30 s, 1 h 05 min."""
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 10000:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"

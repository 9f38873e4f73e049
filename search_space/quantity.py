"""Quantities as people write them: 32k, 64MiB, 1.5ms; pure text, no torch."""

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

"""What may enter a JSON column or a number column: finite numbers, texts, lists and dictionaries, checked by name."""

import math
from collections.abc import Mapping
from typing import Any

_INT64_MAX = 2**63 - 1


def plain(value: Any, where: str, *, non_finite_as_none: bool = False) -> Any:
    """The value as plain JSON types; ValueError names the spot that is not finite or not JSON.

    With `non_finite_as_none` a NaN or an infinity becomes None: for curves that people look at, never for numbers
    that the search reads.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)  # a numpy float64 becomes an ordinary one
        if non_finite_as_none:
            return None
        raise ValueError(f"{where} is {value}: only finite numbers are stored")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: the keys of a stored mapping are texts")
        return {
            key: plain(item, f"{where}[{key!r}]", non_finite_as_none=non_finite_as_none)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            plain(item, f"{where}[{index}]", non_finite_as_none=non_finite_as_none)
            for index, item in enumerate(value)
        ]
    raise ValueError(f"{where} is a {type(value).__name__}: store plain numbers, texts, lists and mappings")


def finite(value: float, where: str) -> float:
    """The number as a float; ValueError where it is not finite or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}: only finite numbers are stored")
    return float(value)


def numbers(values: Mapping[str, float], where: str) -> dict[str, float]:
    """A mapping of names to finite numbers, as given; ValueError names the first that is not."""
    for name, value in values.items():
        finite(value, f"{where}[{name!r}]")
    checked: dict[str, float] = plain(values, where)
    return checked


def whole(value: int, where: str) -> int:
    """The integer; ValueError where it does not fit the 64 bits of a column."""
    if isinstance(value, bool) or not isinstance(value, int) or not -_INT64_MAX <= value <= _INT64_MAX:
        raise ValueError(f"{where} is {value!r}: an integer of at most 63 bits is stored")
    return value


def printable(text: str) -> str:
    """The text with what no database takes (NUL, lone surrogates) written out: a reason must always be stored."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def storable(text: str, where: str) -> str:
    """The text as it is; ValueError where a database could not hold it."""
    if printable(text) != text:
        raise ValueError(f"{where} is {text!r}: a stored text has no NUL and no lone surrogate")
    return text

"""The bounds that a study was given, as far as they are on something that a picture has an axis for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_space.quantity import read_count, read_quantity

_RULE = re.compile(r"\s*([A-Za-z_]\w*)(?:@(\w+))?\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A most, or a least where it is not upper, of a cost by its stored name."""

    name: str
    bound: float
    upper: bool


def limits_of(config: Mapping[str, Any]) -> tuple[Limit, ...]:
    """Those among the constraints of a stored configuration; rules on layers and unknown words are none."""
    space = config.get("space")
    texts = space.get("constraints", ()) if isinstance(space, Mapping) else ()
    found = (_limit(text) for text in texts if isinstance(text, str))
    return tuple(limit for limit in found if limit is not None)


def _limit(text: str) -> Limit | None:
    rule = _RULE.fullmatch(text)
    if rule is None:
        return None
    name, context, sign, number = rule.groups()
    try:
        at = f"@{read_count(context)}" if context else ""
        return Limit(name=name + at, bound=read_quantity(number), upper=sign == "<=")
    except ValueError:
        return None

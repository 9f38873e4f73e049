"""The rules of a study, read: what the layers of a pattern must keep, bounds on what it costs, a width for each."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dashboards import quantities
from nas.objectives import KINDS, Quantity, read_amount, read_quantity_name, write_amount
from search_space.constraint import BOUNDED, Bound, Constraint, families, read_constraint
from search_space.frame import Frame
from search_space.notation import nearest
from search_space.vocabulary import VOCABULARY

MOST_TOLERANCE = 50.0

_LIMIT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*(?:@[^<>=\s]*|\[[^\]]*\])?)\s*(<=|>=)\s*(\S.*?)\s*")
_PARAMS = re.compile(r"\s*params\s*=\s*(\S+?)\s*(?:(?:±|\+-|\+/-)\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*)?")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on something that is known of a layout before it is trained."""

    text: str
    quantity: Quantity
    amount: str
    """The number as it was written."""
    least: float = -math.inf
    most: float = math.inf

    def broken_by(self, value: float) -> str | None:
        """Why a value breaks the bound, or None."""
        name = self.quantity.name
        if value > self.most:
            return (
                f"{name} is {write_amount(value, self.quantity, up=True)}, at most {self.amount} is allowed"
            )
        if value < self.least:
            return (
                f"{name} is {write_amount(value, self.quantity, up=False)}, at least {self.amount} is asked"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class Params:
    """So many parameters, within a share of them: every layout is given the width that comes nearest."""

    text: str
    count: float
    tolerance: float

    def broken_by(self, params: float, width: int) -> str | None:
        """Why a number of parameters is too far away, or None."""
        if abs(params - self.count) <= self.tolerance * self.count:
            return None
        off = 100 * (params / self.count - 1)
        return (
            f"params is {quantities.count(params)} at width {width}, the nearest that fits: {off:+.2g} % off "
            f"{quantities.count(self.count)}, {100 * self.tolerance:g} % are allowed"
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All rules of a study."""

    structure: tuple[Constraint, ...] = ()
    structure_texts: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    params: Params | None = None

    @property
    def of_space(self) -> tuple[Constraint, ...]:
        """Those that the space itself counts and draws by: structure, and exact sums at one width."""
        if self.params is not None:
            return self.structure
        return self.structure + tuple(
            Bound(cost=limit.quantity.base, most=limit.most)
            for limit in self.limits
            if limit.quantity.name in BOUNDED and limit.most < math.inf
        )

    @property
    def beyond_space(self) -> bool:
        """Whether there are rules that the space does not know."""
        return self.params is not None or len(self.of_space) < len(self.structure) + len(self.limits)


def read_rules(texts: Sequence[str], tasks: Collection[str], frame: Frame) -> Rules:
    """The rules that texts such as full>=1, latency_ms<=12ms or params=1.3B+-5% say at a target frame.

    Raises:
        ValueError: one is no rule, names nothing that is known, or bounds what only training tells.
    """
    structure: dict[str, Constraint] = {}
    limits: list[Limit] = []
    params: list[Params] = []
    for text in texts:
        wanted, rule = _PARAMS.fullmatch(text), _LIMIT.fullmatch(text)
        if wanted:
            params.append(_read_params(text, wanted.group(1), wanted.group(2)))
        elif rule and rule.group(1) not in VOCABULARY and rule.group(1) not in families():
            limits.append(_read_limit(text, rule.group(1), rule.group(2), rule.group(3), tasks, frame))
        else:
            structure[text] = read_constraint(text)
    if len(params) > 1:
        raise ValueError(
            f"constraints {', '.join(rule.text for rule in params)}: a width is fitted to one of them"
        )
    return Rules(
        structure=tuple(structure.values()),
        structure_texts=tuple(structure),
        limits=tuple(limits),
        params=params[0] if params else None,
    )


def _read_params(text: str, count: str, percent: str | None) -> Params:
    if percent is None:
        raise ValueError(f"constraint {text!r}: say how near, such as params={count}+-5%")
    if not 0 < float(percent) <= MOST_TOLERANCE:
        raise ValueError(
            f"constraint {text!r}: {percent} % is not valid: more than 0, at most {MOST_TOLERANCE:g}"
        )
    try:
        amount = read_amount(count, Quantity(base="params"))
    except ValueError as error:
        raise ValueError(f"constraint {text!r}: {error}") from None
    if amount < 1:
        raise ValueError(f"constraint {text!r}: at least one parameter is needed")
    return Params(text=text, count=amount, tolerance=float(percent) / 100)


def _read_limit(text: str, name: str, sign: str, number: str, tasks: Collection[str], frame: Frame) -> Limit:
    base = re.split(r"[@\[]", name)[0]
    if base not in tasks and base != "flops" and base not in KINDS:
        words = [*VOCABULARY, *families(), *(known for known in KINDS if known != "quality")]
        raise ValueError(f"constraint {text!r}: no mixer, family or cost {base!r}{nearest(base, words)}")
    try:
        quantity = read_quantity_name(name, tasks).at(frame)
        if quantity.kind.source == "training":
            raise ValueError(
                f"{quantity.name} is told by training and cannot be bounded before it; name it as an objective"
            )
        amount = read_amount(number, quantity)
    except ValueError as error:
        raise ValueError(f"constraint {text!r}: {error}") from None
    limit = Limit(text=text.strip(), quantity=quantity, amount=number)
    return replace(limit, most=amount) if sign == "<=" else replace(limit, least=amount)

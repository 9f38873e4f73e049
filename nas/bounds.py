"""Bounds on what is known of a layout before it is trained: who breaks one, the nearest value, a layout that keeps all."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dashboards import quantities
from nas.letters import Letters
from nas.objectives import Phase, Quantity, write_amount
from nas.reach import Reach
from nas.rules import Limit, Rules
from nas.widths import PARAMS, Widths
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.space import Space

MOST_LISTED = 4096
"""Patterns that are all looked at where a random one that is not known yet is wanted; larger spaces are drawn from."""
MOST_DRAWN = 300
MOST_MEASURED = 2000
"""Latencies that are measured ahead for the sake of a bound; beyond, layers are measured as their layouts come up."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A bound on a sum over layers, as a most: of the sum, or with the sign -1 of its negative."""

    quantity: Quantity
    sign: int
    most: float
    limit: Limit | None = None
    """None for the parameters that a width is fitted to."""
    over: float | None = None
    """Where the bound is on so much over the sum, as tokens a second are on a latency."""

    def shown(self, total: float) -> str:
        """The bound's own amount that a sum would keep."""
        amount = self.sign * total
        value = self.over / amount if self.over is not None else amount
        return write_amount(value, self.quantity, up=self.upper)

    @property
    def upper(self) -> bool:
        """Whether the bound is written with <=."""
        return self.limit is not None and self.limit.most < math.inf


def column_of(limit: Limit, target: Frame) -> Column:
    """The column of a limit."""
    upper = limit.most < math.inf
    bound = limit.most if upper else limit.least
    if limit.quantity.base != "tokens_per_s":
        sign = 1 if upper else -1
        return Column(quantity=limit.quantity, sign=sign, most=sign * bound, limit=limit)
    over = limit.quantity.of_latency(1.0, target)
    sign = -1 if upper else 1
    most = sign * (over / bound if bound else math.inf)
    return Column(quantity=limit.quantity, sign=sign, most=most, limit=limit, over=over)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """The rules of a study over its space; measured ones ask the letters for latencies."""

    space: Space
    rules: Rules
    letters: Letters
    widths: Widths | None = None
    answers: dict[Layout, str | None] = field(default_factory=dict)
    built: dict[tuple[int, tuple[Column, ...]], Reach] = field(default_factory=dict)

    def why_not(self, layout: Layout) -> str | None:
        """Why a layout breaks a rule, or None: structure first, then its width, then bounds by the costs that are stored."""
        if layout not in self.answers:
            self.answers[layout] = self._why_not(layout)
        return self.answers[layout]

    def _why_not(self, layout: Layout) -> str | None:
        broken = self.space.why_not(layout)
        if broken is None and self.widths is not None:
            broken = self.widths.why_not(layout)
        if broken is not None:
            return broken
        width = self.width_of(layout)
        for limit in self.rules.limits:
            if why := limit.broken_by(self.letters.value(limit.quantity, layout, width)):
                return why
        return None

    def width_of(self, layout: Layout) -> int:
        """The layout's own width; ValueError if it is valid at none."""
        return self.space.frame.width if self.widths is None else self.widths.width_of(layout)

    def sample(self, rng: random.Random, known: Callable[[Layout], bool]) -> Layout | None:
        """A random layout that keeps all rules and is not known; None if there is none, or drawing found none."""
        if self._listed is not None:
            rest = [layout for layout in self._listed if not known(layout)]
            return rng.choice(rest) if rest else None
        reaches = [
            reach
            for reach in (self._reach(width, self._columns) for width in self._all_widths)
            if reach.keeps()
        ]
        for _ in range(MOST_DRAWN if reaches else 0):
            layout = rng.choice(reaches).sample(rng)
            if layout is not None and not known(layout) and self.why_not(layout) is None:
                return layout
        return None

    @cached_property
    def _listed(self) -> list[Layout] | None:
        alphabet = list(self.space.alphabet)
        if len(alphabet) ** self.space.layers > MOST_LISTED:
            return None
        patterns = (Layout(layers) for layers in itertools.product(alphabet, repeat=self.space.layers))
        return [
            one for one in patterns if self.space.params_of(one) is not None and self.why_not(one) is None
        ]

    @cached_property
    def _all_widths(self) -> list[int]:
        return [self.space.frame.width] if self.widths is None else self.widths.among(self.space.alphabet)

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        """What can be proven: exact bounds, and measured ones as far as their layers are few enough to measure all."""
        wanted = [column_of(limit, self.space.frame) for limit in self.rules.limits]
        if not self.measurable:
            wanted = [column for column in wanted if column.quantity.kind.source != "measured"]
        return tuple(wanted)

    @property
    def measurable(self) -> bool:
        """Whether latencies may be asked for, and for every layer at every width."""
        return self.letters.latency is not None and len(self.to_measure()) <= MOST_MEASURED

    def to_measure(self) -> list[tuple[Layer, Frame, Phase]]:
        """What must be measured before measured bounds can be judged."""
        frames = dict.fromkeys(
            (limit.quantity.frame(self.letters.frame(width)), width, limit.quantity.phase)
            for limit in self.rules.limits
            if limit.quantity.kind.source == "measured"
            for width in self._all_widths
        )
        return [
            (layer, frame, phase)
            for frame, width, phase in frames
            for layer in self.space.alphabet
            if self.letters.fits(layer, width)
        ]

    @cached_property
    def _window(self) -> tuple[Column, ...]:
        if self.rules.params is None:
            return ()
        wanted, room = self.rules.params.count, self.rules.params.tolerance * self.rules.params.count
        return (
            Column(quantity=PARAMS, sign=1, most=wanted + room),
            Column(quantity=PARAMS, sign=-1, most=room - wanted),
        )

    def _reach(self, width: int, columns: tuple[Column, ...]) -> Reach:
        columns = (*self._window, *columns)
        if (width, columns) not in self.built:
            alphabet = self.space.alphabet
            letters = [layer for layer in alphabet if self.letters.fits(layer, width)]
            prices = [[self._price(column, layer, width) for column in columns] for layer in letters]
            self.built[width, columns] = Reach(
                letters,
                owners=[alphabet[layer][0] for layer in letters],
                variants=[alphabet[layer][1] for layer in letters],
                shared=self.space.sharing == "study",
                structure=self.rules.structure,
                prices=np.array(prices, dtype=np.float64),
                most=[column.most for column in columns],
                weights=self.space.weights,
            )
        return self.built[width, columns]

    def _price(self, column: Column, layer: Layer, width: int) -> float:
        # The easier end where the price depends on the place, so that what is refused is refused rightly.
        low, high = self.letters.span(column.quantity, layer, width, self.space.alphabet)
        return low if column.sign > 0 else -high

    def check(self) -> None:
        """Raise ValueError if no layout of the space keeps all rules, with the nearest value that one reaches."""
        if not self._columns and not self._window:
            return
        reaches = [self._reach(width, self._columns) for width in self._all_widths]
        if any(reach.keeps() for reach in reaches):
            return
        if not any(len(reach.sums()) for reach in reaches):
            # No pattern keeps the structure alone, which the space says in its own words.
            return
        if self.rules.params is not None and not any(
            self._reach(width, ()).keeps() for width in self._all_widths
        ):
            raise ValueError(self._no_width())
        for column in self._columns:
            alone = self._least(column, (column,))
            if alone is not None and alone > column.most:
                assert column.limit is not None
                raise ValueError(
                    f"{column.limit.text}: no layout of the space{self._with()} comes "
                    f"{'below' if column.upper else 'above'} {column.shown(alone)}{self._example(column, alone)}: "
                    "loosen it to that"
                )
        raise ValueError(self._none_together(exact=all(reach.exact for reach in reaches)))

    def _no_width(self) -> str:
        assert self.rules.params is not None
        wanted = self.rules.params
        found = [
            (abs(-total - wanted.count), -total, width)
            for width in self._all_widths
            for total in self._reach(width, ()).sums()[:, 1].tolist()
        ]
        _, params, width = min(found)
        off = 100 * abs(params / wanted.count - 1)
        return (
            f"{wanted.text}: no layout of the space comes nearer than {quantities.count(params)}, at width {width}: "
            f"allow {math.ceil(10 * off) / 10:g} %, or another number"
        )

    def _none_together(self, *, exact: bool) -> str:
        names = " and ".join(column.limit.text for column in self._columns if column.limit)
        nearest = []
        for column in self._columns:
            least = self._least(column, self._columns)
            if least is not None and column.limit is not None:
                way = "down" if column.upper else "up"
                nearest.append(f"{column.quantity.name} comes {way} to {column.shown(least)}")
        kept = f"; with the others kept, {', '.join(nearest)}" if nearest else ""
        none = "no layout of the space keeps" if exact else "no layout was found that keeps"
        return f"{none} {names} together{self._with()}{kept}: loosen one of them"

    def _least(self, column: Column, columns: tuple[Column, ...]) -> float | None:
        """The least of a column at any width, heeding the other columns that are given."""
        found = []
        for width in self._all_widths:
            reach = self._reach(width, columns)
            least = reach.least(len(self._window) + columns.index(column), heeding=True)
            found += [least] if least is not None else []
        return min(found, default=None)

    def _with(self) -> str:
        """The rules of structure and the parameters that stand beside, as a clause."""
        others = [*self.rules.structure_texts]
        if self.rules.params is not None:
            others.append(self.rules.params.text)
        return f" with {', '.join(others)}" if others else ""

    def _example(self, column: Column, least: float) -> str:
        """The layout that comes nearest, in brackets, if one is found at once."""
        if self._window:
            return ""
        reach = self._reach(self.space.frame.width, (column,))
        pinned = Reach(
            reach.letters,
            owners=reach.owners,
            variants=reach.variants,
            shared=reach.shared,
            structure=self.rules.structure,
            prices=reach.prices,
            most=[least],
            weights=reach.weights,
        )
        layout = pinned.sample(random.Random(0))
        return f" ({layout})" if layout is not None else ""

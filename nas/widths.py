"""A width for every layout: the one at which its network comes nearest to a number of parameters."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from nas.letters import Letters, placed
from nas.objectives import Quantity
from nas.rules import Params
from search_space.layout import Layer, Layout

STEPS = (64, 32, 16, 8)
"""Widths are multiples of the first that is fine enough for the tolerance; the last is what a frame demands."""
MOST_WIDTH = 2**18
MOST_TRIED = 64
"""Layers whose widths say how fine the steps must be."""
PARAMS = Quantity(base="params")


@dataclass(frozen=True, kw_only=True, eq=False)
class Widths:
    """Widths by layout, remembered."""

    rule: Params
    letters: Letters
    step: int
    weights: Sequence[int]
    """How often each layer of a pattern stands in the network."""
    known: dict[Layout, int] = field(default_factory=dict)
    alone: dict[tuple[Layer, int], float] = field(default_factory=dict)

    def width_of(self, pattern: Layout) -> int:
        """The multiple of the step whose network has the nearest number of parameters; ties go to the narrower.

        Raises:
            ValueError: the layout is valid at no width that was tried.
        """
        if pattern not in self.known:
            self.known[pattern] = self._nearest(pattern)
        return self.known[pattern]

    def params(self, pattern: Layout, width: int) -> float:
        """Parameters of the whole network at a width."""
        if any(placed(layer) for layer in pattern.layers):
            return self.letters.value(PARAMS, pattern, width)
        found = 0.0
        for layer, weight in zip(pattern.layers, self.weights, strict=True):
            key = (layer, width)
            if key not in self.alone:
                self.alone[key] = self.letters.span(PARAMS, layer, width)[0]
            found += weight * self.alone[key]
        return found

    def why_not(self, pattern: Layout) -> str | None:
        """Why no width brings a layout near enough, or None."""
        try:
            width = self.width_of(pattern)
        except ValueError as error:
            return str(error)
        return self.rule.broken_by(self.params(pattern, width), width)

    def among(self, letters: Iterable[Layer]) -> list[int]:
        """Every width that a layout of such layers may be given, from the narrowest to the widest."""
        ends = []
        for layer in letters:
            try:
                ends.append(self.width_of(Layout((layer,) * len(self.weights))))
            except ValueError:
                continue
        return list(range(min(ends), max(ends) + 1, self.step)) if ends else []

    def _nearest(self, pattern: Layout) -> int:
        wanted, width = self.rule.count, self._valid(pattern, self.letters.target.width)
        # Parameters grow about with the square of the width, so that a few rounds come close.
        for _ in range(4):
            ideal = width * (wanted / self.params(pattern, width)) ** 0.5
            width = self._valid(pattern, min(ideal, MOST_WIDTH))
        near = {width, *self._until(pattern, width, -1), *self._until(pattern, width, 1)}
        return min(near, key=lambda one: (abs(self.params(pattern, one) - wanted), one))

    def _until(self, pattern: Layout, width: int, way: int) -> Iterator[int]:
        """The valid widths from here on, to the first on the other side of the number."""
        for one in self._row(width, way):
            if self._fits(pattern, one):
                yield one
                if (self.params(pattern, one) - self.rule.count) * way >= 0:
                    return

    def _valid(self, pattern: Layout, ideal: float) -> int:
        """The valid multiple of the step that is nearest to a width."""
        start = max(self.step, round(ideal / self.step) * self.step)
        near = sorted((start, *self._row(start, 1), *self._row(start, -1)), key=lambda one: abs(one - start))
        for one in near:
            if self._fits(pattern, one):
                return one
        raise ValueError(f"{pattern} is valid at no multiple of {self.step} near width {start}")

    def _row(self, width: int, way: int) -> Iterator[int]:
        """Multiples of the step from a width on, up to twice of it or down to the first."""
        end = max(2 * width, width + 32 * self.step) + 1 if way > 0 else self.step - 1
        return iter(range(width + way * self.step, end, way * self.step))

    def _fits(self, pattern: Layout, width: int) -> bool:
        return all(self.letters.fits(layer, width) for layer in dict.fromkeys(pattern.layers))


def make_widths(rule: Params, letters: Letters, alphabet: Iterable[Layer], weights: Sequence[int]) -> Widths:
    """Widths in the widest steps by which a network can be brought within the tolerance.

    Raises:
        ValueError: no layer of the alphabet is valid at any width.
    """
    some = list(islice(alphabet, MOST_TRIED))
    widths = Widths(rule=rule, letters=letters, step=STEPS[-1], weights=weights)
    found = widths.among(some)
    if not found:
        raise ValueError(f"{rule.text}: no layer of the space is valid at any width")
    # Half a step beside the ideal width changes the parameters by about a step over the width.
    fine = [step for step in STEPS if (1 + step / 2 / found[0]) ** 2 - 1 <= rule.tolerance]
    return Widths(rule=rule, letters=letters, step=(fine or STEPS[-1:])[0], weights=weights)

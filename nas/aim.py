"""What a sampler is told before anything is trained: the study's axes, and the costs of any pattern of its space."""

from dataclasses import dataclass, field

from nas.plan import Plan
from nas.prices import LatencyBook
from nas.samplers.sampler import Aim
from search_space.layout import Layer, Layout
from storage.records import Axis

MOST_MEASURED_AHEAD = 128
"""Layers that are measured before the first trial; a larger space is measured as its layers come up, and a sampler has
to learn its latency."""


@dataclass(frozen=True)
class Costs:
    """Costs of patterns as sums over their layers, as fast as a sampler asks that looks at thousands of them."""

    plan: Plan
    book: LatencyBook
    axes: tuple[Axis, ...]
    measured: dict[Layer, float] = field(default_factory=dict)

    def of(self, pattern: Layout) -> list[float | None]:
        """One value an axis, None for what only a trial can tell."""
        return [None if self._is_learnt(axis.name) else self._sum(pattern, axis.name) for axis in self.axes]

    def _is_learnt(self, name: str) -> bool:
        return name == "quality" or (
            name == "latency_ms" and len(self.plan.space.alphabet) > MOST_MEASURED_AHEAD
        )

    def _sum(self, pattern: Layout, cost: str) -> float:
        weights = self.plan.space.weights
        return sum(
            weight * self._of(layer, cost) for weight, layer in zip(weights, pattern.layers, strict=True)
        )

    def _of(self, layer: Layer, cost: str) -> float:
        if cost != "latency_ms":
            return self.plan.space.prices[layer][cost]
        if layer not in self.measured:
            self.measured[layer] = self.book.layer(layer, self.plan.target).latency_ms
        return self.measured[layer]


def make_aim(plan: Plan, axes: tuple[Axis, ...], book: LatencyBook) -> Aim:
    """What a search is after: its frozen axes, and all costs by themselves."""
    return Aim(axes=axes, known=Costs(plan, book, axes).of)

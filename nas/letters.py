"""Prices of layers, remembered: what bounds and widths ask of thousands of patterns, of few layers each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from nas.objectives import FROM_COST, Phase, Quantity
from search_space.cost import at_depth, frames_of, inner_frame, layer_cost, layout_cost
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.spec import Cost, total
from search_space.vocabulary import VOCABULARY, check

Latency = Callable[[Layer, Frame, Phase], float]
"""Milliseconds of one layer in a frame."""


def placed(layer: Layer) -> bool:
    """Whether a layer's price may depend on where it stands, as `search_space.cost.layout_cost` sees it."""
    return any({"depth", "stream"} & VOCABULARY[branch.mixer].needs for branch in layer.branches)


@dataclass(frozen=True, kw_only=True, eq=False)
class Letters:
    """The layers of a target's networks by their price; the width alone differs from question to question."""

    target: Frame
    fill: str
    latency: Latency | None = None
    """None where nothing may be measured."""
    costs: dict[tuple[Layer, Frame], Cost] = field(default_factory=dict)
    times: dict[tuple[Layer, Frame, Phase], float] = field(default_factory=dict)
    fitting: dict[tuple[Layer, int], bool] = field(default_factory=dict)

    def frame(self, width: int) -> Frame:
        """The target at another width."""
        return self.target if width == self.target.width else replace(self.target, width=width)

    def fits(self, layer: Layer, width: int) -> bool:
        """Whether a layer's sizes go together at a width."""
        key = (layer, width)
        if key not in self.fitting:
            try:
                check(Layout((layer,)), self.frame(width))
                self.fitting[key] = True
            except ValueError:
                self.fitting[key] = False
        return self.fitting[key]

    def value(self, quantity: Quantity, pattern: Layout, width: int) -> float:
        """What `nas.prices.price` will say of a pattern, to the last bit."""
        frame = self.frame(width)
        network, at = at_depth(pattern, frame, self.fill), quantity.frame(frame)
        if quantity.kind.source == "measured":
            times = {layer: self._time(layer, at, quantity.phase) for layer in dict.fromkeys(pattern.layers)}
            return quantity.of_latency(sum(times[layer] for layer in network.layers), frame)
        return FROM_COST[quantity.base](self.cost(pattern, network, at))

    def cost(self, pattern: Layout, network: Layout, frame: Frame) -> Cost:
        """As `layout_cost` of the network that a pattern stands for."""
        if any(placed(layer) for layer in pattern.layers):
            return layout_cost(network, frame)
        costs = {layer: self.alone(layer, frame) for layer in dict.fromkeys(pattern.layers)}
        return total(costs[layer] for layer in network.layers)

    def span(
        self, quantity: Quantity, layer: Layer, width: int, others: Iterable[Layer] = ()
    ) -> tuple[float, float]:
        """The least and the most that one such layer adds: alone, after one like it, or after one of the others."""
        frame = self.frame(width)
        at = quantity.frame(frame)
        if quantity.kind.source == "measured":
            own = self._time(layer, at, quantity.phase)
            return own, own
        first = FROM_COST[quantity.base](self.alone(layer, at))
        if not placed(layer):
            return first, first
        after = [inner_frame(layer, at)]
        if any("stream" in VOCABULARY[branch.mixer].needs for branch in layer.branches):
            after += [frames_of(Layout((other, layer)), at)[1] for other in others]
        found = [first, *(FROM_COST[quantity.base](layer_cost(layer, place)) for place in after)]
        return min(found), max(found)

    def alone(self, layer: Layer, frame: Frame) -> Cost:
        """As `layer_cost` of a layer that stands nowhere."""
        key = (layer, frame)
        if key not in self.costs:
            self.costs[key] = layer_cost(layer, frame)
        return self.costs[key]

    def _time(self, layer: Layer, frame: Frame, phase: Phase) -> float:
        key = (layer, frame, phase)
        if key not in self.times:
            assert self.latency is not None
            self.times[key] = self.latency(layer, frame, phase)
        return self.times[key]

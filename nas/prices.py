"""The price of a pattern at the target: exact costs in closed form, and latency from a table that is filled by measuring."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from nas.letters import placed
from nas.objectives import Quantity
from nas.plan import Plan
from search_space.cost import at_depth, frames_of, layer_cost, layout_cost
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from storage.errors import Outdated, StorageError
from storage.records import LatencyRecord
from storage.store import Store
from trainers.measure import Latency, Phase, device_name, frame_text, measure_layer, measure_network

PREFILL_TOKENS = 512
"""The longest prompt that is measured unless one asks for more: a CPU needs minutes for a long one."""


class Meter(Protocol):
    """Measures on a device that is not this process's own."""

    name: str
    """The device, as `device_name` says it."""

    def layer(self, layer: Layer, frame: Frame, phase: Phase) -> Latency:
        """As `measure_layer`."""

    def network(self, network: Layout, frame: Frame, phase: Phase) -> Latency:
        """As `measure_network`."""


@dataclass(frozen=True, kw_only=True)
class LatencyBook:
    """Latencies by device and frame: the study's database first, then this machine's own table, then a measurement."""

    store: Store | None
    machine: Store | None
    device: str
    warn: Callable[[str], None] = field(default=lambda _: None)
    again: bool = False
    """Measure even what is known, and replace it."""
    meter: Meter | None = None
    """Measures elsewhere; None: in this process."""
    seen: dict[tuple[Any, ...], LatencyRecord] = field(default_factory=dict, compare=False, repr=False)
    """What was looked up before: a search asks for the same few layers again and again."""

    @property
    def device_name(self) -> str:
        """The device that the latencies hold for."""
        return self.meter.name if self.meter else device_name(self.device)

    def layer(self, layer: Layer, frame: Frame, phase: Phase = "decode") -> LatencyRecord:
        """A layer's latency; raises ValueError if the machine is too small to measure it."""
        meter = self.meter

        def measure() -> Latency:
            if meter is not None:
                return meter.layer(layer, frame, phase)
            return measure_layer(layer, frame, phase, device=self.device)

        return self._look_up(str(layer), frame, phase, False, measure)

    def milliseconds(self, layer: Layer, frame: Frame, phase: Phase = "decode") -> float:
        """A layer's latency as a number alone; raises ValueError as `layer`."""
        return self.layer(layer, frame, phase).latency_ms

    def network(self, network: Layout, frame: Frame, phase: Phase = "decode") -> LatencyRecord:
        """A whole network's latency, run end to end; raises ValueError if the machine is too small for it."""
        meter = self.meter

        def measure() -> Latency:
            if meter is not None:
                return meter.network(network, frame, phase)
            return measure_network(network, frame, phase, device=self.device)

        return self._look_up(str(network), frame, phase, True, measure)

    def unknown(self, layers: Iterable[Layer], frame: Frame, phase: Phase = "decode") -> list[Layer]:
        """Those of the layers that would have to be measured."""
        keys = {layer: self._key(str(layer), frame, phase, False) for layer in layers}
        return [
            layer
            for layer, key in keys.items()
            if not any(self._known(store, key) for store in (self.store, self.machine))
        ]

    def _key(self, subject: str, frame: Frame, phase: Phase, whole: bool) -> dict[str, Any]:
        return {
            "device": self.device_name,
            "frame": frame_text(frame, phase),
            "subject": subject,
            "phase": phase,
            "whole": whole,
        }

    def _known(self, store: Store | None, key: Mapping[str, Any]) -> LatencyRecord | None:
        return None if store is None or self.again else store.latency(**key)

    def _look_up(
        self, subject: str, frame: Frame, phase: Phase, whole: bool, measure: Callable[[], Latency]
    ) -> LatencyRecord:
        key = self._key(subject, frame, phase, whole)
        place = tuple(key.values())
        if self.again or place not in self.seen:
            self.seen[place] = self._stored(key, measure)
        return self.seen[place]

    def _stored(self, key: Mapping[str, Any], measure: Callable[[], Latency]) -> LatencyRecord:
        own = self._known(self.store, key)
        if own is not None:
            return own
        record = self._known(self.machine, key) or self._measured(key, measure())
        if self.store is not None:
            self.store.put_latency(record)
        return record

    def _measured(self, key: Mapping[str, Any], latency: Latency) -> LatencyRecord:
        record = LatencyRecord(
            **key,
            latency_ms=latency.latency_ms,
            spread_ms=latency.spread_ms,
            repetitions=latency.repetitions,
        )
        if self.machine is not None:
            try:
                self.machine.put_latency(record)
            except StorageError as error:
                self.warn(f"the machine's latency table could not be written: {error}")
        return record


def open_machine_table(path: str | None, warn: Callable[[str], None]) -> Store | None:
    """This machine's latency table, or None if there shall be none or it cannot be opened (which is said)."""
    if path is None:
        return None
    place = Path(path).expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return _open_current(f"sqlite:///{place}")
    except (OSError, StorageError) as error:
        warn(f"the machine's latency table {place} cannot be used, every latency is measured anew: {error}")
        return None


def _open_current(url: str) -> Store:
    """A table of ours that nobody asked for is brought up to date without asking anybody."""
    try:
        return Store.open(url)
    except Outdated:
        from storage.upkeep import upgrade  # takes half a second to import, for once in the life of a table

        upgrade(url, copy=False)
        return Store.open(url)


@dataclass(frozen=True, kw_only=True)
class Price:
    """A pattern's costs at the target by name, in whole and layer by layer of the pattern."""

    costs: dict[str, float]
    layer_costs: tuple[dict[str, float], ...]


def price(plan: Plan, pattern: Layout, book: LatencyBook) -> Price:
    """Exact costs of the target network that a pattern stands for; latency is the sum over its layers.

    Further quantities that objectives or bounds name stand beside by their names, and a width if it is the pattern's own.
    """
    target = plan.target_of(pattern)
    network = at_depth(pattern, target, plan.config.target.fill)
    letters = plan.letters_by(book.milliseconds)
    exact = letters.cost(pattern, network, target)
    latency = {layer: book.milliseconds(layer, target) for layer in dict.fromkeys(pattern.layers)}
    costs: dict[str, float] = {
        "params": exact.params,
        "active_params": exact.active_params,
        "kv_bytes": exact.stored_bytes,
        "read_bytes": exact.read_bytes,
        "flops_prefill": exact.flops_prefill,
        "flops_decode": exact.flops_decode,
        "serial_steps": exact.serial_steps,
        "latency_ms": sum(latency[layer] for layer in network.layers),
    }
    for context in plan.config.target.contexts:
        at = replace(target, context=context)
        costs[f"kv_bytes@{context}"] = letters.cost(pattern, network, at).stored_bytes
    for quantity in (*plan.quantities, Quantity(base="tokens_per_s")):
        if quantity.name not in costs:
            costs[quantity.name] = letters.value(quantity, pattern, target.width)
    if plan.widths is not None:
        costs["width"] = target.width
    by_layer = []
    for layer, frame in zip(pattern.layers, frames_of(pattern, target), strict=True):
        own = layer_cost(layer, frame) if placed(layer) else letters.alone(layer, target)
        by_layer.append(
            {"params": float(own.params), "kv_bytes": float(own.stored_bytes), "latency_ms": latency[layer]}
        )
    return Price(costs=costs, layer_costs=tuple(by_layer))


def prefill_frame(frame: Frame, tokens: int | None = None) -> Frame:
    """The frame whose context is the prompt to be measured."""
    return replace(frame, context=tokens or min(frame.context, PREFILL_TOKENS))


def cost_json(layout: Layout, frame: Frame, contexts: Iterable[int], fill: str) -> dict[str, Any]:
    """The answer of `nas cost`: everything that is exact about a layout in a frame."""
    network = at_depth(layout, frame, fill)
    price_at = {context: layout_cost(network, replace(frame, context=context)) for context in contexts}
    first = next(iter(price_at.values()))
    return {
        "layout": str(network),
        "layers": len(network),
        "params": first.params,
        "active_params": round(first.active_params),
        "serial_steps": first.serial_steps,
        "flops_per_token": {"prefill": first.flops_prefill, "decode": first.flops_decode},
        "cache": [
            {
                "context": context,
                "stored_bytes": cost.stored_bytes,
                "read_bytes": cost.read_bytes,
                "flops_per_token": {"prefill": cost.flops_prefill, "decode": cost.flops_decode},
                "by_layer": _by_layer(network, replace(frame, context=context)),
            }
            for context, cost in price_at.items()
        ],
    }


def _by_layer(network: Layout, frame: Frame) -> list[dict[str, Any]]:
    priced = [
        layer_cost(layer, own) for layer, own in zip(network.layers, frames_of(network, frame), strict=True)
    ]
    return [
        {
            "layer": str(layer),
            "params": cost.params,
            "stored_bytes": cost.stored_bytes,
            "read_bytes": cost.read_bytes,
            "tensors": {tensor.name: tensor.stored_bytes for tensor in cost.cache},
        }
        for layer, cost in zip(network.layers, priced, strict=True)
    ]

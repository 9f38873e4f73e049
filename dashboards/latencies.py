"""Latencies of layouts at the contexts and batches that one moves to, as far as somebody measured them there."""

from collections.abc import Sequence
from dataclasses import replace

from dashboards.desk import Desk, MeasuredLatency, NetworkPrice
from dashboards.memory import Snapshot
from storage.records import TrialRecord

Known = dict[tuple[str, str], float]
"""Milliseconds by frame and layer."""


def with_latencies(
    desk: Desk, snapshot: Snapshot, prices: Sequence[Sequence[NetworkPrice]]
) -> list[list[NetworkPrice]]:
    """Prices with the latency of each where all of its layers were measured there, on the study's own device.

    Of a study whose search named no device, the first by name that has all of them.
    """
    frames = {price.latency_frame for own in prices for price in own}
    with desk.store() as store:
        records = store.latencies(device=snapshot.device, frames=frames)
    by_device: dict[str, Known] = {}
    for record in records:
        if record.phase == "decode" and not record.whole:
            by_device.setdefault(record.device, {})[record.frame, record.subject] = record.latency_ms
    return [[_measured(price, by_device) for price in own] for own in prices]


def _measured(price: NetworkPrice, by_device: dict[str, Known]) -> NetworkPrice:
    for device, known in by_device.items():
        parts = [known.get((price.latency_frame, layer.layer)) for layer in price.by_layer]
        times = [layer.count * ms for layer, ms in zip(price.by_layer, parts, strict=True) if ms is not None]
        if len(times) == len(parts):
            found = MeasuredLatency(device=device, latency_ms=sum(times), by_layer_ms=tuple(times))
            return replace(price, latency=found)
    return price


def by_layer(trial: TrialRecord, price: NetworkPrice | None) -> tuple[float, ...]:
    """Milliseconds of each layer of the pattern: as measured where it is priced, else as it was searched, or nothing."""
    if price is not None and price.latency is not None:
        return price.latency.by_layer_ms
    if not any("latency_ms" in costs for costs in trial.layer_costs):
        return ()
    counts = [1] * len(trial.layer_costs) if price is None else [part.count for part in price.by_layer]
    return tuple(
        costs.get("latency_ms", 0.0) * n for costs, n in zip(trial.layer_costs, counts, strict=False)
    )

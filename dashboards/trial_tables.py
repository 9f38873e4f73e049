"""The tables of one layout's page: costs by layer, scores beside known layouts, rungs, curves, and single changes."""

import time
from collections.abc import Mapping, Sequence

from dashboards import addresses, latencies, quantities, strips
from dashboards.desk import NetworkPrice
from dashboards.memory import Snapshot
from dashboards.near import Change
from dashboards.tables import Column, Entry, Row, Table, value_entry
from dashboards.trial_charts import curves_by_seed
from dashboards.view import StudyView, kind_of
from storage.records import EventRecord, TrialRecord


def layers(view: StudyView, trial: TrialRecord, price: NetworkPrice | None) -> Table:
    """What each layer of the pattern costs, as priced, or as it was stored; the latency as it was measured.

    As the bars, the numbers of a price are those of all layers of the network that are this layer of the pattern.
    """
    cells = strips.strip(trial.layout, view.families, view.marks)
    stored = list(dict.fromkeys(name for costs in trial.layer_costs for name in costs))
    times = latencies.by_layer(trial, price)
    names = stored if price is None else ["latency_ms"] if times else []
    rows = []
    for depth, cell in enumerate(cells):
        own: Mapping[str, float] = {}
        if price is None and depth < len(trial.layer_costs):
            own = trial.layer_costs[depth]
        elif depth < len(times):
            own = {"latency_ms": times[depth]}
        priced: tuple[Entry, ...] = ()
        if price is not None:
            part = price.by_layer[depth]
            priced = (
                Entry(text=str(part.count), sort=part.count),
                value_entry("stored_bytes", part.stored_bytes),
                value_entry("read_bytes", part.read_bytes),
                value_entry("params", part.params),
            )
        entries = (Entry(text=str(depth + 1), sort=depth), Entry(text=cell.label, strip=(cell,)), *priced)
        rows.append(Row(entries=(*entries, *(value_entry(name, own.get(name)) for name in names))))
    titles = ("layers of the network", "cache", "read a step", "parameters") if price is not None else ()
    columns = (
        Column(title="layer", numeric=True),
        Column(title="mixer"),
        *(Column(title=title, numeric=True) for title in titles),
        *(Column(title=view.title(name), numeric=True) for name in names),
    )
    return Table(caption="Cost by layer of the pattern", columns=columns, rows=tuple(rows))


def known_scores(snapshot: Snapshot, trial: TrialRecord) -> list[tuple[str, int, Mapping[str, float]]]:
    """The layouts to compare scores with: name, number and scores of measured presets and of uniform layouts."""
    found: dict[str, tuple[str, int, Mapping[str, float]]] = {}
    for number in snapshot.view.known.tolist():
        seen = snapshot.view.glance(number)
        if seen.scores is None or number == trial.number:
            continue
        name = seen.origin if kind_of(seen.origin) == "preset" else seen.layout.text
        values = {task: seen.value(task) for task in seen.scores}
        found[name] = (name, number, {task: x for task, x in values.items() if x is not None})
    return sorted(found.values(), key=lambda item: item[1])


def scores(snapshot: Snapshot, trial: TrialRecord) -> Table:
    """Scores by task: this layout's, each of its seeds, and those of the known layouts."""
    result = trial.result
    tasks = ("quality", *result.scores) if result else ()
    known = known_scores(snapshot, trial)
    rows = []
    for task in tasks:
        seeds = trial.by_seed(task)
        others = [
            snapshot.view.glance(number).value("quality") if task == "quality" else values.get(task)
            for _, number, values in known
        ]
        mean = sum(seeds) / len(seeds) if seeds else None
        rows.append(
            Row(
                entries=(
                    Entry(text=task),
                    value_entry("quality", mean),
                    Entry(text=", ".join(quantities.quality(x) for x in seeds) if len(seeds) > 1 else "–"),
                    *(value_entry("quality", x) for x in others),
                )
            )
        )
    columns = (
        Column(title="task"),
        Column(title="this layout", numeric=True),
        Column(title="by seed", numeric=True),
        *(Column(title=name, numeric=True) for name, _, _ in known),
    )
    return Table(caption="Scores by task", columns=columns, rows=tuple(rows))


def rungs(trial: TrialRecord) -> Table:
    """Every result, rung by rung and then seed by seed."""
    results = [*sorted(trial.results, key=lambda r: r.rung), *trial.repeats]
    rows = [
        Row(
            entries=(
                Entry(text=str(result.rung), sort=result.rung),
                Entry(text=str(result.seed), sort=result.seed),
                Entry(text=quantities.quality(result.quality), sort=result.quality),
                Entry(text=", ".join(f"{t} {quantities.quality(x)}" for t, x in result.scores.items())),
                Entry(text=f"{result.steps:,}", sort=result.steps),
                Entry(text=f"{result.tokens:,}", sort=result.tokens),
                Entry(text=quantities.duration(result.worker_s), sort=result.worker_s),
            )
        )
        for result in results
    ]
    titles = ("rung", "seed", "quality", "scores", "steps", "tokens", "worker time")
    columns = tuple(Column(title=title, numeric=title != "scores") for title in titles)
    return Table(caption="Rungs and seeds", columns=columns, rows=tuple(rows))


FAILED = {
    "trial_requeued": "put back",
    "trial_unfit": "unfit",
    "trial_lost": "given up",
    "trial_quarantined": "set aside",
    "trial_retried": "tried again on demand",
    "late_result_rejected": "came too late",
}
"""What became of attempts that brought no result, by the kind of event that tells of it."""
MOST_TOLD = 5000
"""Such events of a study that are looked through for a trial's own, the newest."""


def attempts(told: Sequence[EventRecord], trial: TrialRecord) -> Table:
    """Every attempt at a trial that brought no result: what became of it, why and when."""
    rows = []
    for event in told:
        if event.payload.get("trial") != trial.number:
            continue
        attempt = event.payload.get("attempt")
        entries = (
            Entry(text="–" if attempt is None else str(attempt), sort=event.seq),
            Entry(text=FAILED[event.kind]),
            Entry(text=str(event.payload.get("why") or "–")),
            Entry(text=quantities.age(time.time() - event.at), sort=event.at),
        )
        rows.append(Row(entries=entries))
    titles = ("attempt", "became", "why", "when")
    columns = tuple(Column(title=title, numeric=title in ("attempt", "when")) for title in titles)
    return Table(caption="Attempts that brought no result", columns=columns, rows=tuple(rows))


def curves(trial: TrialRecord) -> Table:
    """First, last and lowest loss of each learning curve."""
    rows = []
    for task, seed, curve in curves_by_seed(trial):
        losses = [loss for _, loss in curve]
        shown = (losses[0], losses[-1], min(losses))
        numbers = (Entry(text=f"{x:.4g}", sort=x) for x in shown)
        rows.append(Row(entries=(Entry(text=task), Entry(text=str(seed), sort=seed), *numbers)))
    columns = (
        Column(title="task"),
        Column(title="seed", numeric=True),
        *(Column(title=f"{which} loss (nats)", numeric=True) for which in ("first", "last", "lowest")),
    )
    return Table(caption="Learning curves", columns=columns, rows=tuple(rows))


def changes(snapshot: Snapshot, found: Sequence[Change]) -> Table:
    """Measured layouts that differ in one layer, and what that did."""
    name, view = snapshot.study.name, snapshot.view
    rows = [
        Row(
            trial=change.number,
            entries=(
                Entry(text=str(change.position + 1), sort=change.position),
                Entry(text=change.before),
                Entry(text=change.after),
                Entry(text=", ".join(change.did) or "no change"),
                Entry(text=str(change.number), sort=change.number, href=addresses.trial(name, change.number)),
                Entry(text="front" if change.number in view.on_front else "done",
                      state="front" if change.number in view.on_front else "done"),
            ),
        )
        for change in found
    ]  # fmt: skip
    columns = (
        Column(title="layer", numeric=True),
        Column(title="here"),
        Column(title="there"),
        Column(title="what it did"),
        Column(title="trial", numeric=True),
        Column(title="state"),
    )
    return Table(caption="What changing one layer did", columns=columns, rows=tuple(rows))

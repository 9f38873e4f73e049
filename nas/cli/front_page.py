"""The front in the terminal and as JSON, with what seeds say of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from dashboards import quantities
from nas.axes import redrawn
from nas.cli.picture import Seeds, beaten_lines, front_letters, front_table, legend, scatter
from nas.cli.rung_lines import has_rungs, rung_lines
from nas.config import of_study, resolve
from nas.front import beaten, finished, front, row, trained_axis
from nas.noise import candidates, chances, estimates, is_trained
from storage.points import Points, of_trials
from storage.records import Axis, StudyRecord, TrialRecord
from storage.store import Store

QUALITY = Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False)
LIKELY = 0.1
"""A layout off the front that may stand on it as often as this is named."""
MOST_NAMED = 6
MOST_RECENT = 2000
"""Trials that rungs are judged by on this page: to compare all of a hundred thousand takes minutes."""


def seeds_of(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> Seeds:
    """Intervals of the quality and of the trained objectives, and chances of standing on the front."""
    trained = [axis for axis in axes if is_trained(axis, trials)]
    shown = [*trained, *([] if any(axis.name == "quality" for axis in trained) else [QUALITY])]
    return Seeds(
        estimates={axis.name: estimates(trials, axis) for axis in shown},
        chances=chances(trials, axes),
    )


def front_rows(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """The front as JSON: null for an interval or a chance where no layout has a second seed."""
    seeds = seeds_of(trials, axes)
    rows = []
    for trial in front(trials, axes):
        found = seeds.estimates["quality"].get(trial.number)
        interval = [found.low, found.high] if found else None
        further = {"quality_interval": interval, "front_probability": seeds.chances.get(trial.number)}
        rows.append(row(trial, axes) | further)
    return rows


def seed_lines(best: Sequence[TrialRecord], seeds: Seeds) -> list[str]:
    """What the table does not say of seeds."""
    if not seeds.chances:
        return [
            "  one seed each, so it is not known how far seeds lie apart: nas search --repeats N trains those near the front again"
        ]
    on_front = {trial.number for trial in best}
    others = [(chance, number) for number, chance in seeds.chances.items() if number not in on_front]
    likely = sorted(((chance, number) for chance, number in others if chance >= LIKELY), reverse=True)
    if not likely:
        return []
    named = ", ".join(f"trial {number} ({chance * 100:.0f} %)" for chance, number in likely[:MOST_NAMED])
    more = f" and {len(likely) - MOST_NAMED} more" if len(likely) > MOST_NAMED else ""
    return [f"  may stand on the front too: {named}{more}"]


def drawn_axes(names: str, study: StudyRecord, trials: list[TrialRecord]) -> tuple[Axis, ...]:
    """Axes by other names, commas between them, for a study that is there; ValueError if one has no stored values."""
    config = resolve(of_study(study.config))
    # A comma within brackets belongs to its name.
    texts = [text for text in re.split(r",(?![^\[]*\])", names) if text.strip()]
    return redrawn(texts, study.axes, list(config.tasks), config.target.frame(), finished(trials))


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a front's page is made of: a study may be too large to be read whole."""

    study: StudyRecord
    axes: tuple[Axis, ...]
    trials: Sequence[TrialRecord]
    """The front and whatever else is named beside it."""
    points: Points
    """Of all done trials."""
    recent: Sequence[TrialRecord]
    """Those that the rungs are judged by."""


def standing_of(study: StudyRecord, trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> Standing:
    """Of trials that are all at hand."""
    own = replace(study, axes=tuple(axes))
    return Standing(
        study=study, axes=own.axes, trials=trials, points=of_trials(own, trials), recent=trials[-MOST_RECENT:]
    )


def read_standing(store: Store, study: StudyRecord) -> Standing:
    """Reads whole what a front's page shows of single trials, and of all others no more than their points."""
    points = store.points(study)
    given, repeated = store.notable(study)
    seen = candidates(points, store.trials(study, numbers=repeated))
    trials = store.trials(study, numbers=sorted({*seen, *given, *repeated}))
    first = max(0, sum(store.counts(study).values()) - MOST_RECENT)
    recent = store.trials(study, offset=first, limit=MOST_RECENT) if has_rungs(study) else []
    return Standing(study=study, axes=study.axes, trials=trials, points=points, recent=recent)


def show_front(found: Standing, out: Console) -> None:
    """Print the front as a table with its strips, a scatter, and what it beats."""
    study, axes, trials, points = found.study, found.axes, found.trials, found.points
    best = front(trials, axes)
    if not best:
        return
    letters = front_letters(len(best))
    contexts = sorted(int(name.partition("@")[2]) for name in best[0].costs if name.startswith("kv_bytes@"))
    out.print(f"\nFront ({len(best)} of {len(points)}; hypervolume {points.hypervolume:.3f})")
    seeds = seeds_of(trials, axes)
    out.print(front_table(best, study.families, contexts, letters, axes, seeds))
    out.print(legend(best, study.families))
    for line in seed_lines(best, seeds):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    across = next((axis for axis in reversed(axes) if axis.log), None)
    up = trained_axis(axes)
    if across is not None and up is not None:
        columns = [[axis.name for axis in axes].index(axis.name) for axis in (across, up)]
        others = points.values[~np.isin(points.numbers, [trial.number for trial in best])][:, columns]
        out.print(
            scatter(best, others.tolist(), letters, across.name, up.name), markup=False, highlight=False
        )
    lines = beaten_lines(beaten(trials, axes), seeds)
    if lines:
        out.print("\nBeaten:")
        for line in lines:
            out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    whole = [
        (trial.costs["latency_ms_whole"], trial.costs["latency_ms"])
        for trial in best
        if "latency_ms_whole" in trial.costs
    ]
    if whole:
        worst = max(whole, key=lambda pair: abs(pair[0] / pair[1] - 1))
        out.print(
            f"\nLatency is a sum over layers; {len(whole)} networks of the front were also run end to end, and the "
            f"worst differs by {(worst[0] / worst[1] - 1) * 100:+.0f} % ({quantities.milliseconds(worst[1])} summed, "
            f"{quantities.milliseconds(worst[0])} run).",
            highlight=False,
            soft_wrap=True,
        )
    rungs = rung_lines(found.recent, study)
    if rungs:
        out.print("\n" + "\n".join(rungs), markup=False, highlight=False, soft_wrap=True)

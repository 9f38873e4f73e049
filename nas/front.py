"""Fronts from records: objective values, rows for tables and JSON, what was beaten by what, and the hypervolume."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import pareto
from storage.records import Axis, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Beaten:
    """A known layout that is not on the front, and the front's layout that beats it most clearly."""

    trial: TrialRecord
    by: TrialRecord
    gains: dict[str, float]
    """What the winner has more, by objective that training tells."""
    cost_ratios: dict[str, float]
    """Winner over loser by cost: 0.5 is half of it."""


def values_of(trial: TrialRecord, axes: Sequence[Axis]) -> list[float]:
    """A finished trial's objective values, in the order of the axes."""
    values = []
    for axis in axes:
        value = trial.value(axis.name)
        assert value is not None, f"trial {trial.number} has no {axis.name}"
        values.append(value)
    return values


def trained_axis(axes: Sequence[Axis]) -> Axis | None:
    """The first objective that training tells: the one that a front is sorted by and drawn upwards."""
    return next((axis for axis in axes if not axis.log), None)


def finished(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that may stand on a front."""
    return [trial for trial in trials if trial.state == "done" and trial.result is not None]


def minimised(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[trials, axes] values of finished trials, turned so that smaller is better."""
    signs = np.array([-1.0 if axis.maximise else 1.0 for axis in axes])
    values = np.array([values_of(trial, axes) for trial in trials], dtype=np.float64).reshape(-1, len(axes))
    turned: np.ndarray[Any, np.dtype[np.float64]] = values * signs
    return turned


def front(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[TrialRecord]:
    """The trials that no other one beats, the best in what training tells first."""
    done = finished(trials)
    chosen = [done[index] for index in pareto.front(minimised(done, axes))]
    first = trained_axis(axes)
    return sorted(chosen, key=lambda trial: (-((first and trial.value(first.name)) or 0.0), trial.number))


def hypervolume(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> float:
    """Share of the study's frozen box of objectives that the finished trials dominate."""
    done = finished(trials)
    if not done:
        return 0.0
    values = np.array([values_of(trial, axes) for trial in done], dtype=np.float64)
    return float(pareto.hypervolume(pareto.losses(axes, values)))


def row(trial: TrialRecord, axes: Sequence[Axis] = ()) -> dict[str, Any]:
    """A trial of the front as JSON, with the values of axes that have no key of their own; means over its seeds."""
    result = trial.result
    assert result is not None
    plain = {
        "trial": trial.number,
        "layout": trial.layout.text,
        "quality": trial.value("quality"),
        "latency_ms": trial.costs["latency_ms"],
        "kv_bytes": int(trial.costs["kv_bytes"]),
        "params": int(trial.costs["params"]),
        "scores": {name: trial.value(name) for name in result.scores},
        "seeds": len(trial.by_seed("quality")),
        "origin": trial.origin,
    }
    further = [axis.name for axis in axes if axis.name not in plain and axis.name not in result.scores]
    return plain | _width(trial) | {name: trial.value(name) for name in further}


def _width(trial: TrialRecord) -> dict[str, Any]:
    """The trial's own width, where it has one."""
    return {"width": int(trial.costs["width"])} if "width" in trial.costs else {}


def trial_row(trial: TrialRecord) -> dict[str, Any]:
    """Any trial as JSON."""
    result = trial.result
    return {
        "trial": trial.number,
        "layout": trial.layout.text,
        "state": trial.state,
        "attempts": trial.attempts,
        "scores": {name: trial.value(name) for name in result.scores} if result else {},
        "quality": trial.value("quality"),
        "rung": result.rung if result else None,
        "origin": trial.origin,
        "latency_ms": trial.costs.get("latency_ms"),
        "kv_bytes": int(trial.costs["kv_bytes"]),
        "params": int(trial.costs["params"]),
        "steps": result.steps if result else None,
        "tokens": result.tokens if result else None,
        "train_s": result.train_s if result else None,
        "worker_s": result.worker_s if result else None,
        "seed": result.seed if result else None,
        "seeds": len(trial.by_seed("quality")),
        "why": trial.why,
    } | _width(trial)


def beaten(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[Beaten]:
    """Uniform layouts and presets that something on the front beats in every objective, or equals and beats in one."""
    done = finished(trials)
    points = minimised(done, axes)
    on_front = set(pareto.front(points).tolist())
    result = []
    for index, trial in enumerate(done):
        if trial.origin == "search" or index in on_front:
            continue
        winners = [done[other] for other in pareto.beaten_by(points, index) if other in on_front]
        if winners:
            by = max(winners, key=lambda winner: _gain(winner, trial, axes))
            result.append(
                Beaten(
                    trial=trial,
                    by=by,
                    gains={
                        axis.name: after - before
                        for axis, after, before in _side_by_side(by, trial, axes)
                        if not axis.log
                    },
                    cost_ratios={
                        axis.name: after / before
                        for axis, after, before in _side_by_side(by, trial, axes)
                        if axis.log and before
                    },
                )
            )
    return result


def _gain(winner: TrialRecord, loser: TrialRecord, axes: Sequence[Axis]) -> float:
    """How much smaller the winner's losses are, summed on the frozen scale."""
    values = np.array([values_of(winner, axes), values_of(loser, axes)], dtype=np.float64)
    better, worse = pareto.losses(axes, values)
    return float((worse - better).sum())


def _side_by_side(
    winner: TrialRecord, loser: TrialRecord, axes: Sequence[Axis]
) -> list[tuple[Axis, float, float]]:
    return list(zip(axes, values_of(winner, axes), values_of(loser, axes), strict=True))

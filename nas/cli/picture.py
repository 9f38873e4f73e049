"""Pictures in text: a layout as a strip of marks, the front as a table and as a scatter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from dashboards import quantities
from nas.front import Beaten
from nas.noise import Estimate
from search_space.family import FAMILIES, UNKNOWN_FAMILY, Family
from storage.records import Axis, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What further seeds say of finished trials; empty where there are none."""

    estimates: Mapping[str, Mapping[int, Estimate]]
    """By name of what was trained, and trial."""
    chances: Mapping[int, float]
    """By trial: how likely it is to stand on the front."""


SCATTER_WIDTH, SCATTER_HEIGHT = 64, 9


def family_of(mixer: str, families: Mapping[str, str]) -> Family:
    """The family of a mixer by a study's own table."""
    return FAMILIES.get(families.get(mixer, ""), UNKNOWN_FAMILY)


def strip(layers: Sequence[Mapping[str, Any]], families: Mapping[str, str]) -> Text:
    """One coloured mark a layer; several mixers side by side show the first one's mark."""
    text = Text()
    for layer in layers:
        family = family_of(layer["branches"][0]["mixer"], families)
        text.append(family.mark, style=family.colour)
    return text


def legend(trials: Sequence[TrialRecord], families: Mapping[str, str]) -> Text:
    """The marks that occur, with their families' names."""
    used: dict[str, Family] = {}
    for trial in trials:
        for layer in trial.layout.layers:
            for branch in layer["branches"]:
                family = family_of(branch["mixer"], families)
                used.setdefault(family.name, family)
    text = Text("  ")
    for family in used.values():
        text.append(family.mark, style=family.colour)
        text.append(f" {family.title}   ")
    return text


def front_table(
    trials: Sequence[TrialRecord],
    families: Mapping[str, str],
    contexts: Sequence[int],
    letters: Sequence[str],
    axes: Sequence[Axis] = (),
    seeds: Seeds | None = None,
) -> Table:
    """The front, one row a layout; letters are the marks of the scatter below. Axes without a column get one."""
    spread = seeds.estimates if seeds is not None and seeds.chances else None
    shown = {"quality", "latency_ms", "params", *(f"kv_bytes@{context}" for context in contexts)}
    further = [axis for axis in axes if axis.name not in shown and axis.name != "kv_bytes"]
    own_width = any("width" in trial.costs for trial in trials)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("trial", justify="right")
    table.add_column("layout", overflow="fold")
    table.add_column("strip")
    table.add_column("quality", justify="right")
    if spread is not None:
        for title in ("95 % interval", "seeds", "on front"):
            table.add_column(title, justify="right")
    table.add_column("decode", justify="right")
    for context in contexts:
        table.add_column(f"cache {quantities.tokens(context)}", justify="right")
    for axis in further:
        table.add_column(quantities.title(axis.name), justify="right")
    table.add_column("params", justify="right")
    if own_width:
        table.add_column("width", justify="right")
    table.add_column("origin")
    for trial, letter in zip(trials, letters, strict=True):
        table.add_row(
            letter,
            str(trial.number),
            Text(trial.layout.text),
            strip(trial.layout.layers, families),
            _quality(trial),
            *_seed_cells(trial, seeds) if seeds is not None and spread is not None else (),
            quantities.milliseconds(trial.costs["latency_ms"]),
            *(quantities.size(trial.costs[f"kv_bytes@{context}"]) for context in contexts),
            *(
                quantities.value(axis.name, trial.value(axis.name), axis.unit)
                + _interval((spread or {}).get(axis.name, {}).get(trial.number), " ({})")
                for axis in further
            ),
            quantities.count(trial.costs["params"]),
            *([f"{trial.costs['width']:.0f}" if "width" in trial.costs else ""] if own_width else []),
            trial.origin,
        )
    return table


def _quality(trial: TrialRecord) -> str:
    value = trial.value("quality")
    return "" if value is None else f"{value:.3f}"


def _seed_cells(trial: TrialRecord, seeds: Seeds) -> tuple[str, str, str]:
    """The interval of the quality, the seeds behind it, and how likely the trial is to stand on the front."""
    found = seeds.estimates["quality"].get(trial.number)
    chance = seeds.chances.get(trial.number)
    return (
        _interval(found),
        str(len(trial.by_seed("quality"))),
        "" if chance is None else f"{chance * 100:.0f} %",
    )


def _interval(found: Estimate | None, form: str = "{}") -> str:
    return "" if found is None else form.format(f"{found.low:.2f}–{found.high:.2f}")


def front_letters(count: int) -> list[str]:
    """a, b, c, … for the rows of a front; a front of more than 26 goes on with A, B, C and then dots."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [letters[index] if index < len(letters) else "·" for index in range(count)]


def scatter(
    trials: Sequence[TrialRecord],
    others: Sequence[Sequence[float]],
    letters: Sequence[str],
    cost: str,
    up: str = "quality",
) -> str:
    """A score upwards against a cost by its logarithm; letters are the front, dots the rest, given as cost and score.

    A cost of nought has no logarithm, and stands at the left edge, a factor of two below the least that is paid.
    """
    values = [*((trial.value(cost), trial.value(up)) for trial in trials), *map(tuple, others)]
    marks = [*letters, *["·"] * len(others)]
    shown = [
        (x, y, mark) for (x, y), mark in zip(values, marks, strict=True) if x is not None and y is not None
    ]
    if len(shown) < 2:
        return ""
    free = min((x for x, _, _ in shown if x > 0), default=2.0) / 2
    places = [math.log10(x or free) for x, _, _ in shown]
    low, high = min(places), max(places)
    worst, best = min(y for _, y, _ in shown), max(y for _, y, _ in shown)
    grid = [[" "] * SCATTER_WIDTH for _ in range(SCATTER_HEIGHT)]
    # The front is drawn last, so that no dot hides a letter.
    for place, (_, value, mark) in reversed(list(zip(places, shown, strict=True))):
        column = round((place - low) / ((high - low) or 1) * (SCATTER_WIDTH - 1))
        line = round((best - value) / ((best - worst) or 1) * (SCATTER_HEIGHT - 1))
        grid[line][column] = mark
    lines = [f"  {up}"]
    for index, cells in enumerate(grid):
        value = best - (best - worst) * index / (SCATTER_HEIGHT - 1)
        label = f"{value:.2f} ┤" if index % 4 == 0 else "     │"
        lines.append(f"  {label}{''.join(cells).rstrip()}")
    left = quantities.value(cost, 0 if any(not x for x, _, _ in shown) else 10**low)
    right = quantities.value(cost, 10**high)
    lines.append(f"       └{'─' * SCATTER_WIDTH}")
    lines.append(
        f"        {left}{' ' * max(1, SCATTER_WIDTH - len(left) - len(right))}{right}  {cost}, log scale"
    )
    return "\n".join(lines)


def beaten_lines(items: Sequence[Beaten], seeds: Seeds) -> list[str]:
    """`4*mamba2 (uniform) by "kda window" (quality +.05, kv_bytes −22 %)`, one a line; what seeds might undo is named so."""
    lines = []
    for item in items:
        changes = [
            f"{name} {gain:+.3f}{_doubt(gain, item, seeds.estimates.get(name, {}))}"
            for name, gain in item.gains.items()
        ]
        changes += [f"{name} {(ratio - 1) * 100:+.0f} %" for name, ratio in item.cost_ratios.items()]
        lines.append(
            f'{item.trial.layout.text} ({item.trial.origin}) by "{item.by.layout.text}" ({", ".join(changes)})'
        )
    return lines


def _doubt(gain: float, item: Beaten, estimates: Mapping[int, Estimate]) -> str:
    """A word of caution where the difference is less than what other seeds might change."""
    own, other = estimates.get(item.by.number), estimates.get(item.trial.number)
    if own is None or other is None or gain > math.hypot(own.high - own.mean, other.high - other.mean):
        return ""
    return " within the spread of seeds"

"""Early stopping replayed on learning curves that are known: hypervolume against compute, and what stopping loses.

`python -m benchmarks.early_stopping [TABLE.csv[:COST,COST] …]`; without a table it takes the one of hybrids, and some that
it makes up. A table is a complete record of layouts trained to the end, one a row, with a header:

    layout            any text, once a table
    quality@SHARE     the score after this share of the steps, such as quality@0.111; any number of them
    quality           the score at the end
    anything else     a cost of the layout, smaller is better: latency_ms, kv_bytes, …; all of them count if none is named

Columns such as mqar@0.111, or mqar where there is one, are scores of single tasks; they are not used.

Layouts come in a random order, the same for every rule, to a few workers that work side by side. One unit of compute
is the training of one layout to its end; a rule that stops nobody spends as many units as there are layouts.
"""

import argparse
import csv
import heapq
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import save
from nas.config import RungsConfig
from nas.rungs import Ladder, Rules, Standing
from storage import pareto
from storage.records import Axis

SEEDS, WORKERS, MOST_LAYOUTS = 20, 4, 150
HYBRIDS = f"{Path(__file__).parent / 'data' / 'hybrids.csv'}:latency_ms,kv_bytes"
COMPUTE = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of the compute that training everything to the end takes."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Layouts with their learning curves and costs."""

    name: str
    shares: tuple[float, ...]
    """Of the steps, by rung; the last is 1."""
    costs: tuple[str, ...]
    values: NDArray[np.float64]
    """[layouts, rungs, 1 + costs]: quality and costs at every rung."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Objectives scaled to the whole table, as a study's are to its space."""
        whole = self.values[:, -1]
        axes = [Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False)]
        for place, name in enumerate(self.costs, start=1):
            column = whole[:, place][whole[:, place] > 0]
            low, high = column.min() / 1.25, column.max() * 1.25
            axes.append(Axis(name=name, maximise=False, low=float(low), high=float(high), log=True))
        return tuple(axes)


def read_table(text: str) -> Table:
    """A table as the module's text describes it, by its path and perhaps costs; raises ValueError where it is not one."""
    place, _, wanted = text.partition(":")
    path = Path(place)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "quality" not in rows[0]:
        raise ValueError(f"{path} is no table of learning curves: it needs rows and a column quality")
    names = list(rows[0])
    shares = {name: float(name.partition("@")[2]) for name in names if name.startswith("quality@")}
    rungs = sorted((share, name) for name, share in shares.items() if share < 1)
    tasks = {name.partition("@")[0] for name in names if "@" in name}
    costs = tuple(
        name for name in names if name != "layout" and name.partition("@")[0] not in tasks | {"quality"}
    )
    if wanted:
        unknown = [name for name in wanted.split(",") if name not in costs]
        if unknown:
            raise ValueError(f"{path} has no cost {', '.join(unknown)}: it has {', '.join(costs)}")
        costs = tuple(wanted.split(","))
    if not rungs or not costs:
        raise ValueError(f"{path} needs a column such as quality@0.111, and one of a cost")
    curves = np.array([[float(row[name]) for _, name in rungs] + [float(row["quality"])] for row in rows])
    prices = np.array([[float(row[name]) for name in costs] for row in rows])
    repeated = np.repeat(prices[:, None], curves.shape[1], axis=1)
    return Table(
        name=path.stem,
        shares=(*(share for share, _ in rungs), 1.0),
        costs=costs,
        values=np.concatenate([curves[:, :, None], repeated], axis=2),
    )


def made_table(name: str, *, crossing: float, seed: int = 0, layouts: int = 600) -> Table:
    """Curves of a level, a pace, and a moment before which nothing is learnt; `crossing` spreads pace and moment.

    More memory for a kind of layer means a higher level, and a later start.
    """
    rng = np.random.default_rng(seed)
    memory = np.array([0.05, 0.2, 0.5, 1.0])[rng.integers(4, size=(layouts, 4))].mean(1)
    level = np.clip(0.25 + 0.6 * memory**0.4 + rng.normal(0, 0.06, layouts), 0.05, 0.99)
    start = np.clip(crossing * rng.gamma(2.0, 0.02 + 0.03 * memory), 0, 0.9)
    pace = 0.3 * np.exp(rng.normal(0, 0.25 * crossing, layouts))
    shares = (1 / 9, 1 / 3, 1.0)
    curves = [
        level * (1 - np.exp(-np.maximum(0.0, share - start) / pace)) / (1 - np.exp(-(1 - start) / pace))
        + rng.normal(0, 0.01, layouts)
        for share in shares
    ]
    spread = rng.uniform(0.8, 1.25, (2, layouts))
    prices = np.stack([(0.3 + memory) * spread[0], (0.02 + memory**1.5) * spread[1] * 1e8], axis=1)
    repeated = np.repeat(prices[:, None], len(shares), axis=1)
    return Table(
        name=name,
        shares=shares,
        costs=("latency_ms", "kv_bytes"),
        values=np.concatenate([np.clip(np.stack(curves, axis=1), 0, 1)[:, :, None], repeated], axis=2),
    )


MADE = {
    "made, rungs that tell much": 0.3,
    "made, rungs that tell some": 0.7,
    "made, rungs that tell little": 1.5,
}
"""Tables for when none is given, by how much their curves cross."""


Choose = Callable[[Ladder], list[int]]


def _nobody(_: Ladder) -> list[int]:
    return []


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of stopping: who goes on before another layout is begun, and who when there are none left."""

    rules: dict[str, Any]
    now: Choose = _nobody
    late: Choose = _nobody
    stops: bool = True


def _at_random(ladder: Ladder) -> list[int]:
    """A third of those at each rung, whoever they are."""
    lucky = []
    for standing in ladder.standings:
        draw = random.Random(f"{ladder.rules.seed}/{standing.number}/{standing.rung}").random()
        if standing.heading is None and 0 <= standing.rung < ladder.rules.rungs and draw < ladder.rules.keep:
            lucky.append(standing.number)
    return lucky


RANK_ONLY: dict[str, Any] = {"protect": False, "chance": 0.0, "trust": -1.0, "keep": 1 / 3}
METHODS = {
    "no stopping": Method(rules={}, stops=False),
    "ours": Method(rules={}, now=lambda ladder: ladder.promotable() or ladder.protected()),
    "ours, protected at the end": Method(rules={}, now=Ladder.promotable, late=Ladder.protected),
    "rank only (MOASHA)": Method(rules=RANK_ONLY, now=Ladder.promotable),
    "random": Method(rules=RANK_ONLY, now=_at_random),
}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What one rule did with one order of layouts."""

    events: list[tuple[float, int]]
    """Compute spent until a layout was fully trained, in order."""
    spent: float
    stopped: list[int]


def replay(table: Table, order: Sequence[int], method: Method, rules: Rules) -> Replay:
    """Train the layouts in this order; a trial's number is its place in the order."""
    axes, end = table.axes, len(table.shares) - 1
    standings: dict[int, Standing] = {}
    running: list[tuple[float, int]] = []
    events: list[tuple[float, int]] = []
    spent, clock, begun = 0.0, 0.0, 0
    while True:
        while len(running) < WORKERS:
            ladder = Ladder(rules, axes, [0], list(standings.values()))
            if now := method.now(ladder):
                number = now[0]
            elif begun < len(order):
                number, begun = begun, begun + 1
                standings[number] = Standing(number=number, values={})
            elif late := method.late(ladder):
                number = late[0]
            else:
                break
            one = standings[number]
            goal = ladder.goal(number, one.rung) if method.stops else end
            if method.stops and method.now is _at_random:
                goal = one.rung + 1
            standings[number] = replace(one, heading=goal)
            cost = table.shares[goal] - (table.shares[one.rung] if one.rung >= 0 else 0.0)
            heapq.heappush(running, (clock + cost, number))
        if not running:
            break
        clock, number = heapq.heappop(running)
        one = standings[number]
        assert one.heading is not None
        first = one.rung
        passed = {
            rung: tuple(table.values[order[number], rung].tolist())
            for rung in range(first + 1, one.heading + 1)
        }
        spent += table.shares[one.heading] - (table.shares[first] if first >= 0 else 0.0)
        standings[number] = replace(one, values={**one.values, **passed}, heading=None)
        if one.heading == end:
            events.append((spent, order[number]))
    stopped = [order[number] for number, one in standings.items() if one.rung < end]
    return Replay(events=events, spent=spent, stopped=stopped)


def measure(table: Table, settings: dict[str, Any]) -> dict[str, Any]:
    """All methods over several orders of the table's layouts."""
    axes = table.axes
    signs = np.array([-1.0 if axis.maximise else 1.0 for axis in axes])
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        rows = []
        for seed in range(SEEDS):
            order = random.Random(seed).sample(range(len(table.values)), min(MOST_LAYOUTS, len(table.values)))
            rules = Rules(**{"rungs": len(table.shares) - 1, "seed": seed, **settings, **method.rules})
            rows.append(_row(table, order, replay(table, order, method, rules), axes, signs))
        results[name] = {
            "hypervolume_by_compute": {
                f"{share:g}": round(statistics.mean(row["volumes"][share] for row in rows), 4)
                for share in COMPUTE
            },
            **{
                key: round(statistics.mean(row[key] for row in rows), 4)
                for key in ("compute", "hypervolume", "front_lost")
            },
            # Of all seeds together: what is promised to be at most `promised_risk`.
            "stopped_that_would_have_joined": round(
                sum(row["joining"] for row in rows) / max(1, sum(row["stopped"] for row in rows)), 4
            ),
            "stopped": sum(row["stopped"] for row in rows),
        }
    return results


def _row(
    table: Table, order: Sequence[int], done: Replay, axes: Sequence[Axis], signs: NDArray[np.float64]
) -> dict[str, Any]:
    """Shares of what training everything would have given."""
    whole = table.values[list(order), -1]
    best = pareto.hypervolume(pareto.losses(axes, whole))
    front = {order[place] for place in pareto.front(whole * signs)}

    def volume(layouts: Sequence[int]) -> float:
        if not layouts:
            return 0.0
        return pareto.hypervolume(pareto.losses(axes, table.values[list(layouts), -1])) / best

    ended = [layout for _, layout in done.events]
    finals = table.values[ended, -1] * signs
    joining = sum(
        not ((finals <= point).all(1) & (finals < point).any(1)).any()
        for point in table.values[done.stopped, -1] * signs
    )
    return {
        "volumes": {
            share: volume([layout for spent, layout in done.events if spent <= share * len(order) + 1e-9])
            for share in COMPUTE
        },
        "compute": done.spent / len(order),
        "hypervolume": volume(ended),
        "front_lost": len(front - set(ended)) / len(front),
        "joining": joining,
        "stopped": len(done.stopped),
    }


def main(arguments: Sequence[str] = ()) -> None:
    """Replay and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE.csv[:COST,COST]")
    parser.add_argument("--keep", type=float, default=RungsConfig().keep)
    parser.add_argument("--chance", type=float, default=RungsConfig().chance)
    parser.add_argument("--trust", type=float, default=RungsConfig().trust)
    given = parser.parse_args(arguments)
    settings = {"keep": given.keep, "chance": given.chance, "trust": given.trust}
    measured: dict[str, Any] = {"settings": settings, "seeds": SEEDS, "workers": WORKERS, "tables": {}}
    made = [made_table(name, crossing=crossing) for name, crossing in MADE.items()]
    for table in [read_table(text) for text in given.tables] or [read_table(HYBRIDS), *made]:
        whole = Ladder(
            Rules(rungs=len(table.shares) - 1, seed=0, **settings),
            table.axes,
            [0],
            [
                Standing(number=number, values=dict(enumerate(map(tuple, rows.tolist()))))
                for number, rows in enumerate(table.values)
            ],
        )
        measured["tables"][table.name] = {
            "layouts": len(table.values),
            "shares": [round(share, 3) for share in table.shares],
            "kendall_tau": [
                None if math.isnan(tau := whole.calibration(rung).tau or math.nan) else round(tau, 3)
                for rung in range(len(table.shares) - 1)
            ],
            "promised_risk": Rules.risk,
            "promised_loss": Rules.loss,
            "methods": measure(table, settings),
        }
    save("early_stopping", measured)


if __name__ == "__main__":
    main(sys.argv[1:])

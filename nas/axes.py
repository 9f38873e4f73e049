"""The frozen scales of a study's objectives, and those on which a finished study's front is drawn anew."""

from collections.abc import Callable, Sequence
from itertools import islice

from nas.letters import Letters
from nas.objectives import PHASES, Phase, Quantity, read_objectives
from nas.plan import Plan
from nas.prices import LatencyBook
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.notation import nearest
from storage.records import Axis, TrialRecord

MOST_MEASURED_AHEAD = 128
"""Layers that are measured before the first trial; a larger space is measured as its layers come up."""
ROOM = 1.25
"""A scale reaches so much further on both sides, so that the dearest layout still counts for something."""


def make_axes(plan: Plan, book: LatencyBook, say: Callable[[str], None]) -> tuple[Axis, ...]:
    """Scores from 0 to 1, costs by logarithm from the cheapest layer at every depth to the dearest one.

    Raises:
        ValueError: a layer cannot be measured on this machine.
    """
    letters = dict.fromkeys(layer for start in plan.starts for layer in start.layout.layers)
    if len(plan.space.alphabet) <= MOST_MEASURED_AHEAD or not letters:
        letters |= dict.fromkeys(islice(plan.space.alphabet, MOST_MEASURED_AHEAD))
    prices = plan.letters_by(book.milliseconds)
    axes = []
    for objective in plan.objectives:
        quantity = objective.quantity
        if quantity.kind.source == "training":
            axes.append(Axis(name=quantity.name, maximise=True, low=0.0, high=1.0, log=False))
            continue
        if quantity.kind.source == "measured" and plan.widths is None:
            measure_ahead(book, [(list(letters), quantity.frame(plan.target), quantity.phase)], say)
        low, high = _span(plan, quantity, list(letters), prices)
        axes.append(
            Axis(
                name=quantity.name,
                maximise=objective.maximise,
                low=low / ROOM,
                high=high * ROOM,
                log=True,
                unit=quantity.kind.unit,
            )
        )
    return tuple(axes)


def _span(plan: Plan, quantity: Quantity, letters: Sequence[Layer], prices: Letters) -> tuple[float, float]:
    """The least and the most of a quantity over networks of one layer throughout."""
    if plan.widths is None:
        width = plan.target.width
        low, high = cost_span([prices.span(quantity, one, width)[1] for one in letters], plan.space.weights)
    else:
        found = []
        for one in letters:
            pattern = Layout((one,) * plan.space.layers)
            if plan.widths.why_not(pattern) is None:
                found.append(prices.value(quantity, pattern, plan.widths.width_of(pattern)))
        paid = [value for value in found if value > 0] or [1.0]
        return min(paid), max(paid)
    if quantity.base == "tokens_per_s":
        low, high = quantity.of_latency(high, plan.target), quantity.of_latency(low, plan.target)
    return low, high


def cost_span(prices: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """The least and the most above nothing that a network of such layers costs; 1 for both where all are free.

    Where a layer is free, as one that only gates what another keeps, the rarest position may be the only one to cost.
    """
    paid = [price for price in prices if price > 0]
    if not paid:
        return 1.0, 1.0
    return min(paid) * (min(weights) if len(paid) < len(prices) else sum(weights)), max(paid) * sum(weights)


def measure_ahead(
    book: LatencyBook,
    wanted: Sequence[tuple[Sequence[Layer], Frame, Phase]],
    say: Callable[[str], None],
) -> None:
    """Measure what is not known yet of layers by frame and phase, and say first how many that are."""
    for phase in PHASES:
        unknown = [
            (layer, frame)
            for layers, frame, wished in wanted
            if wished == phase
            for layer in book.unknown(layers, frame, phase)
        ]
        if not unknown:
            continue
        widths = len({frame.width for _, frame in unknown})
        where = f"{widths} widths" if widths > 1 else "the target"
        say(f"measuring the {phase} latency of {len(unknown)} layers at {where}, once for this machine …")
        for layer, frame in unknown:
            book.layer(layer, frame, phase)


def redrawn(
    names: Sequence[str],
    axes: Sequence[Axis],
    tasks: Sequence[str],
    target: Frame,
    trials: Sequence[TrialRecord],
) -> tuple[Axis, ...]:
    """Axes of other objectives than a study was made for, as far as its trials hold their values.

    Raises:
        ValueError: a name is not valid, or a finished trial has no value under it.
    """
    frozen = {axis.name: axis for axis in axes}
    found = []
    for objective in read_objectives(names, tasks, target):
        name, kind = objective.quantity.name, objective.quantity.kind
        values = [trial.value(name) for trial in trials]
        there = [value for value in values if value is not None]
        if len(there) < len(values):
            held = sorted(set.intersection(*(set(trial.costs) for trial in trials)) - {"latency_ms_whole"})
            raise ValueError(
                f"{len(values) - len(there)} of {len(values)} trials hold no {name}{nearest(name, held)} "
                f"(they hold quality, {', '.join([*tasks, *held])})"
            )
        old = frozen.get(name)
        if old is not None and old.maximise == objective.maximise:
            found.append(old)
        elif kind.source == "training":
            found.append(Axis(name=name, maximise=True, low=0.0, high=1.0, log=False))
        else:
            paid = [value for value in there if value > 0] or [1.0]
            low, high = min(paid) / ROOM, max(paid) * ROOM
            found.append(
                Axis(name=name, maximise=objective.maximise, low=low, high=high, log=True, unit=kind.unit)
            )
    return tuple(found)

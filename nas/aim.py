"""What a sampler is told before anything is trained: the study's axes, and the costs of any pattern of its space."""

from nas.axes import MOST_MEASURED_AHEAD
from nas.bounds import Bounds
from nas.objectives import Quantity, read_quantity_name
from nas.plan import Plan
from nas.prices import LatencyBook
from nas.samplers.sampler import Aim
from search_space.layout import Layout
from storage.records import Axis


def make_aim(plan: Plan, axes: tuple[Axis, ...], book: LatencyBook, bounds: Bounds) -> Aim:
    """What a search is after: its frozen axes, all costs that are known by themselves, and the bounds on them.

    Of a space with more layers than are measured ahead, a sampler has to learn the latency.
    """
    prices = plan.letters_by(book.milliseconds)
    few = len(plan.space.alphabet) <= MOST_MEASURED_AHEAD
    known: list[Quantity | None] = []
    for axis in axes:
        quantity = read_quantity_name(axis.name, list(plan.config.tasks))
        source = quantity.kind.source
        known.append(quantity if source == "exact" or (source == "measured" and few) else None)

    def costs(pattern: Layout) -> list[float | None]:
        width = bounds.width_of(pattern)
        return [None if one is None else prices.value(one, pattern, width) for one in known]

    # Without bounds of its own a study's rules are those of its space, which answers faster.
    why_not = bounds.why_not if plan.rules.beyond_space else None
    return Aim(axes=axes, known=costs, why_not=why_not)

"""What stands near a layout: those before and after it on the front, and those that differ from it in one layer."""

from dataclasses import dataclass

from dashboards import strips
from dashboards.memory import Snapshot
from dashboards.view import StudyView, changes

MOST_CHANGES = 60


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another trial whose layout is the same but for one layer, and what that did."""

    number: int
    position: int
    """From 0."""
    before: str
    after: str
    did: tuple[str, ...]


def on_front(view: StudyView, number: int) -> tuple[int | None, int | None]:
    """The trials before and after one along the front, best on the first axis first; of a beaten one, those around it."""
    if number not in set(view.measured.tolist()):
        return None, None
    sign = -1.0 if view.axes[0].maximise else 1.0
    own = sign * float(view.values[number, 0])
    others = [p for p in view.front if p.number != number]
    name = view.axes[0].name
    better = [p.number for p in others if sign * p.values[name] <= own]
    worse = [p.number for p in others if sign * p.values[name] > own]
    return (better[-1] if better else None), (worse[0] if worse else None)


def one_change(snapshot: Snapshot, number: int) -> tuple[Change, ...]:
    """Measured layouts one layer away from a measured one, by position and then by what stands there."""
    view = snapshot.view
    seen = view.glances[number] if number < len(view.glances) else None
    if seen is None:
        return ()
    places = {id(layer): place for place, layer in enumerate(snapshot.layer_kinds)}
    own = tuple(places[id(layer)] for layer in seen.layout.layers)
    here = strips.strip(seen.layout, view.families, view.marks)
    measured = set(view.measured.tolist())
    found = []
    for position, mine in enumerate(own):
        for other in range(len(snapshot.layer_kinds)):
            if other == mine:
                continue
            there = snapshot.neighbours.get((*own[:position], other, *own[position + 1 :]), ())
            numbers = [n for n in there if n in measured]
            if not numbers or number not in measured:
                continue
            cells = strips.strip(view.glance(numbers[0]).layout, view.families, view.marks)
            found.append(
                Change(
                    number=numbers[0],
                    position=position,
                    before=here[position].label,
                    after=cells[position].label,
                    did=changes(view, number, numbers[0]),
                )
            )
    return tuple(found[:MOST_CHANGES])

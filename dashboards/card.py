"""One layout in a few lines, for whoever points at its mark in a picture."""

from dataclasses import dataclass

from dashboards import addresses, quantities, strips
from dashboards.desk import Desk, Missing
from dashboards.facts import Fact
from dashboards.pages import Page
from dashboards.strips import Strip
from dashboards.view import value_on


@dataclass(frozen=True, kw_only=True)
class CardPage(Page):
    """Part of a page: a strip and its numbers."""

    template = "card.html"
    number: int
    href: str
    strip: Strip
    text: str
    standing: str
    origin: str
    figures: tuple[Fact, ...]


def card(desk: Desk, segment: str, number: int) -> CardPage:
    """The card of a trial; Missing where there is none."""
    snapshot = desk.snapshot(segment)
    view = snapshot.view
    try:
        seen = view.glance(number)
    except KeyError:
        raise Missing(f"The study “{snapshot.study.name}” has no trial {number}.") from None
    doubt = desk.doubt(snapshot)
    figures = []
    for axis in view.axes:
        text = quantities.value(axis.name, value_on(axis, seen), axis.unit)
        known = doubt.intervals.get(axis.name, {}).get(number)
        if known:
            text += f" ({' to '.join(quantities.value(axis.name, x, axis.unit) for x in known)})"
        figures.append(Fact(term=view.title(axis.name), text=text))
    if number in doubt.chances:
        figures.append(Fact(term="chance of the front", text=quantities.share(doubt.chances[number])))
    return CardPage(
        number=number,
        href=addresses.trial(snapshot.study.name, number),
        strip=strips.strip(seen.layout, view.families, view.marks),
        text=seen.layout.text,
        standing="front" if number in view.on_front else seen.state,
        origin=seen.origin,
        figures=tuple(figures),
    )

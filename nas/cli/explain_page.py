"""Why these layers, in the terminal: sentences first, then the numbers behind them as bars, strips and tables."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dashboards import quantities
from dashboards.reasons import FRONT, Effect, Ranking, Ratio, Reasons, Share, outside
from nas.cli.picture import family_of
from nas.cli.progress import spark

LONGEST_BAR, LONGEST_STRIP = 24, 20
MOST_MIXERS = 8
WIDE = 88
CELL = 14
"""Columns that a change with its interval takes."""


def print_reasons(found: Reasons, families: Mapping[str, str], out: Console) -> None:
    """Everything that is said of why."""
    out.print(
        Text(
            f"Why these layers: study {found.study!r}, {found.objective} · {found.trials} trained layouts, "
            f"{found.on_front} on the front"
        ),
        soft_wrap=True,
    )
    if found.inside < found.trials:
        out.print(outside(found), soft_wrap=True)
    for line in found.said:
        out.print(Text(f"  {line}"), soft_wrap=not out.is_terminal)
    _importance(found, out)
    _effects(found, families, out)
    _shares(found, families, out)
    _ratios(found, families, out)
    if found.progress:
        volumes = [step.hypervolume for step in found.progress]
        out.print(
            f"\nHypervolume over {len(volumes)} trained layouts: "
            f"{spark(volumes, 24)} {quantities.quality(volumes[-1])}"
        )


def bar(share: float, by_chance: float, width: int) -> str:
    """A share of 1 as a bar: full blocks, dots up to 1, and a line where chance ends."""
    cells = ["█"] * round(share * width)
    cells += ["·"] * (width - len(cells))
    if 0 < by_chance < 1:
        cells[min(width - 1, round(by_chance * width))] = "│"
    return "".join(cells)


def _importance(found: Reasons, out: Console) -> None:
    shown = [item for item in found.importance[:2] if not item.why_not]
    if not shown:
        return
    titles = [
        "near the front"
        if item.objective == FRONT
        else f"best {item.objective} ({item.top} of {item.trials})"
        for item in shown
    ]
    width = min(LONGEST_BAR, max(6, (out.width - 24) // len(shown) - 8))
    out.print(
        "\nHow much each choice tells the best from all (PED-ANOVA); beyond │ is more than shuffled results give"
    )
    table = _table(["", *titles])
    order = [str(position) for position in range(found.layers)]
    _rows(table, [item.positions for item in shown], width, order, _layer)
    _rows(table, [item.mixers for item in shown], width, _heaviest_first(shown[0].mixers), _number_of)
    out.print(table)
    left_out = found.importance[0].left_out
    if left_out:
        rest = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        out.print(Text(f"  left out: {', '.join(left_out[:3])}{rest}"), soft_wrap=True)


def _layer(name: str) -> str:
    return f"layer {int(name) + 1}" if name.isdigit() else "shared settings"


def _number_of(name: str) -> str:
    return f"number of {name}"


def _heaviest_first(ranking: Ranking) -> list[str]:
    return [weight.name for weight in ranking.weights[:MOST_MIXERS]]


def _rows(table: Table, rankings: Sequence[Ranking], width: int, order: Sequence[str], words: object) -> None:
    """One row a name, in the order, and whatever else the rankings hold."""
    assert callable(words)
    shares = [{weight.name: weight.share for weight in ranking.weights} for ranking in rankings]
    rest = [name for own in shares for name in own if not name.isdigit() and order and order[0].isdigit()]
    for name in dict.fromkeys([*order, *rest]):
        if not any(name in own for own in shares):
            continue
        cells = []
        for own, ranking in zip(shares, rankings, strict=True):
            share = own.get(name, 0.0)
            cells.append(f"{bar(share, ranking.by_chance, width)} {quantities.share(share):>5}")
        table.add_row(Text(words(name)), *map(Text, cells))


def _effects(found: Reasons, families: Mapping[str, str], out: Console) -> None:
    effects = found.effects
    if effects.trust is None or not effects.trust.enough:
        return
    out.print(
        f"\nWhat {found.objective} is expected to change by if every layout held this mixer in this layer, by a surrogate of "
        f"{effects.trials} trials;",
        markup=False,
        soft_wrap=True,
    )
    out.print(
        "± holds it 19 times in 20 if the surrogate is right; (in brackets) it may be nothing; ? never tried there",
        markup=False,
        soft_wrap=True,
    )
    strength: dict[str, float] = {}
    for cell in effects.cells:
        strength[cell.mixer] = max(strength.get(cell.mixer, 0.0), abs(cell.change) if cell.sure else 0.0)
    fitting = max(1, (out.width - 10) // CELL)
    shown = sorted(sorted(strength, key=lambda mixer: -strength[mixer])[:fitting])
    table = _table([""])
    for mixer in shown:
        table.add_column(_marked(mixer, families), justify="right", no_wrap=True)
    by_place = {(cell.position, cell.mixer): cell for cell in effects.cells}
    for position in sorted({cell.position for cell in effects.cells}):
        table.add_row(f"layer {position + 1}", *(Text(change(by_place[position, mixer])) for mixer in shown))
    out.print(table)
    if len(shown) < len(strength):
        out.print(f"  {len(strength) - len(shown)} more mixers in a wider terminal, or with --json")


def change(cell: Effect) -> str:
    """A cell of the table."""
    text = quantities.interval(cell.change, cell.low, cell.high)
    unknown = "" if cell.seen else "?"
    return f"{text}{unknown}" if cell.sure else f"({text}){unknown}"


def _marked(mixer: str, families: Mapping[str, str]) -> Text:
    """A mixer's name behind the marks of its families."""
    text = Text()
    for name in mixer.split("|"):
        family = family_of(name.partition("[")[0].partition("@")[0], families)
        text.append(family.mark, style=family.colour)
    return text.append(f" {mixer}")


def _shares(found: Reasons, families: Mapping[str, str], out: Console) -> None:
    out.print("\nWhat stands in each layer, on the front and in the rest")
    width = min(LONGEST_STRIP, max(6, out.width - 60))
    table = _table(["", "", "", "layouts"])
    for position in range(found.layers):
        own = [item for item in found.shares if item.position == position]
        for place, on_front in enumerate((True, False)):
            counts = {item.mixer: item.front if on_front else item.rest for item in own}
            words = ", ".join(f"{mixer} {count}" for mixer, count in counts.items() if count)
            table.add_row(
                f"layer {position + 1}" if place == 0 else "",
                "front" if on_front else "rest",
                share_strip(own, on_front=on_front, width=width, families=families),
                Text(words or "none"),
            )
    out.print(table)


def share_strip(items: Sequence[Share], *, on_front: bool, width: int, families: Mapping[str, str]) -> Text:
    """One mark for each so many layouts, mixer by mixer, so that lengths are shares."""
    total = sum(item.front if on_front else item.rest for item in items)
    text, passed = Text(), 0
    for item in items:
        before, passed = passed, passed + (item.front if on_front else item.rest)
        family = family_of(item.mixer.partition("|")[0], families)
        length = round(passed * width / total) - round(before * width / total) if total else 0
        text.append(family.mark * length, style=family.colour)
    return text


def _ratios(found: Reasons, families: Mapping[str, str], out: Console) -> None:
    out.print(f"\n{found.objective} by how many layers hold a mixer", markup=False)
    # A narrow terminal has the trial's number, which nas show takes, instead of the layout.
    texts = ("best layout",) if out.width >= WIDE else ()
    numbers = ("layers", "others : it", "trials", "front", "mean", "best", "trial")
    table = _table([])
    for title in ("", *numbers, *texts):
        table.add_column(
            title,
            justify="right" if title in numbers else "left",
            no_wrap=title not in texts,
            overflow="fold",
        )
    shown = _told_ratios(found, families)
    before = ""
    for row in shown:
        title = f"{row.name} (family)" if row.family else row.name
        name = Text(title) if row.family else _marked(row.name, families)
        table.add_row(
            Text("") if title == before else name,
            f"{row.layers} of {row.of}",
            row.ratio if 0 < row.layers < row.of else "",
            str(row.trials),
            str(row.on_front),
            mean(row, found.objective),
            quantities.value(found.objective, row.best),
            str(row.best_trial),
            *(Text(row.best_layout) for _ in texts),
        )
        before = title
    out.print(table)
    left = len({row.name for row in found.ratios if not row.family}) - len(
        {row.name for row in shown if not row.family}
    )
    if left:
        out.print(f"  {left} more mixers with --json")


def mean(row: Ratio, objective: str) -> str:
    """The mean over the trials, with its standard error where there are several."""
    if row.deviation is None:
        return quantities.value(objective, row.mean)
    half = row.deviation / row.trials**0.5
    return quantities.interval(row.mean, row.mean - half, row.mean + half).removeprefix("+")


def _told_ratios(found: Reasons, families: Mapping[str, str]) -> list[Ratio]:
    """The mixers that most layouts of the front hold, then families of several mixers."""
    mixers = [row for row in found.ratios if not row.family]
    held: dict[str, int] = {}
    for row in mixers:
        held[row.name] = held.get(row.name, 0) + (row.on_front if row.layers else 0)
    kept = sorted(held, key=lambda name: (-held[name], name))[:MOST_MIXERS]
    sizes: dict[str, int] = {}
    for name in held:
        family = families.get(name, "unknown")
        sizes[family] = sizes.get(family, 0) + 1
    several = [row for row in found.ratios if row.family and sizes.get(row.name, 0) > 1]
    return [row for name in kept for row in mixers if row.name == name] + several


def _table(titles: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title)
    return table

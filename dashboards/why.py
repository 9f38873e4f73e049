"""The section of a study's pages that says why its layers stand where they stand: sentences, pictures, tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dashboards import labels, quantities, strips
from dashboards.charts import GRID, INK, SCALE, Figure, bare_axis, bare_layout, plain
from dashboards.reasons import FRONT, Effect, Importance, Ratio, Reasons, outside
from dashboards.tables import Column, Entry, Row, Table


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture, what it shows, and the numbers behind it."""

    key: str
    heading: str
    words: str
    figure: Figure
    table: Table


@dataclass(frozen=True, kw_only=True)
class Why:
    """The whole section."""

    lead: str
    said: tuple[str, ...]
    pictures: tuple[Picture, ...]


def why(found: Reasons, families: Mapping[str, str]) -> Why:
    """What a page prints of the reasons; what cannot be said has a sentence and no picture."""
    also = f"; {outside(found)}" if found.inside < found.trials else ""
    pictures = []
    weighed = tuple(item for item in found.importance[:2] if not item.why_not)
    if weighed:
        pictures.append(_importance(weighed))
    if found.effects.trust is not None and found.effects.trust.enough:
        pictures.append(_effects(found))
    pictures += [_shares(found, families), _ratios(found, families)]
    return Why(
        lead=f"What {found.trials} trained layouts say of {found.objective}{also}.",
        said=found.said,
        pictures=tuple(pictures),
    )


def _of(item: Importance) -> str:
    return "being near the front" if item.objective == FRONT else f"being among the best in {item.objective}"


def _layer(name: str) -> str:
    return f"layer {int(name) + 1}" if name.isdigit() else "shared settings"


def _importance(items: tuple[Importance, ...]) -> Picture:
    traces: list[Figure] = []
    rows = []
    colours = ("var(--accent)", "var(--faint)")
    positions = sorted({w.name for item in items for w in item.positions.weights}, key=lambda n: (len(n), n))
    names = [_layer(name) for name in positions]
    for item, colour, symbol in zip(items, colours, ("line-ns-open", "x-thin-open"), strict=False):
        shares = {weight.name: weight.share for weight in item.positions.weights}
        limit = item.positions.by_chance
        hover = [
            f"{name}: {quantities.share(shares.get(key, 0.0))} of {plain(_of(item))}<br>shuffled results give at most "
            f"{quantities.share(limit)}"
            for key, name in zip(positions, names, strict=True)
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plain(_of(item)),
                "marker": {"color": colour, "line": {"color": INK, "width": 1}},
                "x": [100 * shares.get(name, 0.0) for name in positions],
                "y": names,
                "hovertext": hover,
                "hoverinfo": "text",
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"at most by chance, for {plain(_of(item))}",
                "marker": {"symbol": symbol, "size": 14, "color": INK, "line": {"width": 2, "color": INK}},
                "x": [100 * limit] * len(names),
                "y": names,
                "hoverinfo": "skip",
            }
        )
        for kind, ranking in (("position", item.positions), ("mixers", item.mixers), ("choice", item.kinds)):
            for weight in ranking.weights:
                name = _layer(weight.name) if kind == "position" else weight.name
                rows.append(
                    Row(
                        entries=(
                            Entry(text=f"number of layers with {name}" if kind == "mixers" else name),
                            Entry(text=_of(item)),
                            Entry(text=quantities.share(weight.share), sort=weight.share),
                            Entry(text=quantities.share(ranking.by_chance), sort=ranking.by_chance),
                        )
                    )
                )
    layout = bare_layout(height=130 + 44 * max(2, len(names)))
    layout |= {"barmode": "group", "bargap": 0.25}
    layout["xaxis"] = bare_axis("share of the importance (%)") | {"rangemode": "tozero"}
    layout["yaxis"] = bare_axis("") | {"autorange": "reversed", "showgrid": False, "type": "category"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return Picture(
        key="why_importance",
        heading="Which layer matters",
        words="How much the choice of each layer tells the best third of the layouts from all of them (PED-ANOVA). The "
        "marks are what shuffled results give: a bar that does not reach beyond its mark may be chance.",
        figure={"data": traces, "layout": layout},
        table=_table(
            "Importance", ("choice", "of", "share", "at most by chance"), ("share", "at most by chance"), rows
        ),
    )


def _interval(effect: Effect) -> str:
    return quantities.interval(effect.change, effect.low, effect.high)


def _effects(found: Reasons) -> Picture:
    cells = {(cell.position, cell.mixer): cell for cell in found.effects.cells}
    mixers = list(dict.fromkeys(mixer for _, mixer in cells))
    positions = list(dict.fromkeys(position for position, _ in cells))
    most = max(abs(cell.change) for cell in cells.values()) or 1.0
    grid = [[cells[position, mixer] for mixer in mixers] for position in positions]
    heat = {
        "type": "heatmap",
        "x": [plain(mixer) for mixer in mixers],
        "y": [f"layer {position + 1}" for position in positions],
        "z": [[cell.change for cell in line] for line in grid],
        "zmin": -most,
        "zmax": most,
        "colorscale": SCALE,
        "xgap": 1,
        "ygap": 1,
        "hovertext": [
            [
                f"{plain(cell.mixer)} in layer {cell.position + 1}: {_interval(cell)} of {plain(found.objective)}<br>"
                f"{cell.seen} trials hold it there"
                for cell in line
            ]
            for line in grid
        ],
        "hoverinfo": "text",
        "colorbar": {"thickness": 8, "len": 0.8, "outlinewidth": 0, "ticks": ""},
    }
    layout = bare_layout(height=110 + 40 * max(2, len(positions)))
    layout["xaxis"] = bare_axis("") | {"type": "category", "showgrid": False}
    layout["yaxis"] = bare_axis("") | {"type": "category", "autorange": "reversed", "showgrid": False}
    # On a ground of its own, since a cell may be any shade.
    layout["annotations"] = [
        {
            "x": plain(cell.mixer),
            "y": f"layer {cell.position + 1}",
            "text": _interval(cell) if cell.sure else f"({_interval(cell)})",
            "showarrow": False,
            "bgcolor": "var(--raised)",
            "bordercolor": GRID,
            "borderpad": 2,
            "font": {"size": 11, "color": INK},
        }
        for cell in cells.values()
        if len(mixers) <= 10
    ]
    rows = [
        Row(
            entries=(
                Entry(text=str(cell.position + 1), sort=cell.position),
                Entry(text=cell.mixer),
                *(
                    Entry(text=quantities.value(found.objective, x), sort=x)
                    for x in (cell.change, cell.low, cell.high)
                ),
                Entry(text=str(cell.seen), sort=cell.seen),
            )
        )
        for cell in cells.values()
    ]
    titles = ("layer", "mixer", "change", "from", "to", "trials with it there")
    return Picture(
        key="why_effects",
        heading="What a change would do",
        words=f"By how much {found.objective} is expected to change if every layout held this mixer in this layer, by a "
        f"surrogate of {found.effects.trials} trials, averaged over {found.effects.layouts} layouts. The interval holds it "
        "19 times in 20 if the surrogate is right; in brackets, it may be nothing.",
        figure={"data": [heat], "layout": layout},
        table=_table("Expected changes", titles, tuple(t for t in titles if t != "mixer"), rows),
    )


def _shares(found: Reasons, families: Mapping[str, str]) -> Picture:
    letters = strips.marks(families)
    traces: list[Figure] = []
    grounds = [f"layer {p + 1}, {which}" for p in range(found.layers) for which in ("front", "rest")]
    for mixer in dict.fromkeys(item.mixer for item in found.shares):
        first = mixer.partition("|")[0]
        family = strips.family_of(families.get(first, "")).name
        mark = "|".join(letters.get(name, name[:2]) for name in mixer.split("|"))
        own = [item for item in found.shares if item.mixer == mixer]
        parts = [
            (f"layer {item.position + 1}, {which}", count, of)
            for item in own
            for which, count, of in (("front", item.front, item.front_of), ("rest", item.rest, item.rest_of))
            if count
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"{plain(mark)} {plain(mixer)}",
                "x": [100 * count / of for _, count, of in parts],
                "y": [ground for ground, _, _ in parts],
                "text": [plain(mark) if count / of > 0.04 else "" for _, count, of in parts],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "textfont": {"color": f"var(--family-ink-{family})"},
                "hovertext": [f"{ground}: {plain(mixer)} in {count} of {of}" for ground, count, of in parts],
                "hoverinfo": "text",
                "marker": {
                    "color": f"var(--family-{family})",
                    "line": {"color": "var(--paper)", "width": 1.5},
                },
            }
        )
    layout = bare_layout(height=110 + 46 * max(1, found.layers))
    layout |= {"barmode": "stack", "bargap": 0.2}
    layout["xaxis"] = bare_axis("share of the layouts (%)") | {"range": [0, 100]}
    layout["yaxis"] = bare_axis("") | {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": grounds[::-1],
        "showgrid": False,
    }
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    rows = [
        Row(
            entries=(
                Entry(text=str(item.position + 1), sort=item.position),
                Entry(text=item.mixer),
                Entry(text=f"{item.front} of {item.front_of}", sort=item.front),
                Entry(text=f"{item.rest} of {item.rest_of}", sort=item.rest),
                Entry(text=quantities.quality(item.chance), sort=item.chance),
            )
        )
        for item in found.shares
    ]
    titles = ("layer", "mixer", "on the front", "in the rest", "as uneven by lot")
    return Picture(
        key="why_shares",
        heading="What stands where",
        words="How many layouts hold each mixer in each layer, on the front and in the rest.",
        figure={"data": traces, "layout": layout},
        table=_table("Mixers by depth", titles, tuple(t for t in titles if t != "mixer"), rows),
    )


def _ratios(found: Reasons, families: Mapping[str, str]) -> Picture:
    letters = strips.marks(families)
    mixers = [row for row in found.ratios if not row.family]
    traces: list[Figure] = []
    placed = _letters_placed(mixers, letters)
    for name in dict.fromkeys(row.name for row in mixers):
        own = [row for row in mixers if row.name == name]
        sides = [placed.get(mixers.index(row)) for row in own]
        family = strips.family_of(families.get(name, "")).name
        hover = [
            f"{plain(name)} in {row.layers} of {row.of} layers: {row.trials} trials, mean "
            f"{quantities.value(found.objective, row.mean)}, best {quantities.value(found.objective, row.best)}<br>"
            f"{plain(row.best_layout)} (trial {row.best_trial})"
            for row in own
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "name": f"{plain(letters.get(name, name[:2]))} {plain(name)}",
                "x": [row.layers for row in own],
                "y": [row.mean for row in own],
                "error_y": {
                    "type": "data",
                    "array": [(row.deviation or 0.0) / row.trials**0.5 for row in own],
                    "thickness": 1,
                    "width": 3,
                },
                "text": [plain(letters.get(name, name[:2])) if side else "" for side in sides],
                "textposition": [side or "top center" for side in sides],
                "line": {"color": f"var(--family-{family})", "width": 1.5},
                "marker": {"size": 7, "color": f"var(--family-{family})"},
                "customdata": [row.best_trial for row in own],
                "hovertext": hover,
                "hoverinfo": "text",
            }
        )
    layout = bare_layout(height=380)
    layout["xaxis"] = bare_axis("layers that hold the mixer") | {"dtick": 1}
    layout["yaxis"] = bare_axis(f"mean {plain(found.objective)}, with its standard error")
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    rows = [
        Row(
            trial=row.best_trial,
            entries=(
                Entry(text=f"{row.name} (family)" if row.family else row.name),
                Entry(text=f"{row.layers} of {row.of}", sort=row.layers),
                Entry(text=row.ratio if 0 < row.layers < row.of else ""),
                Entry(text=str(row.trials), sort=row.trials),
                Entry(text=str(row.on_front), sort=row.on_front),
                Entry(text=quantities.value(found.objective, row.mean), sort=row.mean),
                Entry(text=quantities.value(found.objective, row.best), sort=row.best),
                Entry(text=row.best_layout),
            ),
        )
        for row in found.ratios
    ]
    titles = ("mixer", "layers", "others to it", "trials", "on the front", "mean", "best", "best layout")
    numbers = ("layers", "trials", "on the front", "mean", "best")
    return Picture(
        key="why_ratios",
        heading="How many of them",
        words=f"Mean {found.objective} of the layouts by how many of their layers hold a mixer. A search does not try "
        "layouts by lot, so this is what was found and not what each mixer does.",
        figure={"data": traces, "layout": layout},
        table=_table(f"{found.objective} by number of layers", titles, numbers, rows),
    )


def _letters_placed(rows: Sequence[Ratio], letters: Mapping[str, str]) -> dict[int, str]:
    """By place in the list, on which side of its mark the letters of a mixer have room; the ends of lines come first."""
    means = [row.mean for row in rows]
    low, span = min(means, default=0.0), (max(means, default=0.0) - min(means, default=0.0)) or 1.0
    spots = [
        labels.Spot(
            key=place,
            x=0.05 + 0.9 * row.layers / row.of,
            y=0.05 + 0.9 * (row.mean - low) / span,
            text=letters.get(row.name, row.name[:2]),
            weight=row.layers,
        )
        for place, row in enumerate(rows)
    ]
    return labels.places(spots, width=480, height=250)


def _table(caption: str, titles: tuple[str, ...], numbers: tuple[str, ...], rows: list[Row]) -> Table:
    columns = tuple(Column(title=title, numeric=title in numbers) for title in titles)
    return Table(caption=caption, columns=columns, rows=tuple(rows))

"""Pictures of several layouts at once: what they keep at every context, how long they take, and how they score."""

from collections.abc import Sequence

from dashboards import quantities
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from dashboards.desk import NetworkPrice
from dashboards.trial_charts import COLOURS, DASHES
from storage.glances import Glance

Line = list[tuple[int, float, str]]
"""Context, value, and what is said of both."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def contexts(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> Figure:
    """Cache bytes against context, one line a layout, told apart by colour, dash and mark."""
    lines: list[Line] = [
        [
            (
                price.context,
                max(1, price.stored_bytes),
                f"{quantities.size(price.stored_bytes)} at {quantities.tokens(price.context)}, "
                f"{quantities.size(price.read_bytes)} read a step",
            )
            for price in own
        ]
        for own in prices
    ]
    return _against_context(picked, lines, "cache", "stored_bytes")


def latencies(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> Figure:
    """Decode latency against context, as far as it was measured; one line a layout."""
    lines: list[Line] = [
        [
            (
                price.context,
                price.latency.latency_ms,
                f"{quantities.milliseconds(price.latency.latency_ms)} at {quantities.tokens(price.context)}",
            )
            for price in own
            if price.latency
        ]
        for own in prices
    ]
    return _against_context(picked, lines, "decode latency", "latency_ms")


def _against_context(picked: Sequence[Glance], lines: Sequence[Line], title: str, unit_of: str) -> Figure:
    traces: list[Figure] = []
    for place, (seen, line) in enumerate(zip(picked, lines, strict=True)):
        colour = COLOURS[place % 5]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _name(seen),
                "x": [context for context, _, _ in line],
                "y": [value for _, value, _ in line],
                "line": {"color": colour, "dash": DASHES[place % 5], "width": 2},
                "marker": {"symbol": SYMBOLS[place % 6], "size": 8, "color": colour},
                "hovertext": [f"{_name(seen)}<br>{words}" for _, _, words in line],
                "hoverinfo": "text",
            }
        )
    layout = bare_layout(height=380)
    at = sorted({context for line in lines for context, _, _ in line})
    shown = at[::2] if len(at) > 6 else at
    layout["xaxis"] = bare_axis("context") | {
        "type": "log",
        "tickvals": shown,
        "ticktext": [quantities.tokens(context) for context in shown],
    }
    values = [value for line in lines for _, value, _ in line]
    places, words = quantities.ticks(unit_of, min(values, default=1.0), max(values, default=1.0), log=True)
    layout["yaxis"] = bare_axis(title) | {"type": "log", "tickvals": places, "ticktext": words}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def tasks(picked: Sequence[Glance]) -> Figure:
    """Scores by task, one mark a layout."""
    names = ["quality", *dict.fromkeys(task for seen in picked for task in seen.scores or ())]
    traces = []
    for place, seen in enumerate(picked):
        at = [(task, value) for task in names if (value := seen.value(task)) is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _name(seen),
                "x": [value for _, value in at],
                "y": [plain(task) for task, _ in at],
                "marker": {"symbol": SYMBOLS[place % 6], "size": 12, "color": COLOURS[place % 5], "opacity": 0.9},
                "hovertext": [f"{_name(seen)}<br>{plain(task)} {quantities.quality(value)}" for task, value in at],
                "hoverinfo": "text",
            }
        )  # fmt: skip
    layout = bare_layout(height=130 + 48 * len(names))
    layout["xaxis"] = bare_axis("score") | {"range": [-0.02, 1.02]}
    layout["yaxis"] = bare_axis("") | {"type": "category", "autorange": "reversed"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def _name(seen: Glance) -> str:
    text = seen.layout.text
    return plain(f"{seen.number}: {text if len(text) <= 40 else text[:38] + ' …'}")

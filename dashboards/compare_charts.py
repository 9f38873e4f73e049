"""Pictures of several layouts at once: what they keep at every context, and how they score."""

from collections.abc import Sequence

from dashboards import quantities
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from dashboards.desk import NetworkPrice
from dashboards.trial_charts import COLOURS, DASHES
from storage.glances import Glance

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def contexts(picked: Sequence[Glance], prices: Sequence[Sequence[NetworkPrice]]) -> Figure:
    """Cache bytes against context, one line a layout, told apart by colour, dash and mark."""
    traces: list[Figure] = []
    least, most = 2.0**62, 1.0
    for place, (seen, own) in enumerate(zip(picked, prices, strict=True)):
        colour = COLOURS[place % 5]
        sizes = [max(1, price.stored_bytes) for price in own]
        least, most = min(least, *sizes), max(most, *sizes)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _name(seen),
                "x": [price.context for price in own],
                "y": sizes,
                "line": {"color": colour, "dash": DASHES[place % 5], "width": 2},
                "marker": {"symbol": SYMBOLS[place % 6], "size": 8, "color": colour},
                "hovertext": [
                    f"{_name(seen)}<br>{quantities.size(price.stored_bytes)} at {quantities.tokens(price.context)}, "
                    f"{quantities.size(price.read_bytes)} read a step"
                    for price in own
                ],
                "hoverinfo": "text",
            }
        )
    layout = bare_layout(height=380)
    at = [price.context for price in prices[0]] if prices else []
    layout["xaxis"] = bare_axis("context") | {
        "type": "log",
        "tickvals": at[::2],
        "ticktext": [quantities.tokens(context) for context in at[::2]],
    }
    places, words = quantities.ticks("stored_bytes", least, most, log=True)
    layout["yaxis"] = bare_axis("cache") | {"type": "log", "tickvals": places, "ticktext": words}
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

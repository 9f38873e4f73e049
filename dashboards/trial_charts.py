"""Pictures of one trial as Plotly figures: what each layer costs, how it scores beside known layouts, how it learnt."""

import math
from collections.abc import Mapping, Sequence

from dashboards import latencies, quantities, strips
from dashboards.charts import FAINT, INK, Figure, bare_axis, bare_layout, plain
from dashboards.desk import NetworkPrice
from storage.records import ResultRecord, TrialRecord

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLOURS = tuple(f"var(--curve-{n})" for n in range(1, 6))
Bars = list[tuple[str, float, Sequence[float]]]


def layers(
    trial: TrialRecord,
    families: Mapping[str, str],
    letters: Mapping[str, str],
    price: NetworkPrice | None = None,
    measured_at: str = "",
) -> Figure:
    """What each layer of the pattern costs, one stacked bar a cost, as shares of the whole."""
    cells = strips.strip(trial.layout, families, letters)
    bars = _bars(trial, price)
    traces = []
    for depth, cell in enumerate(cells):
        family = cell.parts[0].family if cell.parts else strips.family_of("").name
        parts = [(name, parts[depth] if depth < len(parts) else 0.0, total) for name, total, parts in bars]
        shares = [part / total if total else 0.0 for _, part, total in parts]
        words = [
            f"{quantities.value(name, part)} ({round(100 * share)} %)"
            for (name, part, _), share in zip(parts, shares, strict=True)
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"{depth + 1} {plain(cell.label)}",
                "y": [_title(name, total, measured_at) for name, total, _ in bars],
                "x": [100 * share for share in shares],
                "text": [plain(cell.mark) if share > 0.025 else "" for share in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "textfont": {"color": f"var(--family-ink-{family})"},
                "hovertext": [f"layer {depth + 1}: {plain(cell.label)}<br>{word}" for word in words],
                "hoverinfo": "text",
                "marker": {
                    "color": f"var(--family-{family})",
                    "line": {"color": "var(--paper)", "width": 1.5},
                },
                "showlegend": False,
            }
        )
    layout = bare_layout(height=90 + 62 * max(1, len(bars)))
    layout |= {"barmode": "stack", "bargap": 0.3}
    layout["xaxis"] = bare_axis("share of the whole (%)") | {"range": [0, 100]}
    layout["yaxis"] = bare_axis("") | {"autorange": "reversed", "showgrid": False}
    return {"data": traces, "layout": layout}


def _bars(trial: TrialRecord, price: NetworkPrice | None) -> Bars:
    """By name: the whole, and the part of each layer of the pattern."""
    times = latencies.by_layer(trial, price)
    timed: Bars = [("latency_ms", sum(times), times)] if times else []
    if price is not None:
        parts = price.by_layer
        return [
            ("kv_bytes", price.stored_bytes, [p.stored_bytes for p in parts]),
            ("read_bytes", price.read_bytes, [p.read_bytes for p in parts]),
            ("params", price.params, [p.params for p in parts]),
            *timed,
        ]
    stored = [
        (name, [costs.get(name, 0.0) for costs in trial.layer_costs])
        for name in ("kv_bytes", "params")
        if any(name in costs for costs in trial.layer_costs)
    ]
    return timed + [(name, sum(own), own) for name, own in stored]


def _title(name: str, total: float, measured_at: str) -> str:
    at = f"<br>at {measured_at}" if name == "latency_ms" and measured_at else ""
    return f"{quantities.title(name)}<br>{quantities.value(name, total)}{at}"


def scores(
    trial: TrialRecord, known: Sequence[tuple[str, int, Mapping[str, float]]], quality: Mapping[int, float]
) -> Figure:
    """Scores by task as dots: this layout's seeds, and the known layouts by name."""
    result = trial.result
    tasks = ["quality", *result.scores] if result else []
    traces: list[Figure] = []
    for place, (name, number, values) in enumerate(known):
        at = [(task, quality.get(number) if task == "quality" else values.get(task)) for task in tasks]
        there = [(task, x) for task, x in at if x is not None]
        traces.append(
            _dots(there, name, FAINT, ("diamond-open", "square-open", "triangle-up-open", "star-open", "hexagon-open")[place % 5])
        )  # fmt: skip
    own = [(task, x) for task in tasks for x in trial.by_seed(task)]
    traces.append(_dots(own, "this layout, by seed", "var(--accent)", "circle") | {"showlegend": True})
    layout = bare_layout(height=130 + 44 * max(1, len(tasks)))
    layout["xaxis"] = bare_axis("score") | {"range": [-0.02, 1.02]}
    layout["yaxis"] = bare_axis("") | {"type": "category", "autorange": "reversed"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def _dots(points: Sequence[tuple[str, float]], name: str, colour: str, symbol: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name),
        "x": [x for _, x in points],
        "y": [plain(task) for task, _ in points],
        "marker": {"symbol": symbol, "size": 11, "color": colour, "opacity": 0.9, "line": {"width": 1.5, "color": colour}},
        "hovertext": [f"{plain(name)}<br>{plain(task)} {quantities.quality(x)}" for task, x in points],
        "hoverinfo": "text",
    }  # fmt: skip


def curves(trial: TrialRecord) -> Figure:
    """Loss against training step, one colour and dash a task, one line a seed."""
    found = curves_by_seed(trial)
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    first = {task: next(seed for t, seed, _ in found if t == task) for task in tasks}
    traces = []
    for task, seed, curve in found:
        place = tasks.index(task) % 5
        own = seed == first[task]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if own else "lines",
                "name": plain(task),
                "legendgroup": plain(task),
                "showlegend": own,
                "line": {"color": COLOURS[place], "dash": DASHES[place], "width": 2 if own else 1},
                "opacity": 1 if own else 0.7,
                "marker": {"size": 4},
                "x": [step for step, _ in curve],
                "y": [loss for _, loss in curve],
                "hovertext": [
                    f"{plain(task)}, seed {seed}<br>step {step:,.0f}: loss {loss:.4g}" for step, loss in curve
                ],
                "hoverinfo": "text",
            }
        )
    layout = bare_layout(height=300)
    layout["xaxis"] = bare_axis("training step")
    layout["yaxis"] = bare_axis("loss (nats)") | {"rangemode": "tozero"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK}}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def curves_by_seed(trial: TrialRecord) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """Task, seed and learning curve of the highest rung and of every repeat; curves without a finite step are left out."""
    results = [one for one in (trial.result, *trial.repeats) if one is not None]
    found = [(task, one.seed, curve) for one in results for task, curve in curves_of(one).items() if curve]
    return sorted(found, key=lambda item: item[0])


def curves_of(result: ResultRecord) -> dict[str, list[tuple[float, float]]]:
    """The stored learning curves by task, without what is no finite step."""
    stored = result.details.get("curves")
    if not isinstance(stored, Mapping):
        return {}
    return {
        str(task): [(float(pair[0]), float(pair[1])) for pair in curve if _is_step(pair)]
        for task, curve in stored.items()
        if isinstance(curve, Sequence)
    }


def _is_step(pair: object) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(x, int | float) and math.isfinite(x) for x in pair)
    )

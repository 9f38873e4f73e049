"""Pictures of one trial as Plotly figures: what each layer costs, and how it learnt."""

import math
from collections.abc import Mapping

from dashboards import quantities, strips
from dashboards.charts import Figure, bare_axis, bare_layout, plain
from storage.records import TrialRecord

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def layers(trial: TrialRecord, families: Mapping[str, str], letters: Mapping[str, str]) -> Figure:
    """What each layer of the pattern costs, one stacked bar a cost, as shares of the pattern's whole."""
    cells = strips.strip(trial.layout, families, letters)
    names = [
        name for name in ("latency_ms", "kv_bytes", "params") if any(name in c for c in trial.layer_costs)
    ]
    totals = {name: sum(c.get(name, 0.0) for c in trial.layer_costs) for name in names}
    traces = []
    for depth, (cell, costs) in enumerate(zip(cells, trial.layer_costs, strict=False)):
        family = cell.parts[0].family if cell.parts else strips.family_of("").name
        shares = [costs.get(name, 0.0) / totals[name] if totals[name] else 0.0 for name in names]
        words = [
            f"{quantities.value(name, costs.get(name))} ({round(100 * s)} %)"
            for name, s in zip(names, shares, strict=True)
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"{depth + 1} {plain(cell.label)}",
                "y": [
                    f"{quantities.title(name)}<br>{quantities.value(name, totals[name])}" for name in names
                ],
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
    layout = bare_layout(height=90 + 62 * max(1, len(names)))
    layout |= {"barmode": "stack", "bargap": 0.3}
    layout["xaxis"] = bare_axis("share of the pattern (%)") | {"range": [0, 100]}
    layout["yaxis"] = bare_axis("") | {"autorange": "reversed", "showgrid": False}
    return {"data": traces, "layout": layout}


def curves(trial: TrialRecord) -> Figure:
    """Loss against training step, one line a task, told apart by shade and by dash."""
    colours = ("var(--curve-1)", "var(--curve-2)", "var(--curve-3)", "var(--curve-4)", "var(--curve-5)")
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(task),
            "line": {"color": colours[i % 5], "dash": DASHES[i % 5], "width": 2},
            "marker": {"size": 4},
            "x": [step for step, _ in curve],
            "y": [loss for _, loss in curve],
            "hovertext": [f"{plain(task)}<br>step {step:,.0f}: loss {loss:.4g}" for step, loss in curve],
            "hoverinfo": "text",
        }
        for i, (task, curve) in enumerate(curves_of(trial).items())
    ]
    layout = bare_layout(height=300)
    layout["xaxis"] = bare_axis("training step")
    layout["yaxis"] = bare_axis("loss (nats)") | {"rangemode": "tozero"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def curves_of(trial: TrialRecord) -> dict[str, list[tuple[float, float]]]:
    """The stored learning curves by task, without steps that are not finite."""
    stored = trial.result.details.get("curves") if trial.result else None
    if not isinstance(stored, Mapping):
        return {}
    return {
        str(task): [
            (float(step), float(loss)) for step, loss in curve if loss is not None and math.isfinite(loss)
        ]
        for task, curve in stored.items()
    }

"""Pictures of a study as Plotly figures: plain JSON, drawn by the reader's browser.

Colours are names of CSS variables; static/charts.js resolves them, so that one figure serves light and dark.
"""

from typing import Any

from dashboards import strips
from dashboards.view import StudyView

Figure = dict[str, Any]

INK, FAINT, GRID = "var(--ink)", "var(--faint)", "var(--line)"
SCALE = [[0.0, "var(--scale-low)"], [0.5, "var(--scale-mid)"], [1.0, "var(--scale-high)"]]


def plain(text: str) -> str:
    """Text that Plotly prints as it is: it would otherwise read a few tags of HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def layouts(view: StudyView, limit: int = 60) -> Figure:
    """Strips of the best measured layouts, front first: one row a layout, one cell a layer."""
    first = view.axes[0] if view.axes else None
    sign = -1.0 if first and first.maximise else 1.0
    ordered = sorted(
        view.points, key=lambda p: (p.rank, sign * p.values[first.name] if first else 0.0, p.number)
    )
    shown = ordered[:limit]
    families = {part.family for p in shown for cell in p.strip for part in cell.parts}
    used = sorted(families, key=strips.family_order)
    rows = [f"{p.number}" for p in shown]
    traces: list[Figure] = []
    for family in used:
        bars: Figure = {
            "type": "bar",
            "orientation": "h",
            "name": strips.family_of(family).title,
            "marker": {"color": f"var(--family-{family})", "line": {"color": "var(--paper)", "width": 1}},
            "x": [],
            "y": [],
            "base": [],
            "text": [],
            "hovertext": [],
            "customdata": [],
            "hoverinfo": "text",
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": f"var(--family-ink-{family})"},
            "constraintext": "none",
        }
        for p, row in zip(shown, rows, strict=True):
            for depth, cell in enumerate(p.strip):
                for i, part in enumerate(cell.parts):
                    if part.family != family:
                        continue
                    bars["x"].append(1 / len(cell.parts))
                    bars["base"].append(depth + i / len(cell.parts))
                    bars["y"].append(row)
                    bars["text"].append(plain(part.mark))
                    bars["customdata"].append(p.number)
                    bars["hovertext"].append(f"layer {depth + 1}: {plain(cell.label)}<br>{plain(p.text)}")
        traces.append(bars)
    layout = bare_layout(height=90 + 22 * max(4, len(shown)))
    layout |= {"barmode": "overlay", "bargap": 0.12}
    depth = max((len(p.strip) for p in shown), default=0)
    layout["xaxis"] = bare_axis("layer of the pattern") | {
        "showgrid": False,
        "tickvals": [layer + 0.5 for layer in range(depth)],
        "ticktext": [str(layer + 1) for layer in range(depth)],
    }
    layout["yaxis"] = bare_axis("trial, front first") | {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rows[::-1],
        "showgrid": False,
    }
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def bare_axis(title: str) -> Figure:
    """An axis in the house's style."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": "var(--muted)"}},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "tickfont": {"size": 11, "color": "var(--muted)"},
        "automargin": True,
    }


def bare_layout(*, height: int) -> Figure:
    """A picture in the house's style, without axes."""
    return {
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": INK},
        "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
        "hoverlabel": {
            "bgcolor": "var(--raised)",
            "bordercolor": GRID,
            "font": {"color": INK, "size": 12},
            "align": "left",
        },
        "hovermode": "closest",
        # A picture that is drawn again with newer trials keeps its zoom.
        "uirevision": "kept",
    }

"""The front in three dimensions."""

from dashboards.charts import FAINT, GRID, Figure, bare_layout
from dashboards.choice import choose_axes
from dashboards.scales import drawn, drawn_all, scale, shown_range
from dashboards.scene import CROWD, NOTHING, SYMBOLS, Scene, hover, kind_name, packed, packed_numbers, parted
from dashboards.view import StudyView


def front_3d(view: StudyView, scene: Scene = NOTHING) -> Figure:
    """Every layout on three axes, those of the choice first; empty where the study has fewer."""
    if len(view.axes) < 3:
        return {"data": [], "layout": bare_layout(height=300)}
    across, up, third = choose_axes(view.axes, scene.choice.x, scene.choice.y, None)
    axes = (across, third or view.axes[2], up)
    shown = view.measured if scene.shown is None else scene.shown
    crowd, marked = parted(view, shown)
    inside = None if scene.caught is None else frozenset(scene.caught.tolist())
    traces: list[Figure] = []
    if len(crowd):
        columns = [drawn_all(axis, view.column(axis.name)[crowd], axis.log) for axis in axes]
        traces.append(
            {"type": "scatter3d", "mode": "markers", "name": CROWD, "showlegend": False}
            | dict(zip("xyz", map(packed, columns), strict=True))
            | {"customdata": packed_numbers(crowd), "hoverinfo": "none"}
            | {"marker": {"size": 2, "color": FAINT, "opacity": 0.35}}
        )
    for on_front in (False, True):
        for kind in SYMBOLS:
            points = [p for p in marked if p.on_front is on_front and p.kind == kind]
            if not points:
                continue
            lit = [inside is None or p.number in inside for p in points]
            traces.append(
                {
                    "type": "scatter3d",
                    "mode": "markers",
                    "name": kind_name(kind, on_front),
                    "showlegend": on_front,
                    **{
                        letter: [drawn(axis, p.values[axis.name], axis.log) for p in points]
                        for letter, axis in zip("xyz", axes, strict=True)
                    },
                    "marker": {
                        "symbol": SYMBOLS[kind],
                        "size": [(6 if on_front else 3.5) * (1 if on else 0.6) for on in lit],
                        "color": "var(--accent)" if on_front else FAINT,
                        "opacity": 1 if on_front else 0.6,
                        "line": {"width": 0},
                    },
                    "customdata": [p.number for p in points],
                    "hovertext": [hover(view, p, scene.doubt) for p in points],
                    "hoverinfo": "text",
                }
            )
    layout = bare_layout(height=400 if scene.narrow else 480)
    shape: Figure = {
        "bgcolor": "rgba(0,0,0,0)",
        "camera": {"eye": {"x": 1.7, "y": -1.7, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.12}},
    }
    flat = {"showbackground": False, "linecolor": GRID, "showspikes": False}
    for key, axis in zip(("xaxis", "yaxis", "zaxis"), axes, strict=True):
        low, high = shown_range(view, axis, axis.log, shown)
        shape[key] = scale(view, axis, axis.log, (low, high), sparse=True) | flat
    layout["scene"] = shape
    layout["margin"] = {"l": 0, "r": 0, "t": 8, "b": 0}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}

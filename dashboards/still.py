"""The front as a still picture in SVG: seen long before plotly.js has been read, where a script never runs, and in mail.

It is made from the figure that Plotly draws, so that both show the same; it has the width of whatever holds it. Letters: W, H
are the pixels of the crowd's image across and down.
"""

import html
import math
import re
import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards import assets
from dashboards.charts import SCALE, Figure
from dashboards.labels import LETTER
from dashboards.scene import CROWD
from dashboards.view import Floats

SVG = "http://www.w3.org/2000/svg"
W, H = 600, 390
ROW_PX = 19
# How much of each pixel around its middle a dot of four pixels covers: down, along, share.
_DOT = tuple(
    (down, along, 1.0 if down**2 + along**2 <= 2 else 0.5 if down**2 + along**2 <= 4 else 0.25)
    for down in range(-2, 3)
    for along in range(-2, 3)
    if down**2 + along**2 <= 5
)
# XML has no place for most control characters, nor for half a surrogate pair, however they are written.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class _Scale:
    """One axis of a figure."""

    figure: Figure

    def share(self, values: Sequence[float] | Floats) -> Floats:
        """Where values stand along the axis, from 0 to 1; NaN for what has no place."""
        at = np.asarray(values, dtype=float)
        low, high = self.figure["range"]
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.log10(at) if self.figure["type"] == "log" else at
        return np.asarray((at - low) / (high - low))

    def ticks(self) -> Iterator[tuple[float, str]]:
        """What stands at the axis, and where."""
        for at, words in zip(self.share(self.figure["tickvals"]), self.figure["ticktext"], strict=True):
            if 0 <= at <= 1:
                yield float(at), words


def still(figure: Figure, *, narrow: bool = False) -> str:
    """A figure of `front_chart` as SVG, in the colours of the reader's scheme."""
    layout, traces = figure["layout"], figure["data"]
    across, up = _Scale(layout["xaxis"]), _Scale(layout["yaxis"])
    named = [t for t in traces if t.get("showlegend") is not False]
    bar = layout.get("coloraxis")
    left = 21 + max((_width(words) for _, words in up.ticks()), default=12)
    top = (24 + ROW_PX * len(named)) if narrow else 45
    right = 8.0 if narrow or not bar else 72 + max(map(_width, bar["colorbar"]["ticktext"]), default=0)
    bottom = (132 if bar else 58) if narrow else 37
    parts = [_refused(layout), _grid(across, up, (300 if narrow else 580))]
    shades = [x for t in traces if "coloraxis" in t.get("marker", {}) for x in t["marker"]["color"]]
    ends = (min(shades), max(shades)) if shades else (0.0, 1.0)
    for trace in traces:
        if trace["name"] == CROWD:
            parts.append(_crowd(trace, across, up))
        elif trace["mode"] == "lines":
            parts.append(_stairs(trace, across, up))
        else:
            parts += _marks(trace, across, up, ends)
    parts.append(_legend(named, 27 - top, narrow))
    parts.append(_bar(bar, ends, narrow) if bar else "")
    style = (
        f"{assets.text('colours.css')} text{{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}}"
        " .tick,.word{font-size:11px} .tick,.title,.word{fill:var(--muted)} .line{stroke:var(--line)}"
        f" .area{{width:calc(100% - {left + right:.0f}px);height:calc(100% - {top + bottom:.0f}px)}}"
    )
    return (
        f'<svg xmlns="{SVG}" width="100%" height="100%"><style>{style}</style>'
        # Of all that SVG holds, this alone takes a width that is the whole less some pixels.
        f'<foreignObject class="area" x="{left:.0f}" y="{top:.0f}" width="100%" height="100%" overflow="visible">'
        f'<svg xmlns="{SVG}" width="100%" height="100%" overflow="visible">{"".join(parts)}</svg></foreignObject></svg>'
    )


def _text(words: str) -> str:
    """A figure's words, which are written for Plotly, as XML."""
    return html.escape(_UNWRITABLE.sub("", html.unescape(words)))


def _width(words: str) -> float:
    return LETTER * len(words)


def _at(share: float) -> str:
    return f"{100 * share:.2f}%"


def _values(column: Any) -> Floats:
    if isinstance(column, dict):
        return np.frombuffer(b64decode(column["bdata"]), dtype="<" + column["dtype"]).astype(float)
    return np.array([np.nan if x is None else x for x in column], dtype=float)


def _places(trace: Figure, across: _Scale, up: _Scale) -> tuple[Floats, Floats]:
    """Where the points of a trace stand from the left and from the top, from 0 to 1."""
    return across.share(_values(trace["x"])), 1 - up.share(_values(trace["y"]))


def _grid(across: _Scale, up: _Scale, width_px: float) -> str:
    lines, free = [], -math.inf
    for at, words in across.ticks():
        lines.append(f'<line class="line" x1="{_at(at)}" x2="{_at(at)}" y1="0" y2="100%"/>')
        half = _width(words) / 2
        # Words that would run into those before them are left out.
        if width_px * at - half > free:
            free = width_px * at + half + LETTER
            lines.append(
                f'<text class="tick" x="{_at(at)}" y="100%" dy="15" text-anchor="middle">{_text(words)}</text>'
            )
    for at, words in up.ticks():
        lines.append(f'<line class="line" y1="{_at(1 - at)}" y2="{_at(1 - at)}" x1="0" x2="100%"/>')
        lines.append(
            f'<text class="tick" x="-3" y="{_at(1 - at)}" dy="4" text-anchor="end">{_text(words)}</text>'
        )
    far = 8 + max((_width(words) for _, words in up.ticks()), default=12)
    lines.append(
        f'<text class="title" x="50%" y="100%" dy="31" text-anchor="middle">{_text(across.figure["title"]["text"])}</text>'
        f'<svg x="{-far:.0f}" y="50%" overflow="visible"><text class="title" transform="rotate(-90)" text-anchor="middle">'
        f"{_text(up.figure['title']['text'])}</text></svg>"
    )
    return "".join(lines)


def _refused(layout: Figure) -> str:
    regions = [
        f'<rect x="{_at(s["x0"])}" y="{_at(1 - s["y1"])}" width="{_at(s["x1"] - s["x0"])}" '
        f'height="{_at(s["y1"] - s["y0"])}" fill="{s["fillcolor"]}"/>'
        for s in layout["shapes"]
    ]
    anchors = {"left": "start", "right": "end"}
    words = [
        f'<text class="word" x="{_at(a["x"])}" y="{_at(1 - a["y"])}" dy="-5" text-anchor="{anchors[a["xanchor"]]}">{_text(a["text"])}</text>'
        for a in layout["annotations"]
    ]
    return "".join(regions + words)


def _crowd(trace: Figure, across: _Scale, up: _Scale) -> str:
    """The dots of all layouts without a mark, as a mask through which their colour is seen."""
    x, y = _places(trace, across, up)
    meta = trace["meta"]
    first = len(x) - meta["caught"] if "outside" in meta else 0
    faint, shown = 1 - meta.get("outside", 0.0), 1 - trace["marker"]["opacity"]
    seen = 1 - faint ** _covered(x[:first], y[:first]) * shown ** _covered(x[first:], y[first:])
    image = b64encode(_png((255 * seen).round().astype(np.uint8))).decode()
    return (
        '<mask id="crowd" style="mask-type:luminance" maskUnits="userSpaceOnUse" x="0" y="0" width="100%" height="100%">'
        f'<image width="100%" height="100%" preserveAspectRatio="none" href="data:image/png;base64,{image}"/></mask>'
        f'<rect width="100%" height="100%" fill="{trace["marker"]["color"]}" mask="url(#crowd)"/>'
    )


def _covered(x: Floats, y: Floats) -> Floats:
    """How many dots cover each pixel."""
    there = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    cells = ((H - 1) * y[there]).round().astype(int) * W + ((W - 1) * x[there]).round().astype(int)
    edged = np.pad(np.bincount(cells, minlength=W * H).reshape(H, W), 2).astype(float)
    parts = [w * edged[2 + down : 2 + down + H, 2 + along : 2 + along + W] for down, along, w in _DOT]
    return np.asarray(sum(parts))


def _png(grey: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """An image of one byte a pixel as PNG (W3C, Portable Network Graphics): every row as it is, squeezed."""
    height, width = grey.shape
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 6)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _stairs(trace: Figure, across: _Scale, up: _Scale) -> str:
    x, y = _places(trace, across, up)
    if not len(x):
        return ""
    steps = "".join(f"H{1000 * a:.1f}V{1000 * b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        '<svg viewBox="0 0 1000 1000" width="100%" height="100%" preserveAspectRatio="none" overflow="visible">'
        f'<path d="M{1000 * x[0]:.1f} {1000 * y[0]:.1f}{steps}" fill="none" stroke="{trace["line"]["color"]}" '
        f'stroke-width="{trace["line"]["width"]}" vector-effect="non-scaling-stroke"/></svg>'
    )


def _marks(trace: Figure, across: _Scale, up: _Scale, ends: tuple[float, float]) -> Iterator[str]:
    marker, x, y = trace["marker"], *_places(trace, across, up)
    line, names = marker.get("line", {}), trace.get("text")
    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if not np.isfinite(a) or not np.isfinite(b):
            continue
        radius = _one(marker["size"], i) / 2
        colour = _one(marker["color"], i)
        fill = colour if isinstance(colour, str) else _shade(colour, ends)
        if marker["symbol"].endswith("-open"):
            drawn = f'fill="none" stroke="{fill}"'
        else:
            drawn = f'fill="{fill}" stroke="{line.get("color", "none")}"'
        drawn += f' stroke-width="{line.get("width", 1)}" opacity="{_one(marker.get("opacity", 1), i)}"'
        yield from _bars(trace, i, across, up, a, b)
        yield f'<svg x="{_at(a)}" y="{_at(b)}" overflow="visible">{_symbol(marker["symbol"], radius, drawn)}'
        if names and names[i]:
            yield _name(names[i], trace["textposition"][i], radius, trace["textfont"]["color"])
        yield "</svg>"


def _symbol(symbol: str, radius: float, drawn: str) -> str:
    match symbol.removesuffix("-open"):
        case "square":
            return f'<rect x="{-radius:g}" y="{-radius:g}" width="{2 * radius:g}" height="{2 * radius:g}" {drawn}/>'
        case "diamond":
            r = round(1.3 * radius, 2)
            return f'<path d="M0 {-r}L{r} 0L0 {r}L{-r} 0Z" {drawn}/>'
        case _:
            return f'<circle r="{radius:.4g}" {drawn}/>'


def _name(words: str, position: str, radius: float, colour: str) -> str:
    height, side = position.split()
    down = {"top": -radius - 4, "middle": 4, "bottom": radius + 12}[height]
    along = {"left": -radius - 3, "center": 0, "right": radius + 3}[side] if height == "middle" else 0
    anchor = {"left": "end", "center": "middle", "right": "start"}[side]
    return f'<text class="word" style="fill:{colour}" x="{along:.3g}" y="{down:.3g}" text-anchor="{anchor}">{_text(words)}</text>'


def _bars(trace: Figure, i: int, across: _Scale, up: _Scale, a: float, b: float) -> Iterator[str]:
    """The intervals of one mark."""
    for letter, scale in (("x", across), ("y", up)):
        bars = trace.get(f"error_{letter}")
        if bars and (bars["array"][i] or bars["arrayminus"][i]):
            value = trace[letter][i]
            low, high = scale.share([value - bars["arrayminus"][i], value + bars["array"][i]])
            flat = letter == "x"
            x1, x2, y1, y2 = (low, high, b, b) if flat else (a, a, 1 - high, 1 - low)
            yield f'<line x1="{_at(x1)}" x2="{_at(x2)}" y1="{_at(y1)}" y2="{_at(y2)}" stroke="{bars["color"]}"/>'


def _one(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) else values


def _shade(value: float, ends: tuple[float, float]) -> str:
    share = (value - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
    low, middle, high = (colour for _, colour in SCALE)
    first, second, part = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    return f"color-mix(in srgb,{first},{second} {100 * part:.0f}%)"


def _legend(named: Sequence[Figure], y: float, narrow: bool) -> str:
    x, entries = 4.0, []
    for trace in named:
        if trace["mode"] == "lines":
            mark = (
                f'<line x1="0" x2="28" y1="-4" y2="-4" stroke="{trace["line"]["color"]}" stroke-width="1.5"/>'
            )
        else:
            marker = trace["marker"]
            line = marker["line"].get("color", marker["color"])
            fill = "none" if marker["symbol"].endswith("-open") else marker["color"]
            symbol = _symbol(marker["symbol"], 5, f'fill="{fill}" stroke="{line}" stroke-width="1.5"')
            mark = f'<svg x="14" y="-4" overflow="visible">{symbol}</svg>'
        entries.append(
            f'<svg x="{x:.0f}" y="{y:.0f}" overflow="visible">{mark}<text x="34">{_text(trace["name"])}</text></svg>'
        )
        if narrow:
            y += ROW_PX
        else:
            x += 44 + _width(trace["name"])
    return "".join(entries)


def _bar(axis: Figure, ends: tuple[float, float], narrow: bool) -> str:
    """What the shades mean."""
    bar = axis["colorbar"]
    stops = "".join(f'<stop offset="{share}" stop-color="{colour}"/>' for share, colour in axis["colorscale"])
    direction = 'x1="0" x2="1"' if narrow else 'x1="0" x2="0" y1="1" y2="0"'
    parts = [f'<linearGradient id="shades" {direction}>{stops}</linearGradient>']
    marks = [
        ((at - ends[0]) / (ends[1] - ends[0]), words)
        for at, words in zip(bar["tickvals"], bar["ticktext"], strict=True)
        if ends[0] <= at <= ends[1] and ends[1] > ends[0]
    ]
    title = _text(bar["title"]["text"])
    if narrow:
        parts.append(
            '<svg y="100%" overflow="visible"><rect x="5%" width="90%" y="86" height="8" fill="url(#shades)"/>'
        )
        parts.append(f'<text x="5%" y="80">{title}</text>')
        parts += [
            f'<text x="{_at(0.05 + 0.9 * at)}" y="108" text-anchor="middle">{_text(words)}</text>'
            for at, words in marks
        ]
        return "".join([*parts, "</svg>"])
    parts.append(
        '<svg x="100%" overflow="visible"><rect x="22" width="8" y="10%" height="80%" fill="url(#shades)"/>'
    )
    parts += [f'<text x="34" y="{_at(0.9 - 0.8 * at)}" dy="4">{_text(words)}</text>' for at, words in marks]
    far = 58 + max((_width(words) for _, words in marks), default=0)
    parts.append(
        f'<svg x="{far:.0f}" y="50%" overflow="visible"><text transform="rotate(-90)" text-anchor="middle">{title}</text></svg>'
    )
    return "".join([*parts, "</svg>"])

"""Where the names of marked points may stand without lying over one another: a spot for each, or none."""

from collections.abc import Sequence
from dataclasses import dataclass

LETTER, LINE, MARK = 6.4, 14.0, 8.0
"""Sizes in pixels: a letter's width, a line's height, half of a mark."""
_SIDES = {
    "top center": (0.0, 1.0),
    "bottom center": (0.0, -1.0),
    "middle right": (1.0, 0.0),
    "middle left": (-1.0, 0.0),
    "top right": (1.0, 1.0),
    "top left": (-1.0, 1.0),
    "bottom right": (1.0, -1.0),
    "bottom left": (-1.0, -1.0),
}


Box = tuple[float, float, float, float]
"""Left, low, right, high."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A mark at shares of the picture's width and height, and the name that it would like to have."""

    key: int
    x: float
    y: float
    text: str
    weight: int = 0
    """Those of a higher weight are placed first."""


def places(
    spots: Sequence[Spot], *, width: float, height: float, lines: Sequence[Box] = ()
) -> dict[int, str]:
    """By key, on which side of its mark a name stands; a name without room is left out.

    `lines` run upright or level, in the same shares as the spots: no name lies over one.
    """
    marks = {
        spot.key: (
            spot.x * width - MARK,
            spot.y * height - MARK,
            spot.x * width + MARK,
            spot.y * height + MARK,
        )
        for spot in spots
    }
    taken: list[Box] = [
        (min(x0, x1) * width - 1, min(y0, y1) * height - 1, max(x0, x1) * width + 1, max(y0, y1) * height + 1)
        for x0, y0, x1, y1 in lines
    ]
    found: dict[int, str] = {}
    for spot in sorted((s for s in spots if s.text), key=lambda s: (-s.weight, s.key)):
        for side, (right, up) in _SIDES.items():
            box = _box(spot, right, up, width, height)
            off = box[0] < 0 or box[2] > width or box[3] > height + LINE or box[1] < 0
            others = (mark for key, mark in marks.items() if key != spot.key)
            if off or any(_meet(box, other) for other in taken) or any(_meet(box, mark) for mark in others):
                continue
            taken.append(box)
            found[spot.key] = side
            break
    return found


def _box(spot: Spot, right: float, up: float, width: float, height: float) -> Box:
    long = LETTER * len(spot.text)
    x, y = spot.x * width, spot.y * height
    left = x - long / 2 if right == 0 else x + MARK if right > 0 else x - MARK - long
    low = y - LINE / 2 if up == 0 else y + MARK if up > 0 else y - MARK - LINE
    return left, low, left + long, low + LINE


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

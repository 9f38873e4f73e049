"""What a reader chose to see of a study: axes, filters, order and page, as they stand in an address."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from dashboards.view import Kind
from storage.records import Axis, State

NUMBER = "number"
NONE = "none"
Scale = Literal["", "log", "linear"]
Name = Annotated[str, Field(max_length=200)]
Vertices = tuple[tuple[float, float], ...]


class Choice(BaseModel):
    """Everything that an address says of a view; what it does not say is as the study has it."""

    model_config = ConfigDict(frozen=True)

    x: Annotated[Name | None, Field(description="Objective across.")] = None
    y: Annotated[Name | None, Field(description="Objective up.")] = None
    third: Annotated[Name | None, Field(description="Objective told by size and shade, or none.")] = None
    view: Annotated[Literal["plane", "space"], Field(description="Two dimensions or three.")] = "plane"
    x_scale: Annotated[Scale, Field(description="As the objective's own, if left out.")] = ""
    y_scale: Annotated[Scale, Field(description="As the objective's own, if left out.")] = ""
    mixer: Annotated[
        list[Name], Field(max_length=32, description="Layouts that hold every one of these.")
    ] = []
    origin: Annotated[
        list[Kind], Field(max_length=3, description="Layouts of these origins; all if none.")
    ] = []
    rung: Annotated[int, Field(ge=0, le=99, description="Trials that reached at least this rung.")] = 0
    state: Annotated[State | Literal[""], Field(description="Trials in this state; all if left out.")] = ""
    area: Annotated[
        str, Field(max_length=6000, description="A lasso in the units of the axes: x,y;x,y;x,y and so on.")
    ] = ""
    sort: Annotated[Name, Field(description="An objective, or number.")] = ""
    down: Annotated[bool, Field(description="The largest first.")] = False
    page: Annotated[int, Field(ge=1, le=1_000_000, description="A page of the table, from 1.")] = 1
    pick: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
        Field(max_length=6, description="Trials to be compared."),
    ] = []

    @property
    def filters(self) -> bool:
        """Whether some trials are left out."""
        return bool(self.mixer or self.origin or self.rung or self.area)

    def query(self, **changes: Any) -> str:
        """The address's part after the question mark, without what is as it would be anyway."""
        # Whatever changes what is listed begins at its first page again.
        values = self.model_dump() | {"page": 1} | changes
        said = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        if isinstance(said.get("down"), bool):
            said["down"] = int(said["down"])
        return urlencode(said, doseq=True)

    def vertices(self) -> Vertices:
        """The lasso's corners; ValueError where the text is none."""
        if not self.area:
            return ()
        try:
            pairs = [tuple(float(x) for x in corner.split(",")) for corner in self.area.split(";")]
        except ValueError:
            pairs = []
        if len(pairs) < 3 or any(len(pair) != 2 or not all(map(math.isfinite, pair)) for pair in pairs):
            raise ValueError("area is no lasso: write at least three corners like 1,0.5;2,0.5;2,0.9")
        return tuple((pair[0], pair[1]) for pair in pairs)


_DEFAULTS = Choice().model_dump()


def choose_axes(
    axes: Sequence[Axis], x: str | None, y: str | None, third: str | None = None
) -> tuple[Axis, Axis, Axis | None]:
    """The axes across and up, and the one that size and shade tell; by default cost across and quality up.

    ValueError for a name that the study has not, or for the same axis twice.
    """
    names = [axis.name for axis in axes]
    if len(names) < 2:
        raise ValueError(f"a front needs two axes, and this study has {len(names)}")
    for name in (x, y, third):
        if name is not None and name not in names and not (name == third == NONE):
            raise ValueError(f"this study has no axis {name!r}; it has {', '.join(names)}")
    if x is not None and x == y:
        raise ValueError(f"both axes are {x!r}: choose two different ones")
    up = y or next(name for name in names if name != x)
    across = x or next(name for name in reversed(names) if name != up)
    rest = [name for name in names if name not in (up, across)]
    by_name = {axis.name: axis for axis in axes}
    told = third if third in rest else rest[0] if rest and third != NONE else None
    return by_name[across], by_name[up], by_name[told] if told else None


def scaled(axis: Axis, scale: Scale) -> bool:
    """Whether an axis is drawn by logarithm."""
    return axis.log if not scale else scale == "log"

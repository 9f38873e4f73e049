"""Settings: what a mixer lets one choose, in which unit, and which values are valid outside the search's own options."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Value = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The measure of a size: valid values are the multiples of `step`, from `step` up."""

    name: str
    step: int
    meaning: str


UNITS: Mapping[str, Unit] = {
    unit.name: unit
    for unit in (
        Unit(name="tokens", step=4, meaning="a span of text; shrinks with the training length"),
        Unit(
            name="chunk",
            step=16,
            meaning="tokens computed at once; stays, as the layer does not depend on it",
        ),
        Unit(name="head", step=8, meaning="the width of a head; shrinks with the square root of the width"),
        Unit(name="state", step=8, meaning="the size of a state; shrinks with the square root of the width"),
        Unit(name="rank", step=8, meaning="a share of the width; shrinks with the width"),
        Unit(name="heads", step=1, meaning="a number of heads; shrinks by what the head's width leaves"),
        Unit(
            name="groups",
            step=1,
            meaning="heads that share; shrinks with the number of heads, and divides it",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing to choose. With a unit the options are what a search tries, and any valid size may be written."""

    name: str
    options: tuple[Value, ...]
    unit: str | None
    default: Value | None
    """None: the frame chooses."""
    searched: bool
    """Whether a search varies it unless told otherwise."""

    def read(self, value: Value) -> Value:
        """`value` in this setting's own type.

        Raises:
            ValueError: it is neither an option nor, where the setting has a unit, a valid size.
        """
        for option in self.options:
            if isinstance(value, bool) == isinstance(option, bool) and _same(value, option):
                return option
        if self.unit is not None and isinstance(value, int) and not isinstance(value, bool):
            step = UNITS[self.unit].step
            if value >= step and value % step == 0:
                return value
        raise ValueError(f"{self.name}={show_value(value)} is not valid: {self.rule}")

    @property
    def rule(self) -> str:
        """What may stand here, in words."""
        shown = ", ".join(show_value(option) for option in self.options)
        if self.unit is None:
            return f"choose one of {shown}"
        step = UNITS[self.unit].step
        return f"a search tries {shown}; also any {'number' if step == 1 else f'multiple of {step}'} from {step} up"


def _same(value: Value, option: Value) -> bool:
    if isinstance(value, (int, float)) and isinstance(option, float):
        # A third cannot be written down exactly, so six printed digits must find it again.
        return math.isclose(value, option, rel_tol=1e-5)
    return type(value) is type(option) and value == option


def show_value(value: Value) -> str:
    """A value as the notation writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def choice(
    *options: Value, unit: str | None = None, default: Value | None = None, searched: bool = False
) -> Any:
    """Declare a field of a Spec as a choice; with a unit it defaults to the frame's own size, else to the first option."""
    if unit is not None and unit not in UNITS:
        raise ValueError(f"unit {unit!r} is unknown: use one of {', '.join(UNITS)}")
    if unit is None and default is None:
        default = options[0]
    return field(
        default=default,
        metadata={"options": options, "unit": unit, "default": default, "searched": searched},
    )


def settings_of(spec: type[Any]) -> tuple[Setting, ...]:
    """The settings that a Spec class declares by `choice`, in order."""
    return tuple(
        Setting(
            name=item.name,
            options=item.metadata["options"],
            unit=item.metadata["unit"],
            default=item.metadata["default"],
            searched=item.metadata["searched"],
        )
        for item in fields(spec)
    )

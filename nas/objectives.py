"""Objectives and bounds by name: what a name stands for, where its value comes from, and which way is better.

    quality, mqar, bytes, …                        told by training: the weighted mean, or one task's own score
    kv_bytes, kv_bytes@128k, read_bytes, params, active_params, flops_prefill, flops_decode, serial_steps    exact
    latency_ms, latency_ms[phase=prefill,batch=8,context=4k], tokens_per_s, tokens_per_s[batch=8]    measured

What is not written is the target's. `min:` and `max:` before a name turn it, where both ways can be wanted.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from search_space.frame import Frame
from search_space.notation import nearest
from search_space.quantity import read_count
from search_space.spec import Cost

Source = Literal["training", "exact", "measured"]
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is the same for all quantities of one name."""

    source: Source
    unit: str = ""
    maximise: bool = False
    turns: bool = False
    """Whether the other way can be wanted too, as more parameters at the same latency."""
    settings: tuple[str, ...] = ()
    """What may stand in brackets behind the name."""
    contexts: bool = False
    """Whether @ and a context may follow the name."""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "quality": Kind(source="training", maximise=True),
        "kv_bytes": Kind(source="exact", unit="bytes", turns=True, contexts=True),
        "read_bytes": Kind(source="exact", unit="bytes", turns=True, contexts=True),
        "params": Kind(source="exact", turns=True),
        "active_params": Kind(source="exact", turns=True),
        "flops_prefill": Kind(source="exact", turns=True, contexts=True),
        "flops_decode": Kind(source="exact", turns=True, contexts=True),
        "serial_steps": Kind(source="exact", contexts=True),
        "latency_ms": Kind(source="measured", unit="ms", settings=("phase", "batch", "context")),
        "tokens_per_s": Kind(
            source="measured", unit="tokens/s", maximise=True, settings=("batch", "context")
        ),
    }
)
SCORE = Kind(source="training", maximise=True)
ALIASES: Mapping[str, str] = MappingProxyType(
    {"flops": "flops_decode", "latency_ms@prefill": "latency_ms[phase=prefill]"}
)
FROM_COST: Mapping[str, Callable[[Cost], float]] = MappingProxyType(
    {
        "kv_bytes": lambda cost: cost.stored_bytes,
        "read_bytes": lambda cost: cost.read_bytes,
        "params": lambda cost: cost.params,
        "active_params": lambda cost: cost.active_params,
        "flops_prefill": lambda cost: cost.flops_prefill,
        "flops_decode": lambda cost: cost.flops_decode,
        "serial_steps": lambda cost: cost.serial_steps,
    }
)

_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:@([A-Za-z0-9.]+)|\[([^\[\]]*)\])?")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something that a layout has one number for; what is None is the target's."""

    base: str
    phase: Phase = "decode"
    batch: int | None = None
    context: int | None = None

    @property
    def kind(self) -> Kind:
        """What its name says; a name that is not among the known ones is a task's."""
        return KINDS.get(self.base, SCORE)

    @property
    def name(self) -> str:
        """The canonical text, under which values are stored."""
        if self.kind.contexts and self.context is not None:
            return f"{self.base}@{self.context}"
        given = {"phase": self.phase if self.phase != "decode" else None, "batch": self.batch}
        given |= {"context": self.context}
        inside = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
        return f"{self.base}[{inside}]" if inside else self.base

    def at(self, frame: Frame) -> "Quantity":
        """The same quantity, without what is the frame's own anyway: one name a quantity."""
        return replace(
            self,
            batch=None if self.batch == frame.batch else self.batch,
            context=None if self.context == frame.context else self.context,
        )

    def frame(self, frame: Frame) -> Frame:
        """The frame in which it is taken."""
        batch, context = self.batch or frame.batch, self.context or frame.context
        if (batch, context) == (frame.batch, frame.context):
            return frame
        longest = frame.max_length and max(frame.max_length, context)
        return replace(frame, batch=batch, context=context, max_length=longest)

    def of_latency(self, latency_ms: float, frame: Frame) -> float:
        """Its value where a pass of the whole network takes so long."""
        if self.base == "tokens_per_s":
            return 1e3 * (self.batch or frame.batch) / latency_ms
        return latency_ms


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A quantity and the way that is better."""

    quantity: Quantity
    maximise: bool

    @property
    def text(self) -> str:
        """As it is written, canonically."""
        if self.maximise == self.quantity.kind.maximise:
            return self.quantity.name
        return f"{'max' if self.maximise else 'min'}:{self.quantity.name}"


def read_quantity_name(text: str, tasks: Collection[str]) -> Quantity:
    """The quantity that a name stands for.

    Raises:
        ValueError: the name is unknown, or says something that the quantity does not know.
    """
    given = text.strip()
    found = _NAME.fullmatch(ALIASES.get(given, given))
    base = ALIASES.get(found.group(1), found.group(1)) if found else given
    known = [*KINDS, *(task for task in tasks if task not in KINDS)]
    if found is None or base not in known:
        raise ValueError(
            f"no objective {given!r}{nearest(base, [*known, *ALIASES])} (there are {', '.join(known)})"
        )
    kind = KINDS.get(base, SCORE)
    context, inside = found.group(2), found.group(3)
    if context is not None:
        if not kind.contexts:
            other = "; write latency_ms[phase=prefill,context=4096]" if base == "latency_ms" else ""
            raise ValueError(f"{given!r} is not understood: {base} is not told at a context by @{other}")
        return Quantity(base=base, context=_whole(given, "context", context))
    return Quantity(base=base) if inside is None else _with_settings(given, base, kind, inside)


def _with_settings(text: str, base: str, kind: Kind, inside: str) -> Quantity:
    if not kind.settings:
        example = f": write {base}@131072" if kind.contexts else ""
        raise ValueError(f"{text!r} is not understood: {base} takes nothing in brackets{example}")
    found, seen = Quantity(base=base), set[str]()
    examples = {"phase": "phase=prefill", "batch": "batch=8", "context": "context=4096"}
    for part in inside.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in kind.settings or not equals or key in seen:
            raise ValueError(
                f"{text!r} is not understood at {part.strip()!r}: write "
                f"{base}[{','.join(examples[known] for known in kind.settings)}], or some of these, each once"
            )
        seen.add(key)
        if key == "phase":
            phase = next((known for known in PHASES if known == value), None)
            if phase is None:
                raise ValueError(
                    f"{text!r}: phase {value!r} is not one of {', '.join(PHASES)}{nearest(value, PHASES)}"
                )
            found = replace(found, phase=phase)
        elif key == "batch":
            found = replace(found, batch=_whole(text, key, value))
        else:
            found = replace(found, context=_whole(text, key, value))
    return found


def _whole(text: str, key: str, value: str) -> int:
    try:
        return read_count(value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {key}: {error}") from None


def read_objective(text: str, tasks: Collection[str], frame: Frame) -> Objective:
    """The objective that a text names in a target frame.

    Raises:
        ValueError: the name is unknown, or is turned to a way that nobody can want.
    """
    way, colon, name = text.partition(":")
    if not colon:
        way, name = "", text
    quantity = read_quantity_name(name, tasks).at(frame)
    kind = quantity.kind
    if way.strip() not in ("", "min", "max"):
        raise ValueError(f"objective {text!r}: write min: or max: before a name, or nothing")
    maximise = kind.maximise if not way else way.strip() == "max"
    if maximise != kind.maximise and not kind.turns:
        better = "larger" if kind.maximise else "smaller"
        raise ValueError(f"objective {text!r} is not valid: of {quantity.base}, {better} is better")
    return Objective(quantity=quantity, maximise=maximise)


def read_objectives(texts: Sequence[str], tasks: Collection[str], frame: Frame) -> tuple[Objective, ...]:
    """The objectives of a study, in their order.

    Raises:
        ValueError: one is not valid, one is there twice, or training or cost is not among them.
    """
    found = tuple(read_objective(text, tasks, frame) for text in texts)
    sources = {objective.quantity.kind.source for objective in found}
    if (
        len({objective.quantity for objective in found}) != len(found)
        or "training" not in sources
        or len(sources) < 2
    ):
        raise ValueError(
            f"objectives {', '.join(texts)} are not valid: "
            "name quality or a task, and at least one cost, each of them once"
        )
    return found


_SCALE = {
    "bytes": {
        "": 1.0, "k": 1024.0, "kib": 1024.0, "kb": 1e3, "m": 1e6, "mb": 1e6, "mib": 1024.0**2, "g": 1e9, "gb": 1e9,
        "gib": 1024.0**3, "tb": 1e12, "tib": 1024.0**4,
    },
    "ms": {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3},
    "tokens/s": {"": 1.0, "k": 1e3, "tokens/s": 1.0},
    "": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12},
}  # fmt: skip
_EXAMPLES = {"bytes": "64MiB", "ms": "12ms or 1.5s", "tokens/s": "200", "": "1.3B or 350M"}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ/]*)")


def read_amount(text: str, quantity: Quantity) -> float:
    """A number of a quantity's unit as people write it; raises ValueError if it is none."""
    unit = quantity.kind.unit
    found = _AMOUNT.fullmatch(text.strip())
    scale = _SCALE[unit].get(found.group(2).lower()) if found else None
    if found is None or scale is None or not math.isfinite(float(found.group(1)) * 1e12):
        raise ValueError(
            f"{text.strip()!r} is not an amount of {quantity.name}: write it like {_EXAMPLES[unit]}"
        )
    return float(found.group(1)) * scale


def write_amount(value: float, quantity: Quantity, *, up: bool) -> str:
    """Three digits that `read_amount` takes, rounded up or down, so that they bound what they were made of."""
    units = {
        "bytes": (("GiB", 1024.0**3), ("MiB", 1024.0**2), ("KiB", 1024.0)),
        "ms": (("s", 1e3), ("ms", 1.0), ("us", 1e-3)),
        "": (("B", 1e9), ("M", 1e6)),
    }.get(quantity.kind.unit, ())
    name, scale = next(((name, scale) for name, scale in units if abs(value) >= scale), ("", 1.0))
    places = max(0, 2 - math.floor(math.log10(abs(value) / scale))) if value else 0
    whole = value / scale * 10**places
    # A hair of room: a sum in another order may differ in its last bit.
    rounded = math.ceil(whole * (1 - 1e-12)) if up else math.floor(whole * (1 + 1e-12))
    text = f"{rounded / 10**places:.{places}f}"
    return (text.rstrip("0").rstrip(".") if places else text) + name

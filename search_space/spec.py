"""What a mixer is: a frozen Spec with its settings, its exact price in a frame, and the module that it builds."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from search_space.frame import Frame, nearest_divisor, round_to
from search_space.setting import UNITS, settings_of

AnySpec = TypeVar("AnySpec", bound="Spec")

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """One tensor of a layer's state, in bytes for the frame's whole batch at its context."""

    name: str
    stored_bytes: int
    read_bytes: int
    """Bytes that one decode step reads; less than stored where the mixer selects."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A price in one frame: parameters, mean FLOPs a token (two a multiply-add), and the cache by tensor."""

    params: int = 0
    flops_prefill: float = 0.0
    """A token, averaged over a prefill of the whole context."""
    flops_decode: float = 0.0
    """A token, at the end of the context."""
    cache: tuple[CacheTensor, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes that the layer keeps for the frame's batch."""
        return sum(tensor.stored_bytes for tensor in self.cache)

    @property
    def read_bytes(self) -> int:
        """Bytes of cache that one decode step reads."""
        return sum(tensor.read_bytes for tensor in self.cache)


def total(costs: Iterable[Cost]) -> Cost:
    """Costs added up; the tensors of all are kept, in order."""
    costs = list(costs)
    return Cost(
        params=sum(cost.params for cost in costs),
        flops_prefill=sum(cost.flops_prefill for cost in costs),
        flops_decode=sum(cost.flops_decode for cost in costs),
        cache=tuple(tensor for cost in costs for tensor in cost.cache),
    )


class Mixer(nn.Module, ABC):
    """What `Spec.build` returns; B batch, T time, D width.

    A state is a frozen value of the mixer's own type. It may share memory with the one it came from, so a state
    given to `forward` or `step` must not be used again.
    """

    @abstractmethod
    def start(self, batch: int, max_len: int) -> Any:
        """An empty state that can take `max_len` tokens, on the module's device."""

    @abstractmethod
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """[B, T, D] to [B, T, D]; continues from a state and returns the new one, or None if none was given."""

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token, [B, D] to [B, D]."""


class Channel(nn.Module, ABC):
    """A channel mixer: it sees one token at a time and keeps no state."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """A mixer's settings as a frozen value. Fields are declared by `choice`; None means the frame's own size.

    Raises:
        ValueError: a setting is neither an option nor a valid size of its unit.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            value = getattr(self, setting.name)
            if value is None and setting.default is None:
                continue
            try:
                setting.read(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None

    @abstractmethod
    def sized(self, frame: Frame) -> Self:
        """The same spec with every size that was left to the frame filled in.

        Raises:
            ValueError: the sizes do not fit together in this frame.
        """

    @abstractmethod
    def cost(self, frame: Frame) -> Cost:
        """The exact price of one such layer in the frame, its norm not counted."""


class MixerSpec(Spec):
    """The spec of a sequence mixer."""

    @abstractmethod
    def build(self, frame: Frame) -> Mixer:
        """The module, freshly initialised, for this frame."""


class ChannelSpec(Spec):
    """The spec of a channel mixer."""

    @abstractmethod
    def build(self, frame: Frame) -> Channel:
        """The module, freshly initialised, for this frame."""


def shrink(spec: AnySpec, target: Frame, proxy: Frame) -> AnySpec:
    """The spec as it stands in a smaller frame: every size by its unit's law, rounded to a valid one.

    Tokens follow the training lengths, ranks the widths, heads and states the square root of the widths; the number
    of heads is what is left of the total width, and groups keep their share of the heads.
    """
    full = spec.sized(target)
    ratio = proxy.width / target.width
    by_unit = {
        "tokens": proxy.train_length / target.train_length,
        "rank": ratio,
        "state": math.sqrt(ratio),
        "head": math.sqrt(ratio),
    }
    settings = {setting.name: setting for setting in settings_of(type(spec))}
    values: dict[str, int] = {}
    for name, setting in settings.items():
        value = getattr(full, name)
        # A size of nought says that the part is absent, and stays so.
        if setting.unit in by_unit and value:
            values[name] = round_to(value * by_unit[setting.unit], UNITS[setting.unit].step)
        if setting.unit == "tokens" and value < target.train_length:
            values[name] = min(values[name], _below(proxy.train_length, UNITS["tokens"].step))
    if "heads" in settings:
        heads, head_dim = getattr(full, "heads"), getattr(full, "head_dim")  # noqa: B009
        # The product first: a share such as 48/2304 is no exact number, its product with 2304 may be.
        values["heads"], values["head_dim"] = _shrink_heads(
            heads * head_dim * proxy.width / target.width, head_dim * math.sqrt(ratio)
        )
        for name, setting in settings.items():
            if setting.unit == "groups":
                values[name] = _share(getattr(full, name) * values["heads"] / heads, values["heads"])
    return replace(full, **values)


def _below(length: int, step: int) -> int:
    """The largest multiple of `step` below a length, at least one step: a span that does not cover the text."""
    return max(1, (length - 1) // step) * step


def _shrink_heads(total_width: float, ideal: float) -> tuple[int, int]:
    """Heads and their width at a total: an exact divisor near the ideal width where there is one, else the nearest pair."""
    if total_width % 8 == 0:
        size = nearest_divisor(int(total_width), ideal)
        return int(total_width) // size, size
    size = round_to(ideal, 8)
    return max(1, round(total_width / size)), size


def _share(wanted: float, heads: int) -> int:
    """The divisor of `heads` nearest to `wanted` from below, at least 1."""
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= max(1.0, wanted))

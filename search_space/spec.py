"""What a mixer is: a frozen Spec with its settings, its exact price in a frame, and the module that it builds."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from search_space.frame import Frame, nearest_divisor, round_to
from search_space.setting import UNITS, settings_of

AnySpec = TypeVar("AnySpec", bound="Spec")
Need = Literal["depth", "stream", "width", "length"]
"""What a mixer takes from beyond its own layer: its place in the network, the pass's stream, a value in it that is as
wide as the network, the longest text."""
Reach = Literal["all", "state", "window", "pattern", "chosen", "none"]
REACHES: Mapping[Reach, str] = MappingProxyType(
    {
        "all": "every earlier token; what is kept grows with the text",
        "state": "every earlier token, through a state that does not grow with the text, or by its logarithm",
        "window": "the last tokens alone, as many as the settings say",
        "pattern": "some earlier tokens, told by their places",
        "chosen": "some earlier tokens, told by what they hold",
        "none": "no earlier token by itself; it reads what another layer keeps",
    }
)
"""How far back a token sees in one layer with the default settings, and what that means."""

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
    serial_steps: int = 0
    """Steps of a training or prefill of the context that wait for one another: one a token where tokens are walked."""
    idle_params: float = 0.0
    """Parameters that a decode step of the frame's batch does not touch, on average: experts that nobody chose."""

    @property
    def active_params(self) -> float:
        """Parameters that one decode step of the frame's batch reads, on average."""
        return self.params - self.idle_params

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
        serial_steps=sum(cost.serial_steps for cost in costs),
        idle_params=sum(cost.idle_params for cost in costs),
    )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What one pass carries from layer to layer besides the residual stream: values by name, and losses to be added."""

    values: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """What the first layer of a kind leaves for later ones, [B, T, *]; [B, *] in a step."""
    losses: tuple[Tensor, ...] = ()
    """Numbers that training adds to the loss of its task."""
    star_block: int = 0
    """Tokens of a block, where the pass is a prefill by Star Attention; 0 for every other pass."""

    def with_value(self, name: str, value: Tensor) -> "Stream":
        """The stream with one more value in it."""
        return replace(self, values={**self.values, name: value})

    def with_loss(self, loss: Tensor) -> "Stream":
        """The stream with one more loss in it."""
        return replace(self, losses=(*self.losses, loss))


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

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """`forward` within a network. A mixer whose spec needs the stream reads it and leaves its own in it."""
        y, state = self(x, state)
        return y, state, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """`step` within a network."""
        y, state = self.step(x, state)
        return y, state, stream

    def after_step(self) -> None:
        """Called once after every step of the optimiser, for what is renewed and not learnt."""


class Channel(nn.Module, ABC):
    """A channel mixer: it sees one token at a time, and keeps no state unless it says so.

    One that keeps a state, such as the token before, overrides `start`, `forward_with` and `step_with`.
    """

    def start(self, batch: int) -> Any:  # noqa: ARG002
        """An empty state; () where none is kept."""
        return ()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]; [B, T, D] from an empty state where one is kept."""

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """`forward` within a network: [B, T, D], continuing from a state unless it is None."""
        return self(x), state, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """One token, [B, D]."""
        return self(x), state, stream

    def after_step(self) -> None:
        """Called once after every step of the optimiser, for what is renewed and not learnt."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """A mixer's settings as a frozen value. Fields are declared by `choice`; None means the frame's own size.

    Raises:
        ValueError: a setting is neither an option nor a valid size of its unit.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it takes from beyond its own layer: `frame.place`, the stream of the pass, or `frame.longest`."""

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

    @property
    def written(self) -> tuple[tuple[str, Any], ...]:
        """The settings that differ from their default, sorted by name: what the notation writes."""
        given = ((setting, getattr(self, setting.name)) for setting in settings_of(type(self)))
        return tuple(sorted((setting.name, value) for setting, value in given if value != setting.default))

    def shrunk_from(self, large: Self) -> Self:
        """The spec, each of its sizes shrunk by itself, with what must hold between them as in the large one."""
        del large
        return self


class MixerSpec(Spec):
    """The spec of a sequence mixer."""

    reach: ClassVar[Reach]
    """How far back a token sees; every mixer says it."""

    @property
    def sequential(self) -> bool:
        """Whether training walks the tokens one by one; such a spec charges `Cost.serial_steps`."""
        return False

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
    of heads is what is left of the total width, and groups keep their share of the heads. What says how a layer is
    computed, and not what it is, stays as it was written.
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
    as_written: dict[str, int | None] = {}
    for name, setting in settings.items():
        value = getattr(full, name)
        if setting.unit == "chunk":
            as_written[name] = getattr(spec, name)
        # A size of nought says that the part is absent, and stays so.
        elif setting.unit in by_unit and value:
            size = round_to(value * by_unit[setting.unit], UNITS[setting.unit].step)
            if setting.unit == "tokens" and value < target.train_length:
                size = min(size, _below(proxy.train_length, UNITS["tokens"].step))
            values[name] = size
    if "heads" in settings:
        heads, head_dim = getattr(full, "heads"), getattr(full, "head_dim")  # noqa: B009
        # The product first: a share such as 48/2304 is no exact number, its product with 2304 may be.
        values["heads"], values["head_dim"] = _shrink_heads(
            heads * head_dim * proxy.width / target.width, head_dim * math.sqrt(ratio)
        )
        for name, setting in settings.items():
            if setting.unit == "groups":
                values[name] = _share(getattr(full, name) * values["heads"] / heads, values["heads"])
    elif "head_dim" in settings:
        # Heads that are not counted fill the width.
        ideal = getattr(full, "head_dim") * math.sqrt(ratio)  # noqa: B009
        values["head_dim"] = nearest_divisor(proxy.width, ideal)
    return replace(full, **as_written, **values).shrunk_from(full).sized(proxy)


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

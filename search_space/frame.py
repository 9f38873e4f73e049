"""Frames: the sizes that surround a layout, at the target that will be deployed and at the proxy that is trained."""

import math
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
ROTARY_SCALINGS = ("none", "linear", "ntk", "yarn")
REFERENCE_WIDTH = 2048
"""The width at which heads have their published sizes; below half of it they shrink with the square root."""
Written = tuple[str, tuple[tuple[str, object], ...]]
"""A mixer's name and its written settings."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer stands in its network: what a few mixers depend on besides sizes.

    Raises:
        ValueError: the index is not one of the network's layers.
    """

    index: int = 0
    """Counted from 0."""
    depth: int = 1
    """Layers of the whole network."""
    earlier: frozenset[str] = frozenset()
    """The mixers of the layers before this one, by name."""
    before: tuple[Written, ...] = ()
    """The same in their order, with the settings that are written; without those that have a share of the width."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.depth:
            raise ValueError(f"layer {self.index} is not valid: a network of {self.depth} counts from 0")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What surrounds a layer: widths and depth of the network, lengths in tokens, the numbers' type, and its place.

    Raises:
        ValueError: a size is not positive, the width is no multiple of 8, the dtype is unknown, or the scaling of
            rotary angles lacks what it needs.
    """

    width: int
    depth: int | None = None
    """Layers of the whole network; None means as many as the layout has."""
    train_length: int = 4096
    context: int = 32768
    """Tokens that are visible when the next one is decoded."""
    batch: int = 1
    dtype: str = "bfloat16"
    vocabulary: int = 32000
    rotary_base: float = 10000.0
    rotary_scaling: str = "none"
    """How rotary angles are stretched for longer texts: one of ROTARY_SCALINGS; `positions.Scaling` holds formulas."""
    rotary_factor: float = 1.0
    """How many times longer."""
    rotary_length: int | None = None
    """Tokens of the texts before the stretching; yarn alone asks for it."""
    max_length: int | None = None
    """Tokens that the network is built for; None: as many as it is trained on or keeps, whichever is more."""
    star_block: int = 0
    """Tokens of a block where full attention prefills by Star Attention; 0 where it prefills exactly."""
    place: Place = Place()

    def __post_init__(self) -> None:
        for name in ("width", "train_length", "context", "batch", "vocabulary"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value} is not valid: it must be at least 1")
        if self.star_block < 0:
            raise ValueError(
                f"star_block {self.star_block} is not valid: it must be at least 1, or 0 for none"
            )
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth {self.depth} is not valid: a network has at least one layer")
        if self.max_length is not None and self.max_length < max(self.train_length, self.context):
            raise ValueError(
                f"max_length {self.max_length} is not valid: a training length of {self.train_length} and a context "
                f"of {self.context} must fit into it"
            )
        if self.width % 8:
            raise ValueError(
                f"width {self.width} is not valid: it must be a multiple of 8, such as {-(-self.width // 8) * 8}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPE_BYTES)}")
        self._check_rotary()

    def _check_rotary(self) -> None:
        kind, factor, length = self.rotary_scaling, self.rotary_factor, self.rotary_length
        if not self.rotary_base > 1:
            raise ValueError(f"rotary_base {self.rotary_base:g} is not valid: it must be above 1")
        if kind not in ROTARY_SCALINGS:
            raise ValueError(f"rotary_scaling {kind!r} is unknown: use one of {', '.join(ROTARY_SCALINGS)}")
        if not 1 <= factor < math.inf or (kind == "none" and factor != 1):
            raise ValueError(
                f"rotary_factor {factor:g} is not valid: it must be at least 1, and 1 where rotary_scaling is none"
            )
        if (kind == "yarn") != (length is not None) or (length is not None and length < 1):
            raise ValueError(
                f"rotary_length {length} is not valid with rotary_scaling {kind}: yarn asks for the tokens of the first "
                "training's texts, and nothing else reads it"
            )

    @property
    def longest(self) -> int:
        """The most tokens that the network must be able to hold; some mixers fix a table by it."""
        return self.max_length or max(self.train_length, self.context)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number in the cache and the weights."""
        return DTYPE_BYTES[self.dtype]

    def head_size(self, published: int, inner: int) -> int:
        """A head's default width: the published one where it fits, else shrunk to a divisor of `inner`."""
        if self.width >= REFERENCE_WIDTH // 2 and inner % published == 0:
            return published
        ideal = min(published, published * math.sqrt(self.width / REFERENCE_WIDTH))
        return nearest_divisor(inner, ideal)

    def state_size(self, published: int) -> int:
        """A state's default size: the published one for wide frames, else shrunk with the square root of the width."""
        if self.width >= REFERENCE_WIDTH // 2:
            return published
        return round_to(published * math.sqrt(self.width / REFERENCE_WIDTH), 8)


def round_to(value: float, step: int) -> int:
    """The multiple of `step` nearest to `value`, at least one step; halves go up."""
    return max(1, math.floor(value / step + 0.5)) * step


def nearest_divisor(total: int, ideal: float, step: int = 8) -> int:
    """The multiple of `step` dividing `total` whose ratio to `ideal` is nearest to one; ties go to the smaller."""
    divisors = [size for size in range(step, total + 1, step) if total % size == 0]
    if not divisors:
        raise ValueError(f"{total} has no divisor that is a multiple of {step}")
    # Rounded, so that two sizes at the same distance count as a tie on every machine.
    return min(divisors, key=lambda size: (round(abs(math.log(size / ideal)), 9), size))

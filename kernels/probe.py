"""What it takes to try an operator: inputs of a given size, the call, and what is known of both.

The tests, the tuner, the compiler's check and the GPU benchmark all ask the same probes, listed in `kernels.probes`.

Letters: B batch, T time, H heads, G groups that share k and v, K key, V value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from kernels.backend import Backend

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the drawn inputs are; an operator without heads takes H·V channels."""

    batch: int = 1
    time: int = 75
    heads: int = 2
    groups: int = 1
    key: int = 16
    value: int = 24


Draw = Callable[[Sizes, Generator], dict[str, Tensor]]
Call = Callable[[Backend, Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One way of calling an operator, with all that a check of it needs to know.

    `draw` gives the inputs in float32 or complex64 on the CPU (or whole numbers, which carry no gradient); `call`
    hands them to the operator by name. Of the inputs `wide` stay in float32 whatever the type of the others, `timed`
    have their time on axis 1, and `carried` maps a state's input to the place of its successor among the outputs.
    `step` takes the inputs of one token, `timed` ones without their axis of time; `packed` takes cu_seqlens besides.
    """

    operator: str
    name: str
    draw: Draw
    call: Call
    widths: Callable[[Sizes], tuple[int, ...]]
    """The sizes that the operator's table of configurations goes by."""
    kernels: tuple[str, ...] = ()
    """Those of the table whose rows go by these widths, the leading one first; all of them where none is named."""
    wide: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    carried: Mapping[str, int] = field(default_factory=dict)
    step: Call | None = None
    packed: Callable[[Backend, Inputs, Tensor], tuple[Tensor, ...]] | None = None
    backward: bool = True
    loose: tuple[str, ...] = ()
    """Gates and strengths, whose gradients are sums of many terms and are held to .02 in half precision, not .008."""

    measured: bool = False
    """Whether the GPU benchmark times it, as it does the first probe of every operator: it has kernels of its own."""

    @property
    def id(self) -> str:
        """operator: name."""
        return f"{self.operator}: {self.name}"

    @property
    def leading(self) -> str:
        """The kernel by whose rows a call is answered or refused."""
        return (self.kernels or ("forward",))[0]

    def asks(self, kernel: str) -> bool:
        """Whether the rows of this kernel go by the probe's widths."""
        return not self.kernels or kernel in self.kernels


def differentiable(x: Tensor) -> bool:
    """Whether a tensor can carry a gradient: numbers with a fraction can, complex ones among them."""
    return x.is_floating_point() or x.is_complex()


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type, or in the complex type as wide, of which complex64 is the narrowest; whole numbers stay."""
    if x.is_complex():
        return x.to(torch.complex128 if dtype in (torch.float64, torch.complex128) else torch.complex64)
    return x.to(dtype) if x.is_floating_point() else x


def noise(x: Tensor, generator: Generator) -> Tensor:
    """Normal numbers of the shape, type and device of x."""
    kind = torch.complex64 if x.is_complex() else torch.float32
    return torch.randn(x.shape, generator=generator, dtype=kind).to(x)


def cast(probe: Probe, inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The inputs on a device, in a type: but for the wide ones and whole numbers."""
    return {
        name: (x if name in probe.wide else converted(x, dtype)).to(device=device)
        for name, x in inputs.items()
    }


def fitting(probe: Probe, widths: tuple[int, ...], time: int = 64) -> Sizes:
    """Sizes at which a probe's widths are these, found among them and the powers of two."""
    options = sorted({*widths, 16, 32, 64, 128, 256})
    for key in options:
        for value in options:
            sizes = Sizes(time=time, key=key, value=value)
            if probe.widths(sizes) == widths:
                return sizes
    raise ValueError(f"{probe.id}: no sizes have the widths {widths}; mend the probe's `widths` or the row")


def token_of(probe: Probe, inputs: Inputs) -> Inputs:
    """The inputs of a step: the first token of what has an axis of time, without gradients."""
    return {
        name: x.detach()[:, 0].contiguous() if name in probe.timed else x.detach()
        for name, x in inputs.items()
    }


def normal(generator: Generator, *shape: int) -> Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(shape, generator=generator)


def gates(generator: Generator, *shape: int, hardest: float = -0.2) -> Tensor:
    """Log-decays, uniform between `hardest` and 0."""
    return hardest * torch.rand(shape, generator=generator)


def some_hard(generator: Generator, *shape: int) -> Tensor:
    """Log-decays of which three in ten are -50, one -1e30, the rest mild, and the first in every row 0."""
    mild = gates(generator, *shape, hardest=-0.05)
    draws = torch.rand(shape, generator=generator)
    mixed = mild.masked_fill(draws < 0.3, -50.0).masked_fill(draws > 0.9, -1e30)
    mixed[:, 0] = 0.0
    return mixed

"""How a Triton kernel is launched: with its row of the table, run or only compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kernels.backend import TARGET, TRITON_DTYPES, architecture
from kernels.configurations import Configuration, find

Grid = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel that a dry run compiled, with what it was compiled from."""

    operator: str
    configuration: Configuration
    dtype: str
    architecture: str
    binary: Any


_COMPILED: ContextVar[list[Compiled] | None] = ContextVar("COMPILED", default=None)
_WANTED: ContextVar[Callable[[Configuration], bool] | None] = ContextVar("WANTED", default=None)


def configure(operator: str, kernel: str, widths: Sequence[int], like: Tensor) -> Configuration:
    """The row for a kernel of `operator` at these widths, in the type and on the device of `like`."""
    dtype, place = TRITON_DTYPES[like.dtype], architecture(like.device)
    row = None if place is None else find(operator, kernel, tuple(widths), dtype, place)
    if row is None:
        raise ValueError(
            f"{operator}: its kernel {kernel!r} has no configuration for widths {list(widths)} in {dtype} on "
            f"{place or like.device.type}; use backend='auto', or add a row with `nas tune`"
        )
    return row


def launch(
    operator: str,
    kernel: Any,
    grid: Grid,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    row: Configuration,
    *,
    like: Tensor,
) -> None:
    """Run a kernel on `grid` programs, or compile it alone where a dry run asks for that.

    `arguments` fill the kernel's first parameters in order, None for a tensor that is not there; `constants` and the
    row's block sizes its compile-time ones by name.
    """
    options = {**constants, **row.blocks, "num_warps": row.num_warps, "num_stages": row.num_stages}
    compiled = _COMPILED.get()
    if compiled is not None:
        wanted = _WANTED.get()
        if wanted is not None and not wanted(row):
            return
        binary = kernel.warmup(*arguments, grid=grid, **options)
        place = TARGET.get() or ""
        compiled.append(
            Compiled(
                operator=operator,
                configuration=row,
                dtype=TRITON_DTYPES[like.dtype],
                architecture=place,
                binary=binary,
            )
        )
    elif like.device.type == "cuda":
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32 operands: nearly exactly on tensor cores, or as TF32 where torch may do so too.

    Plain float32 products ("ieee") fill registers so far that kernels of this kind spill kilobytes.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def padded(width: int) -> int:
    """The power of two that holds a width and that a matrix product accepts: at least 16."""
    return max(16, int(triton.next_power_of_2(width)))


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, D] and how many numbers its rows lie apart: a slice of a wider tensor as it is, not copied.

    Row t of batch entry b is the row b·T + t. What does not lie so evenly is copied.
    """
    batch, time, width = x.shape
    if x.is_contiguous():
        return x, width
    apart = x.stride(0) if time == 1 else x.stride(1)
    if x.stride(2) == 1 and (batch == 1 or x.stride(0) == time * apart):
        return x, apart
    return x.contiguous(), width


class _NoDevice:
    """Stands in for Triton's driver while kernels are only compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """One number for each architecture: compiled kernels are kept by it."""
        return int(str(self.target.arch))

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def dry_run(target: str, wanted: Callable[[Configuration], bool] | None = None) -> Iterator[list[Compiled]]:
    """Within it operators called with backend='triton' compile their kernels for an architecture (sm_90) and run none.

    Kernels launched with a row that is not wanted are passed over. Outputs hold arbitrary numbers. Needs no GPU.
    Triton must not interpret (TRITON_INTERPRET unset).
    """
    capability = int(target.removeprefix("sm_"))
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_NoDevice(GPUTarget("cuda", capability, 32)))
    compiled: list[Compiled] = []
    tokens = TARGET.set(target), _COMPILED.set(compiled), _WANTED.set(wanted)
    try:
        yield compiled
    finally:
        TARGET.reset(tokens[0])
        _COMPILED.reset(tokens[1])
        _WANTED.reset(tokens[2])
        triton.runtime.driver._active = before

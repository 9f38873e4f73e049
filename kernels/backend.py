"""How a call of an operator chooses its implementation, and the type in which it does its arithmetic."""

from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kernels.configurations import find, widest

Backend = Literal["auto", "reference", "chunked", "triton"]
Implementation = Literal["reference", "chunked", "triton"]
TARGET: ContextVar[str | None] = ContextVar("TARGET", default=None)
"""The architecture that kernels are compiled for without being run; `launch.dry_run` sets it."""
INTERPRETER = "interpreter"
TRITON_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def resolve(
    backend: Backend,
    operator: str,
    *tensors: Tensor | None,
    widths: Mapping[str, int] | None = None,
    kernel: str = "forward",
    missing: str | None = None,
    complex_numbers: bool = False,
    like: Tensor | None = None,
) -> Implementation:
    """The implementation that answers a call of `operator` on these tensors; ValueError where none does.

    `auto` is Triton on a GPU where the table has a configuration for these widths, else the chunk form. `missing`
    says, where it is so, what about this call no Triton kernel of the operator can do; `complex_numbers` that its
    kernels take complex64 too; `like` is the tensor whose type the table goes by, where types differ in their widths.
    """
    if backend == "reference":
        return "reference"
    if backend == "chunked" or (backend == "auto" and not _on_gpu(tensors)):
        return "chunked"
    if backend not in ("auto", "triton"):
        raise ValueError(f"{operator}: backend={backend!r} is not one of auto, reference, chunked, triton")
    reason = missing or why_not_triton(
        operator, tensors, widths or {}, kernel, complex_numbers=complex_numbers, like=like
    )
    if reason is None:
        return "triton"
    if backend == "auto":
        return "chunked"
    raise ValueError(f"{operator}: {reason}; use backend='auto'")


def why_not_triton(
    operator: str,
    tensors: tuple[Tensor | None, ...],
    widths: Mapping[str, int],
    kernel: str = "forward",
    *,
    complex_numbers: bool = False,
    like: Tensor | None = None,
) -> str | None:
    """Why no Triton kernel can answer a call of `operator` on these tensors; None where one can."""
    operator = operator.removesuffix("_step")
    given = [tensor for tensor in tensors if tensor is not None]
    if widest(operator, kernel) is None:
        return "there is no Triton kernel yet for backend='triton'"
    if not has_triton():
        return "backend='triton' needs the package triton, which is not installed here"
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        return f"the tensors lie on {sorted(map(str, devices))}, but must lie on one device"
    taken = {*TRITON_DTYPES, torch.complex64} if complex_numbers else {*TRITON_DTYPES}
    for tensor in given:
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in taken:
            return (
                f"a tensor is {tensor.dtype}, but the Triton kernels take float32, float16 and bfloat16"
                + (", and complex64" if complex_numbers else "")
            )
    here = architecture(next(iter(devices), torch.device("cpu")))
    if here is None:
        return (
            f"backend='triton' needs a GPU, not the device {next(iter(devices)).type!r} "
            "(or TRITON_INTERPRET=1 set before the program starts, to try the kernels slowly on a CPU)"
        )
    if here == INTERPRETER and any(tensor.dtype == torch.bfloat16 for tensor in given):
        return "Triton's interpreter computes wrongly in bfloat16, but rightly in float32 and float16"
    sizes = tuple(widths.values())
    dtype = None if like is None else TRITON_DTYPES[like.dtype]
    if not any(
        find(operator, kernel, sizes, own, here) for own in ([dtype] if dtype else TRITON_DTYPES.values())
    ):
        text = ", ".join(f"{name}={size}" for name, size in widths.items()) + (
            f" in {dtype}" if dtype else ""
        )
        most = widest(operator, kernel, dtype) or ()
        bound = ", ".join(f"{name} ≤ {size}" for name, size in zip(widths, most, strict=True))
        return f"no configuration serves {text} on {here}, the table goes up to {bound}"
    return None


def architecture(device: torch.device) -> str | None:
    """What a kernel launched there is compiled for: sm_90 and the like, or `interpreter`; None where it cannot run."""
    target = TARGET.get()
    if target is not None:
        return target
    if device.type == "cuda":
        return f"sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    return INTERPRETER if has_triton() and interprets() else None


def _on_gpu(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the call is for a GPU: its tensors lie there, or a dry run compiles for one."""
    return TARGET.get() is not None or any(tensor is not None and tensor.is_cuda for tensor in tensors)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the package can be imported: it exists for Linux alone."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def interprets() -> bool:
    """Whether Triton was told to run its kernels in its interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is float64, else float32: a state kept in less forgets."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def is_poisoned(output: Tensor) -> bool:
    """Whether a result on a CPU holds NaN or infinity; elsewhere False, since the answer would stall a GPU.

    A matrix product reaches masked places too, and 0 · NaN is NaN, so a chunk form can carry a NaN into
    the past. Where this says so, the reference answers instead.
    """
    if output.device.type != "cpu" or TARGET.get() is not None or torch.compiler.is_compiling():
        return False
    return not bool(torch.isfinite(output.detach().sum(dtype=working_dtype(output))))


def require_shape(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """ValueError where `tensor` has not the shape that the other arguments ask of it."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{operator}: {name} has shape {list(tensor.shape)}, but must be {letters} = {list(shape)}; "
            f"reshape {name} or the arguments that set these sizes"
        )


def require_axes(operator: str, name: str, tensor: Tensor, letters: str) -> None:
    """ValueError where `tensor` has not one axis for each letter, or has an empty one."""
    axes = len(letters.strip("[]").split(", "))
    if tensor.dim() != axes or 0 in tensor.shape:
        raise ValueError(
            f"{operator}: {name} has shape {list(tensor.shape)}, but must be {letters} with every size at "
            f"least 1; reshape {name} or leave the empty call out"
        )


def require_groups(operator: str, heads: int, groups: int) -> None:
    """ValueError where the groups do not share the heads evenly."""
    if heads % groups:
        raise ValueError(
            f"{operator}: {heads} heads cannot share {groups} groups evenly; choose a number of groups "
            f"that divides {heads}"
        )


def require_chunk(operator: str, chunk: int) -> None:
    """ValueError where a chunk would hold no token."""
    if chunk < 1:
        raise ValueError(f"{operator}: chunk={chunk} must be at least 1; leave it out for 64")

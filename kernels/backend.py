"""How a call of an operator chooses its implementation, and the type in which it does its arithmetic."""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "chunked", "triton"]
Implementation = Literal["reference", "chunked"]


def resolve(backend: Backend, operator: str) -> Implementation:
    """The implementation that answers a call of `operator`; ValueError where none does."""
    if backend == "triton":
        raise ValueError(
            f"{operator}: there is no Triton kernel yet for backend='triton'; use backend='auto'"
        )
    if backend in ("auto", "chunked"):
        return "chunked"
    if backend == "reference":
        return "reference"
    raise ValueError(f"{operator}: backend={backend!r} is not one of auto, reference, chunked, triton")


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is float64, else float32: a state kept in less forgets."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def is_poisoned(output: Tensor) -> bool:
    """Whether a result on a CPU holds NaN or infinity; elsewhere False, since the answer would stall a GPU.

    A matrix product reaches masked places too, and 0 · NaN is NaN, so a chunk form can carry a NaN into
    the past. Where this says so, the reference answers instead.
    """
    if output.device.type != "cpu" or torch.compiler.is_compiling():
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

"""Filters of state spaces that are diagonal but for a matrix of rank one, and their state: the public functions.

Letters: B batch, T time, C channels, N pairs of conjugate modes, L taps.  As in S4, arXiv:2111.00396.

The recurrence is x' = A x + B u, y = C x with A = Diag(Λ) − P P*, made discrete by the bilinear rule with a step Δ for
each channel. A, B and P are shared by the channels. Of each pair of conjugates one is kept: `pole` Λ, `low_rank` P and
`write` B are complex [N], `read` C is complex [C, N], `step` Δ is [C], and y is twice the real part of a sum over N.
"""

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve
from kernels.cauchy_filter import chunked, reference
from kernels.cauchy_filter.chunked import Discrete as Discrete
from kernels.stacked import stackable


def _check(name: str, pole: Tensor, channels: int, step: Tensor, **vectors: Tensor) -> None:
    """ValueError where the parts of the state space do not belong together."""
    require_axes(name, "pole", pole, "[N]")
    modes = tuple(pole.shape)
    for other, tensor in vectors.items():
        shape, letters = ((channels, *modes), "[C, N]") if other == "read" else (modes, "[N]")
        require_shape(name, other, tensor, shape, letters)
    require_shape(name, "step", step, (channels,), "[C]")
    for other, tensor in {"pole": pole, **vectors}.items():
        if not tensor.is_complex():
            raise ValueError(f"{name}: {other} is {tensor.dtype}, but must be complex; give one of each pair")


def _check_length(name: str, length: int) -> None:
    """ValueError where no tap is asked for."""
    if length < 1:
        raise ValueError(f"{name}: length={length} must be at least 1")


def _check_state(name: str, state: Tensor, batch: int, channels: int, pole: Tensor) -> None:
    """ValueError where the state is not one complex number a mode."""
    require_shape(name, "state", state, (batch, channels, pole.shape[0]), "[B, C, N]")
    if not state.is_complex():
        raise ValueError(f"{name}: state is {state.dtype}, but must be complex")


@stackable(each=("pole", "low_rank", "write", "read", "step"))
def cauchy_filter(
    pole: Tensor,
    low_rank: Tensor,
    write: Tensor,
    read: Tensor,
    step: Tensor,
    length: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """h_l = C Ā^l B̄ for l < length, the filter of the recurrence.

    The real part of pole < 0. Returns [C, L] in float32, or in float64 where an input is wide.
    """
    name = "cauchy_filter"
    implementation = resolve(backend, name)
    require_axes(name, "read", read, "[C, N]")
    _check(name, pole, read.shape[0], step, low_rank=low_rank, write=write, read=read)
    _check_length(name, length)
    if implementation == "chunked":
        return chunked.cauchy_filter(pole, low_rank, write, read, step, length)
    return reference.cauchy_filter(pole, low_rank, write, read, step, length)


@stackable(each=("u", "pole", "low_rank", "write", "step", "state"))
def cauchy_state(
    u: Tensor,
    pole: Tensor,
    low_rank: Tensor,
    write: Tensor,
    step: Tensor,
    state: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """x_T = Σ_t Ā^(T-1-t) B̄ u_t + Ā^T x_0: what is carried on from a text.

    u [B, T, C]; state [B, C, N], complex, None for zeros. Returns [B, C, N] in complex64, or in complex128.
    """
    name = "cauchy_state"
    implementation = resolve(backend, name)
    require_axes(name, "u", u, "[B, T, C]")
    _check(name, pole, u.shape[2], step, low_rank=low_rank, write=write)
    if state is not None:
        _check_state(name, state, u.shape[0], u.shape[2], pole)
    if implementation == "chunked":
        return chunked.cauchy_state(u, pole, low_rank, write, step, state)
    return reference.cauchy_state(u, pole, low_rank, write, step, state)


@stackable(each=("state", "pole", "low_rank", "read", "step"))
def cauchy_response(
    state: Tensor,
    pole: Tensor,
    low_rank: Tensor,
    read: Tensor,
    step: Tensor,
    length: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """y_t = C Ā^(t+1) x_0: what the state before a text, [B, C, N], adds to its outputs [B, T, C], T = length."""
    name = "cauchy_response"
    implementation = resolve(backend, name)
    require_axes(name, "state", state, "[B, C, N]")
    _check(name, pole, state.shape[1], step, low_rank=low_rank, read=read)
    _check_state(name, state, state.shape[0], state.shape[1], pole)
    _check_length(name, length)
    if implementation == "chunked":
        return chunked.cauchy_response(state, pole, low_rank, read, step, length)
    return reference.cauchy_response(state, pole, low_rank, read, step, length)


@stackable(each=("pole", "low_rank", "write", "step"))
def cauchy_discrete(pole: Tensor, low_rank: Tensor, write: Tensor, step: Tensor) -> Discrete:
    """Ā and B̄ of every channel in O(N) numbers each, for `cauchy_step`: they are the same for all tokens."""
    name = "cauchy_discrete"
    require_axes(name, "step", step, "[C]")
    _check(name, pole, step.shape[0], step, low_rank=low_rank, write=write)
    return chunked.discrete(pole, low_rank, write, step)


@stackable(each=("u", "known", "read", "state"))
def cauchy_step(
    u: Tensor, known: Discrete, read: Tensor, state: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """One token: u [B, C], what `cauchy_discrete` made, read [C, N], state [B, C, N] → y [B, C], the new state.

    There is one form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "cauchy_step"
    resolve(backend, name)
    require_axes(name, "u", u, "[B, C]")
    batch, channels = u.shape
    pairs = known.change.shape[-1]
    require_shape(name, "known.change", known.change, (channels, pairs), "[C, N]")
    require_shape(name, "read", read, (channels, pairs), "[C, N]")
    _check_state(name, state, batch, channels, known.change[0])
    return chunked.step(u, known, read, state)

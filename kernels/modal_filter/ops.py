"""Filters that are sums of fading modes, and their state: the public functions.

Letters: B batch, T time, C channels, N modes, L taps.  As in S4D, arXiv:2206.11893, and DSS, arXiv:2203.14343.

The recurrence is x ← exp(log_pole) x + u, y = Σ_n weight_n x_n. Modes are complex, each for itself and its conjugate, so
that the sum is twice the real part; or real, counted once. How a mode is written to is a part of its weight.
"""

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve
from kernels.modal_filter import chunked, reference
from kernels.stacked import stackable


def _check(
    name: str,
    log_pole: Tensor,
    weight: Tensor | None,
    state: Tensor | None,
    batch: int | None,
    *,
    called: str = "log_pole",
) -> None:
    """ValueError where poles, weights and state do not belong together."""
    require_axes(name, called, log_pole, "[C, N]")
    modes = tuple(log_pole.shape)
    if weight is not None:
        require_shape(name, "weight", weight, modes, "[C, N]")
    if state is not None:
        require_shape(name, "state", state, (batch or state.shape[0], *modes), "[B, C, N]")
    for other, tensor in (("weight", weight), ("state", state)):
        if tensor is not None and tensor.is_complex() != log_pole.is_complex():
            raise ValueError(
                f"{name}: {other} is {tensor.dtype} and {called} {log_pole.dtype}; give complex modes or real ones"
            )


def _check_length(name: str, length: int) -> None:
    """ValueError where no tap is asked for."""
    if length < 1:
        raise ValueError(f"{name}: length={length} must be at least 1")


@stackable(each=("log_pole", "weight"))
def modal_filter(log_pole: Tensor, weight: Tensor, length: int, *, backend: Backend = "auto") -> Tensor:
    """h_l = Σ_n weight_n exp(l · log_pole_n): the filter of the recurrence.

    log_pole, weight [C, N], both complex or both real, the real part of log_pole ≤ 0. Returns [C, L] in float32, or in
    float64 where an input is float64 or complex128.
    """
    name = "modal_filter"
    implementation = resolve(backend, name)
    _check(name, log_pole, weight, None, None)
    _check_length(name, length)
    if implementation == "chunked":
        return chunked.modal_filter(log_pole, weight, length)
    return reference.modal_filter(log_pole, weight, length)


@stackable(each=("u", "log_pole", "state"))
def modal_state(
    u: Tensor, log_pole: Tensor, state: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """x_T = Σ_t exp((T-1-t) log_pole) u_t + exp(T log_pole) x_0: what is carried on from a text.

    u [B, T, C]; log_pole [C, N]; state [B, C, N], None for zeros. Returns [B, C, N] in the modes' type.
    """
    name = "modal_state"
    implementation = resolve(backend, name)
    require_axes(name, "u", u, "[B, T, C]")
    require_axes(name, "log_pole", log_pole, "[C, N]")
    require_shape(name, "u", u, (*u.shape[:2], log_pole.shape[0]), "[B, T, C]")
    _check(name, log_pole, None, state, u.shape[0])
    if implementation == "chunked":
        return chunked.modal_state(u, log_pole, state)
    return reference.modal_state(u, log_pole, state)


@stackable(each=("state", "log_pole", "weight"))
def modal_response(
    state: Tensor, log_pole: Tensor, weight: Tensor, length: int, *, backend: Backend = "auto"
) -> Tensor:
    """y_t = Σ_n weight_n exp((t+1) log_pole_n) state_n: what the state before a text adds to its outputs.

    state [B, C, N], log_pole, weight [C, N]. Returns [B, T, C] for T = length.
    """
    name = "modal_response"
    implementation = resolve(backend, name)
    require_axes(name, "state", state, "[B, C, N]")
    _check(name, log_pole, weight, state, None)
    _check_length(name, length)
    if implementation == "chunked":
        return chunked.modal_response(state, log_pole, weight, length)
    return reference.modal_response(state, log_pole, weight, length)


@stackable(each=("u", "pole", "weight", "state"))
def modal_step(
    u: Tensor, pole: Tensor, weight: Tensor, state: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """One token: u [B, C], pole, weight [C, N], state [B, C, N] → y [B, C] in u's dtype, the new state.

    The pole itself, exp(log_pole), because it is the same for all tokens and its exponential costs more than the step.
    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "modal_step"
    resolve(backend, name)
    require_axes(name, "u", u, "[B, C]")
    require_axes(name, "pole", pole, "[C, N]")
    require_shape(name, "u", u, (u.shape[0], pole.shape[0]), "[B, C]")
    _check(name, pole, weight, state, u.shape[0], called="pole")
    return reference.step(u, pole, weight, state)

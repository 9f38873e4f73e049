"""Diagonal linear recurrence: the public functions.

Letters: B batch, T time, C channels, N modes of a channel.  As in RG-LRU, arXiv:2402.19427, and S4D, arXiv:2206.11893.
"""

from torch import Tensor

from kernels.backend import Backend, Implementation, require_axes, require_shape, resolve, wants_gradient
from kernels.diagonal_scan import chunked, reference
from kernels.packing import by_document, require_documents
from kernels.stacked import stackable


def _require_one_kind(operator: str, log_decay: Tensor, x: Tensor, state: Tensor | None) -> None:
    """ValueError where some of the numbers are complex and others are not."""
    kinds = {tensor.is_complex() for tensor in (log_decay, x, state) if tensor is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"{operator}: some of log_decay, x and state are complex and some are real; convert the real ones "
            "with .to(torch.complex64)"
        )


@stackable()
def diagonal_scan(
    log_decay: Tensor,
    x: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h ← exp(log_decay) ⊙ h + x for each token.

    log_decay, x [B, T, C], all real or all complex, with log_decay ≤ 0 (its real part; −inf forgets all); state
    [B, C], None for zeros. Returns every h [B, T, C] in x's dtype and the last one in float32 or complex64, or in
    float64 or complex128 where an input is as wide. cu_seqlens [N + 1] packs N documents in one row, each with its own
    state [N, C].
    """
    name = "diagonal_scan"
    require_axes(name, "x", x, "[B, T, C]")
    batch, time, channels = x.shape
    require_shape(name, "log_decay", log_decay, (batch, time, channels), "[B, T, C]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, channels), "[B, C]")
    _require_one_kind(name, log_decay, x, state)
    implementation = resolve(backend, name, log_decay, x, state, cu_seqlens, complex_numbers=True)
    if implementation == "triton":
        from kernels.diagonal_scan import triton

        return triton.diagonal_scan(log_decay, x, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(log_decay: Tensor, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return diagonal_scan(log_decay, x, state, backend=implementation)

        return by_document(run, (log_decay, x), state, cu_seqlens)
    if implementation == "chunked":
        return chunked.diagonal_scan(log_decay, x, state)
    output, last = reference.diagonal_scan(log_decay, x, state)
    return output.to(x.dtype), last


@stackable()
def diagonal_scan_step(log_decay: Tensor, x: Tensor, state: Tensor, *, backend: Backend = "auto") -> Tensor:
    """One token: log_decay, x, state [B, C] → the new state, in the types of `diagonal_scan`.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "diagonal_scan_step"
    require_axes(name, "x", x, "[B, C]")
    require_shape(name, "log_decay", log_decay, tuple(x.shape), "[B, C]")
    require_shape(name, "state", state, tuple(x.shape), "[B, C]")
    _require_one_kind(name, log_decay, x, state)
    implementation = resolve(backend, name, log_decay, x, state, kernel="step", complex_numbers=True)
    if implementation == "triton" and not wants_gradient(log_decay, x, state):
        from kernels.diagonal_scan import triton

        return triton.step(log_decay, x, state)
    return reference.step(log_decay, x, state)


def _check_modes(
    name: str, called: str, pole: Tensor, weight: Tensor, channels: int, batch: int, state: Tensor | None
) -> None:
    """ValueError where poles, weights and state do not belong together."""
    for other, tensor in ((called, pole), ("weight", weight)):
        lead, letters = ((batch,), "B, ") if tensor.dim() == 3 else ((), "")
        require_axes(name, other, tensor, f"[{letters}C, N]")
        require_shape(name, other, tensor, (*lead, channels, pole.shape[-1]), f"[{letters}C, N]")
    for other, mode in (("weight", weight), ("state", state)):
        if mode is not None and mode.is_complex() != pole.is_complex():
            raise ValueError(
                f"{name}: {other} is {mode.dtype} and {called} {pole.dtype}; give complex modes or real ones"
            )


def mode_scan_backend(
    log_pole: Tensor,
    weight: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Implementation:
    """What will answer such a call of `mode_scan`: only Triton does it faster than a convolution with its filter."""
    return resolve(
        *(backend, "diagonal_scan", log_pole, weight, u, state, cu_seqlens),
        widths={"N": log_pole.shape[-1]},
        kernel="modes_forward",
        complex_numbers=True,
    )


@stackable(own=("log_pole", "weight"))
def mode_scan(
    log_pole: Tensor,
    weight: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h[c, n] ← exp(log_pole[c, n]) h[c, n] + u[c], y[c] = Σ_n weight[c, n] h[c, n]: a scan whose decays never change.

    log_pole and weight [C, N], both real or both complex, with log_pole ≤ 0 (its real part); a complex mode stands for
    a pair of conjugates, so that the sum is twice the real part. u [B, T, C]; state [B, C, N], None for zeros. Where
    several models share a batch, each entry has poles or weights [B, C, N] of its own. Returns y [B, T, C] in u's
    dtype and the last state in float32 or complex64, or in float64 or complex128 where an input is as wide.
    cu_seqlens [n + 1] packs n documents in one row, each with its own state [n, C, N].
    """
    name = "mode_scan"
    require_axes(name, "u", u, "[B, T, C]")
    batch, time, channels = u.shape
    _check_modes(name, "log_pole", log_pole, weight, channels, batch, state)
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, channels, log_pole.shape[-1]), "[B, C, N]")
    implementation = mode_scan_backend(log_pole, weight, u, state, cu_seqlens, backend=backend)
    if implementation == "triton":
        from kernels.diagonal_scan import triton

        return triton.mode_scan(log_pole, weight, u, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return mode_scan(log_pole, weight, u, state, backend=implementation)

        return by_document(run, (u,), state, cu_seqlens)
    scan = chunked.diagonal_scan if implementation == "chunked" else reference.diagonal_scan
    return reference.mode_scan(log_pole, weight, u, state, scan)


@stackable(own=("pole", "weight"))
def mode_scan_step(
    pole: Tensor, weight: Tensor, u: Tensor, state: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """One token: pole, weight [C, N] or [B, C, N], u [B, C], state [B, C, N] → y [B, C] in u's dtype, the new state.

    The pole itself, exp(log_pole), because it is the same for all tokens and its exponential costs more than the step.
    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "mode_scan_step"
    require_axes(name, "u", u, "[B, C]")
    batch, channels = u.shape
    _check_modes(name, "pole", pole, weight, channels, batch, state)
    require_shape(name, "state", state, (batch, channels, pole.shape[-1]), "[B, C, N]")
    implementation = resolve(
        *(backend, "diagonal_scan_step", pole, weight, u, state),
        widths={"N": pole.shape[-1]},
        kernel="modes_step",
        complex_numbers=True,
    )
    if implementation == "triton" and not wants_gradient(pole, weight, u, state):
        from kernels.diagonal_scan import triton

        return triton.mode_scan_step(pole, weight, u, state)
    return reference.mode_scan_step(pole, weight, u, state)

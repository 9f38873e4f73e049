"""Diagonal linear recurrence: the public functions.

Letters: B batch, T time, C channels.  As in RG-LRU, arXiv:2402.19427, and S4D, arXiv:2206.11893.
"""

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve, wants_gradient
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

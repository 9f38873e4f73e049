"""Mamba's selective scan: the public functions.

Letters: B batch, T time, C channels, N state size.  After arXiv:2312.00752.
"""

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve, wants_gradient
from kernels.packing import by_document, require_documents
from kernels.selective_scan import chunked, reference
from kernels.stacked import stackable


def _check(name: str, rate: Tensor, skip: Tensor, batch: int, channels: int) -> int:
    """ValueError where the parameters do not fit; else how many numbers a channel keeps."""
    lead, letters = ((batch,), "B, ") if rate.dim() == 3 else ((), "")
    require_axes(name, "rate", rate, f"[{letters}C, N]")
    size = rate.shape[-1]
    require_shape(name, "rate", rate, (*lead, channels, size), f"[{letters}C, N]")
    lead, letters = ((batch,), "B, ") if skip.dim() == 2 else ((), "")
    require_shape(name, "skip", skip, (*lead, channels), f"[{letters}C]")
    return size


@stackable(own=("rate", "skip"))
def selective_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h[c, n] ← exp(delta[c] rate[c, n]) h[c, n] + delta[c] write[n] x[c], y[c] = Σ_n read[n] h[c, n] + skip[c] x[c].

    x and delta > 0 [B, T, C]; rate < 0 [C, N]; write, read [B, T, N]; skip [C]; state [B, C, N], None for zeros.
    The input is scaled by delta itself (Euler), not by the integral of the decay (zero-order hold).
    Where several models share a batch, each entry has rates [B, C, N] or a skip [B, C] of its own.
    Returns y [B, T, C] in x's dtype and the last state in float32, or in float64 where an input is float64.
    cu_seqlens [n + 1] packs n documents in one row, each with its own state [n, C, N].
    """
    name = "selective_scan"
    require_axes(name, "x", x, "[B, T, C]")
    batch, time, channels = x.shape
    size = _check(name, rate, skip, batch, channels)
    require_shape(name, "delta", delta, (batch, time, channels), "[B, T, C]")
    require_shape(name, "write", write, (batch, time, size), "[B, T, N]")
    require_shape(name, "read", read, (batch, time, size), "[B, T, N]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, channels, size), "[B, C, N]")
    implementation = resolve(
        backend, name, x, delta, rate, write, read, skip, state, cu_seqlens, widths={"N": size}
    )
    if implementation == "triton":
        from kernels.selective_scan import triton

        return triton.selective_scan(x, delta, rate, write, read, skip, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(
            x: Tensor, delta: Tensor, write: Tensor, read: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return selective_scan(x, delta, rate, write, read, skip, state, backend=implementation)

        return by_document(run, (x, delta, write, read), state, cu_seqlens)
    if implementation == "chunked":
        return chunked.selective_scan(x, delta, rate, write, read, skip, state)
    return reference.selective_scan(x, delta, rate, write, read, skip, state)


@stackable(own=("rate", "skip"))
def selective_scan_step(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: x, delta [B, C], rate [C, N], write, read [B, N], skip [C], state [B, C, N] → y [B, C], state.

    Rates and skip may be [B, C, N] and [B, C]. There is one PyTorch form of a single token, so `reference` and
    `chunked` are the same here; it also answers where a gradient is asked for.
    """
    name = "selective_scan_step"
    require_axes(name, "x", x, "[B, C]")
    batch, channels = x.shape
    size = _check(name, rate, skip, batch, channels)
    require_shape(name, "delta", delta, (batch, channels), "[B, C]")
    require_shape(name, "write", write, (batch, size), "[B, N]")
    require_shape(name, "read", read, (batch, size), "[B, N]")
    require_shape(name, "state", state, (batch, channels, size), "[B, C, N]")
    tensors = (x, delta, rate, write, read, skip, state)
    implementation = resolve(backend, name, *tensors, widths={"N": size}, kernel="step")
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.selective_scan import triton

        return triton.step(*tensors)
    return reference.step(x, delta, rate, write, read, skip, state)

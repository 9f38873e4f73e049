"""Mamba's selective scan: the public functions.

Letters: B batch, T time, C channels, N state size.  After arXiv:2312.00752.
"""

from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve
from kernels.selective_scan import chunked, reference
from kernels.stacked import stackable


@stackable(each=("rate",))
def selective_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h[c, n] ← exp(delta[c] rate[c, n]) h[c, n] + delta[c] write[n] x[c], y[c] = Σ_n read[n] h[c, n] + skip[c] x[c].

    x and delta > 0 [B, T, C]; rate < 0 [C, N]; write, read [B, T, N]; skip [C]; state [B, C, N], None for zeros.
    The input is scaled by delta itself (Euler), not by the integral of the decay (zero-order hold).
    Returns y [B, T, C] in x's dtype and the last state in float32, or in float64 where an input is float64.
    """
    name = "selective_scan"
    implementation = resolve(backend, name)
    require_axes(name, "x", x, "[B, T, C]")
    require_axes(name, "rate", rate, "[C, N]")
    batch, time, channels = x.shape
    size = rate.shape[1]
    require_shape(name, "delta", delta, (batch, time, channels), "[B, T, C]")
    require_shape(name, "rate", rate, (channels, size), "[C, N]")
    require_shape(name, "write", write, (batch, time, size), "[B, T, N]")
    require_shape(name, "read", read, (batch, time, size), "[B, T, N]")
    require_shape(name, "skip", skip, (channels,), "[C]")
    if state is not None:
        require_shape(name, "state", state, (batch, channels, size), "[B, C, N]")
    if implementation == "chunked":
        return chunked.selective_scan(x, delta, rate, write, read, skip, state)
    return reference.selective_scan(x, delta, rate, write, read, skip, state)


@stackable(each=("rate",))
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

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "selective_scan_step"
    resolve(backend, name)
    require_axes(name, "x", x, "[B, C]")
    require_axes(name, "rate", rate, "[C, N]")
    batch, channels = x.shape
    size = rate.shape[1]
    require_shape(name, "delta", delta, (batch, channels), "[B, C]")
    require_shape(name, "rate", rate, (channels, size), "[C, N]")
    require_shape(name, "write", write, (batch, size), "[B, N]")
    require_shape(name, "read", read, (batch, size), "[B, N]")
    require_shape(name, "skip", skip, (channels,), "[C]")
    require_shape(name, "state", state, (batch, channels, size), "[B, C, N]")
    return reference.step(x, delta, rate, write, read, skip, state)

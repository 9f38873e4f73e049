"""Causal convolution with filters as long as the text: the public functions.

Letters: B batch, T time, S past tokens, C channels, H filters, L taps.  As in Hyena, arXiv:2302.10866.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_shape, resolve
from kernels.long_convolution import chunked, reference
from kernels.stacked import stackable


def _check(name: str, h: Tensor, channels: int) -> None:
    """ValueError where the filters do not fit the channels."""
    require_axes(name, "h", h, "[H, L]")
    if channels % h.shape[0]:
        raise ValueError(
            f"{name}: {channels} channels cannot share {h.shape[0]} filters evenly; give a number of filters that "
            f"divides {channels}"
        )


def _check_past(name: str, past: Tensor, batch: int, channels: int) -> None:
    """ValueError where the past does not fit; it may be empty."""
    tokens = past.shape[1] if past.dim() == 3 else 0
    require_shape(name, "past", past, (batch, tokens, channels), "[B, S, C]")


@stackable(each=("h",))
def long_convolution(
    u: Tensor, h: Tensor, past: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y_t = Σ_{s ≤ t} h_{t-s} u_s, channel by channel; lags from L on count nothing.

    u [B, T, C]; h [H, L], where channel c reads filter c·H//C; past [B, S, C], the inputs just before u, None for
    none: it is all the state that there is, and the caller's to keep. Returns y [B, T, C] in u's dtype, summed in
    float32, or in float64 where an input is float64.
    """
    name = "long_convolution"
    implementation = resolve(backend, name)
    require_axes(name, "u", u, "[B, T, C]")
    batch, _, channels = u.shape
    _check(name, h, channels)
    if past is not None:
        _check_past(name, past, batch, channels)
    if implementation == "chunked":
        output = chunked.long_convolution(u, h, past)
        if not is_poisoned(output):
            return output
    return reference.long_convolution(u, h, past)


@stackable(each=("h",))
def long_convolution_step(u: Tensor, h: Tensor, past: Tensor, *, backend: Backend = "auto") -> Tensor:
    """One token: u [B, C], h [H, L], past [B, S, C], the inputs just before it → y [B, C].

    Filters are read by lag: fastest where h is the transpose of a contiguous [L, H]. There is one PyTorch form of a
    single token, so `reference` and `chunked` are the same here.
    """
    name = "long_convolution_step"
    resolve(backend, name)
    require_axes(name, "u", u, "[B, C]")
    batch, channels = u.shape
    _check(name, h, channels)
    _check_past(name, past, batch, channels)
    return reference.step(u, h, past)

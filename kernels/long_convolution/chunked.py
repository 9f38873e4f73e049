"""Causal convolution with long filters, a tree of blocks at a time: small squares, and between blocks FFTs.

Letters: B batch, T time, S past tokens, C channels, H filters, L taps, R rows that share a filter (R = B·C/H),
n blocks of c tokens.  As in Hyena, arXiv:2302.10866; overlap-save after Stockham 1966.

One FFT over the whole text would do, padded to twice its length, but every output of an FFT is rounded at the scale
of the largest number in it: a loud future leaks into the past. Here a text is cut into at most 16 blocks. What a
block does to the blocks behind it goes through FFTs of 2c points, in which d blocks of distance meet the taps from
(d − 1)c to (d + 1)c and the wrapped half is thrown away. What a block does to itself is the same problem, smaller,
for all blocks at once; at 64 tokens it is a triangle of taps and a matrix product. So nothing ever reaches
the past, neither in values nor in gradients, to the last bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype

LEAF = 64
BRANCHES = 16


def smooth(size: int) -> int:
    """The smallest m · 2^k from `size` up for a few odd m: lengths whose FFT is fast."""
    return min(odd << max(0, -(-size // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _triangle(u: Tensor, h: Tensor) -> Tensor:
    """u [H, R, T] times the triangle of h [H, T]."""
    size = u.shape[-1]
    # Row s holds the taps from lag -s on, noughts where the lag is negative.
    rows = pad(h, (size - 1, 0)).unfold(1, size, 1).flip(1)
    return torch.bmm(u, rows)


def _causal(u: Tensor, h: Tensor) -> Tensor:
    """y_t = Σ_{s ≤ t} h_{t-s} u_s: u [H, R, T], h [H, T] → [H, R, T]."""
    filters, rows, time = u.shape
    if time <= LEAF:
        return _triangle(u, h)
    size = LEAF
    while size * BRANCHES < time:
        size *= BRANCHES
    count = -(-time // size)
    if count * size != time:
        u, h = pad(u, (0, count * size - time)), pad(h, (0, count * size - time))
    y = _causal(u.reshape(filters, rows * count, size), h[:, :size])
    y = y.view(filters, rows, count, size)
    blocks = torch.fft.rfft(u.reshape(filters, rows, count, size)[:, :, :-1], n=2 * size)
    taps = torch.fft.rfft(h.unfold(1, 2 * size, size)).unsqueeze(1)
    reached = blocks * taps[:, :, :1]
    for distance in range(2, count):
        reached[:, :, distance - 1 :].addcmul_(
            blocks[:, :, : count - distance], taps[:, :, distance - 1 : distance]
        )
    y[:, :, 1:] += torch.fft.irfft(reached, n=2 * size)[..., size:]
    return y.view(filters, rows, count * size)[..., :time]


class _Causal(torch.autograd.Function):
    """Written out by hand: the gradient of u is the same sum backward in time, and is as exact about it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(u, h)
        return _causal(u, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, h = ctx.saved_tensors
        (d_y,) = grads
        d_u = d_h = None
        if ctx.needs_input_grad[0]:
            d_u = _causal(d_y.flip(-1), h).flip(-1)
        if ctx.needs_input_grad[1]:
            time = u.shape[-1]
            size = smooth(2 * time)
            both = torch.fft.rfft(u, n=size).conj() * torch.fft.rfft(d_y, n=size)
            d_h = torch.fft.irfft(both.sum(1), n=size)[:, :time]
        return d_u, d_h


def _from_past(past: Tensor, h: Tensor, time: int) -> Tensor:
    """What the past [H, R, S] adds to the next `time` tokens under h [H, S + time]; here an FFT leaks nothing."""
    tokens = past.shape[-1]
    # Wrapped sums fall on the past's own places, which nobody reads.
    size = smooth(tokens + time)
    sums = torch.fft.rfft(past, n=size) * torch.fft.rfft(h, n=size).unsqueeze(1)
    y: Tensor = torch.fft.irfft(sums, n=size)[..., tokens : tokens + time]
    return y


def long_convolution(u: Tensor, h: Tensor, past: Tensor | None) -> Tensor:
    """A tree of blocks; shapes as in `ops.long_convolution`."""
    batch, time, channels = u.shape
    filters, taps = h.shape
    dtype = working_dtype(u, h, past)

    def by_filter(x: Tensor) -> Tensor:
        """[B, T, C] → [H, R, T]."""
        return x.to(dtype).permute(2, 0, 1).reshape(filters, -1, x.shape[1])

    def reaching(tokens: int) -> Tensor:
        """h, cut or filled up to so many taps."""
        return pad(h.to(dtype), (0, tokens - taps)) if tokens > taps else h[:, :tokens].to(dtype)

    with torch.autocast(u.device.type, enabled=False):
        y: Tensor = _Causal.apply(by_filter(u), reaching(time))  # type: ignore[no-untyped-call]
        if past is not None and past.shape[1] and taps > 1:
            y = y + _from_past(by_filter(past), reaching(past.shape[1] + time), time)
        return y.reshape(channels, batch, time).permute(1, 2, 0).to(u.dtype).contiguous()

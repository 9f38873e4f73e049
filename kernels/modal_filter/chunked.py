"""Filters made of modes, all taps at once: products of two small Vandermonde matrices.

Letters: B batch, T time, C channels, N modes, L taps, A blocks of c taps.  As in S4D, arXiv:2206.11893.

The Vandermonde matrix of N modes and L taps is never made. A lag l = a c + b splits into its block and its place,
and so does the power, exp(l λ) = exp(a c λ) exp(b λ): two matrices of about √L columns each, whose product over the
modes is the filter. Each of their entries is one exponential; no power is a product of many. The exponent is taken
in float64, because a float32 product of a lag and an angle is off by thousandths of a turn at 30,000 tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.modal_filter.reference import working_dtypes


class _Powers(torch.autograd.Function):
    """exp((first + e · stride) λ) for e < count: [C, N] → [C, N, count]; written out so that only the powers are kept."""

    @staticmethod
    def forward(ctx: Any, log_pole: Tensor, first: int, stride: int, count: int) -> Tensor:
        lag = first + stride * torch.arange(count, dtype=torch.float64, device=log_pole.device)
        if log_pole.is_complex():
            # Real functions: a complex exponential is several times slower.
            size = (log_pole.real.double().unsqueeze(-1) * lag).to(log_pole.real.dtype).exp()
            turn = (log_pole.imag.double().unsqueeze(-1) * lag).remainder(2 * torch.pi).to(size.dtype)
            powers = torch.complex(size * turn.cos(), size * turn.sin())
        else:
            powers = (log_pole.double().unsqueeze(-1) * lag).to(log_pole.dtype).exp()
        ctx.save_for_backward(powers, lag.to(powers.real.dtype))
        return powers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        powers, lag = ctx.saved_tensors
        return (grads[0] * powers.conj() * lag).sum(-1), None, None, None


def _powers(log_pole: Tensor, first: int, stride: int, count: int) -> Tensor:
    powers: Tensor = _Powers.apply(log_pole, first, stride, count)  # type: ignore[no-untyped-call]
    return powers


def _left(x: Tensor) -> Tensor:
    """[..., N, A] → [..., 2N, A], so that a real product with `_right` is twice the real part of the complex one."""
    return torch.cat([2 * x.real, -2 * x.imag], dim=-2) if x.is_complex() else x


def _right(x: Tensor) -> Tensor:
    """[..., N, c] → [..., 2N, c], the real parts above the imaginary ones."""
    return torch.cat([x.real, x.imag], dim=-2) if x.is_complex() else x


def _block(length: int) -> int:
    """A power of two near the root of the length."""
    return 1 << (length.bit_length() // 2)


def modal_filter(log_pole: Tensor, weight: Tensor, length: int) -> Tensor:
    """Two Vandermonde matrices; shapes as in `ops.modal_filter`."""
    _, modes = working_dtypes(log_pole, weight)
    poles, size = log_pole.to(modes), _block(length)
    starts = _powers(poles, 0, size, -(-length // size)) * weight.to(modes).unsqueeze(-1)
    with torch.autocast(log_pole.device.type, enabled=False):
        taps = torch.bmm(_left(starts).mT, _right(_powers(poles, 0, 1, size)))
    return taps.flatten(1)[:, :length]


def modal_state(u: Tensor, log_pole: Tensor, state: Tensor | None) -> Tensor:
    """Sums within blocks, then over blocks; shapes as in `ops.modal_state`."""
    real, modes = working_dtypes(u, log_pole, state)
    batch, time, channels = u.shape
    size = _block(time)
    count = -(-time // size)
    poles = log_pole.to(modes)
    # Noughts in front fade to nothing; the newest token is the last of its block.
    inputs = pad(u.to(real).permute(2, 0, 1), (count * size - time, 0))
    inputs = inputs.reshape(channels, batch * count, size)
    within = _right(_powers(poles, 0, 1, size).flip(-1))
    with torch.autocast(u.device.type, enabled=False):
        sums = torch.bmm(inputs, within.mT).view(channels, batch, count, -1)
    if poles.is_complex():
        sums = torch.complex(*sums.chunk(2, dim=-1))
    across = _powers(poles, 0, size, count).flip(-1).mT
    last = (sums * across.unsqueeze(1)).sum(2).transpose(0, 1)
    if state is not None:
        last = torch.addcmul(last, state.to(modes), _powers(poles, time, 1, 1).squeeze(-1))
    return last.contiguous()


def modal_response(state: Tensor, log_pole: Tensor, weight: Tensor, length: int) -> Tensor:
    """As a filter whose weights are the state; shapes as in `ops.modal_response`."""
    _, modes = working_dtypes(state, log_pole, weight)
    batch, channels, _ = state.shape
    poles, size = log_pole.to(modes), _block(length)
    count = -(-length // size)
    held = (state.to(modes) * weight.to(modes)).transpose(0, 1)
    starts = held.unsqueeze(-1) * _powers(poles, 1, size, count).unsqueeze(1)
    rows = _left(starts).mT.reshape(channels, batch * count, -1)
    with torch.autocast(state.device.type, enabled=False):
        y = torch.bmm(rows, _right(_powers(poles, 0, 1, size)))
    return y.view(channels, batch, count * size)[:, :, :length].permute(1, 2, 0).contiguous()

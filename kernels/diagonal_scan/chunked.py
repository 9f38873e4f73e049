"""Diagonal linear recurrence over all blocks of the text at once, with its backward pass written out.

Letters: B batch, T time, C channels, n blocks, L tokens of a block.

A scan has no work for a matrix unit, so its price is the number of steps that wait for one another. The text is cut
into n blocks of about √T tokens: L steps, each over all blocks, find what a block adds and what it leaves of the past;
n steps carry the state from block to block; L more write the states. A factor is only ever multiplied, never divided
by, so that a decay of nought is as good as any.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.diagonal_scan.reference import scan_dtype


def block_size(time: int) -> int:
    """Tokens of a block: three steps within blocks cost about as much as two between them; no block is left empty."""
    size = max(1, round(math.sqrt(time * 2 / 3)))
    blocks = -(-time // size)
    return -(-time // blocks)


def _fold(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, C] → [B, n, L, C], zeros behind the end: they add nothing, and as logarithms they fade nothing."""
    missing = -x.shape[1] % size
    if missing:
        x = pad(x, (0, 0, 0, missing))
    folded: Tensor = x.to(dtype).unflatten(1, (-1, size))
    return folded


def _carry(added: Tensor, left: Tensor, first: Tensor | None, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """What enters each block and what leaves the last one: added, left [B, n, C] → [B, n, C], [B, C]; in time or back."""
    entering = torch.empty_like(added)
    at = torch.zeros_like(added[:, 0]) if first is None else first.to(added.dtype)
    count = added.shape[1]
    for c in reversed(range(count)) if back else range(count):
        entering[:, c] = at
        at = torch.addcmul(added[:, c], left[:, c], at)
    return entering, at


class _Scan(torch.autograd.Function):
    """Written out by hand: autograd would keep and walk a tensor for every step."""

    @staticmethod
    def forward(
        ctx: Any, log_decay: Tensor, x: Tensor, state: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        time = x.shape[1]
        dtype = scan_dtype(log_decay, x, state)
        decay = _fold(log_decay, size, dtype).exp()
        decays, inputs = decay.unbind(2), _fold(x, size, dtype).unbind(2)
        added, left = inputs[0].clone(), decays[0].clone()
        for fade, new in zip(decays[1:], inputs[1:], strict=True):
            torch.addcmul(new, fade, added, out=added)
            left *= fade
        at, _ = _carry(added, left, state)
        states = torch.empty_like(decay)
        for fade, new, here in zip(decays, inputs, states.unbind(2), strict=True):
            at = torch.addcmul(new, fade, at, out=here)
        ctx.save_for_backward(decay, left, states, state)
        ctx.sizes = time, size
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (log_decay, x, state)]
        whole = states.flatten(1, 2)
        return whole[:, :time].to(x.dtype).contiguous(), whole[:, time - 1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        decay, left, states, state = ctx.saved_tensors
        time, size = ctx.sizes
        d_output, d_last = grads
        decay, left = decay.conj(), left.conj()
        if d_output is None:
            d_output = decay.new_zeros(decay.shape[0], time, decay.shape[-1])
        asked, decays = _fold(d_output, size, decay.dtype).unbind(2), decay.unbind(2)
        added = asked[-1].clone()
        for fade, own in zip(reversed(decays[1:]), reversed(asked[:-1]), strict=True):
            torch.addcmul(own, fade, added, out=added)
        at, d_first = _carry(added * decays[0], left, d_last, back=True)
        d_states = torch.empty_like(states)
        slots = d_states.unbind(2)
        at = torch.add(asked[-1], at, out=slots[-1])
        for fade, own, here in zip(
            reversed(decays[1:]), reversed(asked[:-1]), reversed(slots[:-1]), strict=True
        ):
            at = torch.addcmul(own, fade, at, out=here)

        d_x = d_states.flatten(1, 2)[:, :time]
        fades, past = decay.flatten(1, 2)[:, :time], states.flatten(1, 2)[:, : time - 1].conj()
        d_log = torch.empty_like(d_x)
        torch.mul(d_x[:, 1:], past, out=d_log[:, 1:])
        d_log[:, 0] = 0 if state is None else d_x[:, 0] * state.to(d_x.dtype).conj()
        d_log *= fades
        d_state = None if ctx.dtypes[2] is None else d_first.to(ctx.dtypes[2])
        return d_log.to(ctx.dtypes[0]), d_x.to(ctx.dtypes[1]), d_state, None


def diagonal_scan(
    log_decay: Tensor, x: Tensor, state: Tensor | None, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks of `size` tokens, or of a size that suits the length; shapes as in `ops.diagonal_scan`."""
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Scan.apply(log_decay, x, state, size or block_size(x.shape[1]))  # type: ignore[no-untyped-call]
    return result

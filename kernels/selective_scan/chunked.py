"""Mamba's selective scan, a few tokens at a time, with its backward pass written out.

Letters: B batch, T time, C channels, N state size, L tokens of a chunk, n chunks.  After arXiv:2312.00752.

[B, T, C, N] decays and states would be N times as large as everything else, so they exist for one chunk at a time, in
memory that every chunk uses again and a cache can hold. Of a forward pass the state before each chunk is kept; the
backward pass computes the chunk's states once more from there. Within a chunk only the line h ← a h + w waits for the
token before, all else is done for L tokens at once. Channels come last, so that the innermost loop is a long one.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import working_dtype

TOKENS = 16
"""Of a chunk: half a megabyte to a few at the sizes of a proxy."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, None, None]


def _by_time(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, *] → [T, B, *], contiguous."""
    return x.to(dtype).transpose(0, 1).contiguous()


def _decays(delta: Tensor, rate: Tensor, out: Tensor) -> Tensor:
    """exp(delta · rate): [L, B, C] and [N, C] or [B, N, C] → [L, B, N, C] in `out`."""
    return torch.mul(delta.unsqueeze(2), rate, out=out).exp_()


def _outer(down: Tensor, across: Tensor, out: Tensor) -> Tensor:
    """[L, B, N] and [L, B, C] → [L, B, N, C] in `out`."""
    return torch.mul(down.unsqueeze(-1), across.unsqueeze(2), out=out)


def _over_state(weights: Tensor, tiles: Tensor) -> Tensor:
    """Σ_n weights[n] tiles[n]: [L, B, N] and [L, B, N, C] → [L, B, C]."""
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), tiles.flatten(0, 1)).view(*tiles.shape[:2], -1)


def _walk(decays: Tensor, tiles: Tensor, state: Tensor) -> Tensor:
    """h ← a h + w through a chunk: the states take the place of w, and the last one is given back."""
    for fade, here in zip(decays.unbind(0), tiles.unbind(0), strict=True):
        state = torch.addcmul(here, fade, state, out=here)
    return state


class _Chunks(torch.autograd.Function):
    """Written out by hand: autograd would keep a dozen tensors of [B, C, N] for every token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        skip: Tensor,
        state: Tensor | None,
        size: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        inputs = (x, delta, rate, write, read, skip, state)
        dtype = working_dtype(*inputs)
        xs, steps, writes, reads = (_by_time(part, dtype) for part in (x, delta, write, read))
        rates, skips = rate.to(dtype).mT.contiguous(), skip.to(dtype)
        time, batch = xs.shape[:2]
        first = xs.new_zeros(batch, *rates.shape[-2:]) if state is None else state.to(dtype).mT.contiguous()
        fades, tiles = (xs.new_empty(min(size, time), *first.shape) for _ in range(2))
        scaled, output = xs * steps, torch.empty_like(xs)
        last, before = first, []
        for start in range(0, time, size):
            chunk = slice(start, min(time, start + size))
            count = chunk.stop - start
            if learns:
                before.append(last)
            decays = _decays(steps[chunk], rates, out=fades[:count])
            states = _outer(writes[chunk], scaled[chunk], out=tiles[:count])
            # A copy: the next chunk writes over this one.
            last = _walk(decays, states, last).clone()
            torch.addcmul(_over_state(reads[chunk], states), skips, xs[chunk], out=output[chunk])
        ctx.save_for_backward(xs, steps, rates, writes, reads, skips, *before)
        ctx.size = size
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return output.transpose(0, 1).to(x.dtype).contiguous(), last.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        xs, steps, rates, writes, reads, skips, *before = ctx.saved_tensors
        d_output, d_last = grads
        time, batch = xs.shape[:2]
        size, shape, dtype = ctx.size, (batch, *rates.shape[-2:]), xs.dtype
        asked = torch.zeros_like(xs) if d_output is None else _by_time(d_output, dtype)
        carried = xs.new_zeros(shape) if d_last is None else d_last.to(dtype).mT.contiguous()
        fades, tiles, flows = (xs.new_empty(min(size, time), *shape) for _ in range(3))
        # Summed over what shares one parameter.
        rated = 0 if rates.dim() == 3 else (0, 1)
        skipped = 0 if skips.dim() == 2 else (0, 1)
        scaled = xs * steps
        d_scaled, d_steps = torch.empty_like(xs), torch.empty_like(xs)
        d_writes, d_reads, d_rates = (
            torch.empty_like(writes),
            torch.empty_like(reads),
            torch.zeros_like(rates),
        )
        for index, start in reversed(list(enumerate(range(0, time, size)))):
            chunk = slice(start, min(time, start + size))
            count = chunk.stop - start
            decays = _decays(steps[chunk], rates, out=fades[:count])
            states = _outer(writes[chunk], scaled[chunk], out=tiles[:count])
            _walk(decays, states, before[index])
            flow = _outer(reads[chunk], asked[chunk], out=flows[:count])
            flow[-1] += carried
            for later in range(count - 1, 0, -1):
                flow[later - 1].addcmul_(decays[later], flow[later])
            carried = decays[0] * flow[0]
            d_scaled[chunk] = _over_state(writes[chunk], flow)
            # From here on the buffers hold products: first those whose sums are the gradients of the decays.
            decays[0].copy_(carried).mul_(before[index])
            decays[1:].mul_(flow[1:]).mul_(states[:-1])
            d_reads[chunk] = states.mul_(asked[chunk].unsqueeze(2)).sum(-1)
            d_writes[chunk] = flow.mul_(scaled[chunk].unsqueeze(2)).sum(-1)
            d_steps[chunk] = torch.mul(decays, rates, out=flow).sum(2)
            d_rates += decays.mul_(steps[chunk].unsqueeze(2)).sum(rated)
        d_xs = torch.addcmul(asked * skips, d_scaled, steps)
        d_steps.addcmul_(d_scaled, xs)

        def back(x: Tensor, place: int) -> Tensor:
            """[T, B, *] → [B, T, *] in the input's dtype."""
            turned: Tensor = x.transpose(0, 1).to(ctx.dtypes[place])
            return turned

        return (
            back(d_xs, 0),
            back(d_steps, 1),
            d_rates.mT.to(ctx.dtypes[2]),
            back(d_writes, 3),
            back(d_reads, 4),
            (asked * xs).sum(skipped).to(ctx.dtypes[5]),
            None if ctx.dtypes[6] is None else carried.mT.to(ctx.dtypes[6]),
            None,
            None,
        )


def selective_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    state: Tensor | None,
    size: int = TOKENS,
) -> tuple[Tensor, Tensor]:
    """Chunks of `size` tokens; shapes as in `ops.selective_scan`."""
    learns = torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Chunks.apply(  # type: ignore[no-untyped-call]
            x, delta, rate, write, read, skip, state, size, learns
        )
    return result

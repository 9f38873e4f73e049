"""Causal convolution with long filters, one token after another: the meaning of this operator.

Letters: B batch, T time, S past tokens, C channels, H filters, L taps.  As in Hyena, arXiv:2302.10866.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype

BLOCK = 256


def step(u: Tensor, h: Tensor, past: Tensor) -> Tensor:
    """One token: u [B, C], h [H, L], past [B, S, C]."""
    dtype = working_dtype(u, h, past)
    tokens, shared = past.shape[1], u.shape[1] // h.shape[0]
    with torch.autocast(u.device.type, enabled=False):

        def taps(begin: int, end: int) -> Tensor:
            """[end - begin, C], the oldest token's first."""
            rows = h.mT[begin:end].flip(0).to(dtype)
            return rows if shared == 1 else rows.repeat_interleave(shared, dim=1)

        y = u.to(dtype) * taps(0, 1)
        last = min(tokens, h.shape[1] - 1)
        # Block by block: the whole past in the working type would be several times the cache.
        for lag in range(1, last + 1, BLOCK):
            end = min(lag + BLOCK, last + 1)
            y = y + (past[:, tokens - end + 1 : tokens - lag + 1].to(dtype) * taps(lag, end)).sum(1)
        return y.to(u.dtype)


def long_convolution(u: Tensor, h: Tensor, past: Tensor | None) -> Tensor:
    """The whole sequence by steps; shapes as in `ops.long_convolution`."""
    seen = u if past is None else torch.cat([past.to(u.dtype), u], dim=1)
    before = seen.shape[1] - u.shape[1]
    outputs = [step(u[:, t], h, seen[:, : before + t]) for t in range(u.shape[1])]
    return torch.stack(outputs, dim=1)

"""Mamba's selective scan, one token after another: the meaning of this operator.

Letters: B batch, T time, C channels, N state size.  After arXiv:2312.00752.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x, delta [B, C], rate [C, N] or [B, C, N], write, read [B, N], skip [C] or [B, C], state [B, C, N]."""
    dtype = working_dtype(x, delta, rate, write, read, skip, state)
    with torch.autocast(x.device.type, enabled=False):
        inputs, steps = x.to(dtype), delta.to(dtype)
        decay = (steps.unsqueeze(-1) * rate.to(dtype)).exp()
        written = (steps * inputs).unsqueeze(-1) * write.to(dtype).unsqueeze(-2)
        state = torch.addcmul(written, decay, state.to(dtype))
        output = (state @ read.to(dtype).unsqueeze(-1)).squeeze(-1)
        return torch.addcmul(output, skip.to(dtype), inputs).to(x.dtype), state


def selective_scan(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.selective_scan`."""
    batch, time, channels = x.shape
    if state is None:
        dtype = working_dtype(x, delta, rate, write, read, skip)
        state = torch.zeros(batch, channels, rate.shape[-1], dtype=dtype, device=x.device)
    outputs = []
    for t in range(time):
        output, state = step(x[:, t], delta[:, t], rate, write[:, t], read[:, t], skip, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state

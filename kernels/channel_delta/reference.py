"""The delta rule with a decay a key channel, one token after another: the meaning of this operator.

Letters: B batch, T time, H heads, K key, V value.  After Kimi delta attention, arXiv:2510.26692.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, beta, state)
    with torch.autocast(q.device.type, enabled=False):
        qw, kw, vw = q.to(dtype), k.to(dtype), v.to(dtype)
        faded = state.to(dtype) * log_decay.to(dtype).exp().unsqueeze(-1)
        recalled = (kw.unsqueeze(-2) @ faded).squeeze(-2)
        error = beta.to(dtype).unsqueeze(-1) * (vw - recalled)
        state = torch.addcmul(faded, kw.unsqueeze(-1), error.unsqueeze(-2))
        return (qw.unsqueeze(-2) @ state).squeeze(-2).to(v.dtype), state


def channel_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.channel_delta`."""
    batch, time, heads, key = k.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay, beta)
        state = torch.zeros(batch, heads, key, v.shape[-1], dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        output, state = step(q[:, t], k[:, t], v[:, t], log_decay[:, t], beta[:, t], state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state

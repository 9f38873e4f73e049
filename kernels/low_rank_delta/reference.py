"""The generalised delta rule, one token after another: the meaning of this operator.

Letters: B batch, T time, H heads, K key, V value.  After RWKV-7, arXiv:2503.14456.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay, a, b [B, H, K], v [B, H, V], state [B, H, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, a, b, state)
    with torch.autocast(q.device.type, enabled=False):
        before = state.to(dtype)
        recalled = a.to(dtype).unsqueeze(-2) @ before
        state = before * log_decay.to(dtype).exp().unsqueeze(-1)
        state = torch.addcmul(state, b.to(dtype).unsqueeze(-1), recalled)
        state = torch.addcmul(state, k.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-2))
        return (q.to(dtype).unsqueeze(-2) @ state).squeeze(-2).to(v.dtype), state


def low_rank_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.low_rank_delta`."""
    batch, time, heads, key = k.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay, a, b)
        state = torch.zeros(batch, heads, key, v.shape[-1], dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        output, state = step(q[:, t], k[:, t], v[:, t], log_decay[:, t], a[:, t], b[:, t], state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state

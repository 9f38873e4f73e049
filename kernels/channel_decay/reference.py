"""Linear recurrence with a decay a key channel, one token after another: the meaning of this operator.

Letters: B batch, T time, H heads, K key, V value.
After gated linear attention, arXiv:2312.06635; the bonus after RWKV-6, arXiv:2404.05892.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay [B, H, K], v [B, H, V], bonus [H, K] or [B, H, K] or None, state [B, H, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, bonus, state)
    with torch.autocast(q.device.type, enabled=False):
        keys, values = k.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-2)
        before = state.to(dtype)
        after = torch.addcmul(before * log_decay.to(dtype).exp().unsqueeze(-1), keys, values)
        seen = after
        if bonus is not None:
            seen = torch.addcmul(before, keys * bonus.to(dtype).unsqueeze(-1), values)
        return (q.to(dtype).unsqueeze(-2) @ seen).squeeze(-2).to(v.dtype), after


def channel_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.channel_decay`."""
    batch, time, heads, key = k.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay, bonus)
        state = torch.zeros(batch, heads, key, v.shape[-1], dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        output, state = step(q[:, t], k[:, t], v[:, t], log_decay[:, t], bonus, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state

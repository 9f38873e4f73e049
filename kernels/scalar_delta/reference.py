"""The delta rule with one decay a head, one token after another: the meaning of this operator.

Letters: B batch, T time, H heads, G groups that share q and k, R = H/G, K key, V value.
After the gated delta rule, arXiv:2412.06464; without decay DeltaNet, arXiv:2406.06484.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], log_decay [B, H] or None, beta [B, H], state [B, H, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, beta, state)
    groups, shared = q.shape[1], v.shape[1] // q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        state = state.to(dtype)
        if log_decay is not None:
            state = state * log_decay.to(dtype).exp()[..., None, None]
        state = state.unflatten(1, (groups, shared))
        keys = k.to(dtype)[:, :, None, None, :]
        values = v.to(dtype).unflatten(1, (groups, shared)).unsqueeze(-2)
        error = beta.to(dtype).view(-1, groups, shared, 1, 1) * (values - keys @ state)
        state = torch.addcmul(state, keys.mT, error)
        output = q.to(dtype)[:, :, None, None, :] @ state
        return output.squeeze(-2).flatten(1, 2).to(v.dtype), state.flatten(1, 2)


def scalar_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.scalar_delta`."""
    batch, time, heads, value = v.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay, beta)
        state = torch.zeros(batch, heads, k.shape[-1], value, dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        decay = None if log_decay is None else log_decay[:, t]
        output, state = step(q[:, t], k[:, t], v[:, t], decay, beta[:, t], state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state

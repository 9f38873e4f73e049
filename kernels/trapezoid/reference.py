"""Linear recurrence by the trapezoidal rule, one token after another: the meaning of this operator.

Letters: B batch, T time, R ranks (rows that a token writes and reads), H heads, K key, V value.
After Mamba-3, arXiv:2603.15569.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype

Previous = tuple[Tensor, Tensor]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor,
    previous: Previous,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, R, H, K], v [B, R, H, V], log_decay, late, fresh [B, H], state [B, H, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, late, fresh, state, *previous)
    with torch.autocast(q.device.type, enabled=False):

        def written(keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
            """Σ_r k_r v_rᵀ times the weight: [B, H, K, V]."""
            rows = (keys.to(dtype) * weight.to(dtype)[:, None, :, None]).transpose(1, 2)
            return rows.mT @ values.to(dtype).transpose(1, 2)

        state = (state.to(dtype) + written(*previous, late)) * log_decay.to(dtype).exp()[..., None, None]
        state = state + written(k, v, fresh)
        output = (q.to(dtype).transpose(1, 2) @ state).transpose(1, 2)
        return output.to(v.dtype), state


def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor | None,
    previous: Previous | None,
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.trapezoid`."""
    batch, time, _, heads, value = v.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay, late, fresh)
        state = torch.zeros(batch, heads, k.shape[-1], value, dtype=dtype, device=v.device)
    if previous is None:
        previous = torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])
    outputs = []
    for t in range(time):
        output, state = step(
            q[:, t], k[:, t], v[:, t], log_decay[:, t], late[:, t], fresh[:, t], state, previous
        )
        outputs.append(output)
        previous = k[:, t], v[:, t]
    return torch.stack(outputs, dim=1), state

"""Diagonal linear recurrence, one token after another: the meaning of this operator.

Letters: B batch, T time, C channels, N modes of a channel.  As in RG-LRU, arXiv:2402.19427, and S4D, arXiv:2206.11893.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def scan_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type of the arithmetic and of the state: at least float32, complex where an input is complex."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def step(log_decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """One token: log_decay, x and state [B, C]; the new state."""
    dtype = scan_dtype(log_decay, x, state)
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(x.to(dtype), log_decay.to(dtype).exp(), state.to(dtype))


def diagonal_scan(log_decay: Tensor, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.diagonal_scan`."""
    dtype = scan_dtype(log_decay, x, state)
    last = torch.zeros_like(x[:, 0], dtype=dtype) if state is None else state
    states = []
    for t in range(x.shape[1]):
        last = step(log_decay[:, t], x[:, t], last)
        states.append(last)
    return torch.stack(states, dim=1), last


def _read(state: Tensor, weight: Tensor) -> Tensor:
    """Σ_n weight_n state_n; a complex mode stands for a pair of conjugates and counts twice."""
    product = state * weight
    return 2 * product.real.sum(-1) if product.is_complex() else product.sum(-1)


def mode_scan_step(pole: Tensor, weight: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token; shapes as in `ops.mode_scan_step`."""
    dtype = scan_dtype(pole, weight, u, state)
    with torch.autocast(u.device.type, enabled=False):
        state = torch.addcmul(u.to(dtype).unsqueeze(-1), state.to(dtype), pole.to(dtype))
        return _read(state, weight.to(dtype)).to(u.dtype), state


def mode_scan(
    log_pole: Tensor,
    weight: Tensor,
    u: Tensor,
    state: Tensor | None,
    scan: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] = diagonal_scan,
) -> tuple[Tensor, Tensor]:
    """A scan of every mode by itself, and its states read off; shapes as in `ops.mode_scan`."""
    dtype = scan_dtype(log_pole, weight, u, state)
    batch, time, channels = u.shape
    modes = log_pole.shape[-1]
    with torch.autocast(u.device.type, enabled=False):
        decays = log_pole.to(dtype).expand(batch, -1, -1).flatten(1)
        inputs = u.to(dtype).repeat_interleave(modes, -1)
        states, last = scan(
            decays.unsqueeze(1).expand(-1, time, -1), inputs, None if state is None else state.flatten(1)
        )
        weights = weight.to(dtype).expand(batch, -1, -1).unsqueeze(1)
        y = _read(states.unflatten(-1, (channels, modes)), weights)
    return y.to(u.dtype), last.unflatten(-1, (channels, modes))

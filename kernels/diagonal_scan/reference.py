"""Diagonal linear recurrence, one token after another: the meaning of this operator.

Letters: B batch, T time, C channels.  As in RG-LRU, arXiv:2402.19427, and S4D, arXiv:2206.11893.
"""

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

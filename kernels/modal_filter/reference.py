"""Filters made of modes, by stepping the recurrence that they are the response of: the meaning of this operator.

Letters: B batch, T time, C channels, N modes, L taps.  As in S4D, arXiv:2206.11893.
"""

import torch
from torch import Tensor

WIDE = (torch.float64, torch.complex128)


def working_dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """The real type and the modes' type of the arithmetic: wide where an input is wide, complex where one is complex."""
    wide = any(tensor is not None and tensor.dtype in WIDE for tensor in tensors)
    if any(tensor is not None and tensor.is_complex() for tensor in tensors):
        return (torch.float64, torch.complex128) if wide else (torch.float32, torch.complex64)
    return (torch.float64, torch.float64) if wide else (torch.float32, torch.float32)


def read(state: Tensor, weight: Tensor) -> Tensor:
    """Σ_n weight_n state_n over the last axis; a complex mode stands for a pair of conjugates and counts twice."""
    product = state * weight
    return 2 * product.real.sum(-1) if product.is_complex() else product.sum(-1)


def step(u: Tensor, pole: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: u [B, C], pole and weight [C, N], state [B, C, N]."""
    _, modes = working_dtypes(u, pole, weight, state)
    with torch.autocast(u.device.type, enabled=False):
        state = torch.addcmul(u.to(modes).unsqueeze(-1), state.to(modes), pole.to(modes))
        return read(state, weight.to(modes)).to(u.dtype), state


def modal_filter(log_pole: Tensor, weight: Tensor, length: int) -> Tensor:
    """The response to a single one; shapes as in `ops.modal_filter`."""
    real, modes = working_dtypes(log_pole, weight)
    u = torch.ones(1, log_pole.shape[0], dtype=real, device=log_pole.device)
    state = torch.zeros(1, *log_pole.shape, dtype=modes, device=log_pole.device)
    taps = []
    pole = log_pole.to(modes).exp()
    for _ in range(length):
        tap, state = step(u, pole, weight, state)
        taps.append(tap)
        u = torch.zeros_like(u)
    return torch.cat(taps).mT


def modal_state(u: Tensor, log_pole: Tensor, state: Tensor | None) -> Tensor:
    """The state behind the last token; shapes as in `ops.modal_state`."""
    _, modes = working_dtypes(u, log_pole, state)
    if state is None:
        state = torch.zeros(u.shape[0], *log_pole.shape, dtype=modes, device=u.device)
    pole = log_pole.to(modes).exp()
    for t in range(u.shape[1]):
        _, state = step(u[:, t], pole, torch.zeros_like(pole), state)
    return state


def modal_response(state: Tensor, log_pole: Tensor, weight: Tensor, length: int) -> Tensor:
    """The outputs where nothing comes in any more; shapes as in `ops.modal_response`."""
    real, modes = working_dtypes(state, log_pole, weight)
    pole = log_pole.to(modes).exp()
    nothing = torch.zeros(state.shape[:2], dtype=real, device=state.device)
    outputs = []
    for _ in range(length):
        output, state = step(nothing, pole, weight, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1)

"""Filters of diagonal plus rank-one state spaces, by powers of the dense discretised matrix: the meaning here.

Letters: B batch, T time, C channels, N pairs of conjugates, M = 2N entries of the whole state, L taps.
As in S4, arXiv:2111.00396.
"""

import torch
from torch import Tensor


def working_dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """The real and the complex type of the arithmetic: wide where an input is wide."""
    wide = (torch.float64, torch.complex128)
    if any(tensor is not None and tensor.dtype in wide for tensor in tensors):
        return torch.float64, torch.complex128
    return torch.float32, torch.complex64


def _whole(x: Tensor) -> Tensor:
    """[..., N] → [..., M], the conjugates behind."""
    return torch.cat([x, x.conj()], dim=-1)


def _discretised(pole: Tensor, low_rank: Tensor, write: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear: Ā = (1 − Δ/2 A)⁻¹ (1 + Δ/2 A) [C, M, M] and B̄ = (1 − Δ/2 A)⁻¹ Δ B [C, M]."""
    poles, column = _whole(pole), _whole(low_rank)
    a = torch.diag(poles) - torch.outer(column, column.conj())
    one = torch.eye(len(poles), dtype=a.dtype, device=a.device)
    half = (step / 2).to(a.dtype)[:, None, None]
    wide = torch.linalg.solve(one - half * a, one + half * a)
    entered = torch.linalg.solve(one - half * a, 2 * half * _whole(write)[:, None])
    return wide, entered.squeeze(-1)


def _run(
    u: Tensor, pole: Tensor, low_rank: Tensor, write: Tensor, read: Tensor, step: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence over u [B, T, C]: outputs [B, T, C] in the working type, and the last state [B, C, N]."""
    real, modes = working_dtypes(u, pole, low_rank, write, read, step, state)
    pairs = pole.shape[0]
    with torch.autocast(u.device.type, enabled=False):
        matrix, entered = _discretised(pole.to(modes), low_rank.to(modes), write.to(modes), step.to(real))
        if state is None:
            state = torch.zeros(u.shape[0], u.shape[2], pairs, dtype=modes, device=u.device)
        x, rows = _whole(state.to(modes)), _whole(read.to(modes))
        outputs = []
        for t in range(u.shape[1]):
            x = (matrix @ x.unsqueeze(-1)).squeeze(-1) + entered * u[:, t, :, None].to(real)
            outputs.append((rows * x).sum(-1).real)
        return torch.stack(outputs, dim=1), x[..., :pairs].contiguous()


def cauchy_filter(
    pole: Tensor, low_rank: Tensor, write: Tensor, read: Tensor, step: Tensor, length: int
) -> Tensor:
    """The response to a single one; shapes as in `ops.cauchy_filter`."""
    real, _ = working_dtypes(pole, low_rank, write, read, step)
    u = torch.zeros(1, length, read.shape[0], dtype=real, device=pole.device)
    u[:, 0] = 1
    return _run(u, pole, low_rank, write, read, step, None)[0].squeeze(0).mT


def cauchy_state(
    u: Tensor, pole: Tensor, low_rank: Tensor, write: Tensor, step: Tensor, state: Tensor | None
) -> Tensor:
    """The state behind the last token; shapes as in `ops.cauchy_state`."""
    return _run(u, pole, low_rank, write, torch.zeros_like(write).expand(len(step), -1), step, state)[1]


def cauchy_response(
    state: Tensor, pole: Tensor, low_rank: Tensor, read: Tensor, step: Tensor, length: int
) -> Tensor:
    """The outputs where nothing comes in any more; shapes as in `ops.cauchy_response`."""
    real, _ = working_dtypes(state, pole, low_rank, read, step)
    nothing = torch.zeros(state.shape[0], length, state.shape[1], dtype=real, device=state.device)
    return _run(nothing, pole, low_rank, torch.zeros_like(pole), read, step, state)[0]

"""What decays leave of a chunk: of each write at each later read, of the state before it, of each write at its end.

Letters: C tokens of a chunk.  As in Mamba-2's state space duality, arXiv:2405.21060.
"""

from typing import Any

import torch
from torch import Tensor

LEAST = -1e3
"""Below it a decay is nought in every type, and a running sum would lose the digits of what comes after."""


class _Decays(torch.autograd.Function):
    """Written out by hand: no factor of the gradient is a difference of large sums, and a pair j = i adds none."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = gate.double().clamp(min=LEAST).cumsum(-1)
        within = torch.empty(*gate.shape, gate.shape[-1], dtype=gate.dtype, device=gate.device)
        torch.sub(total.unsqueeze(-1), total.unsqueeze(-2), out=within)
        # Above the diagonal an exponential may overflow, and is then wiped out.
        within.exp_().tril_()
        since_start = total.exp().to(gate.dtype)
        until_end = (total[..., -1:] - total).exp_().to(gate.dtype)
        ctx.save_for_backward(within, since_start, until_end)
        return within, since_start, until_end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor:
        within, since_start, until_end = ctx.saved_tensors
        d_within, d_since, d_until = grads
        d_gate = torch.zeros_like(since_start)
        # Token s fades every pair (i, j) with j < s ≤ i, the state for each read i ≥ s, each write j < s at the end.
        if d_within is not None:
            d_gate[..., 1:] += (d_within * within).cumsum(-1).tril_(-1).sum(-2)[..., :-1]
        if d_since is not None:
            d_gate += (d_since * since_start).flip(-1).cumsum(-1).flip(-1)
        if d_until is not None:
            d_gate[..., 1:] += (d_until * until_end).cumsum(-1)[..., :-1]
        return d_gate


def chunk_decays(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-decays [..., C] ≤ 0 of a chunk to three products of decays, none of them above one.

    within [..., C, C], row i, column j: exp(Σ_{j < s ≤ i} gate_s) for j ≤ i, nought elsewhere; since_start [..., C]:
    exp(Σ_{s ≤ i} gate_s); until_end [..., C]: exp(Σ_{s > j} gate_s).
    """
    decays: tuple[Tensor, Tensor, Tensor] = _Decays.apply(gate)  # type: ignore[no-untyped-call]
    return decays

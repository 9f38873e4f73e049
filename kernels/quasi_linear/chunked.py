"""Quasi-linear attention, a group of blocks at a time.

Letters: B batch, T time, H heads, K key, V value, C tokens of a block, n blocks of a group, L = B·H lanes.
After VISTA, arXiv:2510.22049.

The state before block c of a group is γ^(C c) S + Σ_{j < c} γ^(C (c − 1 − j)) W_j with W_j what block j writes:
one product of a small triangle with all W, so that blocks of one token cost no loop over tokens. Only the states of
one group are held at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype
from kernels.quasi_linear.reference import shaped

GROUP = 32


def _decays(distance: Tensor, log_decay: Tensor) -> Tensor:
    """exp(distance · log_decay) where the distance is not negative, else zero: [..., ] and [H] → [H, ...]."""
    rate = log_decay.view(-1, *(1 for _ in distance.shape))
    return (rate * distance.clamp(min=0)).masked_fill(distance < 0, -torch.inf).exp()


def quasi_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    block: int,
    seen: int | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """All blocks; shapes as in `ops.quasi_linear`."""
    with torch.autocast(q.device.type, enabled=False):
        return _quasi_linear(q, k, v, log_decay, state, block, seen, activation)


def _quasi_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    block: int,
    seen: int | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, value = v.shape
    key = k.shape[-1]
    count = -(-time // block)
    dtype = working_dtype(q, k, v, log_decay, state)

    def fold(x: Tensor) -> Tensor:
        """[B, T, H, D] → [L, blocks, C, D], zeros behind the end."""
        if count * block != time:
            x = pad(x, (0, 0, 0, 0, 0, count * block - time))
        x = x.unflatten(1, (count, block)).permute(0, 3, 1, 2, 4).to(dtype)
        return x.reshape(batch * heads, count, block, -1)

    qs, ks, vs = fold(q), fold(k), fold(v)
    rate = torch.zeros(heads, dtype=dtype, device=v.device) if log_decay is None else log_decay.to(dtype)
    place = torch.arange(block, device=v.device)
    within = _decays(place[:, None] - place, rate).repeat(batch, 1, 1).unsqueeze(1)
    since_start = _decays(place + 1, rate).repeat(batch, 1)[:, None, :, None]
    until_end = _decays(block - 1 - place, rate).repeat(batch, 1)[:, None, :, None]
    output = (qs @ ks.mT * within) @ vs
    written = ks.mT @ (vs * until_end)
    qs = qs * since_start

    if state is None:
        last = torch.zeros(batch * heads, 1, key * value, dtype=dtype, device=v.device)
    else:
        last = state.to(dtype).reshape(-1, 1, key * value)
    reads = []
    # Split, not sliced one by one: the gradient of each slice would be as large as the whole.
    groups = zip(qs.split(GROUP, dim=1), written.flatten(2).split(GROUP, dim=1), strict=True)
    for index, (asked, added) in enumerate(groups):
        number = torch.arange(asked.shape[1] + 1, device=v.device)
        between = _decays((number[:, None] - 1 - number[:-1]) * block, rate).repeat(batch, 1, 1)
        carried = _decays(number * block, rate).repeat(batch, 1).unsqueeze(-1) * last
        states, last = torch.baddbmm(carried, between, added).split([asked.shape[1], 1], dim=1)
        tokens = None
        if seen is not None:
            tokens = (seen + (index * GROUP + number[:-1]) * block).clamp(min=1).to(dtype)[:, None, None]
        reads.append(asked @ shaped(states.unflatten(2, (key, value)), tokens, activation))
    if time % block:
        last = states[:, -1]
    output = output + torch.cat(reads, dim=1)
    output = output.view(batch, heads, count * block, value)[:, :, :time].transpose(1, 2)
    return output.to(v.dtype).contiguous(), last.reshape(batch, heads, key, value).contiguous()

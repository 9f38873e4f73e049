"""Log-linear attention, one token after another: the meaning of this operator.

Letters: B batch, T time, H heads, G groups that share q and k, R = H/G, L levels, K key, V value.
After arXiv:2506.04761.

Level 0 holds the last token alone; a level l ≥ 1 holds the 2^(l-1) tokens before those of the levels below, or none.
The last level holds all that is older, so a text longer than the levels can tell apart is read as well.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def merge(levels: Tensor, length: int) -> Tensor:
    """Makes room in level 0 for the token at position `length`: the full levels below the first free one move into it."""
    if length == 0:
        return levels
    free = min((length & -length).bit_length(), levels.shape[2] - 1)
    moved = levels[:, :, : free + 1].sum(2, keepdim=True)
    return torch.cat([torch.zeros_like(levels[:, :, :free]), moved, levels[:, :, free + 1 :]], dim=2)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], log_decay, beta [B, H], weights [B, H, L], levels [B, H, L, K, V]."""
    dtype = working_dtype(q, k, v, log_decay, weights, beta, levels)
    shared = v.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        query, key = (x.to(dtype).repeat_interleave(shared, dim=1) for x in (q, k))
        written = v.to(dtype)
        levels = levels.to(dtype) * log_decay.to(dtype).exp()[..., None, None, None]
        if beta is not None:
            strength = beta.to(dtype)[..., None]
            recalled = torch.einsum("bhk,bhlkv->bhlv", key, levels)
            levels = levels - torch.einsum("bhk,bhlv->bhlkv", strength * key, recalled)
            written = strength * written
        fresh = torch.einsum("bhk,bhv->bhkv", key, written).unsqueeze(2)
        levels = torch.cat([fresh, merge(levels, length)[:, :, 1:]], dim=2)
        output = torch.einsum("bhl,bhk,bhlkv->bhv", weights.to(dtype), query, levels)
        return output.to(v.dtype), levels


def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """The whole sequence by steps; shapes as in `ops.log_linear`."""
    batch, time, heads, value = v.shape
    if levels is None:
        dtype = working_dtype(q, k, v, log_decay, weights, beta)
        shape = (batch, heads, weights.shape[-1], k.shape[-1], value)
        levels = torch.zeros(shape, dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        strength = None if beta is None else beta[:, t]
        output, levels = step(
            q[:, t], k[:, t], v[:, t], log_decay[:, t], weights[:, t], strength, levels, length + t
        )
        outputs.append(output)
    return torch.stack(outputs, dim=1), levels

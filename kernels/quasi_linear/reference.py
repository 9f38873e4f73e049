"""Quasi-linear attention, one token after another: the meaning of this operator.

Letters: B batch, T time, O tokens of the open block, H heads, K key, V value.  After VISTA, arXiv:2510.22049.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def shaped(matrix: Tensor, count: Tensor | float | None, activation: str | None) -> Tensor:
    """What is read of sums [..., K, V]: their activation, or that of their mean over `count` tokens, as a sum again."""
    if activation is None:
        return matrix
    return matrix * torch.sigmoid(matrix if count is None else matrix / count)


def ages(count: int, log_decay: Tensor | None, like: Tensor) -> Tensor:
    """[count, H] factors by which tokens have faded when the last of them has come, the oldest first."""
    if log_decay is None:
        return torch.ones(count, like.shape[-2], dtype=like.dtype, device=like.device)
    age = torch.arange(count - 1, -1, -1, dtype=like.dtype, device=like.device)
    return (age[:, None] * log_decay.to(like.dtype)).exp()


def read(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    count: float | None,
    activation: str | None,
) -> Tensor:
    """One query [B, H, K] over the state and the open block, keys [B, O, H, K] and values [B, O, H, V]."""
    dtype = working_dtype(q, keys, values, log_decay, state)
    with torch.autocast(q.device.type, enabled=False):
        qw, kw, vw = q.to(dtype), keys.to(dtype), values.to(dtype)
        fade = ages(kw.shape[1] + 1, log_decay, kw)
        past = torch.einsum("bhk,bhkv->bhv", qw, shaped(state.to(dtype), count, activation))
        near = torch.einsum("bhk,bohk,oh,bohv->bhv", qw, kw, fade[1:], vw)
        return (past * fade[0, :, None] + near).to(values.dtype)


def fold(keys: Tensor, values: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The state after a block whose keys are [B, O, H, K] and whose values are [B, O, H, V]."""
    dtype = working_dtype(keys, values, log_decay, state)
    with torch.autocast(keys.device.type, enabled=False):
        kw, vw = keys.to(dtype), values.to(dtype)
        fade = ages(kw.shape[1] + 1, log_decay, kw)
        return state.to(dtype) * fade[0, :, None, None] + torch.einsum("bohk,oh,bohv->bhkv", kw, fade[1:], vw)


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
    """The whole sequence by steps; shapes as in `ops.quasi_linear`."""
    batch, time, heads, value = v.shape
    if state is None:
        dtype = working_dtype(q, k, v, log_decay)
        state = torch.zeros(batch, heads, k.shape[-1], value, dtype=dtype, device=v.device)
    outputs = []
    for t in range(time):
        start = t - t % block
        count = None if seen is None else max(1, seen + start)
        opened = slice(start, t + 1)
        outputs.append(read(q[:, t], k[:, opened], v[:, opened], log_decay, state, count, activation))
        if (t + 1) % block == 0:
            state = fold(k[:, opened], v[:, opened], log_decay, state)
    return torch.stack(outputs, dim=1), state

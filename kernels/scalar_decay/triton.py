"""Linear recurrence with one decay a head in Triton: the kernels of `kernels.scan`, and those of a step.

Letters: B batch, T time, H heads, G groups that share q and k, K key, V value.  After Mamba-2's state space duality,
arXiv:2405.21060.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import configure, launch, padded
from kernels.scan import scan

OPERATOR = "scalar_decay"


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    state,
    output,
    last,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at = (n * H + h) * K * V + keys[:, None] * V + values[None, :]
    query = tl.load(q + (n * G + g) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + (n * G + g) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + (n * H + h) * V + values, mask=values < V, other=0.0).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        S = S * tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    S += key[:, None] * value[None, :]
    tl.store(last + at, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + (n * H + h) * V + values, out.to(output.dtype.element_ty), mask=values < V)


def scalar_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks at once; shapes as in `ops.scalar_decay`. Products are taken in v's type, sums in float32."""
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    output, last = scan(OPERATOR, q, k, v, log_decay, None, state, cu_seqlens)
    return output.squeeze(2), last


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.scalar_decay_step`. Carries no gradient."""
    batch, groups, key = q.shape
    heads, value = v.shape[1:]
    row = configure(OPERATOR, "step", (key, value), v)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(batch, heads, key, value, dtype=torch.float32, device=v.device)
    launch(
        OPERATOR,
        _step,
        (triton.cdiv(value, row.blocks["BLOCK_V"]), batch * heads),
        (
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            None if log_decay is None else log_decay.contiguous(),
            state.contiguous(),
            output,
            last,
        ),
        {"H": heads, "G": groups, "K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

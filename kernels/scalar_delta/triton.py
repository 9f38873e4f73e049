"""The delta rule with one decay a head or none, in Triton: the walks of `kernels.delta`, and a step of its own.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value.
After arXiv:2406.06484 (the form) and arXiv:2412.06464 (the decay).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta import delta, prepare
from kernels.launch import configure, launch, padded

OPERATOR = "scalar_delta"


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    beta,
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
    strength = tl.load(beta + n * H + h).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        S = S * tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    error = (value - tl.sum(S * key[:, None], 0)) * strength
    S += key[:, None] * error[None, :]
    tl.store(last + at, S, mask=inside)
    out = tl.sum(S * query[:, None], 0)
    tl.store(output + (n * H + h) * V + values, out.to(output.dtype.element_ty), mask=values < V)


def scalar_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks in two launches; shapes as in `ops.scalar_delta`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous()
        gate = None if log_decay is None else log_decay.float().contiguous()
        state = None if state is None else state.float().contiguous()
        beta = beta.float().contiguous()
        prepared = prepare(OPERATOR, q, k, v, gate, beta, cu_seqlens)
        return delta(OPERATOR, q, k, v, gate, beta, state, prepared, cu_seqlens)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.scalar_delta_step`. Carries no gradient."""
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
            beta.contiguous(),
            state.contiguous(),
            output,
            last,
        ),
        {"H": heads, "G": groups, "K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

"""Linear recurrence by the trapezoidal rule in Triton: the kernels of `kernels.scan`, and those of a step.

Letters: B batch, T time, R ranks (rows that a token writes and reads), H heads, K key, V value.
After Mamba-3, arXiv:2603.15569.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import configure, launch, padded
from kernels.scan import scan
from kernels.trapezoid.chunked import first_state

OPERATOR = "trapezoid"


@triton.jit
def _step(
    q,
    k,
    v,
    gate,
    late,
    fresh,
    state,
    previous_k,
    previous_v,
    output,
    last,
    R: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    n = (tl.program_id(0) // (H * tiles)).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    keys = tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at = (n * H + h) * K * V + keys[:, None] * V + values[None, :]
    before = tl.load(late + n * H + h).to(tl.float32)
    now = tl.load(fresh + n * H + h).to(tl.float32)
    S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    for r in range(R):
        row = (n * R + r) * H + h
        key = tl.load(previous_k + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(previous_v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
        S += (key * before)[:, None] * value[None, :]
    S = S * tl.exp(tl.load(gate + n * H + h).to(tl.float32))
    for r in range(R):
        row = (n * R + r) * H + h
        key = tl.load(k + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
        S += (key * now)[:, None] * value[None, :]
    tl.store(last + at, S, mask=inside)
    for r in range(R):
        row = (n * R + r) * H + h
        query = tl.load(q + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        out = tl.sum(S * query[:, None], 0)
        tl.store(output + row * V + values, out.to(output.dtype.element_ty), mask=values < V)


def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor | None,
    previous: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All chunks at once; shapes as in `ops.trapezoid`. Products are taken in v's type, sums in float32."""
    first = first_state(torch.float32, late, state, previous, cu_seqlens)
    return scan(OPERATOR, q, k, v, log_decay, (late, fresh), first, cu_seqlens)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor,
    previous: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """One token in one launch; shapes as in `ops.trapezoid_step`. Carries no gradient."""
    batch, ranks, heads, key = k.shape
    value = v.shape[-1]
    row = configure(OPERATOR, "step", (key, value), v)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(batch, heads, key, value, dtype=torch.float32, device=v.device)
    inputs = (q, k, v, log_decay, late, fresh, state, *previous)
    launch(
        OPERATOR,
        _step,
        (batch * heads * triton.cdiv(value, row.blocks["BLOCK_V"]),),
        (*(x.contiguous() for x in inputs), output, last),
        {"R": ranks, "H": heads, "K": key, "V": value, "BLOCK_K": padded(key)},
        row,
        like=v,
    )
    return output, last

"""Linear recurrences with one decay a head in Triton: the launches of `kernels.scan_kernels`, with their gradients.

Letters: B batch, N documents (or B), T time, R rows that a token writes and reads, H heads, G groups that share q and
k, K key, V value.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launch import configure, dot_precision, launch
from kernels.packing import chunk_offsets, chunk_owners
from kernels.scan_kernels import gradients, outputs, walk


def scan(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    writes: tuple[Tensor, Tensor] | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S ← exp(log_decay_t) (S + late_t k_{t−1} v_{t−1}ᵀ) + fresh_t k_t v_tᵀ, o_t = Sᵀq_t, by `operator`'s own table.

    q, k [B, T, R, G, K], where head h reads group h·G//H; v [B, T, R, H, V]; log_decay [B, T, H], None for none;
    writes, late and fresh [B, T, H], None for 0 and 1, given only with log_decay; state [B, H, K, V], None for zeros.
    Nothing is written late of what came before the first token. Returns o [B, T, R, H, V] in v's dtype, in which
    products are taken, and the last state in float32.
    """

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    with torch.autocast(v.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Scan.apply(  # type: ignore[no-untyped-call]
            operator,
            q.to(v.dtype).contiguous(),
            k.to(v.dtype).contiguous(),
            v.contiguous(),
            wide(log_decay),
            *(wide(x) for x in writes or (None, None)),
            wide(state),
            cu_seqlens,
        )
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        late: Tensor | None,
        fresh: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, ranks, heads, value = v.shape
        key = k.shape[-1]
        row = configure(operator, "forward", (key, value), v)
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        offsets, chunks = chunk_offsets(cu_seqlens, batch, time, row.blocks["CHUNK"] // ranks)
        owners = chunk_owners(offsets, chunks)
        starts = v.new_empty(chunks, heads, key, value)
        last = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        numbers = gate, late, fresh
        _launch_walk(operator, k, v, *numbers, state, starts, last, cu_seqlens, offsets, back=False)
        output = torch.empty_like(v)
        launch(
            operator,
            outputs,
            (chunks * triton.cdiv(value, row.blocks["BLOCK_V"]), heads),
            (q, k, v, *numbers, starts, output, cu_seqlens, offsets, owners, time),
            _sizes(q, v),
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, *numbers, starts, cu_seqlens, offsets, owners)
        ctx.operator, ctx.has_state = operator, state is not None
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *numbers, starts, cu_seqlens, offsets, owners = ctx.saved_tensors
        gate, late, fresh = numbers
        batch, time, _, groups, key = k.shape
        heads, value = v.shape[3:]
        d_output, d_last = grads
        d_output = torch.zeros_like(v) if d_output is None else d_output.to(v.dtype).contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        ends, d_state = torch.empty_like(starts), None
        if ctx.has_state:
            documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
            d_state = torch.empty(documents, heads, key, value, dtype=torch.float32, device=v.device)
        _launch_walk(
            ctx.operator, q, d_output, gate, None, None, d_last, ends, d_state, cu_seqlens, offsets, back=True
        )
        row = configure(ctx.operator, "backward", (key, value), v)
        parts = 2 * triton.cdiv(key, row.blocks["BLOCK_K"]) + 1
        # Heads that share q and k are summed afterwards.
        shared = groups < heads
        dtype = torch.float32 if shared else v.dtype
        d_q, d_k = (torch.empty(*v.shape[:4], key, dtype=dtype, device=v.device) for _ in range(2))
        d_v = torch.empty_like(v)
        # What is added to these is summed afterwards as well; nothing is late for a first token.
        d_gate, d_fresh = (None if x is None else x.new_empty(parts, *x.shape) for x in (gate, fresh))
        d_late = None if late is None else late.new_zeros(parts, *late.shape)
        launch(
            ctx.operator,
            gradients,
            (len(starts) * (parts + triton.cdiv(value, row.blocks["BLOCK_V"])), heads),
            (
                *(q, k, v, *numbers, starts, ends, d_output),
                *(d_q, d_k, d_v, d_gate, d_late, d_fresh),
                *(cu_seqlens, offsets, owners, time, batch * time),
            ),
            _sizes(q, v),
            row,
            like=v,
        )
        if shared:
            d_q, d_k = (x.unflatten(3, (groups, -1)).sum(4).to(v.dtype) for x in (d_q, d_k))
        d_numbers = (None if x is None else x.sum(0) for x in (d_gate, d_late, d_fresh))
        return None, d_q, d_k, d_v, *d_numbers, d_state, None


def _launch_walk(
    operator: str,
    keys: Tensor,
    values: Tensor,
    gate: Tensor | None,
    late: Tensor | None,
    fresh: Tensor | None,
    first: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    *,
    back: bool,
) -> None:
    batch, time, _, heads, value = values.shape
    key = keys.shape[-1]
    row = configure(operator, "walk", (key, value), values)
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    tiles = triton.cdiv(key, row.blocks["BLOCK_K"]) * triton.cdiv(value, row.blocks["BLOCK_V"])
    launch(
        operator,
        walk,
        (documents * heads * tiles,),
        (keys, values, gate, late, fresh, first, states, last, cu_seqlens, offsets, time),
        {**_sizes(keys, values), "BACK": back},
        row,
        like=values,
    )


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "R": v.shape[2],
        "H": v.shape[3],
        "G": q.shape[3],
        "K": q.shape[4],
        "V": v.shape[4],
        "PRECISION": dot_precision(v.dtype),
    }

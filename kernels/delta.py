"""The delta rule with one decay a head or none in Triton: the launches of `kernels.fused_delta`, with their gradients.

Letters: B batch, N documents (or B), T time, H heads, G groups that share q and k, K key, V value, C tokens of a
chunk, n chunks of all documents, W walks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.configurations import Configuration
from kernels.fused_delta import backward as walk_back
from kernels.fused_delta import forward as walk_on
from kernels.fused_delta import prepare as solve
from kernels.fused_delta_gradient import gradients
from kernels.launch import configure, dot_precision, launch, padded
from kernels.packing import chunk_offsets


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What each chunk needs of itself alone: inverse and scores [n, H, C, C], fades [n, H, 2, C] where there is decay."""

    inverse: Tensor
    scores: Tensor
    fades: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Walks:
    """Several states a head: how many, and how many chunks of the text came before the first one here."""

    count: int
    before: int


def prepare(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rows: str = "",
) -> Prepared:
    """Of all chunks at once; carries no gradient, for `delta`'s knows of it. The chunk is that of `operator`'s row."""
    batch, time, _groups, key = k.shape
    heads, value = v.shape[2:]
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    row = configure(operator, "prepare" + rows, (key, value), v)
    chunk = row.blocks["CHUNK"]
    offsets, chunks = chunk_offsets(cu_seqlens, batch, time, chunk)
    inverse = torch.empty(chunks, heads, chunk, chunk, dtype=v.dtype, device=v.device)
    scores, fades = torch.empty_like(inverse), None
    if gate is not None:
        fades = torch.empty(chunks, heads, 2, chunk, dtype=torch.float32, device=v.device)
    launch(
        operator,
        solve,
        (chunks, heads),
        (q, k, gate, beta, inverse, scores, fades, cu_seqlens, offsets, time, documents),
        {
            "H": heads,
            "G": q.shape[2],
            "K": key,
            "PRECISION": dot_precision(v.dtype),
            "SOLVE": dot_precision(torch.float32),
        },
        row,
        like=v,
    )
    return Prepared(inverse=inverse, scores=scores, fades=fades)


def delta(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    prepared: Prepared,
    cu_seqlens: Tensor | None = None,
    *,
    walks: Walks | None = None,
    rows: str = "",
) -> tuple[Tensor, Tensor]:
    """S ← exp(gate) S, d = β (v − Sᵀk), S ← S + k dᵀ, o = Sᵀq for each token, by `operator`'s rows of these names.

    q, k [B, T, G, K] and v [B, T, H, V], of one type; gate and beta [B, T, H] and state [B, H, K, V] in float32; all
    contiguous. Returns o and the last state, as v and state are. With walks, which take no documents, the states are
    [B, H, W, K, V] and o is [W, B, T, H, V], as v may be where walks have values of their own.
    """
    result: tuple[Tensor, Tensor] = _Delta.apply(  # type: ignore[no-untyped-call]
        *(operator, rows, walks, prepared),
        *(q, k, v, gate, beta, state, cu_seqlens),
        wants_gradient(q, k, v, gate, beta, state),
    )
    return result


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        rows: str,
        walks: Walks | None,
        prepared: Prepared,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        beta: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time = k.shape[:2]
        offsets, _ = chunk_offsets(cu_seqlens, batch, time, prepared.inverse.shape[-1])
        ctx.operator, ctx.rows, ctx.walks, ctx.has_state = operator, rows, walks, state is not None
        made = prepared.inverse, prepared.scores, prepared.fades
        output, last, *kept = _walk_on(
            operator, rows, walks, q, k, v, beta, *made, state, cu_seqlens, offsets, keep and walks is None
        )
        # Several states a head before each chunk outweigh all else, so that they are made anew where they are asked for.
        state = None if walks is None else state
        ctx.save_for_backward(q, k, v, gate, beta, *made, state, *kept, cu_seqlens, offsets)
        return output, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gate, beta, inverse, scores, fades, state, *kept, cu_seqlens, offsets = ctx.saved_tensors
        operator, rows, walks = ctx.operator, ctx.rows, ctx.walks
        if walks is not None:
            made = inverse, scores, fades
            _, _, *kept = _walk_on(
                operator, rows, walks, q, k, v, beta, *made, state, cu_seqlens, offsets, True
            )
        starts, written = kept
        batch, time, groups, key = k.shape
        heads, value = v.shape[-2:]
        chunks, _, chunk, _ = inverse.shape
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        several = () if walks is None else (walks.count,)
        d_output, d_last = grads
        d_output = torch.zeros_like(written) if d_output is None else d_output.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        d_state = None
        if ctx.has_state:
            shape = (documents, heads, *several, key, value)
            d_state = torch.empty(shape, dtype=torch.float32, device=v.device)
        ends, solved = torch.empty_like(starts), torch.empty_like(written)
        total, apart, before = _places(walks, k, v)
        row = configure(operator, "backward" + rows, (key, value), v)
        launch(
            operator,
            walk_back,
            _grid(row, v, documents, walks),
            (
                *(q, k, beta, inverse, scores, fades, d_output, d_last, ends, solved, d_state),
                *(cu_seqlens, offsets, time, total, before),
            ),
            {**_sizes(q, v), "BLOCK_K": padded(key), "CHUNK": chunk},
            row,
            like=v,
        )
        # The heads of a group are summed in float32.
        own = v.dtype if groups == heads else torch.float32
        d_q = torch.empty(*several, batch, time, heads, key, dtype=own, device=v.device)
        d_k, d_v = torch.empty_like(d_q), torch.empty_like(written)
        d_beta = beta.new_empty(*several, *beta.shape)
        d_gate = None if gate is None else torch.empty_like(d_beta)
        launch(
            operator,
            gradients,
            (chunks, heads, *several),
            (
                *(q, k, v, gate, beta, scores, starts, ends, written, solved, d_output),
                *(d_q, d_k, d_v, d_gate, d_beta),
                *(cu_seqlens, offsets, time, documents, total, apart, before),
            ),
            {**_sizes(q, v), "CHUNK": chunk},
            configure(operator, "gradients" + rows, (key, value), v),
            like=v,
        )
        if walks is not None:
            d_q, d_k, d_beta = (x.sum(0) for x in (d_q, d_k, d_beta))
            d_gate = None if d_gate is None else d_gate.sum(0)
            d_v = d_v if v.dim() == d_v.dim() else d_v.sum(0)
        if groups != heads:
            d_q, d_k = (x.unflatten(2, (groups, -1)).sum(3).to(q.dtype) for x in (d_q, d_k))
        return None, None, None, None, d_q, d_k, d_v, d_gate, d_beta, d_state, None, None


def _walk_on(
    operator: str,
    rows: str,
    walks: Walks | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    scores: Tensor,
    fades: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, last state and, where a backward pass will ask for them, states before the chunks and what was written."""
    batch, time, _groups, key = k.shape
    heads, value = v.shape[-2:]
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    several = () if walks is None else (walks.count,)
    row = configure(operator, "forward" + rows, (key, value), v)
    output = v.new_empty(*several, batch, time, heads, value)
    last = torch.empty(documents, heads, *several, key, value, dtype=torch.float32, device=v.device)
    starts = written = None
    if keep:
        starts = v.new_empty(len(inverse), heads, *several, key, value)
        written = torch.empty_like(output)
    total, apart, before = _places(walks, k, v)
    launch(
        operator,
        walk_on,
        _grid(row, v, documents, walks),
        (
            *(q, k, v, beta, inverse, scores, fades, state),
            *(output, last, starts, written, cu_seqlens, offsets, time, total, apart, before),
        ),
        {**_sizes(q, v), "BLOCK_K": padded(key), "CHUNK": inverse.shape[-1]},
        row,
        like=v,
    )
    return output, last, starts, written


def _places(walks: Walks | None, k: Tensor, v: Tensor) -> tuple[int | None, int | None, int | None]:
    """TOTAL, APART and BEFORE of the kernels."""
    if walks is None:
        return None, None, None
    total = k.shape[0] * k.shape[1]
    return total, total if v.dim() == 5 else 0, walks.before


def _grid(row: Configuration, v: Tensor, documents: int, walks: Walks | None) -> tuple[int, ...]:
    """A program for each tile of values, document and head, and walk."""
    several = () if walks is None else (walks.count,)
    return triton.cdiv(v.shape[-1], row.blocks["BLOCK_V"]), documents * v.shape[-2], *several


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What all kernels but the first are compiled for."""
    return {
        "H": v.shape[-2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[-1],
        "PRECISION": dot_precision(v.dtype),
    }

"""How the operators of softmax attention launch the kernels that they share.

Letters: B batch, N documents (or B), T queries, S keys (S ≥ T), H heads, G groups that share k and v, K key, V value.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.fused_attention import attend
from kernels.fused_attention_gradient import attend_keys, attend_queries
from kernels.fused_attention_step import join, read_cache
from kernels.launch import configure, dot_precision, launch, padded

SMALLEST_PART, MOST_PARTS = 256, 128
"""A step's cache is cut in parts of at least so many slots, and in at most so many parts: by what is visible alone, so
that a token is answered alike in every batch."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call asks for beside its tensors; None and 0 for what it leaves out."""

    operator: str
    scale: float
    window: int | None = None
    spans: Tensor | None = None
    sinks: int = 0
    skipped: int = 0
    soft_cap: float | None = None
    cu_seqlens: Tensor | None = None
    sums: bool = False
    mass: bool = False


@cache
def spans_on(spans: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads' windows where a kernel can read them; kept, because bringing them there stalls."""
    return torch.tensor(spans, dtype=torch.int32, device=device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, logits: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """[B, T, H, V], and the log-sum-exps or the masses [B, T, H] where asked for. Products are in v's type."""
    with torch.autocast(v.device.type, enabled=False):
        output, rest = _Attention.apply(  # type: ignore[no-untyped-call]
            _rows(q.to(v.dtype)),
            _rows(k.to(v.dtype)),
            _rows(v),
            None if slopes is None else slopes.float().contiguous(),
            None if logits is None else logits.float().contiguous(),
            call,
        )
    return output, None if rest is None else rest.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, logits: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = q.shape
        value = v.shape[-1]
        keeps = any(ctx.needs_input_grad)
        output = v.new_empty(batch, time, heads, value)
        sums = mass = largest = None
        if keeps or call.sums:
            sums = torch.empty(batch, heads, time, dtype=torch.float32, device=v.device)
        if call.mass:
            mass = torch.empty(batch, heads, time, dtype=torch.float32, device=v.device)
        if call.mass and keeps:
            largest = torch.empty(batch, heads, time, dtype=torch.int32, device=v.device)
        row = configure(call.operator, "forward", (key, value), v)
        tiles, shape = _shape(q, k, call, row.blocks["QUERIES"])
        launch(
            call.operator,
            attend,
            (tiles * batch * heads,),
            (
                *(q, k, v, slopes, logits, call.spans, output, sums, mass, largest, call.cu_seqlens),
                *(*shape, *_strides(q, k, v), _entry(logits)),
            ),
            _sizes(q, k, v),
            row,
            like=v,
        )
        if keeps:
            ctx.save_for_backward(q, k, v, slopes, logits, output, sums, mass, largest)
            ctx.call = call
        return output, sums if call.sums else mass

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_rest: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, logits, output, sums, mass, largest = ctx.saved_tensors
        call: Call = ctx.call
        batch, time, heads, key = q.shape
        groups, value = v.shape[2:]
        d_output = torch.zeros_like(output) if d_output is None else d_output.contiguous()
        d_rest = None if d_rest is None else d_rest.contiguous()
        d_sums, d_mass = (None, d_rest) if call.mass else (d_rest, None)
        delta = torch.empty_like(sums)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        sizes, strides = _sizes(q, k, v), _strides(q, k, v)
        row = configure(call.operator, "backward_queries", (key, value), v)
        tiles, shape = _shape(q, k, call, row.blocks["QUERIES"])

        def parts(wanted: bool) -> Tensor | None:
            return sums.new_empty(batch, heads, tiles) if wanted else None

        d_slopes, d_logits = parts(ctx.needs_input_grad[3]), parts(ctx.needs_input_grad[4])
        launch(
            call.operator,
            attend_queries,
            (tiles * batch * heads,),
            (
                *(q, k, v, slopes, logits, call.spans, output, sums, mass, largest, d_output, d_sums, d_mass),
                *(delta, d_q, d_slopes, d_logits, call.cu_seqlens, *shape, *strides, _entry(logits)),
            ),
            sizes,
            row,
            like=v,
        )
        row = configure(call.operator, "backward_keys", (key, value), v)
        tiles, shape = _shape(k, k, call, row.blocks["KEYS"])
        launch(
            call.operator,
            attend_keys,
            (tiles * batch * groups,),
            (
                *(q, k, v, slopes, call.spans, sums, mass, largest, d_output, d_mass, delta, d_k, d_v),
                *(call.cu_seqlens, time, *shape[1:], *strides),
            ),
            sizes,
            row,
            like=v,
        )
        d_slopes, d_logits = (
            None if part is None else part.sum((0, 2) if own.dim() == 1 else 2)
            for own, part in ((slopes, d_slopes), (logits, d_logits))
        )
        return d_q, d_k, d_v, d_slopes, d_logits, None


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logits: Tensor | None,
    distance: Tensor | None,
    visible: int,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    """One query q [B, H, K] over the first `visible` ≥ 1 slots: [B, H, V], and the masses [B, H] where asked for.

    Where v is a view of k's first columns a row of the cache is read once. Carries no gradient.
    """
    batch, heads, key = q.shape
    groups, value = v.shape[2:]
    aliased = (
        k.dtype == v.dtype
        and k.data_ptr() == v.data_ptr()
        and k.stride() == v.stride()
        and value <= key
        and padded(key - value) <= padded(value)
    )
    q, k = _rows(q.to(v.dtype)), _rows(k.to(v.dtype))
    v = k[..., :value] if aliased else _rows(v)
    slopes, logits, distance = (None if x is None else x.contiguous() for x in (slopes, logits, distance))
    sizes = _sizes(q, k, v, aliased=aliased)
    row = configure(call.operator, "step", (key, value), v)
    # No more heads than a group has.
    most = min(row.blocks["HEADS"], padded(heads // groups))
    row = replace(row, blocks={**row.blocks, "HEADS": most})
    slots = row.blocks["SLOTS"]
    parts = min(MOST_PARTS, triton.cdiv(visible, SMALLEST_PART))
    share = triton.cdiv(triton.cdiv(visible, parts), slots) * slots
    parts = triton.cdiv(visible, share)
    output = v.new_empty(batch, heads, value)
    wide = torch.empty(0, dtype=torch.float32, device=v.device)
    mass = wide.new_empty(batch, heads) if call.mass else None
    mixes = highs = totals = None
    if parts > 1:
        mixes = wide.new_empty(parts, batch, heads, value)
        highs, totals = wide.new_empty(2, parts, batch, heads).unbind()
    launch(
        call.operator,
        read_cache,
        (parts * triton.cdiv(heads // groups, most) * groups * batch,),
        (
            *(q, k, v, slopes, logits, call.spans, distance, output, mass, mixes, highs, totals),
            *(visible, share, parts, call.sinks, call.scale, call.soft_cap),
            *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], _entry(logits)),
        ),
        {**sizes, "ALIASED": aliased},
        row,
        like=v,
    )
    if parts > 1:
        row = configure(call.operator, "join", (key, value), v)
        launch(
            call.operator,
            join,
            (triton.cdiv(value, row.blocks["VALUES"]) * batch * heads,),
            (mixes, highs, totals, output, mass, parts, batch * heads),
            {"V": value},
            row,
            like=v,
        )
    return output, mass


def _rows(x: Tensor) -> Tensor:
    """As it lies in memory, if its last axis is whole."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(rows: Tensor, k: Tensor, call: Call, block: int) -> tuple[int, tuple[Any, ...]]:
    """How many tiles the rows are cut in, and what kernels ask of the sizes that they are not compiled for."""
    time, keys = rows.shape[1], k.shape[1]
    documents = 0 if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    tiles = time // block + documents if documents else triton.cdiv(time, block)
    # A window that holds all keys and sinks that nothing asks for cost masks.
    window = None if call.window is None or call.window >= keys else call.window
    beyond = window is not None or call.spans is not None or call.skipped
    sinks = call.sinks if beyond and call.sinks else None
    skipped = call.skipped if sinks and call.skipped else None
    return tiles, (time, keys, documents, tiles, window, sinks, skipped, call.scale, call.soft_cap)


def _entry(logits: Tensor | None) -> int:
    """How far the logits [B, H] of batch entries lie apart, nought where all share them [H]."""
    return logits.shape[-1] if logits is not None and logits.dim() == 2 else 0


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])


def _sizes(q: Tensor, k: Tensor, v: Tensor, *, aliased: bool = False) -> dict[str, Any]:
    """What the kernels are compiled for. A row of keys is cut where that saves columns, or where values end."""
    key, value = k.shape[-1], v.shape[-1]
    main = value if aliased else _cut(key)
    return {
        "H": q.shape[-2],
        "G": k.shape[-2],
        "K": key,
        "V": value,
        "MAIN": main,
        "BLOCK_K": padded(main),
        "BLOCK_TAIL": padded(key - main) if key > main else 0,
        "BLOCK_V": padded(value),
        "PRECISION": dot_precision(v.dtype),
    }


def _cut(key: int) -> int:
    """The columns of the first part of a key: all, or a power of two where with a padded rest it takes less."""
    main = 1 << (key.bit_length() - 1)
    return main if main < key and main + padded(key - main) < padded(key) and main >= 16 else key

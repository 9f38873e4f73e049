"""Attention over a first part of the keys in Triton: a tile of queries walks the keys that one of them sees.

Letters: B batch, T queries, N keys, H heads, G groups that share k and v, R = H/G, K key, V value.
After the compressed branch of arXiv:2502.11089.

Rows of a tile are the queries by the heads of one group. The keys are walked twice, for the sums and for the weights,
which are asked for. What the queries add to the gradients of a tile of keys is cut into runs of rows, which are written
apart and summed afterwards, so that two runs agree to the bit however few the keys are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import wants_gradient
from kernels.fused_blocks import LOG2_E, known, rows_of, settle, slopes, soften, turned_slopes
from kernels.launch import configure, dot_precision, launch, padded

OPERATOR = "prefix_attention"


@triton.jit(do_not_specialize=["T", "N"])
def _forward(
    q,
    k,
    v,
    visible,
    output,
    weights,
    sums,
    T,
    N,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_n,
    k_g,
    v_b,
    v_n,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // G
    tiles = tl.cdiv(T * R, BLOCK_T)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    g, b = rest % G, (rest // G).to(tl.int64)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t, h, live = row // R, g * R + row % R, row < T * R
    keys, values, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    bound = tl.load(visible + t, mask=live, other=0).to(tl.int32)
    at = b * q_b + (t.to(tl.int64) * q_t + h * q_h)[:, None] + keys[None, :]
    query = tl.load(q + at, mask=live[:, None] & (keys < K)[None, :], other=0.0)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    most = tl.max(bound, 0)
    for start in range(0, most, BLOCK_S):
        slot = start + columns
        far = slot.to(tl.int64)[:, None]
        own_k = (slot < N)[:, None] & (keys < K)[None, :]
        key = tl.load(k + k_b * b + far * k_n + g * k_g + keys[None, :], mask=own_k, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        _, _, top, total = soften(scores, slot[None, :] < bound[:, None], top, total)
    _, total = settle(top, total)
    row = (b * T + t) * H + h
    if sums is not None:
        tl.store(sums + row, total, mask=live)
    total = tl.where(total == float("-inf"), 0.0, total * LOG2_E)
    out = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, N, BLOCK_S):
        slot = start + columns
        share = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        if start < most:
            far = slot.to(tl.int64)[:, None]
            own_k, own_v = (
                (slot < N)[:, None] & (keys < K)[None, :],
                (slot < N)[:, None] & (values < V)[None, :],
            )
            key = tl.load(k + k_b * b + far * k_n + g * k_g + keys[None, :], mask=own_k, other=0.0)
            value = tl.load(v + v_b * b + far * v_n + g * v_g + values[None, :], mask=own_v, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
            seen = slot[None, :] < bound[:, None]
            share = tl.exp2(tl.where(seen, scores - total[:, None], float("-inf")))
            out += tl.dot(share.to(value.dtype), value, input_precision=PRECISION)
        to = weights + row[:, None] * N + slot[None, :]
        tl.store(to, share, mask=live[:, None] & (slot < N)[None, :])
    at = row[:, None] * V + values[None, :]
    tl.store(output + at, out.to(output.dtype.element_ty), mask=live[:, None] & (values < V)[None, :])


@triton.jit(do_not_specialize=["T", "N"])
def _backward_queries(
    q,
    k,
    v,
    visible,
    output,
    sums,
    d_output,
    d_q,
    lost,
    T,
    N,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_n,
    k_g,
    v_b,
    v_n,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // G
    tiles = tl.cdiv(T * R, BLOCK_T)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    g, b = rest % G, (rest // G).to(tl.int64)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t, h, live = row // R, g * R + row % R, row < T * R
    keys, values, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    bound = tl.load(visible + t, mask=live, other=0).to(tl.int32)
    at = b * q_b + (t.to(tl.int64) * q_t + h * q_h)[:, None] + keys[None, :]
    own = live[:, None] & (keys < K)[None, :]
    query = tl.load(q + at, mask=own, other=0.0)
    row = (b * T + t) * H + h
    at, mask = row[:, None] * V + values[None, :], live[:, None] & (values < V)[None, :]
    d_out = tl.load(d_output + at, mask=mask, other=0.0)
    out = tl.load(output + at, mask=mask, other=0.0)
    gone = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(lost + row, gone, mask=live)
    total = known(sums, row, live)
    d_query = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for start in range(0, tl.max(bound, 0), BLOCK_S):
        slot = start + columns
        far = slot.to(tl.int64)[:, None]
        own_k, own_v = (slot < N)[:, None] & (keys < K)[None, :], (slot < N)[:, None] & (values < V)[None, :]
        key = tl.load(k + k_b * b + far * k_n + g * k_g + keys[None, :], mask=own_k, other=0.0)
        value = tl.load(v + v_b * b + far * v_n + g * v_g + values[None, :], mask=own_v, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        _, slope = slopes(scores, slot[None, :] < bound[:, None], total, d_weights, gone)
        d_query += tl.dot(slope.to(key.dtype), key, input_precision=PRECISION)
    d_query = (d_query * scale).to(d_q.dtype.element_ty)
    tl.store(d_q + row[:, None] * K + keys[None, :], d_query, mask=own)


@triton.jit(do_not_specialize=["B", "T", "N"])
def _backward_keys(
    q,
    k,
    v,
    visible,
    sums,
    d_output,
    lost,
    part_k,
    part_v,
    B,
    T,
    N,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_n,
    k_g,
    v_b,
    v_n,
    v_g,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // G
    tiles = tl.cdiv(N, BLOCK_S)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    g, b, run = rest % G, (rest // G % B).to(tl.int64), (rest // (G * B)).to(tl.int64)
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    slot = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    far = slot.to(tl.int64)[:, None]
    own_k, own_v = (slot < N)[:, None] & (keys < K)[None, :], (slot < N)[:, None] & (values < V)[None, :]
    key = tl.load(k + k_b * b + far * k_n + g * k_g + keys[None, :], mask=own_k, other=0.0)
    value = tl.load(v + v_b * b + far * v_n + g * v_g + values[None, :], mask=own_v, other=0.0)
    d_key = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    d_value = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    begin = (run * RUN).to(tl.int32)
    end = tl.minimum(begin + RUN, T * R)
    # The rows from the first to the last that sees one of these keys.
    least, most = end, begin
    for start in range(begin, end, 256):
        row = start + tl.arange(0, 256)
        sees = tl.load(visible + row // R, mask=row < end, other=0) > tile * BLOCK_S
        least = tl.minimum(least, tl.min(tl.where(sees, row, end), 0))
        most = tl.maximum(most, tl.max(tl.where(sees, row + 1, begin), 0))
    for start in range(least, most, BLOCK_T):
        own = start + tl.arange(0, BLOCK_T)
        t, h, live = own // R, g * R + own % R, own < most
        bound = tl.load(visible + t, mask=live, other=0).to(tl.int32)
        ask = b * q_b + (t.to(tl.int64) * q_t + h * q_h)[:, None] + keys[None, :]
        query = tl.load(q + ask, mask=live[:, None] & (keys < K)[None, :], other=0.0)
        at = (b * T + t) * H + h
        mask = live[:, None] & (values < V)[None, :]
        d_out = tl.load(d_output + at[:, None] * V + values[None, :], mask=mask, other=0.0)
        total, gone = known(sums, at, live), tl.load(lost + at, mask=live, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2_E)
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        seen = slot[:, None] < bound[None, :]
        weights, slope = turned_slopes(scores, seen, total, d_weights, gone)
        d_value += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_key += tl.dot(slope.to(query.dtype), query, input_precision=PRECISION)
    to = (((run * B + b) * N + slot) * G + g)[:, None]
    tl.store(part_k + to * K + keys[None, :], d_key * scale, mask=own_k)
    tl.store(part_v + to * V + values[None, :], d_value, mask=own_v)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, _ = q.shape
        output = torch.empty(batch, time, heads, v.shape[3], dtype=v.dtype, device=v.device)
        weights = torch.empty(batch, time, heads, k.shape[1], dtype=torch.float32, device=v.device)
        sums = None
        if keep:
            sums = torch.empty(batch, time, heads, dtype=torch.float32, device=v.device)
        _walk("forward", _forward, (q, k, v, visible, output, weights, sums), scale)
        ctx.save_for_backward(q, k, v, visible, output, sums)
        ctx.scale = scale
        ctx.mark_non_differentiable(weights)
        return output, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, visible, output, sums = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None, None, None, None
        d_output = grads[0].contiguous()
        d_q, lost = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(sums)
        tensors = (q, k, v, visible, output, sums, d_output, d_q, lost)
        _walk("backward_queries", _backward_queries, tensors, ctx.scale)

        batch, time, heads, key = q.shape
        slots, groups, value = v.shape[1:]
        row = configure(OPERATOR, "backward_keys", (key, value), v)
        runs = triton.cdiv(time * (heads // groups), row.blocks["RUN"])
        part_k, part_v = (
            torch.empty(runs, batch, slots, groups, width, dtype=torch.float32, device=v.device)
            for width in (key, value)
        )
        launch(
            OPERATOR,
            _backward_keys,
            (triton.cdiv(slots, row.blocks["BLOCK_S"]) * groups * batch * runs,),
            (
                *(q, k, v, visible, sums, d_output, lost, part_k, part_v),
                *(batch, time, slots, ctx.scale, *_strides(q, k, v)),
            ),
            _constants(q, v),
            row,
            like=v,
        )
        return d_q, part_k.sum(0).to(k.dtype), part_v.sum(0).to(v.dtype), None, None, None


def _walk(kernel: str, function: Any, tensors: tuple[Tensor | None, ...], scale: float) -> None:
    """A kernel whose programs are tiles of queries that walk the keys."""
    q, k, v = (x for x in tensors[:3] if x is not None)
    batch, time, heads, key = q.shape
    slots, groups, value = v.shape[1:]
    row = configure(OPERATOR, kernel, (key, value), v)
    launch(
        OPERATOR,
        function,
        (triton.cdiv(time * (heads // groups), row.blocks["BLOCK_T"]) * groups * batch,),
        (*tensors, time, slots, scale, *_strides(q, k, v)),
        _constants(q, v),
        row,
        like=v,
    )


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])


def _constants(q: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "H": q.shape[2],
        "G": v.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
        "BLOCK_K": padded(q.shape[3]),
        "BLOCK_V": padded(v.shape[3]),
        "PRECISION": dot_precision(v.dtype),
    }


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All queries; shapes as in `ops.prefix_attention`. Products are taken in v's type, sums in float32."""
    with torch.autocast(v.device.type, enabled=False):
        keep = wants_gradient(q, k, v)
        q, k, v = (rows_of(x.to(v.dtype)) for x in (q, k, v))
        result: tuple[Tensor, Tensor] = _Attend.apply(q, k, v, visible.contiguous(), float(scale), keep)
    return result

"""Softmax attention over keys aligned at their end: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, K key, V value, N parts.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825; the rest as `options` says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import (
    Backend,
    is_poisoned,
    require_axes,
    require_groups,
    require_shape,
    resolve,
    wants_gradient,
)
from kernels.packing import by_document, require_documents
from kernels.softmax_attention import chunked, reference
from kernels.softmax_attention.options import Options
from kernels.stacked import stackable

OPERATOR = "softmax_attention"


@stackable(shared=("slopes",), own=("sink_logits",))
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    spans: Sequence[int] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: int = 0,
    skipped: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention; query i stands at position S - T + i and sees the last `window` keys up to its own.

    q [B, T, H, K]; k [B, S, G, K] and v [B, S, G, V], where head h reads group h·G//H; window None for all keys;
    scale K**-0.5 unless given. Returns [B, T, H, V] in v's dtype; the softmax is taken in float32 at least.

    `spans` gives every head a window of its own (arXiv:2406.14909). The scaled scores are capped at ±`soft_cap` by
    a tanh, then each loses slopes [H] times its distance in tokens. The first `sinks` keys stay visible besides the
    window; `skipped` tokens between them and the other keys were left out, and count in distances only.
    sink_logits [H], or [B, H] where several models share a batch, join the denominator alone. cu_seqlens [N + 1] packs N documents, each a text of its own, in one row;
    there are then as many keys as queries.
    """
    options = Options(soft_cap=soft_cap, slopes=slopes, sinks=sinks, skipped=skipped, sink_logits=sink_logits)
    return _attend(
        "softmax_attention", q, k, v, window, spans, scale, options, cu_seqlens, backend, with_sums=False
    )[0]


@stackable(shared=("slopes",), own=("sink_logits",))
def softmax_attention_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    spans: Sequence[int] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: int = 0,
    skipped: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`softmax_attention`, and the logarithms of its denominators [B, T, H], which `merge` asks for.

    They are in float32 at least, hold the sink's share, and carry gradients.
    """
    options = Options(soft_cap=soft_cap, slopes=slopes, sinks=sinks, skipped=skipped, sink_logits=sink_logits)
    output, sums = _attend(
        "softmax_attention_with_sums",
        q,
        k,
        v,
        window,
        spans,
        scale,
        options,
        cu_seqlens,
        backend,
        with_sums=True,
    )
    assert sums is not None
    return output, sums


def merge(outputs: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys, made one: N outputs [B, T, H, V] and logarithms of denominators [B, T, H].

    Returns the same two for all keys together. A part that sees nothing says -inf and counts for nothing; where no
    part sees anything the output is nought. As in FlashAttention, arXiv:2205.14135.
    """
    name = "merge"
    if not outputs or len(outputs) != len(sums):
        raise ValueError(
            f"{name}: {len(outputs)} outputs and {len(sums)} sums are not valid; pass one of each for every part"
        )
    shape = tuple(outputs[0].shape)
    for output, one in zip(outputs, sums, strict=True):
        require_shape(name, "output", output, shape, "[B, T, H, V]")
        require_shape(name, "sums", one, shape[:-1], "[B, T, H]")
    with torch.autocast(outputs[0].device.type, enabled=False):
        stacked = torch.stack(list(sums))
        shift = stacked.detach().amax(0)
        shift = shift.masked_fill(shift == -torch.inf, 0.0)
        shares = torch.exp(stacked - shift)
        total = shares.sum(0)
        unseen = total == 0
        # One stands for a denominator of nought, so that neither the quotient nor its gradient is NaN.
        safe = total.masked_fill(unseen, 1.0)
        mixed = (torch.stack(list(outputs)).to(shares.dtype) * (shares / safe).unsqueeze(-1)).sum(0)
        return mixed.to(outputs[0].dtype), (shift + safe.log()).masked_fill(unseen, -torch.inf)


@stackable(shared=("slopes", "distance"), own=("sink_logits",))
def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    spans: Sequence[int] | None = None,
    sinks: int = 0,
    distance: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """One query over the first `visible` slots of a cache, in whatever order they lie (a ring may be handed over).

    q [B, H, K]; k [B, S, G, K] and v [B, S, G, V], of which v may be a view of k's first columns; scale K**-0.5
    unless given. Returns [B, H, V] in v's dtype; zeros where visible is 0.

    The rest as in `softmax_attention`. Slopes and spans ask for distance [S], how many tokens back each slot lies;
    the first `sinks` slots are seen whatever their head's span.
    """
    name = "softmax_attention_step"
    require_axes(name, "q", q, "[B, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    batch, heads, key = q.shape
    slots, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, slots, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, slots, groups, v.shape[-1]), "[B, S, G, V]")
    require_groups(name, heads, groups)
    options = Options(soft_cap=soft_cap, slopes=slopes, sink_logits=sink_logits)
    _check_options(name, batch, heads, None, spans, options)
    if not 0 <= visible <= slots:
        raise ValueError(
            f"{name}: visible={visible} lies outside the {slots} slots; pass a number from 0 to {slots}"
        )
    if distance is None and (slopes is not None or spans is not None):
        raise ValueError(f"{name}: slopes and spans need the distance [S] of every slot; pass it too")
    if distance is not None:
        require_shape(name, "distance", distance, (slots,), "[S]")
        distance = distance[:visible]
    tensors = (q, k, v, slopes, sink_logits, distance)
    widths = {"K": key, "V": v.shape[-1]}
    implementation = resolve(backend, name, *tensors, widths=widths, kernel="step", like=v)
    if visible == 0:
        return v.new_zeros(batch, heads, v.shape[-1])
    scale = key**-0.5 if scale is None else scale
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.softmax_attention import triton

        return triton.step(q, k, v, visible, spans, sinks, scale, options, distance)
    hidden = None
    if spans is not None:
        assert distance is not None
        span = torch.tensor(spans, device=q.device).unsqueeze(1)
        hidden = (distance >= span) & (torch.arange(visible, device=q.device) >= sinks)
    k, v = k[:, :visible], v[:, :visible]
    if implementation == "reference":
        return reference.step(q, k, v, scale, options, distance, hidden)[0]
    return chunked.step(q, k, v, scale, options, distance, hidden)


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    spans: Sequence[int] | None,
    scale: float | None,
    options: Options,
    cu_seqlens: Tensor | None,
    backend: Backend,
    *,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    _check(name, q, k, v, window, spans, options, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    widths = {"K": k.shape[-1], "V": v.shape[-1]}
    tensors = (q, k, v, options.slopes, options.sink_logits)
    implementation = resolve(backend, OPERATOR, *tensors, widths=widths, like=v)
    if implementation == "triton":
        from kernels.softmax_attention import triton

        return triton.softmax_attention(
            q, k, v, window, spans, scale, options, cu_seqlens, with_sums=with_sums
        )

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if implementation == "chunked":
            output, sums = chunked.softmax_attention(
                q, k, v, window, spans, scale, options, with_sums=with_sums
            )
            if not is_poisoned(output):
                return output, sums
        return _by_reference(q, k, v, window, spans, scale, options)

    if cu_seqlens is None:
        return run(q, k, v)

    def alone(q: Tensor, k: Tensor, v: Tensor, _: None) -> tuple[Tensor, Tensor]:
        output, sums = run(q, k, v)
        # Joined along its first axis, which is time in the only row.
        return output, output[0, :, :, 0] if sums is None else sums[0]

    output, sums = by_document(alone, (q, k, v), None, cu_seqlens)
    return output, sums.unsqueeze(0)


def _by_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    spans: Sequence[int] | None,
    scale: float,
    options: Options,
) -> tuple[Tensor, Tensor]:
    if spans is None:
        return reference.softmax_attention(q, k, v, window, scale, options)
    return reference.spanned(q, k, v, spans, scale, options)


def _check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    spans: Sequence[int] | None,
    options: Options,
    cu_seqlens: Tensor | None,
) -> None:
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    batch, time, heads, key = q.shape
    keys, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, keys, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, keys, groups, v.shape[-1]), "[B, S, G, V]")
    require_groups(name, heads, groups)
    if keys < time:
        raise ValueError(
            f"{name}: {keys} keys for {time} queries; pass at least one key a query, aligned at the end"
        )
    require_documents(name, cu_seqlens, batch, time)
    if cu_seqlens is not None and keys != time:
        raise ValueError(
            f"{name}: cu_seqlens packs documents that see themselves alone, but there are {keys} keys for {time} "
            "queries; pass as many keys as queries"
        )
    _check_options(name, batch, heads, window, spans, options)
    if options.skipped and keys - time < options.sinks:
        raise ValueError(
            f"{name}: skipped={options.skipped} tokens lie behind {options.sinks} sinks, but only {keys - time} "
            "keys come before the queries; hand over all sinks or leave skipped out"
        )


def _check_options(
    name: str, batch: int, heads: int, window: int | None, spans: Sequence[int] | None, options: Options
) -> None:
    if window is not None and window < 1:
        raise ValueError(
            f"{name}: window={window} must be at least 1 (a token sees itself); None sees all keys"
        )
    if spans is not None and (window is not None or len(spans) != heads or min(spans) < 1):
        raise ValueError(
            f"{name}: spans={list(spans)} must be one window of at least 1 for each of {heads} heads, and stand "
            "alone; leave window out"
        )
    if options.soft_cap is not None and not options.soft_cap > 0:
        raise ValueError(f"{name}: soft_cap={options.soft_cap} must be above 0; None caps nothing")
    if options.sinks < 0 or options.skipped < 0:
        raise ValueError(
            f"{name}: sinks={options.sinks} and skipped={options.skipped} must be at least 0; leave them out"
        )
    if options.slopes is not None:
        require_shape(name, "slopes", options.slopes, (heads,), "[H]")
    if options.sink_logits is not None:
        lead, letters = ((batch,), "B, ") if options.sink_logits.dim() == 2 else ((), "")
        require_shape(name, "sink_logits", options.sink_logits, (*lead, heads), f"[{letters}H]")

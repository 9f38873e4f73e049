"""Softmax attention over keys aligned at their end: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, K key, V value.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_groups, require_shape, resolve
from kernels.softmax_attention import chunked, reference


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention; query i stands at position S - T + i and sees the last `window` keys up to its own.

    q [B, T, H, K]; k [B, S, G, K] and v [B, S, G, V], where head h reads group h·G//H; window None for all keys;
    scale K**-0.5 unless given. Returns [B, T, H, V] in v's dtype; the softmax is taken in float32 at least.
    """
    name = "softmax_attention"
    implementation = resolve(backend, name)
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
    if window is not None and window < 1:
        raise ValueError(
            f"{name}: window={window} must be at least 1 (a token sees itself); None sees all keys"
        )
    scale = key**-0.5 if scale is None else scale
    if implementation == "chunked":
        output = chunked.softmax_attention(q, k, v, window, scale)
        if not is_poisoned(output):
            return output
    return reference.softmax_attention(q, k, v, window, scale)


def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """One query over the first `visible` slots of a cache, in whatever order they lie (a ring may be handed over).

    q [B, H, K]; k [B, S, G, K] and v [B, S, G, V], of which v may be a view of k's first columns; scale K**-0.5
    unless given. Returns [B, H, V] in v's dtype; zeros where visible is 0.
    """
    name = "softmax_attention_step"
    implementation = resolve(backend, name)
    require_axes(name, "q", q, "[B, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    batch, heads, key = q.shape
    slots, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, slots, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, slots, groups, v.shape[-1]), "[B, S, G, V]")
    require_groups(name, heads, groups)
    if not 0 <= visible <= slots:
        raise ValueError(
            f"{name}: visible={visible} lies outside the {slots} slots; pass a number from 0 to {slots}"
        )
    if visible == 0:
        return v.new_zeros(batch, heads, v.shape[-1])
    scale = key**-0.5 if scale is None else scale
    if implementation == "chunked":
        return chunked.step(q, k[:, :visible], v[:, :visible], scale)
    return reference.step(q, k[:, :visible], v[:, :visible], scale)

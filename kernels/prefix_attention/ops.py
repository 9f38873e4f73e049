"""Softmax attention over a first part of the keys whose length each query states: the public function.

Letters: B batch, T queries, N keys, H heads, G groups that share k and v, K key, V value.
After the compressed branch of arXiv:2502.11089.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_groups, require_shape, resolve
from kernels.prefix_attention import chunked, reference
from kernels.stacked import stackable


@stackable(shared=("visible",))
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of query t over the first visible[t] keys, which sum up text of any length.

    q [B, T, H, K]; k [B, N, G, K] and v [B, N, G, V], where head h reads group h·G//H; visible [T] integers from 0 to
    N; scale K**-0.5 unless given. Returns [B, T, H, V] in v's dtype, zeros where nothing is visible, and the weights
    [B, T, H, N] in float32 or float64, through which no gradient passes. A score for each query and key is held.
    """
    name = "prefix_attention"
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, N, G, K]")
    require_axes(name, "v", v, "[B, N, G, V]")
    batch, time, heads, key = q.shape
    slots, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, slots, groups, key), "[B, N, G, K]")
    require_shape(name, "v", v, (batch, slots, groups, v.shape[-1]), "[B, N, G, V]")
    require_shape(name, "visible", visible, (time,), "[T]")
    require_groups(name, heads, groups)
    scale = key**-0.5 if scale is None else scale
    widths = {"K": key, "V": v.shape[-1]}
    implementation = resolve(backend, name, q, k, v, visible, widths=widths, like=v)
    if implementation == "triton":
        from kernels.prefix_attention import triton

        return triton.prefix_attention(q, k, v, visible, scale)
    if implementation == "chunked":
        output, weights = chunked.prefix_attention(q, k, v, visible, scale)
        if not is_poisoned(output):
            return output, weights
    return reference.prefix_attention(q, k, v, visible, scale)

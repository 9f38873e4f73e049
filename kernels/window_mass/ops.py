"""Windowed softmax attention and its mass: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, K key, V value.
After the hybrid attention of LoLCATs, arXiv:2410.10254, which adds such a window to sums of another kind.
"""

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
from kernels.stacked import stackable
from kernels.window_mass import chunked, reference


@stackable()
def window_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention, and Σ_s exp(score_s − largest score) of each query, from 1 to `window`.

    q [B, T, H, K], whose query i stands at position S - T + i and sees the last `window` keys up to its own; k
    [B, S, G, K] and v [B, S, G, V], where head h reads group h·G//H; scale K**-0.5 unless given. Returns [B, T, H, V]
    in v's dtype and the mass [B, T, H], float32 or float64. Both carry gradients; of equal largest scores one is
    taken for the largest. Nothing is as large as T×S.
    """
    name = "window_mass"
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
    if window < 1:
        raise ValueError(f"{name}: window={window} must be at least 1 (a token sees itself)")
    scale = key**-0.5 if scale is None else scale
    implementation = resolve(backend, name, q, k, v, widths={"K": key, "V": v.shape[-1]}, like=v)
    if implementation == "triton":
        from kernels.window_mass import triton

        return triton.window_mass(q, k, v, window, scale)
    if implementation == "chunked":
        output, mass = chunked.window_mass(q, k, v, window, scale)
        if not is_poisoned(output):
            return output, mass
    return reference.window_mass(q, k, v, window, scale)


@stackable()
def window_mass_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One query over the first `visible` slots of a cache, in whatever order they lie (a ring may be handed over).

    q [B, H, K]; k [B, S, G, K] and v [B, S, G, V]. Returns [B, H, V] in v's dtype and the mass [B, H]; noughts where
    visible is 0.
    """
    name = "window_mass_step"
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
    implementation = resolve(
        backend, name, q, k, v, widths={"K": key, "V": v.shape[-1]}, kernel="step", like=v
    )
    if visible == 0:
        return v.new_zeros(batch, heads, v.shape[-1]), q.new_zeros(batch, heads)
    scale = key**-0.5 if scale is None else scale
    if implementation == "triton" and not wants_gradient(q, k, v):
        from kernels.window_mass import triton

        return triton.step(q, k, v, visible, scale)
    run = reference.step if implementation == "reference" else chunked.step
    return run(q, k[:, :visible], v[:, :visible], scale)

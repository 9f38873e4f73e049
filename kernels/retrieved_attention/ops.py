"""Attention of each head over few keys of its own: the public functions.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, N named keys, K key, V value.
After Memorizing Transformers, arXiv:2203.08913, and Unlimiformer, arXiv:2305.01625.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_groups, require_shape, resolve
from kernels.retrieved_attention import chunked, reference
from kernels.stacked import stackable


@stackable(shared=("visible",))
def nearest_keys(
    q: Tensor, k: Tensor, visible: Tensor, *, keep: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The N = min(keep, S) keys of largest q · k among the first visible[t] that query t sees; the later of equal ones.

    q [B, T, H, K]; k [B, S, G, K], where head h reads group h·G//H; visible [T] integers from 0 to S. The search is
    exact and reads every visible key; nobody reads the others. Returns places [B, T, H, N], the best first and the later
    of equal ones, -1 for none where a query sees fewer, and their scores in float32 at least, -inf for none. There is
    no gradient.
    """
    name = "nearest_keys"
    implementation = resolve(backend, name)
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    batch, time, heads, key = q.shape
    keys, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, keys, groups, key), "[B, S, G, K]")
    require_shape(name, "visible", visible, (time,), "[T]")
    require_groups(name, heads, groups)
    if keep < 1:
        raise ValueError(f"{name}: keep={keep} must be at least 1, the keys that are named")
    if _known(visible) and not 0 <= int(visible.min()) <= int(visible.max()) <= keys:
        raise ValueError(
            f"{name}: visible runs from {int(visible.min())} to {int(visible.max())}; there are {keys} keys, so name "
            f"numbers from 0 to {keys}"
        )
    if implementation == "chunked":
        return chunked.nearest_keys(q, k, visible, keep)
    return reference.nearest_keys(q.detach(), k.detach(), visible, keep)


@stackable()
def retrieved_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every head of every query over the keys that are named for it; one query touches no other.

    q [B, T, H, K]; k [B, S, G, K] and v [B, S, G, V], where head h reads group h·G//H, in one piece of memory or they
    are copied; places [B, T, H, N] int64 in k, each once, -1 for none; bias [B, T, H, N] is added to the scaled
    scores and has no gradient; scale K**-0.5 unless given. Returns [B, T, H, V] in v's dtype and the log-sum-exp of
    the scores [B, T, H] in float32 or float64, by which disjoint sets of keys are joined; 0 and -inf for a head that
    names nothing.
    """
    name = "retrieved_attention"
    implementation = resolve(backend, name)
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    require_axes(name, "places", places, "[B, T, H, N]")
    batch, time, heads, key = q.shape
    keys, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, keys, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, keys, groups, v.shape[-1]), "[B, S, G, V]")
    require_shape(name, "places", places, (batch, time, heads, places.shape[-1]), "[B, T, H, N]")
    if bias is not None:
        require_shape(name, "bias", bias, tuple(places.shape), "[B, T, H, N]")
    require_groups(name, heads, groups)
    if places.dtype != torch.int64:
        raise ValueError(f"{name}: places is {places.dtype}, but must hold numbers of keys: torch.int64")
    if _known(places) and not -1 <= int(places.min()) <= int(places.max()) < keys:
        raise ValueError(
            f"{name}: places run from {int(places.min())} to {int(places.max())}; name keys from 0 to {keys - 1}, or "
            "-1 for none"
        )
    scale = key**-0.5 if scale is None else scale
    if implementation == "chunked":
        output, sums = chunked.retrieved_attention(q, k, v, places, bias, scale)
        if not is_poisoned(output):
            return output, sums
    return reference.retrieved_attention(q, k, v, places, bias, scale)


def _known(numbers: Tensor) -> bool:
    """Whether the numbers can be looked at without stalling a device."""
    return numbers.device.type == "cpu" and not torch.compiler.is_compiling()

"""Attention over few keys that a light index chose for each query: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), J index heads, I index width, N chosen keys, H heads, K key, V value (V ≤ K).
Query i stands at position S - T + i and sees the keys up to its own.  After DeepSeek-V3.2, arXiv:2512.02556.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_shape, resolve
from kernels.selected_attention import chunked, reference
from kernels.stacked import stackable


def _check_index(name: str, q: Tensor, k: Tensor, weights: Tensor) -> None:
    require_axes(name, "q", q, "[B, T, J, I]")
    require_axes(name, "k", k, "[B, S, I]")
    batch, time, heads, width = q.shape
    require_shape(name, "k", k, (batch, k.shape[1], width), "[B, S, I]")
    require_shape(name, "weights", weights, (batch, time, heads), "[B, T, J]")
    if k.shape[1] < time:
        raise ValueError(
            f"{name}: {k.shape[1]} keys for {time} queries; pass at least one key a query, aligned at the end"
        )


@stackable()
def select_keys(q: Tensor, k: Tensor, weights: Tensor, *, keep: int, backend: Backend = "auto") -> Tensor:
    """The N = min(keep, S) keys of largest Σ_j w_j ReLU(q_j · k_s) that each query sees; the later of equal ones.

    q [B, T, J, I]; k [B, S, I]; weights [B, T, J]. Returns places [B, T, N], ascending; a query that sees fewer keys
    takes all of them, and the places in front hold -1. The scores are taken in float32 at least; there is no gradient.
    """
    name = "select_keys"
    implementation = resolve(backend, name)
    _check_index(name, q, k, weights)
    if keep < 1:
        raise ValueError(f"{name}: keep={keep} must be at least 1; a query reads at least one key")
    if implementation == "chunked":
        chosen: Tensor = chunked.select_keys(q, k, weights, keep)
        return chosen
    return reference.select_keys(q.detach(), k.detach(), weights.detach(), keep)


@stackable()
def index_scores(
    q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor | None, *, backend: Backend = "auto"
) -> Tensor:
    """Σ_j w_j ReLU(q_j · k_s) at the places chosen [B, T, N], or at all keys [B, T, S] for None; −∞ at −1 or the unseen.

    Shapes else as in `select_keys`. With None the result is as large as the text squared: hand in few queries.
    """
    name = "index_scores"
    implementation = resolve(backend, name)
    _check_index(name, q, k, weights)
    if chosen is not None:
        require_axes(name, "chosen", chosen, "[B, T, N]")
        require_shape(name, "chosen", chosen, (*q.shape[:2], chosen.shape[2]), "[B, T, N]")
    if implementation == "chunked":
        return chunked.index_scores(q, k, weights, chosen)
    return reference.index_scores(q, k, weights, chosen)


@stackable()
def selected_attention(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    *,
    value: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of all heads over one shared set of keys a query, whose first `value` columns are the values.

    q [B, T, H, K]; k [B, S, K]; chosen [B, T, N] are places in k, −1 for none; scale K**-0.5 unless given. Returns
    o [B, T, H, V] in k's dtype, 0 where a query chose nothing, and the mean weight of each chosen key [B, T, N],
    in float32 at least and without gradient.
    """
    name = "selected_attention"
    implementation = resolve(backend, name)
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, K]")
    require_axes(name, "chosen", chosen, "[B, T, N]")
    batch, time, _, key = q.shape
    require_shape(name, "k", k, (batch, k.shape[1], key), "[B, S, K]")
    require_shape(name, "chosen", chosen, (batch, time, chosen.shape[2]), "[B, T, N]")
    if not 1 <= value <= key:
        raise ValueError(
            f"{name}: value={value} must be from 1 to {key}, the width of the keys it is cut from"
        )
    scale = key**-0.5 if scale is None else scale
    if implementation == "chunked":
        output, shares = chunked.selected_attention(q, k, chosen, value, scale)
        if not is_poisoned(output):
            return output, shares
    return reference.selected_attention(q, k, chosen, value, scale)

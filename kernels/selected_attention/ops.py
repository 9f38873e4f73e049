"""Attention over few keys that a light index chose for each query: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), J index heads, I index width, N chosen keys, H heads, K key, V value (V ≤ K).
Query i stands at position S - T + i and sees the keys up to its own.  After DeepSeek-V3.2, arXiv:2512.02556.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_shape, resolve
from kernels.selected_attention import chunked, reference
from kernels.stacked import stackable

OPERATOR = "selected_attention"


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
    _check_index(name, q, k, weights)
    if keep < 1:
        raise ValueError(f"{name}: keep={keep} must be at least 1; a query reads at least one key")
    implementation = resolve(backend, OPERATOR, q, k, weights, widths={"I": q.shape[3]}, kernel="select")
    if implementation == "triton":
        from kernels.selected_attention import triton

        return triton.select_keys(q, k, weights, keep)
    if implementation == "chunked":
        chosen: Tensor = chunked.select_keys(q, k, weights, keep)
        return chosen
    return reference.select_keys(q.detach(), k.detach(), weights.detach(), keep)


@stackable()
def index_scores(
    q: Tensor, k: Tensor, weights: Tensor, chosen: Tensor | None, *, backend: Backend = "auto"
) -> Tensor:
    """Σ_j w_j ReLU(q_j · k_s) at the places chosen [B, T, N], or at all keys [B, T, S] for None; −∞ at −1 or the unseen.

    Shapes else as in `select_keys`; float32 at least. With None the result is as large as the text squared: hand in few
    queries.
    """
    name = "index_scores"
    _check_index(name, q, k, weights)
    if chosen is not None:
        require_axes(name, "chosen", chosen, "[B, T, N]")
        require_shape(name, "chosen", chosen, (*q.shape[:2], chosen.shape[2]), "[B, T, N]")
    kernel = "scores" if chosen is None else "places"
    implementation = resolve(
        backend, OPERATOR, q, k, weights, chosen, widths={"I": q.shape[3]}, kernel=kernel
    )
    if implementation == "triton":
        from kernels.selected_attention import triton

        return triton.index_scores(q, k, weights, chosen)
    if implementation == "chunked":
        return chunked.index_scores(q, k, weights, chosen)
    return reference.index_scores(q, k, weights, chosen)


def index_divergence(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The mean over B and T of KL(p_t ‖ softmax(I_t)) over all keys seen: what the index learns while attention is dense.

    I are the scores of `select_keys`; p is the mean over H of softmax(scale queries_h · keys_h), queries [B, T, H, K],
    keys [B, S, H, K], scale K**-0.5 unless given. Gradients go to q, k and weights alone. One number, in float32 at least;
    nothing as large as the text squared is held.
    """
    return _divergences(q, k, weights, queries, keys, scale=scale, backend=backend).mean()


@stackable()
def _divergences(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | None,
    backend: Backend,
) -> Tensor:
    """The mean over T alone, [B], so that members of a stack may be entries of the batch."""
    name = "index_divergence"
    _check_index(name, q, k, weights)
    require_axes(name, "queries", queries, "[B, T, H, K]")
    heads, key = queries.shape[2:]
    require_shape(name, "queries", queries, (*q.shape[:2], heads, key), "[B, T, H, K]")
    require_shape(name, "keys", keys, (*k.shape[:2], heads, key), "[B, S, H, K]")
    scale = key**-0.5 if scale is None else scale
    widths, tensors = {"I": q.shape[3], "K": key}, (q, k, weights, queries, keys)
    implementation = resolve(backend, OPERATOR, *tensors, widths=widths, kernel="difference")
    if implementation == "triton":
        from kernels.selected_attention import triton

        return triton.index_divergence(q, k, weights, queries, keys, scale)
    if implementation == "chunked":
        return chunked.index_divergence(q, k, weights, queries, keys, scale)
    return reference.index_divergence(q, k, weights, queries, keys, scale)


@stackable()
def selected_attention(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    *,
    value: int,
    scale: float | None = None,
    shares: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads over one shared set of keys a query, whose first `value` columns are the values.

    q [B, T, H, K]; k [B, S, K]; chosen [B, T, N] are places in k, −1 for none; scale K**-0.5 unless given. Returns
    o [B, T, H, V] in k's dtype, 0 where a query chose nothing, and the mean weight of each chosen key [B, T, N],
    in float32 at least and without gradient, or None where no shares are asked for.
    """
    name = "selected_attention"
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
    widths = {"V": value, "K - V": key - value}
    implementation = resolve(backend, OPERATOR, q, k, chosen, widths=widths, kernel="attend")
    if implementation == "triton":
        from kernels.selected_attention import triton

        return triton.selected_attention(q, k, chosen, value, scale, shares)
    output, weights = None, None
    if implementation == "chunked":
        output, weights = chunked.selected_attention(q, k, chosen, value, scale)
    if output is None or is_poisoned(output):
        output, weights = reference.selected_attention(q, k, chosen, value, scale)
    return output, weights if shares else None

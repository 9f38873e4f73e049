"""Log-linear attention: the public functions.

Letters: B batch, T time, H heads, G groups that share q and k, L levels, K key, V value.  After arXiv:2506.04761.
"""

from torch import Tensor

from kernels.backend import (
    Backend,
    is_poisoned,
    require_axes,
    require_chunk,
    require_groups,
    require_shape,
    resolve,
    wants_gradient,
)
from kernels.log_linear import chunked, reference
from kernels.stacked import stackable


@stackable()
def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None = None,
    levels: Tensor | None = None,
    length: int = 0,
    *,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Every level S_l ← exp(log_decay) (1 − beta k kᵀ) S_l; full levels merge; S_0 = beta k vᵀ; o = Σ_l weights_l S_lᵀq.

    q, k [B, T, G, K], where head h reads group h·G//H; v [B, T, H, V]; log_decay [B, T, H] ≤ 0; weights
    [B, T, H, L]; beta [B, T, H], None for a decay alone (then nothing is erased, and writes are k vᵀ); levels
    [B, H, L, K, V], what an earlier call returned after `length` tokens in all, None for zeros. Level l ≥ 1 holds
    2^(l-1) tokens or none, and the last one all that is older, so L = ceil(log2(T)) + 1 tells all apart.
    `chunk` is the chunk form's; Triton's chunks come from its table, and are shorter with beta than without.
    Returns o [B, T, H, V] in v's dtype and the last levels in float32, or in float64 where an input is float64.

    Raises:
        ValueError: a shape does not fit, the chunk is no power of two, or the length is negative.
    """
    name = "log_linear"
    require_chunk(name, chunk)
    if chunk & (chunk - 1):
        raise ValueError(f"{name}: chunk={chunk} must be a power of two; leave it out for 64")
    require_axes(name, "k", k, "[B, T, G, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, groups, key = k.shape
    heads, value = v.shape[2:]
    require_groups(name, heads, groups)
    require_shape(name, "q", q, (batch, time, groups, key), "[B, T, G, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, time, heads), "[B, T, H]")
    require_axes(name, "weights", weights, "[B, T, H, L]")
    require_shape(name, "weights", weights, (batch, time, heads, weights.shape[-1]), "[B, T, H, L]")
    if beta is not None:
        require_shape(name, "beta", beta, (batch, time, heads), "[B, T, H]")
    if levels is not None:
        shape = (batch, heads, weights.shape[-1], key, value)
        require_shape(name, "levels", levels, shape, "[B, H, L, K, V]")
    _require_position(name, weights.shape[-1], length)
    tensors = (q, k, v, log_decay, weights, beta, levels)
    kernel, like = ("forward", None) if beta is None else ("forward_delta", v)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel=kernel, like=like)
    if implementation == "triton":
        from kernels.log_linear import triton

        return triton.log_linear(q, k, v, log_decay, weights, beta, levels, length)
    if implementation == "chunked":
        output, last = chunked.log_linear(q, k, v, log_decay, weights, beta, levels, length, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.log_linear(q, k, v, log_decay, weights, beta, levels, length)


@stackable()
def log_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor,
    length: int,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The token at position `length`: q, k [B, G, K], v [B, H, V], log_decay, beta [B, H], weights [B, H, L].

    All but the reference touch only the levels that hold something. Where no gradient is asked for they write them into
    `levels` itself, which must then not be used again; the others would cost as much again to copy.
    """
    name = "log_linear_step"
    require_axes(name, "k", k, "[B, G, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, groups, key = k.shape
    heads, value = v.shape[1:]
    require_groups(name, heads, groups)
    require_shape(name, "q", q, (batch, groups, key), "[B, G, K]")
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, heads), "[B, H]")
    require_axes(name, "weights", weights, "[B, H, L]")
    require_shape(name, "weights", weights, (batch, heads, weights.shape[-1]), "[B, H, L]")
    if beta is not None:
        require_shape(name, "beta", beta, (batch, heads), "[B, H]")
    require_shape(name, "levels", levels, (batch, heads, weights.shape[-1], key, value), "[B, H, L, K, V]")
    _require_position(name, weights.shape[-1], length)
    tensors = (q, k, v, log_decay, weights, beta, levels)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step")
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.log_linear import triton

        return triton.step(q, k, v, log_decay, weights, beta, levels, length)
    step = reference.step if implementation == "reference" else chunked.step
    return step(q, k, v, log_decay, weights, beta, levels, length)


def _require_position(operator: str, levels: int, length: int) -> None:
    if levels < 2:
        raise ValueError(
            f"{operator}: weights for {levels} level are too few; one for the last token and one for all that is "
            f"older are the least, and ceil(log2(T)) + 1 tell a text of T tokens apart"
        )
    if length < 0:
        raise ValueError(
            f"{operator}: length={length} must be at least 0, the number of tokens before this call"
        )

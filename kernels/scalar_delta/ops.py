"""The delta rule with one decay a head and token, or none (gated DeltaNet, DeltaNet): the public functions.

Letters: B batch, T time, H heads, G groups that share q and k, K key, V value.  After arXiv:2412.06464.
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
from kernels.packing import by_document, require_documents
from kernels.scalar_delta import chunked, reference
from kernels.stacked import stackable


@stackable()
def scalar_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← exp(log_decay) S, d = β (v − Sᵀk), S ← S + k dᵀ, o = Sᵀq for each token; no scale inside.

    q, k [B, T, G, K], where head h reads group h·G//H; v [B, T, H, V]; log_decay [B, T, H] ≤ 0, None for no
    decay; beta [B, T, H]; state [B, H, K, V], None for zeros. Returns o [B, T, H, V] in v's dtype and the last
    state in float32, or in float64 where an input is float64. cu_seqlens [N + 1] packs N documents in one row, each
    with its own state [N, H, K, V]. `chunk` is the chunk form's; Triton's chunks come from its table.
    """
    name = "scalar_delta"
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, G, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, groups, key = k.shape
    heads, value = v.shape[2:]
    require_groups(name, heads, groups)
    require_shape(name, "q", q, (batch, time, groups, key), "[B, T, G, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    if log_decay is not None:
        require_shape(name, "log_decay", log_decay, (batch, time, heads), "[B, T, H]")
    require_shape(name, "beta", beta, (batch, time, heads), "[B, T, H]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, beta, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, like=v)
    if implementation == "triton":
        from kernels.scalar_delta import triton

        return triton.scalar_delta(q, k, v, log_decay, beta, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(*own: Tensor) -> tuple[Tensor, Tensor]:
            return scalar_delta(*own, chunk=chunk, backend=implementation)

        return by_document(run, (q, k, v, log_decay, beta), state, cu_seqlens)
    if implementation == "chunked":
        output, last = chunked.scalar_delta(q, k, v, log_decay, beta, state, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.scalar_delta(q, k, v, log_decay, beta, state)


@stackable()
def scalar_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], log_decay [B, H] or None, beta [B, H], state [B, H, K, V].

    Returns o [B, H, V] and the new state. There is one PyTorch form of a single token, so `reference` and
    `chunked` are the same here; it also answers where a gradient is asked for.
    """
    name = "scalar_delta_step"
    require_axes(name, "k", k, "[B, G, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, groups, key = k.shape
    heads, value = v.shape[1:]
    require_groups(name, heads, groups)
    require_shape(name, "q", q, (batch, groups, key), "[B, G, K]")
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    if log_decay is not None:
        require_shape(name, "log_decay", log_decay, (batch, heads), "[B, H]")
    require_shape(name, "beta", beta, (batch, heads), "[B, H]")
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, beta, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.scalar_delta import triton

        return triton.step(q, k, v, log_decay, beta, state)
    return reference.step(q, k, v, log_decay, beta, state)

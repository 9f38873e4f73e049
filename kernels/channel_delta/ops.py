"""The delta rule with a decay a key channel (Kimi delta attention): the public functions.

Letters: B batch, T time, H heads, K key, V value.  After arXiv:2510.26692.
"""

from torch import Tensor

from kernels.backend import (
    Backend,
    is_poisoned,
    require_axes,
    require_chunk,
    require_shape,
    resolve,
    wants_gradient,
)
from kernels.channel_delta import chunked, reference
from kernels.packing import by_document, require_documents
from kernels.stacked import stackable


@stackable()
def channel_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← Diag(exp g) S, d = β (v − Sᵀk), S ← S + k dᵀ, o = Sᵀq for each token; no scale inside.

    q, k, log_decay [B, T, H, K] with log_decay ≤ 0; v [B, T, H, V]; beta [B, T, H]; state [B, H, K, V],
    None for zeros. Returns o [B, T, H, V] in v's dtype and the last state in float32, or in float64
    where an input is float64. cu_seqlens [N + 1] packs N documents in one row, each with its own state
    [N, H, K, V]. `chunk` is the chunk form's; Triton's chunks come from its table.
    """
    name = "channel_delta"
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, H, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, time, heads, key), "[B, T, H, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, time, heads, key), "[B, T, H, K]")
    require_shape(name, "beta", beta, (batch, time, heads), "[B, T, H]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, beta, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, like=v)
    if implementation == "triton":
        from kernels.channel_delta import triton

        return triton.channel_delta(q, k, v, log_decay, beta, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(*own: Tensor) -> tuple[Tensor, Tensor]:
            return channel_delta(*own, chunk=chunk, backend=implementation)

        return by_document(run, (q, k, v, log_decay, beta), state, cu_seqlens)
    if implementation == "chunked":
        output, last = chunked.channel_delta(q, k, v, log_decay, beta, state, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.channel_delta(q, k, v, log_decay, beta, state)


@stackable()
def channel_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V] → o [B, H, V], state.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "channel_delta_step"
    require_axes(name, "k", k, "[B, H, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, heads, key), "[B, H, K]")
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, heads, key), "[B, H, K]")
    require_shape(name, "beta", beta, (batch, heads), "[B, H]")
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, beta, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.channel_delta import triton

        return triton.step(q, k, v, log_decay, beta, state)
    return reference.step(q, k, v, log_decay, beta, state)

"""The generalised delta rule: decay by channel and a correction of rank one a token (RWKV-7): the public functions.

Letters: B batch, T time, H heads, K key, V value.  After arXiv:2503.14456.
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
from kernels.low_rank_delta import chunked, reference
from kernels.packing import by_document, require_documents
from kernels.stacked import stackable


@stackable()
def low_rank_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    bound: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← Diag(exp log_decay) S + b (aᵀ S) + k vᵀ, o = Sᵀq for each token; `a` reads the state before it fades.

    q, k, log_decay, a, b [B, T, H, K] with log_decay ≤ 0; v [B, T, H, V]; state [B, H, K, V], None for zeros; no
    scale inside. `bound` is the caller's promise that log_decay ≥ −bound; it spares work and changes nothing else.
    Returns o [B, T, H, V] in v's dtype and the last state in float32, or in float64 where an input is float64.
    cu_seqlens [N + 1] packs N documents in one row, each with its own state [N, H, K, V]. `chunk` and `bound` are the
    chunk form's; Triton's chunks come from its table, and no decay is too hard for them.
    """
    name = "low_rank_delta"
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, H, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    for letter, tensor in (("q", q), ("log_decay", log_decay), ("a", a), ("b", b)):
        require_shape(name, letter, tensor, (batch, time, heads, key), "[B, T, H, K]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, heads, key, value), "[B, H, K, V]")
    if bound is not None and not bound >= 0:
        raise ValueError(
            f"{name}: bound={bound} is negative: give the hardest decay without its sign, or None"
        )
    tensors = (q, k, v, log_decay, a, b, state, cu_seqlens)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, like=v)
    if implementation == "triton":
        from kernels.low_rank_delta import triton

        return triton.low_rank_delta(q, k, v, log_decay, a, b, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(*own: Tensor) -> tuple[Tensor, Tensor]:
            return low_rank_delta(*own, chunk=chunk, bound=bound, backend=implementation)

        return by_document(run, (q, k, v, log_decay, a, b), state, cu_seqlens)
    if implementation == "chunked":
        output, last = chunked.low_rank_delta(q, k, v, log_decay, a, b, state, chunk, bound)
        if not is_poisoned(output):
            return output, last
    return reference.low_rank_delta(q, k, v, log_decay, a, b, state)


@stackable()
def low_rank_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay, a, b [B, H, K], v [B, H, V], state [B, H, K, V] → o [B, H, V], state.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "low_rank_delta_step"
    require_axes(name, "k", k, "[B, H, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    for letter, tensor in (("q", q), ("log_decay", log_decay), ("a", a), ("b", b)):
        require_shape(name, letter, tensor, (batch, heads, key), "[B, H, K]")
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, a, b, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.low_rank_delta import triton

        return triton.step(q, k, v, log_decay, a, b, state)
    return reference.step(q, k, v, log_decay, a, b, state)

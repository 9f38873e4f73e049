"""Linear recurrence by the trapezoidal rule, with several rows a token: the public functions.

Letters: B batch, T time, R ranks (rows that a token writes and reads), H heads, K key, V value.
After Mamba-3, arXiv:2603.15569.
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
    working_dtype,
)
from kernels.packing import by_document, require_documents
from kernels.stacked import stackable
from kernels.trapezoid import chunked, reference

MOST_RANKS = 16
"""A chunk of Triton's kernels has 64 rows, which ranks share with tokens."""


@stackable()
def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor | None = None,
    previous: tuple[Tensor, Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← exp(log_decay_t) (S + late_t k_{t−1} v_{t−1}ᵀ) + fresh_t k_t v_tᵀ, o_t = Sᵀ q_t; no scale inside.

    q, k [B, T, R, H, K] and v [B, T, R, H, V]: the R rows of a token are written together, and each reads all of
    them. log_decay [B, T, H] ≤ 0; late and fresh [B, T, H] weigh the writes; state [B, H, K, V], None for zeros;
    previous, the keys [B, R, H, K] and values [B, R, H, V] of the token before, None for none. `chunk` counts the
    chunk form's tokens; Triton's chunks come from its table. cu_seqlens [N + 1] packs N documents in one row, each with
    its own state [N, H, K, V] and previous token [N, R, H, K]. Returns o [B, T, R, H, V] in v's dtype and the last
    state in float32, or in float64 where an input is.
    """
    name = "trapezoid"
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, R, H, K]")
    require_axes(name, "v", v, "[B, T, R, H, V]")
    batch, time, ranks, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, time, ranks, heads, key), "[B, T, R, H, K]")
    require_shape(name, "v", v, (batch, time, ranks, heads, value), "[B, T, R, H, V]")
    for title, number in (("log_decay", log_decay), ("late", late), ("fresh", fresh)):
        require_shape(name, title, number, (batch, time, heads), "[B, T, H]")
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, heads, key, value), "[B, H, K, V]")
    if previous is not None:
        require_shape(name, "previous[0]", previous[0], (documents, ranks, heads, key), "[B, R, H, K]")
        require_shape(name, "previous[1]", previous[1], (documents, ranks, heads, value), "[B, R, H, V]")
    tensors = (q, k, v, log_decay, late, fresh, state, *(previous or ()))
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, missing=_too_many(ranks))
    if implementation == "triton":
        from kernels.trapezoid import triton

        return triton.trapezoid(q, k, v, log_decay, late, fresh, state, previous, cu_seqlens)
    if cu_seqlens is not None:

        def run(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            log_decay: Tensor,
            late: Tensor,
            fresh: Tensor,
            state: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            return trapezoid(q, k, v, log_decay, late, fresh, state, chunk=chunk, backend=implementation)

        first = chunked.first_state(working_dtype(*tensors), late, state, previous, cu_seqlens)
        return by_document(run, (q, k, v, log_decay, late, fresh), first, cu_seqlens)
    if implementation == "chunked":
        output, last = chunked.trapezoid(q, k, v, log_decay, late, fresh, state, previous, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.trapezoid(q, k, v, log_decay, late, fresh, state, previous)


@stackable()
def trapezoid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor,
    previous: tuple[Tensor, Tensor],
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, R, H, K], v [B, R, H, V], log_decay, late, fresh [B, H] → o [B, R, H, V], state.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "trapezoid_step"
    require_axes(name, "k", k, "[B, R, H, K]")
    require_axes(name, "v", v, "[B, R, H, V]")
    batch, ranks, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, ranks, heads, key), "[B, R, H, K]")
    require_shape(name, "v", v, (batch, ranks, heads, value), "[B, R, H, V]")
    for title, number in (("log_decay", log_decay), ("late", late), ("fresh", fresh)):
        require_shape(name, title, number, (batch, heads), "[B, H]")
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    require_shape(name, "previous[0]", previous[0], (batch, ranks, heads, key), "[B, R, H, K]")
    require_shape(name, "previous[1]", previous[1], (batch, ranks, heads, value), "[B, R, H, V]")
    tensors = (q, k, v, log_decay, late, fresh, state, *previous)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step")
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.trapezoid import triton

        return triton.step(q, k, v, log_decay, late, fresh, state, previous)
    return reference.step(q, k, v, log_decay, late, fresh, state, previous)


def _too_many(ranks: int) -> str | None:
    if ranks <= MOST_RANKS:
        return None
    return f"{ranks} ranks are more than the {MOST_RANKS} that the Triton kernels take"

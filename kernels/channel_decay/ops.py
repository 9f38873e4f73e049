"""Linear recurrence whose state fades by one number a key channel and token: the public functions.

Letters: B batch, T time, H heads, K key, V value.  After arXiv:2312.06635; the bonus after arXiv:2404.05892.
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
from kernels.channel_decay import chunked, reference
from kernels.packing import by_document, require_documents
from kernels.stacked import stackable


@stackable(own=("bonus",))
def channel_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← Diag(exp g) S + k vᵀ, o = Sᵀq for each token; no scale inside.

    With a bonus the read comes first: o = (S + Diag(bonus) k vᵀ)ᵀ q, then S ← Diag(exp g) S + k vᵀ.
    q, k, log_decay [B, T, H, K] with log_decay ≤ 0, however far below; v [B, T, H, V]; bonus [H, K], or [B, H, K] with
    one for each batch entry (models trained side by side); state [B, H, K, V], None for zeros. Returns o [B, T, H, V]
    in v's dtype and the last state in float32, or in float64 where an input is float64. cu_seqlens [N + 1] packs N
    documents in one row, each with its own state [N, H, K, V]. `chunk` is the chunk form's and counts as the next
    power of two; Triton's chunks come from its table.
    """
    name = "channel_decay"
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, H, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, time, heads, key), "[B, T, H, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, time, heads, key), "[B, T, H, K]")
    if bonus is not None:
        _require_bonus(name, bonus, (batch, heads, key))
    documents = require_documents(name, cu_seqlens, batch, time)
    if state is not None:
        require_shape(name, "state", state, (documents, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, bonus, state, cu_seqlens)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, like=v)
    if implementation == "triton":
        from kernels.channel_decay import triton

        return triton.channel_decay(q, k, v, log_decay, bonus, state, cu_seqlens)
    if cu_seqlens is not None:

        def run(*own: Tensor) -> tuple[Tensor, Tensor]:
            return channel_decay(*own, bonus=bonus, chunk=chunk, backend=implementation)

        return by_document(run, (q, k, v, log_decay), state, cu_seqlens)
    if implementation == "chunked":
        output, last = chunked.channel_decay(q, k, v, log_decay, bonus, state, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.channel_decay(q, k, v, log_decay, bonus, state)


@stackable(own=("bonus",))
def channel_decay_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    bonus: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay [B, H, K], v [B, H, V], bonus [H, K] or [B, H, K], state [B, H, K, V].

    Returns o [B, H, V] and the state.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here; it also answers where
    a gradient is asked for.
    """
    name = "channel_decay_step"
    require_axes(name, "k", k, "[B, H, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, heads, key), "[B, H, K]")
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, heads, key), "[B, H, K]")
    if bonus is not None:
        _require_bonus(name, bonus, (batch, heads, key))
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    tensors = (q, k, v, log_decay, bonus, state)
    implementation = resolve(backend, name, *tensors, widths={"K": key, "V": value}, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(*tensors):
        from kernels.channel_decay import triton

        return triton.step(q, k, v, log_decay, bonus, state)
    return reference.step(q, k, v, log_decay, bonus, state)


def _require_bonus(name: str, bonus: Tensor, shape: tuple[int, int, int]) -> None:
    """ValueError where a bonus is neither one for all batch entries nor one for each."""
    if bonus.dim() == 3:
        require_shape(name, "bonus", bonus, shape, "[B, H, K]")
    else:
        require_shape(name, "bonus", bonus, shape[1:], "[H, K]")

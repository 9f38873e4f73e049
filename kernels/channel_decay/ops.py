"""Linear recurrence whose state fades by one number a key channel and token: the public functions.

Letters: B batch, T time, H heads, K key, V value.  After arXiv:2312.06635; the bonus after arXiv:2404.05892.
"""

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_chunk, require_shape, resolve
from kernels.channel_decay import chunked, reference
from kernels.stacked import stackable


@stackable(each=("bonus",))
def channel_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S ← Diag(exp g) S + k vᵀ, o = Sᵀq for each token; no scale inside.

    With a bonus the read comes first: o = (S + Diag(bonus) k vᵀ)ᵀ q, then S ← Diag(exp g) S + k vᵀ.
    q, k, log_decay [B, T, H, K] with log_decay ≤ 0, however far below; v [B, T, H, V]; bonus [H, K]; state
    [B, H, K, V], None for zeros; a chunk counts as the next power of two. Returns o [B, T, H, V] in v's dtype
    and the last state in float32, or in float64 where an input is float64.
    """
    name = "channel_decay"
    implementation = resolve(backend, name)
    require_chunk(name, chunk)
    require_axes(name, "k", k, "[B, T, H, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, time, heads, key), "[B, T, H, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, time, heads, key), "[B, T, H, K]")
    if bonus is not None:
        require_shape(name, "bonus", bonus, (heads, key), "[H, K]")
    if state is not None:
        require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    if implementation == "chunked":
        output, last = chunked.channel_decay(q, k, v, log_decay, bonus, state, chunk)
        if not is_poisoned(output):
            return output, last
    return reference.channel_decay(q, k, v, log_decay, bonus, state)


@stackable(each=("bonus",))
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
    """One token: q, k, log_decay [B, H, K], v [B, H, V], bonus [H, K], state [B, H, K, V] → o [B, H, V], state.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "channel_decay_step"
    resolve(backend, name)
    require_axes(name, "k", k, "[B, H, K]")
    require_axes(name, "v", v, "[B, H, V]")
    batch, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, heads, key), "[B, H, K]")
    require_shape(name, "v", v, (batch, heads, value), "[B, H, V]")
    require_shape(name, "log_decay", log_decay, (batch, heads, key), "[B, H, K]")
    if bonus is not None:
        require_shape(name, "bonus", bonus, (heads, key), "[H, K]")
    require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    return reference.step(q, k, v, log_decay, bonus, state)

"""Linear attention whose matrix passes through a nonlinearity before it is read: the public functions.

Letters: B batch, T time, O tokens of the open block, H heads, K key, V value.  After VISTA, arXiv:2510.22049.
"""

from typing import Literal

from torch import Tensor

from kernels.backend import Backend, is_poisoned, require_axes, require_shape, resolve
from kernels.quasi_linear import chunked, reference
from kernels.stacked import stackable

Activation = Literal["silu"]


def _check(name: str, activation: str | None, block: int = 1, seen: int | None = None) -> None:
    """ValueError where a setting cannot be."""
    if activation not in (None, "silu"):
        raise ValueError(f"{name}: activation={activation!r} is not known; use 'silu' or None")
    if block < 1:
        raise ValueError(
            f"{name}: block={block} must be at least 1; use 1 for a state that is read anew each token"
        )
    if seen is not None and seen < 0:
        raise ValueError(f"{name}: seen={seen} must be at least 0, or None to read sums and not means")


@stackable(each=("log_decay",))
def quasi_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None = None,
    *,
    block: int,
    seen: int | None = None,
    activation: Activation | None = "silu",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """o_t = φ(S_b)ᵀ q_t + Σ_{b ≤ s ≤ t} (q_t·k_s) v_s, where S_b = Σ_{s < b} k_s v_sᵀ and b = ⌊t / block⌋ block.

    q, k [B, T, H, K]; v [B, T, H, V]; the first token opens a block. log_decay [H] ≤ 0 is what every term fades by
    for each token behind it, None for no decay. state [B, H, K, V] is S before the first token, None for zeros.
    seen, the number of tokens that it sums, asks for m φ(S_b / m) in place of φ(S_b), m being the tokens in S_b.
    Returns o [B, T, H, V] in v's dtype and S after the last whole block, in float32, or float64 where an input is.
    """
    name = "quasi_linear"
    implementation = resolve(backend, name)
    _check(name, activation, block, seen)
    require_axes(name, "k", k, "[B, T, H, K]")
    require_axes(name, "v", v, "[B, T, H, V]")
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    require_shape(name, "q", q, (batch, time, heads, key), "[B, T, H, K]")
    require_shape(name, "v", v, (batch, time, heads, value), "[B, T, H, V]")
    if log_decay is not None:
        require_shape(name, "log_decay", log_decay, (heads,), "[H]")
    if state is not None:
        require_shape(name, "state", state, (batch, heads, key, value), "[B, H, K, V]")
    if implementation == "chunked":
        output, last = chunked.quasi_linear(q, k, v, log_decay, state, block, seen, activation)
        if not is_poisoned(output):
            return output, last
    return reference.quasi_linear(q, k, v, log_decay, state, block, seen, activation)


@stackable(each=("log_decay",))
def quasi_linear_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    seen: int | None = None,
    activation: Activation | None = "silu",
    backend: Backend = "auto",
) -> Tensor:
    """One token: q [B, H, K] reads the state and the open block, keys [B, O, H, K], values [B, O, H, V], itself last.

    There is one PyTorch form of a single token, so `reference` and `chunked` are the same here.
    """
    name = "quasi_linear_step"
    resolve(backend, name)
    _check(name, activation, seen=seen)
    _check_block(name, keys, values, log_decay, state)
    require_shape(name, "q", q, (keys.shape[0], *keys.shape[2:]), "[B, H, K]")
    count = None if seen is None else max(1, seen)
    return reference.read(q, keys, values, log_decay, state, count, activation)


@stackable()
def fold_block(keys: Tensor, values: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The state after a block that is complete: keys [B, O, H, K], values [B, O, H, V] → [B, H, K, V]."""
    _check_block("fold_block", keys, values, log_decay, state)
    return reference.fold(keys, values, log_decay, state)


def _check_block(name: str, keys: Tensor, values: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    require_axes(name, "keys", keys, "[B, O, H, K]")
    require_axes(name, "values", values, "[B, O, H, V]")
    batch, opened, heads, key = keys.shape
    require_shape(name, "values", values, (batch, opened, heads, values.shape[-1]), "[B, O, H, V]")
    require_shape(name, "state", state, (batch, heads, key, values.shape[-1]), "[B, H, K, V]")
    if log_decay is not None:
        require_shape(name, "log_decay", log_decay, (heads,), "[H]")

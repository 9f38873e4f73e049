"""Softmax attention over listed blocks of keys: the public functions.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value, N query blocks, M key
blocks listed for each, I lists, L listed slots.
After arXiv:1904.10509, 2004.05150 and 2007.14062; the merge of parts as in FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import (
    Backend,
    is_poisoned,
    require_axes,
    require_groups,
    require_shape,
    resolve,
    wants_gradient,
    working_dtype,
)
from kernels.block_attention import chunked, reference
from kernels.stacked import stackable


@stackable(shared=("index", "positions"))
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    block: int,
    key_block: int,
    first: int = 0,
    positions: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries over the blocks of keys that are listed for it, and the log-sum-exp.

    q [B, T, H, K], whose query i stands at position first + i; k [B, S, G, K] and v [B, S, G, V], where head h reads
    group h·G//H. Key j stands at positions[j], at j unless they are given. A query at t sees, of the keys listed for
    it, those at s ≤ t, with a window those at t - window < s ≤ t.
    index [N, M], or [G, N, M] or [H, N, M] for lists of their own: row n belongs to the queries of block
    first // block + n, that is, with position // block of that number, and names blocks of key_block keys in the
    order of k, each at most once, -1 for none.
    Returns [B, T, H, V] in v's dtype and the logarithm of the sum of exponentials [B, T, H], float32 or float64; a
    query that sees nothing has 0 and -inf. scale is K**-0.5 unless given. No T×S matrix is ever made.
    """
    name = "block_attention"
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    batch, time, heads, key = q.shape
    keys, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, keys, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, keys, groups, v.shape[-1]), "[B, S, G, V]")
    require_groups(name, heads, groups)
    for label, size, least in (("block", block, 1), ("key_block", key_block, 1), ("first", first, 0)):
        if size < least:
            raise ValueError(f"{name}: {label}={size} must be at least {least}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window} must be at least 1; None bounds nothing")
    if index.dim() == 2:
        index = index.unsqueeze(0)
    require_axes(name, "index", index, "[I, N, M]")
    lists = _lists(name, "index", index, heads, groups)
    count = (first + time - 1) // block - first // block + 1
    require_shape(name, "index", index, (lists, count, index.shape[-1]), "[I, N, M]")
    _within(name, "index", index, -(-keys // key_block))
    if positions is not None:
        require_shape(name, "positions", positions, (keys,), "[S]")
    scale = key**-0.5 if scale is None else scale
    widths = {"K": key, "V": v.shape[-1]}
    implementation = resolve(backend, name, q, k, v, index, positions, widths=widths, like=v)
    if implementation == "triton":
        from kernels.block_attention import triton

        return triton.block_attention(q, k, v, index, positions, block, key_block, first, window, scale)
    if positions is None:
        positions = torch.arange(keys, device=k.device)
    if implementation == "chunked":
        output, total = chunked.block_attention(
            q, k, v, index, positions, block, key_block, first, window, scale
        )
        if not is_poisoned(output):
            return output, total
    return reference.block_attention(q, k, v, index, positions, block, key_block, first, window, scale)


@stackable(shared=("slots",))
def block_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One query over the listed slots of a cache; only those are touched, and widened where the cache is narrow.

    q [B, H, K]; k [B, S, G, K] and v [B, S, G, V]; slots [L], or [G, L] or [H, L] for lists of their own, each slot at
    most once, -1 for none. Returns [B, H, V] in v's dtype and the log-sum-exp [B, H]; 0 and -inf where nothing is
    listed. Where a gradient is asked for, PyTorch answers.
    """
    name = "block_attention_step"
    require_axes(name, "q", q, "[B, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    batch, heads, key = q.shape
    held, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, held, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, held, groups, v.shape[-1]), "[B, S, G, V]")
    require_groups(name, heads, groups)
    if slots.dim() == 1:
        slots = slots.unsqueeze(0)
    if slots.shape[-1] == 0:
        slots = slots.new_full((1, 1), -1)
    require_axes(name, "slots", slots, "[I, L]")
    _lists(name, "slots", slots, heads, groups)
    _within(name, "slots", slots, held)
    scale = key**-0.5 if scale is None else scale
    widths = {"K": key, "V": v.shape[-1]}
    implementation = resolve(backend, name, q, k, v, slots, widths=widths, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(q, k, v):
        from kernels.block_attention import triton

        return triton.step(q, k, v, slots, scale)
    if implementation == "reference":
        return reference.step(q, k, v, slots, scale)
    return chunked.step(q, k, v, slots, scale)


def merge(outputs: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys as one: outputs [*, V] and their log-sum-exps [*] → those of the union.

    A part that saw nothing, 0 and -inf, weighs nothing; where no part saw anything the answer is again 0 and -inf.
    """
    name = "merge"
    if not outputs or len(outputs) != len(sums):
        raise ValueError(
            f"{name}: {len(outputs)} outputs with {len(sums)} sums; pass one sum for every output"
        )
    for output, total in zip(outputs, sums, strict=True):
        require_shape(name, "outputs", output, tuple(outputs[0].shape), "[*, V]")
        require_shape(name, "sums", total, tuple(outputs[0].shape[:-1]), "[*]")
    dtype = working_dtype(*outputs, *sums)
    with torch.autocast(outputs[0].device.type, enabled=False):
        totals = torch.stack([total.to(dtype) for total in sums])
        # The shift cancels, so that no gradient need pass through it.
        high = totals.detach().amax(0)
        high = high.masked_fill(high == -torch.inf, 0.0)
        weights = (totals - high).exp()
        summed = weights[0]
        mixed = outputs[0].to(dtype)
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            summed = summed + weight
            share = weight / summed.masked_fill(summed == 0, 1.0)
            mixed = torch.lerp(mixed, output.to(dtype), share.unsqueeze(-1))
        nothing = summed == 0
        total = high + summed.masked_fill(nothing, 1.0).log()
        return mixed.to(outputs[0].dtype), total.masked_fill(nothing, -torch.inf)


def _lists(name: str, label: str, lists: Tensor, heads: int, groups: int) -> int:
    """How many lists there are; ValueError where they are not one for all, one a group or one a head."""
    if lists.shape[0] not in (1, groups, heads):
        raise ValueError(
            f"{name}: {label} holds {lists.shape[0]} lists, but must hold one for all, one for each of the {groups} "
            f"groups, or one for each of the {heads} heads"
        )
    return lists.shape[0]


def _within(name: str, label: str, lists: Tensor, bound: int) -> None:
    """ValueError where a list names what is not there; elsewhere than on a CPU the question would stall the device."""
    if (
        lists.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not -1 <= lists.min() <= lists.max() < bound
    ):
        raise ValueError(f"{name}: {label} holds numbers outside -1 … {bound - 1}; name only what there is")

"""Softmax attention over blocks of keys that each query names for itself: the public functions.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, C groups of heads that choose
together (G divides C, C divides H), M blocks that a query names, K key, V value.
After arXiv:2502.13189 (blocks by head) and arXiv:2502.11089 (blocks by group).
"""

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
)
from kernels.routed_attention import chunked, reference
from kernels.stacked import stackable


def _require_blocks(name: str, blocks: Tensor, block: int, tokens: int) -> None:
    """ValueError where blocks are no numbers of blocks, or, on a CPU, lie outside or come twice."""
    if block < 1:
        raise ValueError(f"{name}: block={block} must be at least 1, the tokens of a block")
    if blocks.dtype != torch.int64:
        raise ValueError(f"{name}: blocks is {blocks.dtype}, but must hold numbers of blocks: torch.int64")
    if blocks.device.type != "cpu" or torch.compiler.is_compiling():
        return
    count = -(-tokens // block)
    if int(blocks.min()) < -1 or int(blocks.max()) >= count:
        raise ValueError(
            f"{name}: blocks run from {int(blocks.min())} to {int(blocks.max())}; {tokens} tokens have the "
            f"blocks 0 to {count - 1}, and -1 stands for none"
        )
    ordered = blocks.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError(f"{name}: a query names the same block twice; name it once and put -1 for the other")


@stackable()
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact causal attention over the union of the blocks that each query names.

    Query i stands at position S - T + i and sees the tokens up to its own in its blocks; block j holds the tokens
    from j·block on. q [B, T, H, K]; k [B, S, G, K] and v [B, S, G, V], where head h reads group h·G//H; blocks
    [B, T, C, M] int64, each once, -1 for none, where head h follows chooser h·C//H; scale K**-0.5 unless given.
    Returns [B, T, H, V] in v's dtype and the log-sum-exp of the scores [B, T, H] in float32 or float64, by which
    disjoint sets of keys are joined; zeros and -inf for a query that sees nothing.
    """
    name = "routed_attention"
    require_axes(name, "q", q, "[B, T, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    require_axes(name, "blocks", blocks, "[B, T, C, M]")
    batch, time, heads, key = q.shape
    keys, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, keys, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, keys, groups, v.shape[-1]), "[B, S, G, V]")
    require_shape(name, "blocks", blocks, (batch, time, *blocks.shape[2:]), "[B, T, C, M]")
    require_groups(name, heads, blocks.shape[2])
    require_groups(name, blocks.shape[2], groups)
    if keys < time:
        raise ValueError(
            f"{name}: {keys} keys for {time} queries; pass at least one key a query, aligned at the end"
        )
    _require_blocks(name, blocks, block, keys)
    scale = key**-0.5 if scale is None else scale
    implementation = resolve(backend, name, q, k, v, blocks, widths={"K": key, "V": v.shape[-1]}, like=v)
    if implementation == "triton":
        from kernels.routed_attention import triton

        return triton.routed_attention(q, k, v, blocks, block, scale)
    if implementation == "chunked":
        output, sums = chunked.routed_attention(q, k, v, blocks, block, scale)
        if not is_poisoned(output):
            return output, sums
    return reference.routed_attention(q, k, v, blocks, block, scale)


@stackable()
def routed_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block: int,
    length: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One query over the tokens before `length` in the blocks of a cache that it names; no other slot is touched.

    q [B, H, K]; k [B, S, G, K] and v [B, S, G, V], S ≥ length ≥ 1; blocks [B, C, M]; the rest, and what is returned
    ([B, H, V] and [B, H]), as in `routed_attention`. Where a gradient is asked for, PyTorch answers.
    """
    name = "routed_attention_step"
    require_axes(name, "q", q, "[B, H, K]")
    require_axes(name, "k", k, "[B, S, G, K]")
    require_axes(name, "v", v, "[B, S, G, V]")
    require_axes(name, "blocks", blocks, "[B, C, M]")
    batch, heads, key = q.shape
    slots, groups = k.shape[1:3]
    require_shape(name, "k", k, (batch, slots, groups, key), "[B, S, G, K]")
    require_shape(name, "v", v, (batch, slots, groups, v.shape[-1]), "[B, S, G, V]")
    require_shape(name, "blocks", blocks, (batch, *blocks.shape[1:]), "[B, C, M]")
    require_groups(name, heads, blocks.shape[1])
    require_groups(name, blocks.shape[1], groups)
    if not 1 <= length <= slots:
        raise ValueError(
            f"{name}: length={length} lies outside the {slots} slots; pass a number from 1 to {slots}"
        )
    _require_blocks(name, blocks, block, length)
    scale = key**-0.5 if scale is None else scale
    widths = {"K": key, "V": v.shape[-1]}
    implementation = resolve(backend, name, q, k, v, blocks, widths=widths, kernel="step", like=v)
    if implementation == "triton" and not wants_gradient(q, k, v):
        from kernels.routed_attention import triton

        return triton.step(q, k, v, blocks, block, length, scale)
    step = reference.step if implementation == "reference" else chunked.step
    return step(q, k, v, blocks, block, length, scale)

"""Softmax attention over chosen blocks in large operations: queries that chose the same block stand together.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, C groups of heads that choose together,
R = H/C, M blocks that a query names, n blocks in S, K key, V value, P = B·T·C·M pairs of a chooser and a block,
N tiles of Q pairs with the same block. After arXiv:2502.13189.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.backend import working_dtype

LN_2 = math.log(2.0)

TILE_ROWS = 32
"""Rows of queries in a tile: enough to keep a matrix product busy, few enough to leave little of it empty."""

FAR = 1e30
"""What a token loses in its score for each place that it stands ahead of the query: exp makes it nought."""

SLAB_ELEMENTS = 2**18
"""Scores that a CPU works on at once: what belongs to them must stay in a core's cache."""

KEPT_SCORES = 2**23
"""Up to so many weights are kept for the backward pass; more are made again."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Where every pair stands, and what its tile reads. Empty places read the first pair, and nobody reads them."""

    pairs: Tensor
    """[N · Q]: the pair in each place."""
    empty: Tensor
    """[N · Q]"""
    blocks: Tensor
    """[N]: the block of each tile, numbered through batch and groups."""
    places: Tensor
    """[P]: the place of each pair, or N · Q for one that names no block, or a block that lies ahead."""
    within: Tensor
    """[N', Q, 1, 1]: where in its block the query stands, for the first N' tiles; the others see all of their block."""
    slabs: tuple[slice, ...]
    """The tiles by parts that are worked on at once."""

    @property
    def size(self) -> int:
        """Q."""
        return self.pairs.shape[0] // self.blocks.shape[0]

    def own(self, slab: slice) -> slice:
        """The places of a part of the tiles."""
        return slice(slab.start * self.size, slab.stop * self.size)


def _slabs(count: int, each: int, device: torch.device) -> tuple[slice, ...]:
    """Parts of `count` things with `each` numbers that fit a CPU's cache; elsewhere all of them."""
    size = max(1, SLAB_ELEMENTS // each) if device.type == "cpu" else count
    return tuple(slice(start, min(count, start + size)) for start in range(0, count, size))


def _tile(bucket: Tensor, buckets: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by bucket [P]: the pair in each place, -1 in an empty one, the bucket of each tile, the place of each pair.

    Pairs in bucket number `buckets` get the place after the last.
    """
    order = bucket.argsort(stable=True)
    counts = torch.bincount(bucket, minlength=buckets + 1)
    tiles = (counts + size - 1) // size
    tiles[buckets] = 0
    # One tile at the least, so that nothing below must ask whether there is any.
    tiles[:1].clamp_(min=1)
    ends = tiles.cumsum(0)
    # From the rank among all pairs to the place, for each bucket.
    shift = (ends - tiles) * size - (counts.cumsum(0) - counts)
    sorted_bucket = bucket[order]
    place = torch.arange(bucket.shape[0], device=bucket.device) + shift[sorted_bucket]
    place = place.masked_fill(sorted_bucket == buckets, int(ends[-1]) * size)
    pairs = bucket.new_full((int(ends[-1]) * size + 1,), -1).index_copy_(0, place, order)[:-1]
    places = torch.empty_like(bucket).index_copy_(0, order, place)
    owner = torch.arange(buckets + 1, device=bucket.device).repeat_interleave(tiles)
    return pairs, owner, places


def _cut(x: Tensor, block: int) -> Tensor:
    """[B, S, G, D] → [B · G · n, block, D], noughts behind the last token."""
    spare = -x.shape[1] % block
    x = pad(x, (0, 0, 0, 0, 0, spare)) if spare else x
    return x.transpose(1, 2).reshape(-1, block, x.shape[-1])


def _weigh(queries: Tensor, keys: Tensor, tiles: Tiles, slab: slice, shared: int) -> Tensor:
    """Scores [N, Q · R, block] of a part of the tiles, from queries [N · Q, R, K]."""
    queries = queries.view(slab.stop - slab.start, -1, queries.shape[-1])
    scores = torch.bmm(queries, keys.index_select(0, tiles.blocks[slab]).mT)
    within = tiles.within[slab]
    if len(within):
        token = torch.arange(keys.shape[1], device=keys.device, dtype=keys.dtype)
        # An addition: filling by a mask takes ten times as long on a CPU.
        ahead = (within - token).clamp_(max=0.0).mul_(FAR)
        scores[: len(within)].view(len(within), tiles.size, shared, -1).add_(ahead)
    return scores


class _Attend(torch.autograd.Function):
    """Rows of queries [P / M, R, K], blocks of keys [n, block, K] and of values [n, block, V] to outputs and sums.

    Written by hand, because autograd would keep every stage of the scores. With scores S, sums L and weights
    W = exp(S - L) the gradient of S is W (dO·v - dO·o + dL). Inside, scores and sums are to the base of 2: where
    weights vanish, exp takes ten times as long as exp2 on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, values: Tensor, tiles: Tiles, named: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows = rows * (scale / LN_2)
        shared, width = rows.shape[1], values.shape[-1]
        # One place more than there are, for the pairs that have none.
        mixed = values.new_empty(len(tiles.pairs) + 1, shared, width)
        weight, peaks = values.new_empty(2, len(tiles.pairs) + 1, shared).unbind()
        mixed[-1], weight[-1], peaks[-1] = 0.0, 0.0, -torch.inf
        source = tiles.pairs // named
        keeps = any(ctx.needs_input_grad) and len(source) * shared * keys.shape[1] <= KEPT_SCORES
        kept: list[Tensor] = []
        for slab in tiles.slabs:
            own = tiles.own(slab)
            scores = _weigh(rows.index_select(0, source[own]), keys, tiles, slab, shared)
            torch.amax(scores, -1, out=peaks[own].view(scores.shape[:2]))
            scores.sub_(peaks[own].view(*scores.shape[:2], 1)).exp2_()
            torch.sum(scores, -1, out=weight[own].view(scores.shape[:2]))
            near = values.index_select(0, tiles.blocks[slab])
            torch.bmm(scores, near, out=mixed[own].view(*scores.shape[:2], width))
            kept += [scores] if keeps else []
        top = peaks.index_select(0, tiles.places).view(-1, named, shared).amax(1)
        none = top == -torch.inf
        top = top.masked_fill(none, 0.0)
        output, total = values.new_empty(*rows.shape[:2], width), torch.empty_like(top)
        for some in _slabs(len(rows), shared * named * width, rows.device):
            places = tiles.places[some.start * named : some.stop * named]
            part = peaks.index_select(0, places).view(-1, named, shared).sub_(top[some].unsqueeze(1)).exp2_()
            torch.sum(part * weight.index_select(0, places).view(part.shape), 1, out=total[some])
            pieces = mixed.index_select(0, places).view(*part.shape, width)
            torch.sum(pieces.mul_(part.unsqueeze(-1)), 1, out=output[some])
        output /= total.masked_fill(none, 1.0).unsqueeze(-1)
        # Of nothing the logarithm is -inf.
        sums = top + total.log2()
        ctx.save_for_backward(rows, keys, values, output, sums, peaks, *kept)
        ctx.tiles, ctx.source, ctx.named, ctx.scale = tiles, source, named, scale
        return output, sums * LN_2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, output, sums, peaks, *kept = ctx.saved_tensors
        tiles, source, shared = ctx.tiles, ctx.source, rows.shape[1]
        none = sums == -torch.inf
        rest = (to_output * output).sum(-1) - to_sums.masked_fill(none, 0.0)
        sums = sums.masked_fill(none, 0.0)
        back = rows.new_empty(len(tiles.pairs) + 1, *rows.shape[1:])
        back[-1] = 0.0
        to_rows, to_keys, to_values = (torch.zeros_like(x) for x in (rows, keys, values))
        for number, slab in enumerate(tiles.slabs):
            own, blocks = tiles.own(slab), tiles.blocks[slab]
            many = (slab.stop - slab.start, -1)
            queries = rows.index_select(0, source[own])
            whole = sums.index_select(0, source[own]).masked_fill_(tiles.empty[own, None], torch.inf)
            if kept:
                weights = kept[number] * (peaks[own] - whole).exp2_().view(*many, 1)
            else:
                scores = _weigh(queries, keys, tiles, slab, shared)
                weights = scores.sub_(whole.view(*many, 1)).exp2_()
            near = to_output.index_select(0, source[own]).view(*many, output.shape[-1])
            to_values.index_add_(0, blocks, torch.bmm(weights.mT, near))
            to_scores = torch.bmm(near, values.index_select(0, blocks).mT)
            to_scores.sub_(rest.index_select(0, source[own]).view(*many, 1)).mul_(weights)
            to_keys.index_add_(0, blocks, torch.bmm(to_scores.mT, queries.view(*many, keys.shape[-1])))
            to_queries = back[own].view(*many, keys.shape[-1])
            torch.bmm(to_scores, keys.index_select(0, blocks), out=to_queries)
        for some in _slabs(len(rows), shared * ctx.named * keys.shape[-1], rows.device):
            places = tiles.places[some.start * ctx.named : some.stop * ctx.named]
            pieces = back.index_select(0, places).view(-1, ctx.named, *rows.shape[1:])
            torch.sum(pieces, 1, out=to_rows[some])
        return to_rows * ctx.scale, to_keys * LN_2, to_values, None, None, None


def _arrange(
    blocks: Tensor, first: int, groups: int, count: int, block: int, shared: int, dtype: torch.dtype
) -> Tiles:
    """The tiles of blocks [B, T, C, M] whose first query stands at `first`; those of the queries' own blocks lead."""
    batch, time, choosers, named = blocks.shape
    device, everything = blocks.device, batch * groups * count
    position = torch.arange(first, first + time, device=device)
    here = (position // block)[:, None, None]
    void = (blocks < 0) | (blocks > here)
    home = torch.arange(batch, device=device)[:, None] * groups
    home = home + torch.arange(choosers, device=device) * groups // choosers
    bucket = home[:, None, :, None] * count + blocks
    bucket = torch.where(blocks == here, bucket, bucket + everything).masked_fill_(void, 2 * everything)
    size = max(1, TILE_ROWS // shared)
    pairs, owner, places = _tile(bucket.flatten(), 2 * everything, size)
    empty = pairs < 0
    cut = int((owner < everything).sum())
    within = position[pairs[: cut * size] // (named * choosers) % time] % block
    within = within.masked_fill_(empty[: cut * size], block).to(dtype)
    return Tiles(
        pairs=pairs.clamp(min=0),
        empty=empty,
        blocks=owner % everything,
        places=places,
        within=within.view(-1, size, 1, 1),
        slabs=_slabs(len(owner), size * shared * block, device),
    )


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """All queries at once; shapes as in `ops.routed_attention`."""
    dtype = working_dtype(q, k, v)
    batch, time, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    choosers, named = blocks.shape[2:]
    shared = heads // choosers
    with torch.autocast(q.device.type, enabled=False):
        tiles = _arrange(blocks, keys - time, groups, -(-keys // block), block, shared, dtype)
        rows = q.to(dtype).reshape(batch * time * choosers, shared, -1)
        pieces = (rows, _cut(k.to(dtype), block), _cut(v.to(dtype), block))
        output, sums = _Attend.apply(*pieces, tiles, named, scale)  # type: ignore[no-untyped-call]
        return output.view(batch, time, heads, -1).to(v.dtype), sums.view(batch, time, heads)


def step(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One query q [B, H, K] over its blocks [B, C, M]: their tokens are gathered first, no other is touched."""
    dtype, device = working_dtype(q, k, v), q.device
    choosers, groups = blocks.shape[1], k.shape[2]
    with torch.autocast(device.type, enabled=False):
        token = (blocks.unsqueeze(-1) * block + torch.arange(block, device=device)).flatten(2)
        seen = (token >= 0) & (token < length)
        none = ~seen.any(-1)
        # What is not there is read from a token that is, and its weight is nought.
        spare = token.masked_fill(~seen, -1).amax(-1, keepdim=True).clamp(min=0)
        at = (
            torch.arange(q.shape[0], device=device)[:, None, None],
            torch.where(seen, token, spare),
            torch.arange(choosers, device=device)[:, None] * groups // choosers,
        )
        keys, values = k[at].to(dtype), v[at].to(dtype)
        scores = torch.einsum("bcrk,bcsk->bcrs", q.to(dtype).unflatten(1, (choosers, -1)), keys) * scale
        hidden = ~seen.unsqueeze(2) & ~none[..., None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        output = torch.einsum("bcrs,bcsv->bcrv", scores.softmax(-1), values)
        output = output.masked_fill(none[..., None, None], 0.0)
        sums = scores.logsumexp(-1).masked_fill(none.unsqueeze(-1), -torch.inf)
        return output.flatten(1, 2).to(v.dtype), sums.flatten(1)

"""Attention over listed blocks of keys by gathers and explicit products, a few blocks of queries at a time.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value, N query blocks of c, M key
blocks of d listed for each, I lists, P the sets of keys that are gathered (G, or H where every head has a list),
R = H/P, n the query blocks of one tile, L = M d.
After arXiv:2004.05150 and 2007.14062; the backward pass recomputes the weights as FlashAttention-2, arXiv:2307.08691.

Scores exist for one tile at a time, and where they are many again in the backward pass; what is then kept between are
the inputs, the outputs, and the maximum and the sum of each row. The two are kept apart, because the logarithm of a
sum near 10⁴ has no digits left for the weights. Powers are of two and masks are added, because on a CPU both are
several times faster than powers of e and filling.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.backend import working_dtype

TILE_SCORES = 2**18
"""Scores of one tile on a CPU: what is worked on must stay in a core's cache."""

WIDE_TILE_SCORES = 2**25
"""On other devices, where a tile costs launches."""

KEPT_SCORES = 2**23
"""Up to so many weights are kept for the backward pass; more are made again."""

NEVER = 2**30
"""The position of a key that nobody sees; differences of two positions fit 32 bits."""


class _Tile(NamedTuple):
    """Query blocks and texts that are worked on together, and the keys that they gather."""

    at: tuple[slice, slice]
    rows: Tensor
    """[n, B, P, M]: rows of the folded keys."""
    keys: Tensor
    """[n, I, L]: the positions of those keys."""


class _Plan:
    """Which keys each query block gathers, and which of them each query sees."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        positions: Tensor,
        block: int,
        key_block: int,
        first: int,
        window: int | None,
    ) -> None:
        batch, time, self.heads, _ = q.shape
        self.groups, lists = k.shape[2], index.shape[0]
        self.sets = self.groups if lists in (1, self.groups) else self.heads
        self.block, self.key_block = block, key_block
        self.window = None if window is None else min(window, NEVER)
        self.front, self.count = first % block, index.shape[1]
        self.back = self.count * block - self.front - time
        self.key_back = -k.shape[1] % key_block
        blocks = (k.shape[1] + self.key_back) // key_block
        start = torch.arange(self.count, device=q.device, dtype=torch.int32) * block + first - self.front
        self.queries = start[:, None] + torch.arange(block, device=q.device, dtype=torch.int32)
        where = pad(positions.to(torch.int32), (0, self.key_back), value=NEVER).view(blocks, key_block)
        listed = index.transpose(0, 1)
        # [N, I, M, d]: an absent block lies where nobody sees it.
        keys = where[listed.clamp(min=0)].masked_fill(listed.unsqueeze(-1) < 0, NEVER)
        group = torch.arange(self.sets, device=q.device) * self.groups // self.sets
        row = (torch.arange(batch, device=q.device)[:, None] * self.groups + group) * blocks
        rows = listed.clamp(min=0).unsqueeze(1) + row.unsqueeze(-1)
        length = rows.shape[-1] * key_block
        self.scores_in_all = batch * self.heads * self.count * block * length
        # Of a tile's scores, its gathered keys and its gathered values the largest.
        widest = max(q.shape[-1], v.shape[-1])
        scores = self.sets * length * max(self.heads // self.sets * block, widest)
        most = max(1, (TILE_SCORES if q.device.type == "cpu" else WIDE_TILE_SCORES) // scores)
        texts, together = min(batch, most), max(1, most // batch)
        self.tiles = [
            _Tile(
                (slice(at, end), slice(text, min(text + texts, batch))),
                rows[at:end, text : text + texts],
                keys[at:end],
            )
            for at in range(0, self.count, together)
            for end in (min(at + together, self.count),)
            for text in range(0, batch, texts)
        ]
        self.tiles = [_without_absent(tile, listed[tile.at[0]]) for tile in self.tiles]

    def fold_queries(self, x: Tensor) -> Tensor:
        """[B, T, H, *] → [N, B, P, R c, *]."""
        if self.front or self.back:
            x = pad(x, (0, 0) * (x.dim() - 2) + (self.front, self.back))
        x = x.unflatten(1, (self.count, self.block)).unflatten(3, (self.sets, -1))
        return x.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).flatten(3, 4)

    def unfold_queries(self, x: Tensor) -> Tensor:
        """[N, B, P, R c, *] → [B, T, H, *]."""
        x = x.unflatten(3, (-1, self.block)).movedim((1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
        x = x.flatten(3, 4).flatten(1, 2)
        return x[:, self.front : x.shape[1] - self.back]

    def fold_keys(self, x: Tensor) -> Tensor:
        """[B, S, G, D] → [B G S/d, d D]."""
        if self.key_back:
            x = pad(x, (0, 0, 0, 0, 0, self.key_back))
        return x.transpose(1, 2).reshape(-1, self.key_block * x.shape[-1])

    def unfold_keys(self, x: Tensor, batch: int, width: int) -> Tensor:
        """[B G S/d, d D] → [B, S, G, D]."""
        x = x.view(batch, self.groups, -1, width).transpose(1, 2)
        return x[:, : x.shape[1] - self.key_back]

    def gather(self, x: Tensor, tile: _Tile) -> Tensor:
        """The listed keys of a tile: [n B P, L, D]."""
        count, listed = tile.rows[..., 0].numel(), tile.rows.shape[-1] * self.key_block
        return x.index_select(0, tile.rows.flatten()).view(count, listed, -1)

    def scatter(self, into: Tensor, x: Tensor, tile: _Tile) -> None:
        """Add what belongs to the listed keys, [n B P, L, D], where they were taken from."""
        into.index_add_(0, tile.rows.flatten(), x.view(-1, into.shape[1]))

    def mask(self, tile: _Tile, dtype: torch.dtype) -> Tensor:
        """[n, 1, I or 1, 1, c, L]: nought where a query sees a key, -inf elsewhere."""
        queries, keys = self.queries[tile.at[0]], tile.keys
        distance = queries[:, None, None, None, :, None] - keys[:, None, :, None, None]
        hidden = distance.clamp(-1, 0)
        if self.window is not None:
            hidden = torch.minimum(hidden, distance.neg_().add_(self.window - 1).clamp_(-1, 0))
        # From 0 and -1 to 0 and -inf, in several passes that are together faster than one choice by condition.
        return hidden.to(dtype).add_(1).reciprocal_().neg_().add_(1)

    def scores(self, q: Tensor, k: Tensor, tile: _Tile) -> Tensor:
        """Queries [n B P, R c, K], already scaled, against gathered keys [n B P, L, K], -inf where hidden."""
        scores = torch.bmm(q, k.mT)
        square = scores.view(*tile.rows.shape[:2], self.sets, self.heads // self.sets, self.block, k.shape[1])
        square.add_(self.mask(tile, scores.dtype))
        return scores


def _without_absent(tile: _Tile, listed: Tensor) -> _Tile:
    """The tile without the columns in which none of its lists [n, I, M] names a block, and its keys [n, I, M, d] in a row.

    Elsewhere than on a CPU the question would stall the device, and the columns stay.
    """
    used = (listed >= 0).flatten(0, 1).any(0) if listed.device.type == "cpu" else None
    if used is None or torch.compiler.is_compiling() or used.all() or not used.any():
        return tile._replace(keys=tile.keys.flatten(2))
    return tile._replace(rows=tile.rows[..., used], keys=tile.keys[:, :, used].flatten(2))


class _Attend(torch.autograd.Function):
    """Folded queries [N, B, P, R c, K], keys and values [B G S/d, d D] → outputs and log-sum-exps, folded as queries."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float
    ) -> tuple[Tensor, Tensor]:
        # Scores in units of ln 2.
        base = scale / math.log(2)
        output = q.new_empty(*q.shape[:-1], v.shape[1] // plan.key_block)
        most, total = q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])
        kept: list[Tensor] = []
        for tile in plan.tiles:
            rows = q[tile.at].flatten(0, 2)
            scores = plan.scores(rows * base, plan.gather(k, tile), tile)
            # A row that sees nothing has no maximum; nought in its place makes its weights nought.
            high = scores.amax(-1, keepdim=True)
            high.masked_fill_(high == -torch.inf, 0.0)
            weights = scores.sub_(high).exp2_()
            summed = weights.sum(-1, keepdim=True)
            weights.div_(summed.masked_fill(summed == 0, 1.0))
            output[tile.at] = torch.bmm(weights, plan.gather(v, tile)).view_as(output[tile.at])
            if plan.scores_in_all <= KEPT_SCORES and any(ctx.needs_input_grad):
                kept.append(weights)
            most[tile.at], total[tile.at] = high.view_as(most[tile.at]), summed.view_as(total[tile.at])
        ctx.save_for_backward(q, k, v, output, most, total, *kept)
        ctx.plan, ctx.scale = plan, scale
        return output, (most + total.log2()) * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, output, most, total, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with torch.autocast(q.device.type, enabled=False):
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            grad_output = grad_output.contiguous()
            lost = (grad_output * output).sum(-1).sub_(grad_sum)
            share = total.masked_fill(total == 0, 1.0).reciprocal()
            for number, tile in enumerate(plan.tiles):
                rows, keys = q[tile.at].flatten(0, 2), plan.gather(k, tile)
                if kept:
                    weights = kept[number]
                else:
                    weights = plan.scores(rows * (ctx.scale / math.log(2)), keys, tile)
                    weights.sub_(most[tile.at].flatten(0, 2)[..., None]).exp2_()
                    weights.mul_(share[tile.at].flatten(0, 2)[..., None])
                outward = grad_output[tile.at].flatten(0, 2)
                plan.scatter(grad_v, torch.bmm(weights.mT, outward), tile)
                inward = torch.bmm(outward, plan.gather(v, tile).mT).sub_(
                    lost[tile.at].flatten(0, 2)[..., None]
                )
                inward.mul_(weights)
                grad_q[tile.at] = torch.bmm(inward, keys).mul_(ctx.scale).view_as(grad_q[tile.at])
                plan.scatter(grad_k, torch.bmm(inward.mT, rows), tile)
        return grad_q, grad_k.mul_(ctx.scale), grad_v, None, None


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    positions: Tensor,
    block: int,
    key_block: int,
    first: int,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All queries, a tile of blocks at a time; index [I, N, M], positions [S]; else as in `ops.block_attention`."""
    dtype, out_dtype = working_dtype(q, k, v), v.dtype
    plan = _Plan(q, k, v, index, positions, block, key_block, first, window)
    with torch.autocast(q.device.type, enabled=False):
        queries = plan.fold_queries(q.to(dtype)).contiguous()
        keys, values = plan.fold_keys(k.to(dtype)), plan.fold_keys(v.to(dtype))
        output, total = _Attend.apply(queries, keys, values, plan, scale)  # type: ignore[no-untyped-call]
        return plan.unfold_queries(output).to(out_dtype), plan.unfold_queries(total)


def step(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query over the listed slots [I, L] of a cache; as in `ops.block_attention_step`."""
    dtype = working_dtype(q, k, v)
    groups = k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        listed = slots.clamp(min=0)
        if slots.shape[0] == 1:
            keys, values = (x.index_select(1, listed[0]).transpose(1, 2) for x in (k, v))
        else:
            group = torch.arange(slots.shape[0], device=k.device)[:, None] * groups // slots.shape[0]
            keys, values = (x[:, listed, group] for x in (k, v))
        queries = q.to(dtype).unflatten(1, (keys.shape[1], -1))
        scores = (queries @ keys.to(dtype).mT).mul(scale)
        scores = scores.masked_fill((slots < 0).view(slots.shape[0], 1, -1), -torch.inf)
        high = scores.amax(-1, keepdim=True).detach()
        high = high.masked_fill(high == -torch.inf, 0.0)
        weights = (scores - high).exp()
        summed = weights.sum(-1, keepdim=True)
        nothing = summed == 0
        output = weights @ values.to(dtype) / summed.masked_fill(nothing, 1.0)
        total = (high + summed.masked_fill(nothing, 1.0).log()).masked_fill(nothing, -torch.inf)
        return output.view(*q.shape[:2], -1).to(v.dtype), total.view(q.shape[:2])

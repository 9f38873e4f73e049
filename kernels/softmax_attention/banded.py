"""Attention through a window on a CPU: blocks of queries, each over a view of the keys that stand in its reach.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value, D either,
P keys that all see, n blocks of c queries, L = r + c keys of a block's span: its own behind those of its reach, which c divides.
The window after arXiv:2004.05150 and 2310.06825; the backward pass is that of FlashAttention-2, arXiv:2307.08691.

By hand, because what a window costs beside its products is passes over the scores and copies: the mask is what a
product begins with, powers are of two (on a CPU half as dear as powers of e), outputs are divided by the sums and
not the weights, and keys are neither gathered nor, where a tile lies within one text and group, copied.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.backend import working_dtype

QUERY_BLOCK, NARROW_BLOCK = 32, 16
"""Queries of a block, and where the window is no wider than that: more see too little of its span, fewer make its
products too small."""

SQUARE = 128
"""Up to so many keys, all of which are seen, are one block."""

TILE_SCORES = 2**19
"""Scores that are worked on at once: more leave a core's cache, fewer cost calls."""

JOINED_SCORES = 2**17
"""The same where they are of several texts or groups, whose keys are then copied."""

KEPT_SCORES = 2**23
"""Up to so many weights are kept for the backward pass; more are made again."""

Tile = tuple[slice, slice, slice]
"""Texts, groups and blocks that are worked on together."""


def _parts(count: int, size: int) -> list[slice]:
    """0 … count in parts of `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Plan:
    """How tokens are cut into blocks, and which blocks are worked on together."""

    def __init__(self, q: Tensor, k: Tensor, window: int, pinned: int) -> None:
        batch, self.time, heads, _ = q.shape
        self.pinned, keys, self.groups = pinned, k.shape[1] - pinned, k.shape[2]
        self.shared = heads // self.groups
        past, block = keys - self.time, QUERY_BLOCK if window > QUERY_BLOCK else NARROW_BLOCK
        if window >= keys and keys <= SQUARE:
            block = keys
        self.block = block = min(block, self.time)
        self.count = -(-self.time // block)
        self.reach = -(-min(window - 1, past + (self.count - 1) * block) // block) * block
        self.span = self.reach + block
        # Keys behind the reach of the first query are left out; where it reaches before the text there are noughts.
        self.cut, self.front = max(0, past - self.reach), max(0, self.reach - past)
        self.back = self.count * block - self.time
        each = self.shared * block * self.span
        blocks, row = min(self.count, max(1, TILE_SCORES // each)), each * self.count
        groups = max(1, min(self.groups, JOINED_SCORES // row))
        texts = max(1, JOINED_SCORES // (row * self.groups))
        self.tiles: list[Tile] = [
            (text, group, at)
            for text in _parts(batch, texts)
            for group in _parts(self.groups, groups)
            for at in _parts(self.count, blocks)
        ]
        self.kept = batch * self.groups * row <= KEPT_SCORES
        query = torch.arange(self.reach, self.span, device=q.device).repeat(self.shared).unsqueeze(1)
        slot = torch.arange(self.span, device=q.device)
        hidden = (slot > query) | (slot <= query - window)
        self.mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        """[R c, L]: -inf where a query does not see a slot of its block's span."""
        edge = torch.arange(-(-self.front // block), device=q.device)[:, None, None] * block
        self.before = edge + slot < self.front
        """[some, 1, L]: what lies before the text, in the first blocks."""

    def whole(self, x: Tensor) -> Tensor:
        """[B, T, …] → [B, n c, …]."""
        return pad(x, (0, 0) * (x.dim() - 2) + (0, self.back)) if self.back else x

    def by_block(self, x: Tensor) -> Tensor:
        """[B, n c, H, D] → a view [B, G, n, R, c, D]."""
        x = x.unflatten(2, (self.groups, self.shared)).unflatten(1, (self.count, self.block))
        return x.permute(0, 3, 1, 4, 2, 5)

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The queries of a tile, of [B, G, n, R, c, D]: [blocks, R c, D], a view where it can be one."""
        return x[tile].reshape(-1, self.shared * self.block, x.shape[-1])

    def fold(self, x: Tensor) -> Tensor:
        """Keys [B, S, G, D] → [B, G, r + n c, D], without those that all see."""
        return pad(x[:, self.pinned + self.cut :].transpose(1, 2), (0, 0, self.front, self.back))

    def unfold(self, x: Tensor, pins: Tensor) -> Tensor:
        """[B, G, r + n c, D] and [B, G, P, D] → [B, S, G, D]."""
        x = x[:, :, self.front : x.shape[2] - self.back]
        x = pad(x, (0, 0, self.cut, 0)) if self.cut else x
        return (torch.cat([pins, x], dim=2) if self.pinned else x).transpose(1, 2)

    def pins(self, x: Tensor) -> Tensor:
        """Of keys [B, S, G, D] those that all see, [B, G, P, D]."""
        return x[:, : self.pinned].transpose(1, 2)

    def together(self, x: Tensor, tile: Tile) -> Tensor:
        """What is a tile's by block, [blocks, R c, D], by text and group: [texts · groups, rows, D]."""
        return x.reshape(-1, (tile[2].stop - tile[2].start) * x.shape[1], x.shape[-1])

    def far_scores(self, rows: Tensor, pins: Tensor, base: float, tile: Tile) -> Tensor:
        """As `scores`, against the keys that all see: [texts · groups, rows, P]."""
        return torch.bmm(self.together(rows, tile), pins[tile[:2]].flatten(0, 1).mT).mul_(base)

    def spans(self, x: Tensor, tile: Tile) -> Tensor:
        """The keys of a tile, of [B, G, r + n c, D], by block: [blocks, L, D]; they overlap."""
        texts, groups, at = tile
        x = x[texts, groups, at.start * self.block : (at.stop - 1) * self.block + self.span]
        return x.unfold(2, self.span, self.block).mT.reshape(-1, self.span, x.shape[-1])

    def add(self, into: Tensor, x: Tensor, tile: Tile) -> None:
        """Add what belongs to a tile's spans, [blocks, L, D], where they were taken from."""
        texts, groups, at = tile
        into = into[texts, groups].unflatten(2, (-1, self.block))
        pieces = x.view(*into.shape[:2], at.stop - at.start, -1, self.block, x.shape[-1])
        for number in range(pieces.shape[3]):
            into[:, :, at.start + number : at.stop + number].add_(pieces[:, :, :, number])

    def room(self, like: Tensor, *, whole: bool) -> list[Tensor]:
        """For every tile a place for its scores, [blocks, R c, L]: its own, or one and the same for all."""
        counts = [math.prod(part.stop - part.start for part in tile) for tile in self.tiles]
        each = self.mask.shape
        if whole:
            # In one piece, which a process gives back and takes again at a smaller cost than many.
            return list(like.new_empty(sum(counts), *each).split(counts))
        room = like.new_empty(max(counts), *each)
        return [room[:count] for count in counts]

    def scores(self, rows: Tensor, k: Tensor, base: float, tile: Tile, out: Tensor) -> Tensor:
        """Queries [blocks, R c, K] times `base` against the keys of their spans: [blocks, R c, L], -inf where hidden."""
        scores = torch.baddbmm(self.mask, rows, self.spans(k, tile).mT, alpha=base, out=out)
        at = tile[2]
        if at.start < len(self.before):
            own = self.before[at]
            first = scores.view(-1, at.stop - at.start, *scores.shape[1:])[:, : len(own)]
            first.masked_fill_(own, -torch.inf)
        return scores


class _Attend(torch.autograd.Function):
    """q [B, n c, H, K], k [B, S, G, K], v [B, S, G, V] → outputs [B, n c, H, V] and log-sum-exps [B, n c, H]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float
    ) -> tuple[Tensor, Tensor]:
        pins_k, pins_v, k, v = plan.pins(k), plan.pins(v), plan.fold(k), plan.fold(v)
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        most, total = q.new_empty(2, *q.shape[:-1], 1).unbind()
        queries, outputs, highs, sums = (plan.by_block(x) for x in (q, output, most, total))
        keeps = plan.kept and any(ctx.needs_input_grad)
        rooms, fars = plan.room(q, whole=keeps), []
        for tile, room in zip(plan.tiles, rooms, strict=True):
            # Scores in units of ln 2.
            base, rows = scale / math.log(2), plan.rows(queries, tile)
            weights = plan.scores(rows, k, base, tile, room)
            high = weights.amax(-1, keepdim=True)
            if plan.pinned:
                far = plan.far_scores(rows, pins_k, base, tile)
                high = torch.maximum(high, far.amax(-1).view_as(high))
            summed = weights.sub_(high).exp2_().sum(-1, keepdim=True)
            mixed = torch.bmm(weights, plan.spans(v, tile))
            if plan.pinned:
                far.sub_(plan.together(high, tile)).exp2_()
                summed += far.sum(-1).view_as(summed)
                plan.together(mixed, tile).baddbmm_(far, pins_v[tile[:2]].flatten(0, 1))
                fars += [far] if keeps else []
            mixed.div_(summed)
            for into, x in ((outputs, mixed), (highs, high), (sums, summed)):
                into = into[tile]
                into.copy_(x.view(into.shape))
        kept = [*rooms, *fars] if keeps else []
        ctx.save_for_backward(q, k, v, pins_k, pins_v, output, most, total, *kept)
        ctx.plan, ctx.scale = plan, scale
        return output, total.log2().add_(most).mul_(math.log(2)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, pins_k, pins_v, output, most, total, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with torch.autocast(q.device.type, enabled=False):
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            grads = [torch.zeros_like(x) for x in (pins_k, pins_v)]
            outward = grad_output / total
            lost = torch.linalg.vecdot(outward, output).unsqueeze(-1).sub_(grad_sums.unsqueeze(-1) / total)
            queries, highs, into, outward, lost = (plan.by_block(x) for x in (q, most, grad_q, outward, lost))
            rooms, again = plan.room(q, whole=False), kept or plan.room(q, whole=False)
            for number, tile in enumerate(plan.tiles):
                rows, near, weights = plan.rows(queries, tile), plan.rows(outward, tile), again[number]
                gone, base = plan.rows(lost, tile), ctx.scale / math.log(2)
                if not kept:
                    plan.scores(rows, k, base, tile, weights)
                    weights.sub_(plan.rows(highs, tile)).exp2_()
                plan.add(grad_v, torch.bmm(weights.mT, near), tile)
                inward = torch.bmm(near, plan.spans(v, tile).mT, out=rooms[number])
                inward.sub_(gone).mul_(weights)
                to_rows = torch.bmm(inward, plan.spans(k, tile))
                plan.add(grad_k, torch.bmm(inward.mT, rows), tile)
                if plan.pinned:
                    if kept:
                        far = kept[len(plan.tiles) + number]
                    else:
                        far = plan.far_scores(rows, pins_k, base, tile)
                        far.sub_(plan.together(plan.rows(highs, tile), tile)).exp2_()
                    rows, near, gone = (plan.together(x, tile) for x in (rows, near, gone))
                    own_k, own_v = (x[tile[:2]].flatten(0, 1) for x in (pins_k, pins_v))
                    inward = torch.bmm(near, own_v.mT).sub_(gone).mul_(far)
                    plan.together(to_rows, tile).baddbmm_(inward, own_k)
                    for grad, x in zip(grads, (inward.mT @ rows, far.mT @ near), strict=True):
                        own = grad[tile[:2]]
                        own += x.view(own.shape)
                own = into[tile]
                torch.mul(to_rows.view(own.shape), ctx.scale, out=own)
            to_k = plan.unfold(grad_k, grads[0]).mul_(ctx.scale)
        return grad_q, to_k, plan.unfold(grad_v, grads[1]), None, None


def banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, *, pinned: int = 0
) -> tuple[Tensor, Tensor]:
    """Every query over the last `window` keys up to its own: [B, T, H, V] and log-sum-exps [B, T, H], float32 at least.

    The first `pinned` keys, which come before all queries, are seen by all, and count in no window.
    """
    dtype = working_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    plan = _Plan(q, k, window, pinned)
    output, sums = _Attend.apply(plan.whole(q), k, v, plan, scale)  # type: ignore[no-untyped-call]
    return output[:, : plan.time], sums[:, : plan.time]

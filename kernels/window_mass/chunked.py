"""Windowed softmax attention and its mass, in blocks of queries over the blocks of keys that they reach.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value, w window,
n blocks of c queries, m blocks of keys before a query's own, L = (m + 1) c.
After the hybrid attention of LoLCATs, arXiv:2410.10254.

With p the weights of a row and M = 1 / max p its mass, ∂M/∂score_s = M (p_s − [s is the largest]).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.backend import working_dtype

LARGEST_BLOCK = 64
SMALLEST_BLOCK = 16
TILE_SCORES = 2**18
"""Scores of one tile on a CPU: what is worked on must stay in a core's cache."""
WIDE_TILE_SCORES = 2**25
"""On other devices, where a tile costs launches."""


class _Plan:
    """How queries and keys are cut into blocks, and which keys of its span a query sees."""

    def __init__(self, q: Tensor, k: Tensor, window: int) -> None:
        self.batch, self.time, heads, _ = q.shape
        self.keys, self.groups = k.shape[1:3]
        self.shared = heads // self.groups
        past = min(self.keys - self.time, window - 1)
        reach = min(window - 1, past + self.time - 1)
        rounded = -(-max(reach, 1) // SMALLEST_BLOCK) * SMALLEST_BLOCK
        self.block = min(LARGEST_BLOCK, rounded)
        self.before = -(-reach // self.block)
        self.count = -(-self.time // self.block)
        self.skipped = self.keys - self.time - past
        self.front = self.before * self.block - past
        self.back = self.count * self.block - self.time
        length = (self.before + 1) * self.block
        query = torch.arange(self.block, device=q.device)[:, None] + self.before * self.block
        slot = torch.arange(length, device=q.device)
        band = (slot <= query) & (slot > query - window)
        # Only the first blocks reach what lies in front of the text.
        edge = torch.arange(min(self.count, self.before + 1), device=q.device)[:, None, None] * self.block
        there = (slot >= self.front - edge) & band
        self.masks = [self._added(there, q), self._added(band[None], q)]
        most = TILE_SCORES if q.device.type == "cpu" else WIDE_TILE_SCORES
        together = max(1, most // (self.batch * heads * self.block * length))
        first = len(edge)
        cuts = [*range(0, first, together), *range(first, self.count, together), self.count]
        self.tiles = list(pairwise(cuts))

    @staticmethod
    def _added(seen: Tensor, q: Tensor) -> Tensor:
        """[n or 1, 1, 1, c, L]: nought where a key is seen, -inf elsewhere."""
        added = torch.zeros(seen.shape, dtype=working_dtype(q), device=q.device)
        return added.masked_fill(~seen, -torch.inf)[:, None, None]

    def mask(self, at: int, end: int) -> Tensor:
        """What is added to the scores of the blocks at … end - 1."""
        return self.masks[0][at:end] if at < self.masks[0].shape[0] else self.masks[1]

    def fold_queries(self, x: Tensor) -> Tensor:
        """[B, T, H, *] → [n, B G, R c, *]."""
        x = pad(x, (0, 0, 0, 0, 0, self.back)) if self.back else x
        x = x.unflatten(1, (self.count, self.block)).unflatten(3, (self.groups, self.shared))
        return x.permute(1, 0, 3, 4, 2, 5).reshape(
            self.count, self.batch * self.groups, self.shared * self.block, -1
        )

    def unfold_queries(self, x: Tensor) -> Tensor:
        """[n, B G, R c, *] → [B, T, H, *]."""
        x = x.view(self.count, self.batch, self.groups, self.shared, self.block, -1)
        x = x.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        return x[:, : self.time]

    def fold_keys(self, x: Tensor) -> Tensor:
        """[B, S, G, *] → [n + m, B G, c, *]."""
        x = pad(x[:, self.skipped :], (0, 0, 0, 0, self.front, self.back))
        x = x.unflatten(1, (self.count + self.before, self.block))
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)

    def unfold_keys(self, x: Tensor) -> Tensor:
        """[n + m, B G, c, *] → [B, S, G, *]."""
        x = x.unflatten(1, (self.batch, self.groups)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        x = x[:, self.front : x.shape[1] - self.back]
        return pad(x, (0, 0, 0, 0, self.skipped, 0)) if self.skipped else x

    def spans(self, x: Tensor, at: int, end: int) -> Tensor:
        """Of blocks [n + m, B G, c, *] those that each block of a tile reaches: [(end - at) B G, L, *]."""
        return torch.cat([x[at + one : end + one] for one in range(self.before + 1)], dim=2).flatten(0, 1)

    def add_spans(self, into: Tensor, x: Tensor, at: int, end: int) -> None:
        """Add [(end - at) B G, L, *] to where `spans` took it from."""
        x = x.unflatten(0, (end - at, -1))
        for one, part in enumerate(x.split(self.block, dim=2)):
            into[at + one : end + one] += part


class _Attend(torch.autograd.Function):
    """By hand, because autograd would keep the scores beside the weights, and every span."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        plan = _Plan(q, k, window)
        queries, keys, values = plan.fold_queries(q * scale), plan.fold_keys(k), plan.fold_keys(v)
        output = q.new_empty(*queries.shape[:3], v.shape[-1])
        mass = q.new_empty(*queries.shape[:3], 1)
        kept = []
        for at, end in plan.tiles:
            scores = torch.bmm(queries[at:end].flatten(0, 1), plan.spans(keys, at, end).mT)
            square = scores.view(end - at, -1, plan.shared, plan.block, scores.shape[-1])
            weights = square.add_(plan.mask(at, end)).view_as(scores).softmax(-1)
            kept.append(weights)
            mass[at:end] = weights.amax(-1, keepdim=True).reciprocal().unflatten(0, (end - at, -1))
            torch.bmm(weights, plan.spans(values, at, end), out=output[at:end].flatten(0, 1))
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(queries, keys, values, output, mass, *kept)
        return plan.unfold_queries(output), plan.unfold_queries(mass).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, mass_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        plan = ctx.plan
        queries, keys, values, output, mass, *kept = ctx.saved_tensors
        grad, mass_grad = plan.fold_queries(grad), plan.fold_queries(mass_grad.unsqueeze(-1)) * mass
        taken = (grad * output).sum(-1, keepdim=True) - mass_grad
        # Contiguous, as queries need not be: what is written through a flattened slice would be lost.
        grad_q = queries.new_empty(queries.shape)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for (at, end), weights in zip(plan.tiles, kept, strict=True):
            above = grad[at:end].flatten(0, 1)
            slope = torch.bmm(above, plan.spans(values, at, end).mT)
            slope = slope.sub_(taken[at:end].flatten(0, 1)).mul_(weights)
            place = weights.argmax(-1, keepdim=True)
            slope.scatter_add_(-1, place, mass_grad[at:end].flatten(0, 1).neg())
            torch.bmm(slope, plan.spans(keys, at, end), out=grad_q[at:end].flatten(0, 1))
            plan.add_spans(grad_k, torch.bmm(slope.mT, queries[at:end].flatten(0, 1)), at, end)
            plan.add_spans(grad_v, torch.bmm(weights.mT, above), at, end)
        return (
            plan.unfold_queries(grad_q) * ctx.scale,
            plan.unfold_keys(grad_k),
            plan.unfold_keys(grad_v),
            None,
            None,
        )


def window_mass(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """All queries, a tile of blocks at a time; shapes as in `ops.window_mass`."""
    dtype = working_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        output, mass = _Attend.apply(q.to(dtype), k.to(dtype), v.to(dtype), window, scale)  # type: ignore[no-untyped-call]
        return output.to(v.dtype).contiguous(), mass.contiguous()


def step(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query q [B, H, K] over k [B, S, G, K] and v [B, S, G, V], as `reference.step`."""
    dtype = working_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (k.shape[2], -1)) * scale
        weights = torch.matmul(grouped, k.to(dtype).permute(0, 2, 3, 1)).softmax(-1)
        read = torch.matmul(weights, v.to(dtype).transpose(1, 2))
        return read.flatten(1, 2).to(v.dtype), weights.amax(-1).reciprocal().flatten(1, 2)

"""A tree over the chunks of a growing text: which nodes there are, what a walk finds at each level, and their means.

Letters: B batch, T queries, S tokens, G key heads, K head width, F fan-out, N nodes, M nodes that a walk finds, E it enters.
Levels count from 0, the chunks, upwards; node i of a level holds the nodes i·F … i·F + F - 1 of the level below.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from search_space.routing import choose
from search_space.state import push

MANY_QUERIES, FEW_NODES = 16, 16
"""So many queries are compared with all nodes if these are at most so many times those that they find: that is faster."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a text of at most `tokens` tokens. A node exists once the last of its tokens is past."""

    chunk: int
    fan_out: int
    tokens: int

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Nodes of each level. A level above the chunks with a single node would tell nothing apart, and is left out."""
        counts = [self.tokens // self.chunk] if self.tokens >= self.chunk else []
        while counts and counts[-1] // self.fan_out > 1:
            counts.append(counts[-1] // self.fan_out)
        return tuple(counts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each level begins in a table of all nodes."""
        return tuple(sum(self.counts[:level]) for level in range(len(self.counts)))

    def span(self, level: int) -> int:
        """Tokens of a node."""
        return self.chunk * int(self.fan_out**level)

    def roots(self, level: int, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """First and end [T] of the nodes of a level that lie in none above, where so many chunks are past."""
        end = chunks // self.fan_out**level
        top = level == len(self.counts) - 1
        return torch.zeros_like(end) if top else end // self.fan_out * self.fan_out, end

    def found(self, level: int, chunks: Tensor, entered: Tensor | None) -> Tensor:
        """The nodes [B, T, G, M] of a level that a walk finds, in order: the children of those it entered above
        [B, T, G, E], and the roots; -1 for none. chunks [T] are past; without a level above roots alone, [1, T, 1, M].
        """
        first, end = self.roots(level, chunks)
        most = self.counts[level] if entered is None else self.fan_out - 1
        roots = first[:, None] + torch.arange(most, device=chunks.device)
        roots = roots.masked_fill(roots >= end[:, None], -1)[None, :, None]
        if entered is None:
            return roots
        children = entered.unsqueeze(-1) * self.fan_out + torch.arange(self.fan_out, device=chunks.device)
        children = children.masked_fill(entered.unsqueeze(-1) < 0, -1).flatten(-2)
        return torch.cat([children, roots.expand(*children.shape[:-1], -1)], dim=-1)

    def met(self, chunks: Tensor, enter: int) -> list[tuple[Tensor, Tensor]]:
        """How many nodes a walk finds and how many of them it enters, [T] each, by level from the top down."""
        found_and_entered: list[tuple[Tensor, Tensor]] = []
        entered = torch.zeros_like(chunks)
        for level in reversed(range(len(self.counts))):
            first, end = self.roots(level, chunks)
            found = entered * self.fan_out + end - first
            entered = found.clamp(max=enter)
            found_and_entered.append((found, entered))
        return found_and_entered

    @torch.no_grad()
    def walk(self, q: Tensor, table: Tensor, chunks: Tensor, enter: int) -> tuple[Tensor, Tensor]:
        """Walk down with queries [B, T, G, K] over a table of keys [B, N, G, K], entering the best `enter` of each level.

        Of equal nodes the earlier is entered. Returns the nodes that were found and not entered, by their places in
        the table [B, T, G, M], and the chunks that were entered [B, T, G, E]; -1 for none.
        """
        left, entered = [], None
        with torch.autocast(q.device.type, enabled=False):
            for level in reversed(range(len(self.counts))):
                found = self.found(level, chunks, entered).expand(*q.shape[:3], -1)
                # What is not there is read from a node that is, and not chosen.
                spare = found.amax(-1, keepdim=True).clamp(min=0)
                places = torch.where(found < 0, spare, found) + self.offsets[level]
                scores = compared(q, table, places)
                best = choose(scores.masked_fill(found < 0, -torch.inf), enter)
                none = best < 0
                entered = found.gather(-1, best.clamp(min=0)).masked_fill(none, -1).sort(-1).values
                # One place more than there are, for the choices that are none.
                slot = best.masked_fill(none, found.shape[-1])
                rest = pad(found, (0, 1)).scatter(-1, slot, -1)[..., :-1]
                left.append(torch.where(rest < 0, -1, rest + self.offsets[level]))
        assert entered is not None
        return torch.cat(left, dim=-1), entered

    def sizes(self, enter: int, device: torch.device) -> Tensor:
        """[M] tokens of the nodes that `walk` returns."""
        sizes: list[float] = []
        found = 0
        for level in reversed(range(len(self.counts))):
            found = min(enter, found) * self.fan_out + self.fan_out - 1 if sizes else self.counts[level]
            sizes += [float(self.span(level))] * found
        return torch.tensor(sizes, device=device)

    def table(self, x: Tensor) -> Tensor:
        """The means [B, N, G, K] of x [B, S, G, K] by node, S the tokens of the tree."""
        levels: list[Tensor] = []
        for _ in self.counts:
            levels.append(means(levels[-1], self.fan_out) if levels else means(x, self.chunk))
        return torch.cat(levels, dim=1) if levels else x[:, :0]

    def grow(self, table: Tensor, x: Tensor, start: int, end: int) -> None:
        """Write into a table the nodes that the tokens start … end - 1 of x [B, S, G, K] complete."""
        for level, offset in enumerate(self.offsets):
            first, last = start // self.span(level), end // self.span(level)
            if first == last:
                continue
            if level == 0:
                below = x[:, first * self.chunk : last * self.chunk]
            else:
                under = self.offsets[level - 1]
                below = table[:, under + first * self.fan_out : under + last * self.fan_out]
            push(table, means(below, self.fan_out if level else self.chunk), offset + first)


def compared(q: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """Products of queries [B, T, G, K] with the keys of a table [B, N, G, K] at places [B, T, G, M], in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype)
    if q.shape[1] >= MANY_QUERIES and table.shape[1] <= FEW_NODES * places.shape[-1]:
        return torch.einsum("btgk,bngk->btgn", q, table.to(dtype)).gather(-1, places)
    at = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    group = torch.arange(q.shape[2], device=q.device)[:, None]
    products: Tensor = (q.unsqueeze(3) @ table[at, places, group].to(dtype).mT).squeeze(3)
    return products


def means(x: Tensor, count: int) -> Tensor:
    """Of x [B, S, G, K] the means of every `count`, in float32 at least; what is left over at the end is left out."""
    whole = x.shape[1] // count
    wide = x[:, : whole * count].to(torch.promote_types(x.dtype, torch.float32))
    averaged: Tensor = wide.unflatten(1, (whole, count)).mean(2)
    return averaged

"""A memory whose slots sum up several tokens each: how they are made, kept, seen by segments, and what makes them good.

Letters: B batch, T time, D width, H heads, K head width, n segments of S tokens, M tokens of memory, c tokens of a slot,
N slots.  After the Compressive Transformer (arXiv:1911.05507).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.segments import InSegments, RelativeAttention, read_by_content, slots_at, spans
from search_space.state import KeyValue, append_ring, read_span

Pair = tuple[Tensor, Tensor]


class Squeeze(nn.Module):
    """A convolution of kernel and stride c over the inputs of a layer, and the geometry of its N slots."""

    def __init__(self, width: int, *, each: int, slots: int, segment: int, memory: int) -> None:
        super().__init__()
        self.each, self.slots, self.segment, self.memory = each, slots, segment, memory
        self.map = nn.Linear(each * width, width, bias=False)
        # A slot begins as the mean of its tokens.
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(width).repeat(1, each) / each)

    @property
    def kept(self) -> int:
        """Slots that a ring needs: those that are seen, and those whose tokens are still seen themselves."""
        return self.slots + (self.segment + self.memory) // self.each

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, T, D], the first of which opens a slot, to the inputs of whole slots [B, T // c, D]."""
        count = inputs.shape[1] // self.each
        groups = inputs[:, : count * self.each].reshape(inputs.shape[0], count, self.map.in_features)
        made: Tensor = self.map(groups)
        return made

    def grown(
        self, ring: KeyValue, waiting: Tensor, length: int, inputs: Tensor, new: Pair
    ) -> tuple[KeyValue, Tensor]:
        """The ring with new slots' keys and values, and the inputs of the open slot [B, c - 1, D], after `length` tokens."""
        if new[0].shape[1]:
            ring = append_ring(replace(ring, length=length // self.each), *new, self.kept)
        rest, opened = inputs.shape[1] % self.each, torch.zeros_like(waiting)
        opened[:, :rest] = inputs[:, inputs.shape[1] - rest :]
        return ring, opened

    def seen_by_token(self, ring: KeyValue, place: int) -> Pair:
        """Keys and values of the slots that the token at a place sees, in the order of time."""
        end = (place - place % self.segment - self.memory) // self.each
        return read_span(ring, end - slots_at(place, self.segment, self.memory, self.slots, self.each), end)

    def seen_by_segments(
        self, ring: KeyValue | None, start: int, new: Pair, count: int
    ) -> tuple[list[Tensor], Tensor]:
        """Keys and values [B, n, N, H, K] for `count` segments from the one of token `start` on, and which are there [n, N].

        `new` are those of the slots that the tokens from `start` on complete.
        """
        first, begin = start // self.segment, start // self.each
        size, before = self.segment // self.each, self.memory // self.each + self.slots
        if ring is not None:
            low = min(begin, max(0, first * size - before))
            past = read_span(ring, low, begin)
            new = (
                torch.cat([past[0].to(new[0].dtype), new[0]], 1),
                torch.cat([past[1].to(new[1].dtype), new[1]], 1),
            )
            begin = low
        old = [spans(part, begin, size, before, first, count)[:, :, : self.slots] for part in new]
        number = torch.arange(first, first + count, device=new[0].device)[:, None] * size - before
        return old, number + torch.arange(self.slots, device=new[0].device) >= 0

    def loss(self, attention: RelativeAttention, parts: InSegments, made: Tensor, time: int) -> Tensor:
        """How far a segment's reading of the tokens that left as it began is from its reading of their slots, squared.

        By content, with everything but the slots' inputs detached; the mean over the `time` tokens of a text, from its
        beginning, in whose segments something left.
        """
        size, count = self.segment, parts.queries.shape[1]
        leaving, device = self.memory + size, made.device
        with torch.autocast(device.type, enabled=False):
            old = [spans(part.detach(), 0, size, leaving, 0, count)[:, :, :size] for part in parts.new]
            short = []
            for layer in (attention.key, attention.value):
                mapped = F.linear(made.to(layer.weight.dtype), layer.weight.detach())
                heads = mapped.unflatten(-1, (attention.heads, -1))
                slots = spans(heads, 0, size // self.each, leaving // self.each, 0, count)
                short.append(slots[:, :, : size // self.each])
            begin = torch.arange(count, device=device)[:, None] * size - leaving
            there = begin + torch.arange(size, device=device) >= 0
            query = parts.queries.detach()
            wanted = read_by_content(query, old[0], old[1], there)
            error = wanted - read_by_content(query, short[0], short[1], there[:, :: self.each])
            places = torch.arange(count * size, device=device).view(count, size)
            asked = (begin + size > 0) & (places < time)
            return error.square().mean((-2, -1))[:, asked].mean()

"""Memory tokens: attention within a segment and over a few slots, which read each segment at its end and pass it on.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, n segments of S tokens, M slots.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.prefix_attention.ops import prefix_attention
from kernels.softmax_attention.ops import softmax_attention
from search_space.frame import Frame
from search_space.grouped import Grouped, fit_grouped, joined
from search_space.parts import Norm, attend_flops
from search_space.positions import Positions
from search_space.segments import count_segments, cut, default_segment, mean_seen, seen_at, wide
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, push

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MemoryTokens(MixerSpec):
    """The memory tokens of the recurrent memory transformer (RMT, arXiv:2207.06881) by layer, which is ours.

    RMT wraps a whole network: what its last layer makes of the memory tokens stands before the next segment at the
    input of the first. Here each layer carries slots of its own, and the layers do not wait for one another. A token
    sees the slots as they were written at the end of the segment before, or as they were learnt before the first,
    and its own segment up to itself. At the end of a segment the slots, normalised and through the projections of
    the tokens, read themselves and the whole segment, and add that to what they hold. They stand at the segment's
    beginning when they are read, and behind its end when they read. Gradients pass through all segments of a text.
    """

    name: ClassVar[str] = "memory_tokens"
    family: ClassVar[str] = "memory"
    source: ClassVar[str] = "by layer, which is ours, after Bulatov et al. 2022, arXiv:2207.06881"
    reach: ClassVar[Reach] = "state"

    segment: int | None = choice(128, 256, 512, 1024, 2048, unit="tokens", searched=True)
    slots: int | None = choice(0, 4, 8, 16, 32, 64, unit="tokens", searched=True)
    """Without any the segments are alone. They shrink with the text, as what they have to hold does."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        segment = self.segment or default_segment(frame.train_length)
        # About the published ten of 499 tokens.
        slots = max(4, segment // 32 // 4 * 4) if self.slots is None else self.slots
        return replace(self, segment=segment, slots=slots, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.segment and spec.slots is not None and spec.heads and spec.kv_heads and spec.head_dim
        heads, key, cached = spec.heads, spec.head_dim, spec.kv_heads * spec.head_dim
        width, context, segment, slots = frame.width, frame.context, spec.segment, spec.slots
        weights = 2 * width * (heads * key + cached)
        last = seen_at(context - 1, segment, 0)
        seen = mean_seen(context, segment, 0) + slots
        write = slots * (2 * weights + attend_flops(heads, key, key, segment + slots))
        # Segments that end are written; before the first the slots need keys and values.
        writes = context // segment * write + slots * 4 * width * cached
        row = frame.batch * cached * frame.dtype_bytes
        stored, held, hidden = row * min(context, segment), row * slots, frame.batch * slots * width * 4
        caches = [("keys", stored, row * last), ("values", stored, row * last)]
        if slots:
            # A segment's last token writes.
            caches += [("slot keys", held, held), ("slot values", held, held)]
            caches += [("hidden", hidden, hidden if last == segment else 0)]
        return Cost(
            params=weights + (2 * key if spec.qk_norm else 0) + ((slots + 1) * width if slots else 0),
            flops_prefill=2 * weights + attend_flops(heads, key, key, seen) + writes / context,
            flops_decode=2 * weights + attend_flops(heads, key, key, last + slots) + write / segment,
            cache=tuple(CacheTensor(name=n, stored_bytes=kept, read_bytes=read) for n, kept, read in caches),
        )

    def build(self, frame: Frame) -> Mixer:
        return MemoryTokensMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MemoryTokensState:
    """Keys, turned, and values of the open segment, those of the slots, and the slots [B, M, D] themselves in float32."""

    opened: KeyValue
    held: KeyValue
    hidden: Tensor


class MemoryTokensMixer(Mixer):
    """The slots from segment to segment; then the tokens of all segments at once."""

    def __init__(self, spec: MemoryTokens, frame: Frame) -> None:
        super().__init__()
        assert spec.segment and spec.slots is not None and spec.heads and spec.kv_heads and spec.head_dim
        self.segment, self.slots = spec.segment, spec.slots
        self.positions = Positions.of(frame, "rope", spec.rotary)
        sizes = (spec.heads, spec.kv_heads, spec.head_dim)
        self.projections = Grouped(frame, *sizes, rotary=0.0, qk_norm=spec.qk_norm)
        self.first: Tensor
        if self.slots:
            self.register_parameter("first", nn.Parameter(torch.randn(self.slots, frame.width)))
        else:
            self.register_buffer("first", torch.zeros(0, frame.width), persistent=False)
        self.norm = Norm(frame.width, eps=1e-6) if self.slots else nn.Identity()

    @torch.no_grad()
    def start(self, batch: int, max_len: int) -> MemoryTokensState:
        own = self.projections
        opened = own.start(batch, min(max_len, self.segment), own.kv_heads)
        held, hidden = own.start(batch, self.slots, own.kv_heads), self.beginning(batch)
        keys, values = (part.to(held.keys.dtype) for part in self.keys_values(hidden))
        return MemoryTokensState(
            opened=opened, held=replace(held, keys=keys, values=values), hidden=hidden.float().clone()
        )

    def beginning(self, batch: int) -> Tensor:
        """The slots before the first segment, [B, M, D]."""
        return wide(self.first).expand(batch, -1, -1)

    def keys_values(self, slots: Tensor) -> Pair:
        """Of slots [B, M, D]: two of [B, M, G, K]."""
        own, x = self.projections, self.norm(slots).to(self.first.dtype)
        keys, values = (
            layer(x).unflatten(-1, (own.kv_heads, own.head_dim)) for layer in (own.key, own.value)
        )
        return own.key_norm(keys), values

    def write(self, slots: Tensor, past: Pair, keys: Tensor, values: Tensor) -> tuple[Tensor, Pair]:
        """Slots [B, M, D], whose keys and values are `past`, after a segment of [B, S, G, K]; and their new ones."""
        own, x = self.projections, self.norm(slots).to(self.first.dtype)
        q = own.query_norm(own.query(x).unflatten(-1, (own.heads, own.head_dim)))
        q = self.positions.turn(q.flatten(0, 1)[:, None], self.segment).view_as(q)
        keys, values = joined(past, keys, values)
        everything = torch.full((self.slots,), keys.shape[1], device=keys.device)
        slots = slots + wide(own.finish(prefix_attention(q, keys, values, everything)[0], x))
        return slots, self.keys_values(slots)

    def forward(self, x: Tensor, state: MemoryTokensState | None = None) -> tuple[Tensor, Any]:
        size, start, time = self.segment, state.opened.length if state else 0, x.shape[1]
        place, count, end = start % size, count_segments(start, time, size), start + time
        q, k, v = (cut(part, start, size) for part in self.projections(x, 0))
        q, k = (self.positions.turn(part.flatten(0, 1), 0).unflatten(0, (-1, count)) for part in (q, k))
        if state is not None and place:
            # The open segment is read again from its start; nobody asks what its old tokens saw.
            old = state.opened.keys[:, :place], state.opened.values[:, :place]
            k, v = joined(old, *(part.flatten(1, 2)[:, place:] for part in (k, v)))
            k, v = k.unflatten(1, (count, size)), v.unflatten(1, (count, size))
        slots = state.hidden if state else self.beginning(len(x))
        past, pasts = (state.held.keys, state.held.values) if state else self.keys_values(slots), []
        for number in range(count):
            pasts.append(past)
            whole = (start // size + number + 1) * size <= end
            if self.slots and whole and (state or number + 1 < count):
                slots, past = self.write(slots, past, k[:, number], v[:, number])
        before = (torch.stack(part, dim=1).to(q.dtype) for part in zip(*pasts, strict=True))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(before, (k, v), strict=True))
        read = softmax_attention(*(part.flatten(0, 1) for part in (q, keys, values)))
        if state is not None:
            left = slice(place + time - end % size, place + time)
            push(state.opened.keys, k.flatten(1, 2)[:, left], 0)
            push(state.opened.values, v.flatten(1, 2)[:, left], 0)
            state = carried(state, slots, past, end)
        read = read.view(len(x), count * size, *q.shape[3:])[:, place : place + time]
        return self.projections.finish(read, x), state

    def step(self, x: Tensor, state: MemoryTokensState) -> tuple[Tensor, MemoryTokensState]:
        opened, place = state.opened, state.opened.length % self.segment
        q, k, v = self.projections(x[:, None], 0)
        q, k = self.positions.turn(q, place), self.positions.turn(k, place)
        # Like a prefill's, this token's own key and value are not rounded before it reads them.
        keys, values = joined((opened.keys[:, :place], opened.values[:, :place]), k, v)
        push(opened.keys, k, place)
        push(opened.values, v, place)
        slots, past = state.hidden, (state.held.keys, state.held.values)
        read = softmax_attention(q, *joined(past, keys, values))
        if self.slots and place + 1 == self.segment:
            slots, past = self.write(slots, past, keys, values)
        return self.projections.finish(read, x[:, None])[:, 0], carried(state, slots, past, opened.length + 1)


def carried(state: MemoryTokensState, slots: Tensor, past: Pair, length: int) -> MemoryTokensState:
    """The state after so many tokens, with these slots and their keys and values."""
    keys, values = (part.to(state.held.keys.dtype) for part in past)
    return MemoryTokensState(
        opened=replace(state.opened, length=length),
        held=replace(state.held, keys=keys, values=values),
        hidden=slots.to(state.hidden.dtype),
    )

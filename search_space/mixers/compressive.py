"""Compressive Transformer: Transformer-XL's memory, and behind it slots that sum up a few tokens each, learnt by their
own loss.

Letters: B batch, T time, D width, H heads, K head width, n segments of S tokens, M tokens of memory, c tokens of a slot,
N slots, L = N + M + S.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.parts import fit_heads
from search_space.segments import (
    RelativeAttention,
    default_segment,
    mean_seen,
    mean_slots,
    relative_params,
    seen_at,
    slots_at,
)
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach, Stream
from search_space.squeeze import Squeeze
from search_space.state import KeyValue, append_ring, read_span, start_key_value


@dataclass(frozen=True, kw_only=True)
class Compressive(MixerSpec):
    """Transformer-XL with a compressed memory (arXiv:1911.05507): a convolution turns c tokens into one.

    What leaves the memory of single tokens is seen as slots, the last `slots` of them, by its place in the row of
    keys. The convolution learns from one loss alone, in the stream: the square of what a segment reads of the tokens
    that left as it began, less what it reads of their slots, by content and with all else detached.
    """

    name: ClassVar[str] = "compressive"
    family: ClassVar[str] = "memory"
    reach: ClassVar[Reach] = "window"
    source: ClassVar[str] = "Rae et al. 2019, arXiv:1911.05507"
    needs: ClassVar[frozenset[Need]] = frozenset({"stream"})

    segment: int | None = choice(128, 256, 512, 1024, unit="tokens")
    memory: int | None = choice(0, 128, 256, 512, 1024, unit="tokens", searched=True)
    """Single tokens before the segment; as many as a segment has where it is left out."""
    slots: int | None = choice(0, 128, 256, 512, 1024, unit="tokens", searched=True)
    """Compressed tokens before those; as many as a segment has where it is left out."""
    compression: int = choice(4, 2, 1)
    """Tokens of a slot."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, unit="head")

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        segment = self.segment or default_segment(frame.train_length)
        memory, slots = (segment if own is None else own for own in (self.memory, self.slots))
        return replace(self, segment=segment, memory=memory, slots=slots, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.segment and spec.memory is not None and spec.slots is not None
        assert spec.heads and spec.head_dim
        width, inner, each, context = frame.width, spec.heads * spec.head_dim, spec.compression, frame.context
        sizes, row = (spec.segment, spec.memory), frame.batch * inner * frame.dtype_bytes
        span, slots = spec.segment + spec.memory, (*sizes, spec.slots, each)
        seen, old = seen_at(context - 1, *sizes), slots_at(context - 1, *slots)
        # A token's share of making a slot, and of its key and value.
        shares = width * width + 2 * width * inner / each if spec.slots else 0.0
        work = 2 * (4 * width * inner + shares)
        stored = row * min(context, span)
        cache = [
            CacheTensor(name=name, stored_bytes=stored, read_bytes=row * seen) for name in ("keys", "values")
        ]
        if spec.slots:
            made = row * min(context // each, spec.slots + span // each)
            names = ("slot_keys", "slot_values")
            cache += [CacheTensor(name=name, stored_bytes=made, read_bytes=row * old) for name in names]
            waiting = frame.batch * (each - 1) * width * frame.dtype_bytes
            read = frame.batch * ((context - 1) % each) * width * frame.dtype_bytes
            cache += [CacheTensor(name="inputs", stored_bytes=waiting, read_bytes=read)]
        reach = span + spec.slots
        return Cost(
            params=relative_params(width, inner) + (each * width * width if spec.slots else 0),
            flops_prefill=work
            + 6 * inner * (mean_seen(context, *sizes) + mean_slots(context, *slots))
            + 2 * reach * width * inner / context,
            flops_decode=work + 6 * inner * (seen + old),
            cache=tuple(cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return CompressiveMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class CompressiveState:
    """Rings of the last tokens and of slots, and the inputs [B, c - 1, D] of the slot that is not whole."""

    recent: KeyValue
    slots: KeyValue
    inputs: Tensor


class CompressiveMixer(Mixer):
    """All segments of a text at once; slots are made as soon as their tokens are there, and seen once those have left."""

    def __init__(self, spec: Compressive, frame: Frame) -> None:
        super().__init__()
        assert spec.segment and spec.memory is not None and spec.slots is not None
        assert spec.heads and spec.head_dim
        self.frame, self.segment, self.memory, self.slots = frame, spec.segment, spec.memory, spec.slots
        self.each, self.span = spec.compression, spec.segment + spec.memory
        self.attention = RelativeAttention(frame.width, spec.heads, spec.head_dim, self.span + self.slots)
        self.squeeze = (
            Squeeze(frame.width, each=self.each, slots=self.slots, segment=self.segment, memory=self.memory)
            if self.slots
            else None
        )

    def start(self, batch: int, max_len: int) -> CompressiveState:
        own, dtype, device = self.attention, DTYPES[self.frame.dtype], self.attention.query.weight.device

        def ring(rows: int) -> KeyValue:
            return start_key_value(
                batch, rows, own.heads, own.head_dim, own.head_dim, device=device, dtype=dtype
            )

        slots = min(max_len // self.each, self.squeeze.kept) if self.squeeze else 0
        waiting = self.each - 1 if self.squeeze else 0
        return CompressiveState(
            recent=ring(min(max_len, self.span)),
            slots=ring(slots),
            inputs=torch.zeros(batch, waiting, self.frame.width, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, state: CompressiveState | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: CompressiveState) -> tuple[Tensor, CompressiveState]:
        own, place = self.attention, state.recent.length
        new = own.keys_values(x[:, None])
        recent = append_ring(state.recent, *new, self.span)
        seen = read_span(recent, place + 1 - seen_at(place, self.segment, self.memory), place + 1)
        slots, inputs = state.slots, state.inputs
        if self.squeeze is not None:
            old = self.squeeze.seen_by_token(slots, place)
            seen = torch.cat([old[0], seen[0]], dim=1), torch.cat([old[1], seen[1]], dim=1)
            inputs = torch.cat([inputs[:, : place % self.each].to(x.dtype), x[:, None]], dim=1)
            made = own.keys_values(self.squeeze(inputs))
            slots, inputs = self.squeeze.grown(slots, state.inputs, place, inputs, made)
        y: Tensor = own.out(own.attend_step(own.heads_of(own.query, x), *seen).flatten(1))
        return y, CompressiveState(recent=recent, slots=slots, inputs=inputs)

    def forward_with(
        self, x: Tensor, state: CompressiveState | None, stream: Stream
    ) -> tuple[Tensor, Any, Stream]:
        own, start, time = self.attention, state.recent.length if state else 0, x.shape[1]
        parts = own.in_segments(x, state.recent if state else None, self.segment, self.memory)
        keys, values, visible = parts.keys, parts.values, parts.visible
        if self.squeeze is not None:
            inputs = x.detach()
            if state is not None:
                inputs = torch.cat([state.inputs[:, : start % self.each].to(x.dtype), inputs], dim=1)
            made = self.squeeze(inputs)
            if self.training and torch.is_grad_enabled() and state is None and time > self.span:
                stream = stream.with_loss(self.squeeze.loss(own, parts, made, time))
            new = own.keys_values(made.detach())
            ring = state.slots if state else None
            old, there = self.squeeze.seen_by_segments(ring, start, new, keys.shape[1])
            keys, values = torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2)
            visible = torch.cat([there[:, None].expand(-1, self.segment, -1), visible], dim=2)
            if state is not None:
                slots, waiting = self.squeeze.grown(state.slots, state.inputs, start, inputs, new)
                state = replace(state, slots=slots, inputs=waiting)
        y = own.finish(own.attend(parts.queries, keys, values, visible), parts.place, time)
        if state is not None:
            state = replace(state, recent=append_ring(state.recent, *parts.new, self.span))
        return y, state, stream

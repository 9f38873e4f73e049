"""Transformer-XL: attention within a segment and over the tokens before it, through which no gradient flows.

Letters: B batch, T time, D width, H heads, K head width, n segments of S tokens, M tokens of memory.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.parts import fit_heads
from search_space.segments import (
    RelativeAttention,
    count_segments,
    cut,
    default_segment,
    mean_seen,
    relative_params,
    seen_at,
    spans,
    visible_keys,
)
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec
from search_space.state import KeyValue, append_ring, start_key_value


@dataclass(frozen=True, kw_only=True)
class TransformerXL(MixerSpec):
    """Segment-level recurrence with relative positions (arXiv:1901.02860).

    A token sees its segment up to itself and the `memory` tokens before the segment. Gradients of what is seen there
    reach the projections of keys and values, and not the tokens.
    """

    name: ClassVar[str] = "transformer_xl"
    family: ClassVar[str] = "memory"
    source: ClassVar[str] = "Dai et al. 2019, arXiv:1901.02860"

    segment: int | None = choice(128, 256, 512, 1024, 2048, unit="tokens")
    memory: int | None = choice(0, 128, 256, 512, 1024, 2048, unit="tokens", searched=True)
    """Tokens before the segment that it sees; as many as a segment has where it is left out."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, unit="head")

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        segment = self.segment or default_segment(frame.train_length)
        memory = segment if self.memory is None else self.memory
        return replace(self, segment=segment, memory=memory, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.segment and spec.memory is not None and spec.heads and spec.head_dim
        inner, reach = spec.heads * spec.head_dim, spec.segment + spec.memory
        seen = seen_at(frame.context - 1, spec.segment, spec.memory)
        weights = 4 * frame.width * inner
        row = frame.batch * inner * frame.dtype_bytes
        stored, read = row * min(frame.context, reach), row * seen
        return Cost(
            params=relative_params(frame.width, inner),
            # Content, position and value; the map of the distances is made once a prefill, and kept in decode.
            flops_prefill=2 * weights
            + 6 * inner * mean_seen(frame.context, spec.segment, spec.memory)
            + 2 * reach * frame.width * inner / frame.context,
            flops_decode=2 * weights + 6 * inner * seen,
            cache=(
                CacheTensor(name="keys", stored_bytes=stored, read_bytes=read),
                CacheTensor(name="values", stored_bytes=stored, read_bytes=read),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return TransformerXLMixer(self.sized(frame), frame)


class TransformerXLMixer(Mixer):
    """All segments of a text at once; a ring of memory and segment carries the text from call to call."""

    def __init__(self, spec: TransformerXL, frame: Frame) -> None:
        super().__init__()
        assert spec.segment and spec.memory is not None and spec.heads and spec.head_dim
        self.segment, self.memory, self.dtype = spec.segment, spec.memory, DTYPES[frame.dtype]
        self.attention = RelativeAttention(frame.width, spec.heads, spec.head_dim, spec.segment + spec.memory)

    def start(self, batch: int, max_len: int) -> KeyValue:
        own = self.attention
        return start_key_value(
            batch,
            min(max_len, self.segment + self.memory),
            own.heads,
            own.head_dim,
            own.head_dim,
            device=own.query.weight.device,
            dtype=self.dtype,
        )

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        own, start, time = self.attention, state.length if state else 0, x.shape[1]
        first, count = start // self.segment, count_segments(start, time, self.segment)
        keys, values = own.keys_values(x)
        old_keys, old_values = own.keys_values(x.detach()) if torch.is_grad_enabled() else (keys, values)
        begin = start
        if state is not None:
            past = read_last(state, start - max(0, first * self.segment - self.memory))
            begin -= past[0].shape[1]
            state = append_ring(state, keys, values, self.segment + self.memory)
            keys, old_keys = (torch.cat([past[0].to(part.dtype), part], dim=1) for part in (keys, old_keys))
            values, old_values = (
                torch.cat([past[1].to(part.dtype), part], dim=1) for part in (values, old_values)
            )

        def span(now: Tensor, old: Tensor) -> Tensor:
            near = spans(now, begin, self.segment, 0, first, count)
            far = spans(old, begin, self.segment, self.memory, first, count)[:, :, : self.memory]
            return torch.cat([far, near], dim=2)

        q = cut(own.heads_of(own.query, x), start, self.segment)
        visible = visible_keys(first, count, self.segment, self.memory, device=x.device)
        read = own.attend(q, span(keys, old_keys), span(values, old_values), visible)
        place = start - first * self.segment
        return own.out(read.flatten(1, 2)[:, place : place + time].flatten(2).to(x.dtype)), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        own = self.attention
        keys, values = own.keys_values(x[:, None])
        state = append_ring(state, keys, values, self.segment + self.memory)
        seen = read_last(state, seen_at(state.length - 1, self.segment, self.memory))
        return own.out(own.attend_step(own.heads_of(own.query, x), *seen).flatten(1).to(x.dtype)), state


def read_last(state: KeyValue, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` keys and values of a ring in the order of time; no other is touched."""
    places = torch.arange(state.length - count, state.length, device=state.keys.device) % state.keys.shape[1]
    return state.keys[:, places], state.values[:, places]

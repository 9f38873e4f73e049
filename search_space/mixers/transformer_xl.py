"""Transformer-XL: attention within a segment and over the tokens before it, by relative positions; no gradient flows
through the memory.

Letters: B batch, T time, D width, H heads, K head width, n segments of S tokens, M tokens of memory.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from search_space.frame import Frame
from search_space.parts import fit_heads
from search_space.segments import (
    RelativeAttention,
    default_segment,
    mean_seen,
    relative_params,
    seen_at,
)
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append_ring, read_span, start_key_value


@dataclass(frozen=True, kw_only=True)
class TransformerXL(MixerSpec):
    """Segment-level recurrence with relative positions (arXiv:1901.02860).

    A token sees its segment up to itself and the `memory` tokens before the segment. Gradients of what is seen there
    reach the projections of keys and values, and not the tokens.
    """

    name: ClassVar[str] = "transformer_xl"
    family: ClassVar[str] = "memory"
    reach: ClassVar[Reach] = "window"
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
        own = self.attention
        parts = own.in_segments(x, state, self.segment, self.memory)
        if state is not None:
            state = append_ring(state, *parts.new, self.segment + self.memory)
        read = own.attend(parts.queries, parts.keys, parts.values, parts.visible)
        return own.finish(read, parts.place, x.shape[1]), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        own = self.attention
        keys, values = own.keys_values(x[:, None])
        state = append_ring(state, keys, values, self.segment + self.memory)
        count = seen_at(state.length - 1, self.segment, self.memory)
        seen = read_span(state, state.length - count, state.length)
        return own.out(own.attend_step(own.heads_of(own.query, x), *seen).flatten(1).to(x.dtype)), state

"""Attention whose keys and values several layers share: the first makes and keeps them, the next bring queries only.

Letters: B batch, T time, S keys, D width, H query heads, G key heads, K key width, V value width, M learned tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.heads import fit_kv_heads
from search_space.loan import Counted, Loan
from search_space.parts import attend_flops, mean_visible
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach, Stream
from search_space.state import KeyValue, append, append_ring, read_ring, start_key_value


@dataclass(frozen=True, kw_only=True)
class CrossLayer(MixerSpec):
    """Cross-layer attention (arXiv:2405.12981): layers with the same settings read one cache, in runs of `every`.

    With `every=0` all later layers read the cache of the first, as the second half of YOCO (arXiv:2405.05254) does; with
    `size` a window of it; with `meta` learned tokens stand before the text, as in Hymba (arXiv:2411.13676), here with
    keys and values of each layer's own.
    """

    name: ClassVar[str] = "cross_layer"
    family: ClassVar[str] = "attention"
    source: ClassVar[str] = (
        "Brandon 2024, arXiv:2405.12981; Sun 2024, arXiv:2405.05254; meta tokens: Dong 2024, arXiv:2411.13676"
    )
    reach: ClassVar[Reach] = "all"
    needs: ClassVar[frozenset[Need]] = frozenset({"stream", "width"})

    every: int = choice(2, 3, 4, 0, 1, searched=True)
    """Layers to a cache; 0: one for all of them, 1: each its own."""
    size: int | None = choice(0, 512, 1024, 2048, unit="tokens", default=0)
    """Tokens that are seen; 0: all."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, unit="head")
    value_ratio: int = choice(1, 2)
    """How much wider a value is than a key."""
    meta: int = choice(0, 4, 16, 128)
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_kv_heads(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        return replace(self, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def makes(self, frame: Frame) -> bool:
        """Whether the layer makes keys and values, rather than reading those of one before."""
        like = sum(one == (self.name, self.written) for one in frame.place.before)
        return like % self.every == 0 if self.every else like == 0

    def cost(self, frame: Frame) -> Cost:
        spec, makes = self.sized(frame), self.makes(frame)
        assert spec.heads and spec.kv_heads and spec.head_dim
        key, value = spec.head_dim, spec.head_dim * spec.value_ratio
        seen = min(frame.context, spec.size or frame.context) + spec.meta
        mean = mean_visible(frame.context, spec.size or None) + spec.meta
        weights = frame.width * (spec.heads * (key + value) + makes * spec.kv_heads * (key + value))
        cache = []
        for name, width in (("keys", key), ("values", value)):
            held = frame.batch * seen * spec.kv_heads * width * frame.dtype_bytes
            cache.append(CacheTensor(name=name, stored_bytes=makes * held, read_bytes=held))
        return Cost(
            params=weights + makes * spec.meta * spec.kv_heads * (key + value),
            flops_prefill=2 * weights + attend_flops(spec.heads, key, value, mean),
            flops_decode=2 * weights + attend_flops(spec.heads, key, value, seen),
            cache=tuple(cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return CrossLayerMixer(self, frame)


class CrossLayerMixer(Mixer):
    """Learned tokens lie in the first slots of the cache, the text behind them, in a ring where there is a window."""

    def __init__(self, spec: CrossLayer, frame: Frame) -> None:
        super().__init__()
        full = spec.sized(frame)
        assert full.heads and full.kv_heads and full.head_dim
        self.frame, self.makes, self.span, self.meta = frame, spec.makes(frame), full.size or None, full.meta
        self.kv_heads, self.key_width = full.kv_heads, full.head_dim
        self.value_width = full.head_dim * full.value_ratio
        self.positions = Positions.of(frame, "rope", full.rotary)
        self.loan = Loan(mixer=spec.name, key=str(spec.written))
        self.query = nn.Linear(frame.width, full.heads * self.key_width, bias=False)
        self.out = nn.Linear(full.heads * self.value_width, frame.width, bias=False)
        self.key = self.value = self.meta_keys = self.meta_values = None
        if self.makes:
            self.key = nn.Linear(frame.width, self.kv_heads * self.key_width, bias=False)
            self.value = nn.Linear(frame.width, self.kv_heads * self.value_width, bias=False)
        if self.makes and self.meta:
            shape = (self.meta, self.kv_heads)
            self.meta_keys = nn.Parameter(torch.randn(*shape, self.key_width))
            self.meta_values = nn.Parameter(torch.randn(*shape, self.value_width) * self.value_width**-0.5)

    def start(self, batch: int, max_len: int) -> KeyValue | Counted:
        if not self.makes:
            return Counted(length=0)
        state = start_key_value(
            batch,
            min(max_len, self.span or max_len) + self.meta,
            self.kv_heads,
            self.key_width,
            self.value_width,
            device=self.query.weight.device,
            dtype=DTYPES[self.frame.dtype],
        )
        if self.meta_keys is None or self.meta_values is None:
            return state
        with torch.no_grad():
            return append(
                state,
                self.meta_keys.to(state.keys.dtype).expand(batch, -1, -1, -1),
                self.meta_values.to(state.values.dtype).expand(batch, -1, -1, -1),
            )

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state, _ = self.step_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        start = self.seen(state)
        q = self.queries(x, start)
        if self.key is not None:
            state, keys, values = self.grown(x, state, start)
            stream = self.loan.lend(stream, keys, values)
        elif state is not None:
            state = replace(state, length=start + x.shape[1])
        keys, values = self.loan.borrow(stream)
        sinks = self.meta if self.span else 0
        skipped = start + x.shape[1] + self.meta - keys.shape[1] if sinks else 0
        attended = softmax_attention(
            q, keys.to(q.dtype), values.to(q.dtype), window=self.span, sinks=sinks, skipped=skipped
        )
        return self.out(attended.flatten(2)), state, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        start = self.seen(state)
        q = self.queries(x[:, None], start)[:, 0]
        if self.key is not None:
            k, v = self.pair(x[:, None], start)
            state = append_ring(state, k, v, self.span, self.meta) if self.span else append(state, k, v)
            stream = self.loan.lend(stream, state.keys, state.values)
        else:
            state = replace(state, length=start + 1)
        keys, values = self.loan.borrow(stream)
        visible = min(start + 1 + self.meta, keys.shape[1])
        attended = softmax_attention_step(
            q.to(keys.dtype), keys[:, :visible], values[:, :visible], visible=visible
        )
        y: Tensor = self.out(attended.to(x.dtype).flatten(1))
        return y, state, stream

    def seen(self, state: Any) -> int:
        """Tokens of the text before this call."""
        if state is None:
            return 0
        return int(state.length) - (self.meta if self.makes else 0)

    def queries(self, x: Tensor, start: int) -> Tensor:
        """x [B, T, D] to turned queries [B, T, H, K]."""
        return self.positions.turn(self.query(x).unflatten(-1, (-1, self.key_width)), start)

    def pair(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to turned keys [B, T, G, K] and values [B, T, G, V]."""
        assert self.key is not None and self.value is not None
        k = self.key(x).unflatten(-1, (-1, self.key_width))
        return self.positions.turn(k, start), self.value(x).unflatten(-1, (-1, self.value_width))

    def grown(self, x: Tensor, state: KeyValue | None, start: int) -> tuple[Any, Tensor, Tensor]:
        """The state with x's keys and values, and all that its queries may see, in the order of time."""
        k, v = self.pair(x, start)
        if state is None:
            if self.meta_keys is None or self.meta_values is None:
                return None, k, v
            batch = x.shape[0]
            first = [
                part.to(k.dtype).expand(batch, -1, -1, -1) for part in (self.meta_keys, self.meta_values)
            ]
            return None, torch.cat([first[0], k], dim=1), torch.cat([first[1], v], dim=1)
        if self.span is None:
            state = append(state, k, v)
            return state, state.keys[:, : state.length], state.values[:, : state.length]
        past_k, past_v = read_ring(state, self.meta)
        state = append_ring(state, k, v, self.span, self.meta)
        return state, torch.cat([past_k.to(k.dtype), k], dim=1), torch.cat([past_v.to(v.dtype), v], dim=1)

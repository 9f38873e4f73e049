"""Differential attention: two softmax patterns a head, the second taken from the first by a learned share.

Letters: B batch, T time, D width, H heads, G key heads, K key width; values are 2K wide.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.heads import fit_kv_heads
from search_space.parts import Norm, attend_flops, mean_visible
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach
from search_space.state import KeyValue, append, start_key_value

SPREAD = 0.1
"""Standard deviation of the vectors that the share is made of."""


@dataclass(frozen=True, kw_only=True)
class Differential(MixerSpec):
    """(softmax(Q1 K1) - λ softmax(Q2 K2)) V, normalised by head (arXiv:2410.05258); a head holds two queries and keys."""

    name: ClassVar[str] = "differential"
    family: ClassVar[str] = "attention"
    reach: ClassVar[Reach] = "all"
    source: ClassVar[str] = "Ye 2024, arXiv:2410.05258"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    heads: int | None = choice(4, 8, 16, 32, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups", searched=True)
    head_dim: int | None = choice(64, 128, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)

    def sized(self, frame: Frame) -> Self:
        # Half the width, because each head has two queries; a narrow frame has one head at least.
        half = max(8, frame.width // 16 * 8)
        heads, kv_heads, head_dim = fit_kv_heads(
            self.name, frame, self.heads, self.kv_heads, self.head_dim, inner=half
        )
        return replace(self, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.kv_heads and spec.head_dim
        weights = frame.width * 2 * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
        held = frame.batch * frame.context * spec.kv_heads * 2 * spec.head_dim * frame.dtype_bytes

        def attend(keys: float) -> float:
            assert spec.heads and spec.head_dim
            return attend_flops(2 * spec.heads, spec.head_dim, 2 * spec.head_dim, keys)

        return Cost(
            params=weights + 4 * spec.head_dim + 2 * spec.head_dim,
            flops_prefill=2 * weights + attend(mean_visible(frame.context)),
            flops_decode=2 * weights + attend(frame.context),
            cache=(
                CacheTensor(name="keys", stored_bytes=held, read_bytes=held),
                CacheTensor(name="values", stored_bytes=held, read_bytes=held),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return DifferentialMixer(self.sized(frame), frame)


class DifferentialMixer(Mixer):
    """Both keys of a head lie side by side in the cache, turned; the values serve both patterns."""

    def __init__(self, spec: Differential, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.kv_heads and spec.head_dim
        self.frame, self.positions = frame, Positions.of(frame, "rope", spec.rotary)
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.first_share = 0.8 - 0.6 * math.exp(-0.3 * frame.place.index)
        self.query = nn.Linear(frame.width, self.heads * 2 * self.head_dim, bias=False)
        self.key = nn.Linear(frame.width, self.kv_heads * 2 * self.head_dim, bias=False)
        self.value = nn.Linear(frame.width, self.kv_heads * 2 * self.head_dim, bias=False)
        self.share_query = nn.Parameter(SPREAD * torch.randn(2, self.head_dim))
        self.share_key = nn.Parameter(SPREAD * torch.randn(2, self.head_dim))
        self.norm = Norm(2 * self.head_dim, eps=1e-5)
        self.out = nn.Linear(self.heads * 2 * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KeyValue:
        return start_key_value(
            batch,
            max_len,
            self.kv_heads,
            2 * self.head_dim,
            2 * self.head_dim,
            device=self.query.weight.device,
            dtype=DTYPES[self.frame.dtype],
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, 2K], keys and values [B, T, G, 2K], each half of a head turned alike."""
        q, k = (
            self.positions.turn(layer(x).unflatten(-1, (-1, self.head_dim)), start)
            for layer in (self.query, self.key)
        )
        pair = (-1, 2 * self.head_dim)
        return (
            q.flatten(2).unflatten(2, pair),
            k.flatten(2).unflatten(2, pair),
            self.value(x).unflatten(2, pair),
        )

    @property
    def share(self) -> Tensor:
        """λ, how much of the second pattern is taken away."""
        one, two = (self.share_query.float() * self.share_key.float()).sum(-1).exp()
        share: Tensor = one - two + self.first_share
        return share

    def finish(self, one: Tensor, two: Tensor, x: Tensor) -> Tensor:
        """What the two patterns read, [..., H, 2K] each, to [..., D]."""
        kept = self.norm(one - self.share.to(one.dtype) * two) * (1.0 - self.first_share)
        y: Tensor = self.out(kept.flatten(-2).to(x.dtype))
        return y

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        if state is not None:
            state = append(state, k, v)
            k, v = state.keys[:, : state.length].to(q.dtype), state.values[:, : state.length].to(q.dtype)
        one, two = (
            softmax_attention(queries, keys, v)
            for queries, keys in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        )
        return self.finish(one, two, x), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = self.project(x[:, None], state.length)
        state = append(state, k, v)
        halves = zip(q[:, 0].to(state.keys.dtype).chunk(2, dim=-1), state.keys.chunk(2, dim=-1), strict=True)
        one, two = (
            softmax_attention_step(queries, keys, state.values, visible=state.length)
            for queries, keys in halves
        )
        return self.finish(one, two, x), state

"""The Sparse Transformer's strided attention: the last `stride` tokens, and every `stride`-th one before, in one softmax,
by layer or by head.

Letters: B batch, T time, D width, H query heads, G key heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels.block_attention.ops import block_attention_step, merge
from search_space.frame import Frame, round_to
from search_space.grouped import (
    Grouped,
    Kind,
    banded,
    dense,
    every,
    fit_grouped,
    grouped_cost,
    joined,
    ramp,
    together,
    two_kinds,
)
from search_space.setting import choice
from search_space.spec import Cost, Mixer, MixerSpec, Need, Reach
from search_space.state import KeyValue, append, append_ring, read_ring


@dataclass(frozen=True, kw_only=True)
class Strided(MixerSpec):
    """The strided attention of the Sparse Transformer: t sees s where t - s is below the stride or a multiple of it."""

    name: ClassVar[str] = "strided"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "pattern"
    source: ClassVar[str] = "Child et al. 2019, arXiv:1904.10509"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    stride: int | None = choice(32, 64, 128, 256, 512, unit="tokens", searched=True)
    mode: str = choice("union", "layer", "head", searched=True)
    """Both patterns in one softmax, one a layer in turn, or one for each half of the key heads."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        # The root of the length reads least: l tokens and L / l.
        stride = self.stride or round_to(frame.train_length**0.5, 4)
        return replace(self, stride=stride, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.stride and spec.heads and spec.kv_heads and spec.head_dim
        length, stride = frame.context, spec.stride
        whole, rest = divmod(length, stride)
        earlier = stride * whole * (whole - 1) // 2 + rest * whole
        seen: dict[Kind, int] = {
            "near": ramp(length, stride),
            "far": earlier + length,
            "both": ramp(length, stride) + earlier,
        }
        reads: dict[Kind, int] = {
            "near": min(length, stride),
            "far": (length - 1) // stride + 1,
            "both": min(length, stride) + (length - 1) // stride,
        }
        kinds = two_kinds(spec.mode, spec.kv_heads, frame.place.index)
        caches = [
            (kind, count * (min(length, stride) if kind == "near" else length), count * reads[kind])
            for kind, count in kinds
        ]
        return grouped_cost(
            frame,
            (spec.heads, spec.kv_heads, spec.head_dim),
            qk_norm=self.qk_norm,
            mean=sum(count * seen[kind] for kind, count in kinds) / spec.kv_heads / length,
            last=sum(count * reads[kind] for kind, count in kinds) / spec.kv_heads,
            caches=caches,
        )

    def build(self, frame: Frame) -> Mixer:
        return StridedMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class StridedState:
    """A cache for each kind of head: a ring where only the last tokens are read, else all."""

    caches: tuple[KeyValue, ...]
    length: int


class StridedMixer(Mixer):
    """The distant tokens of one residue are a text of their own, read densely."""

    def __init__(self, spec: Strided, frame: Frame) -> None:
        super().__init__()
        assert spec.stride and spec.heads and spec.kv_heads and spec.head_dim
        self.stride = spec.stride
        kinds = two_kinds(spec.mode, spec.kv_heads, frame.place.index)
        self.kinds, self.counts = [kind for kind, _ in kinds], [count for _, count in kinds]
        self.attention = Grouped(
            frame, spec.heads, spec.kv_heads, spec.head_dim, rotary=spec.rotary, qk_norm=spec.qk_norm
        )

    def start(self, batch: int, max_len: int) -> StridedState:
        slots = [min(max_len, self.stride) if kind == "near" else max_len for kind in self.kinds]
        caches = (self.attention.start(batch, *each) for each in zip(slots, self.counts, strict=True))
        return StridedState(caches=tuple(caches), length=0)

    def push(self, kind: Kind, cache: KeyValue, k: Tensor, v: Tensor) -> KeyValue:
        """The cache with new tokens in it."""
        return append_ring(cache, k, v, self.stride) if kind == "near" else append(cache, k, v)

    def attend(self, kind: Kind, q: Tensor, k: Tensor, v: Tensor, end: int) -> Tensor:
        """One kind of heads: queries [B, T, H, K], keys and values [B, S, G, K] up to `end` → [B, T, H, K]."""
        first, length = end - q.shape[1], q.shape[1]
        if kind == "near":
            return banded(q, k, v, window=self.stride)[0]
        rows = [every(x, self.stride, at) for x, at in ((q, first), (k, 0), (v, 0))]
        # Where the last tokens are read too, a token of an earlier row is first distant one row later.
        later = torch.arange(rows[1].shape[1], device=q.device) + (kind == "both")
        far = [
            together(x, self.stride, first, length)
            for x in dense(*rows, first=first // self.stride, positions=later)
        ]
        if kind == "far":
            return far[0]
        cut = max(0, first - self.stride + 1)
        near = banded(q, k[:, cut:], v[:, cut:], window=self.stride)
        return merge((near[0], far[0]), (near[1], far[1]))[0]

    def forward(self, x: Tensor, state: StridedState | None = None) -> tuple[Tensor, Any]:
        start = state.length if state else 0
        end, outputs, caches = start + x.shape[1], [], []
        for number, (q, k, v) in enumerate(self.attention.parts(x, start, self.counts)):
            kind = self.kinds[number]
            if state is not None:
                cache = state.caches[number]
                past = (
                    read_ring(cache) if kind == "near" else (cache.keys[:, :start], cache.values[:, :start])
                )
                k_all, v_all = joined(past, k, v)
                caches.append(self.push(kind, cache, k, v))
                k, v = k_all, v_all
            outputs.append(self.attend(kind, q, k, v, end))
        after = StridedState(caches=tuple(caches), length=end) if state else None
        return self.attention.finish(torch.cat(outputs, dim=2), x), after

    def step(self, x: Tensor, state: StridedState) -> tuple[Tensor, StridedState]:
        at, stride = state.length, self.stride
        slots: dict[Kind, list[int]] = {
            "near": list(range(min(at + 1, stride))),
            "far": list(range(at % stride, at + 1, stride)),
            "both": [*range(at % stride, at - stride + 1, stride), *range(max(0, at - stride + 1), at + 1)],
        }
        parts, outputs, caches = self.attention.parts(x[:, None], at, self.counts), [], []
        for kind, cache, (q, k, v) in zip(self.kinds, state.caches, parts, strict=True):
            caches.append(self.push(kind, cache, k, v))
            own = torch.tensor(slots[kind], device=x.device)
            outputs.append(block_attention_step(q[:, 0], caches[-1].keys, caches[-1].values, own)[0])
        after = StridedState(caches=tuple(caches), length=at + 1)
        return self.attention.finish(torch.cat(outputs, dim=1), x), after

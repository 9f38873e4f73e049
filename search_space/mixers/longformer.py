"""A window, wider and with gaps for some heads, and a prefix, with projections of its own, that all tokens read.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, P tokens of the prefix.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels.block_attention.ops import block_attention_step, merge
from search_space.frame import Frame
from search_space.grouped import Grouped, banded, dense, fit_grouped, grouped_cost, joined, keep, ramp, recall
from search_space.setting import choice
from search_space.spec import Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append_ring, read_ring


@dataclass(frozen=True, kw_only=True)
class Longformer(MixerSpec):
    """Longformer made causal (ours): its global tokens are the first of the text. Of a single key head none is dilated."""

    name: ClassVar[str] = "longformer"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "pattern"
    source: ClassVar[str] = "Beltagy, Peters and Cohan 2020, arXiv:2004.05150; causal form ours"

    size: int | None = choice(64, 128, 256, 512, 1024, unit="tokens", searched=True)
    """Tokens that a head reads up to its own."""
    dilation: int = choice(1, 2, 4)
    """Of how many tokens a dilated head reads one."""
    dilated: float = choice(0.5, 0.25)
    """The share of the key heads that are dilated."""
    prefix: int | None = choice(0, 4, 16, 64, unit="tokens")
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        size = self.size or max(4, frame.train_length // 8 // 4 * 4)
        prefix = min(64, max(4, frame.train_length // 64 // 4 * 4)) if self.prefix is None else self.prefix
        most = -(-frame.train_length // 8) * 4
        if prefix > most:
            raise ValueError(
                f"longformer: prefix={prefix} leaves too few other tokens to train on in {frame.train_length}; "
                f"at most half of them, {most}, may be in the prefix"
            )
        return replace(self, size=size, prefix=prefix, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def kinds(self) -> list[tuple[int, int]]:
        """Key heads and their dilation, in order, of a spec that is sized."""
        assert self.kv_heads
        far = int(self.kv_heads * self.dilated) if self.dilation > 1 else 0
        return [(self.kv_heads - far, 1)] + ([(far, self.dilation)] if far else [])

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim and spec.prefix is not None
        length, held = frame.context, min(frame.context, spec.prefix)
        rest, inside = length - held, held == length
        seen, last, caches = held * (held + 1) / 2 + rest * held, float(held), []
        for count, gap in spec.kinds():
            whole, more = divmod(rest, gap)
            read = min(spec.size, -(-rest // gap))
            seen += count / spec.kv_heads * (gap * ramp(whole, spec.size) + more * min(spec.size, whole + 1))
            last += count / spec.kv_heads * read
            slots = min(length, (spec.size - 1) * gap + 1)
            caches.append(("window" if gap == 1 else "dilated", count * slots, count * read))
        if spec.prefix:
            caches.append(("prefix", spec.kv_heads * held, 0 if inside else spec.kv_heads * held))
            caches.append(("global", spec.kv_heads * held, spec.kv_heads * held if inside else 0))
        plain = grouped_cost(
            frame,
            (spec.heads, spec.kv_heads, spec.head_dim),
            qk_norm=self.qk_norm,
            mean=seen / length,
            last=last,
            caches=caches,
        )
        own = frame.width * spec.head_dim * (spec.heads + 2 * spec.kv_heads) if spec.prefix else 0
        norms = 2 * spec.head_dim if spec.prefix and self.qk_norm else 0
        return replace(
            plain,
            params=plain.params + own + norms,
            flops_prefill=plain.flops_prefill + 2 * own * held / length,
            flops_decode=plain.flops_decode + (2 * own if inside else 0),
            idle_params=0 if inside else own + norms,
        )

    def build(self, frame: Frame) -> Mixer:
        return LongformerMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class LongformerState:
    """A ring for each kind of head; of the prefix the keys and values that others read, and those that it reads itself."""

    rings: tuple[KeyValue, ...]
    prefix: tuple[KeyValue, ...]
    length: int


class LongformerMixer(Mixer):
    """Tokens of the prefix see one another through projections of their own; the others see the prefix and a window."""

    def __init__(self, spec: Longformer, frame: Frame) -> None:
        super().__init__()
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim and spec.prefix is not None
        self.size, self.prefix, self.kinds = spec.size, spec.prefix, spec.kinds()
        sizes = (frame, spec.heads, spec.kv_heads, spec.head_dim)
        self.attention = Grouped(*sizes, rotary=spec.rotary, qk_norm=spec.qk_norm)
        self.own = (
            Grouped(*sizes, rotary=spec.rotary, qk_norm=spec.qk_norm, out=False) if spec.prefix else None
        )

    def start(self, batch: int, max_len: int) -> LongformerState:
        rings = tuple(
            self.attention.start(batch, min(max_len, (self.size - 1) * gap + 1), count)
            for count, gap in self.kinds
        )
        held, groups = min(max_len, self.prefix), self.attention.kv_heads
        prefix = tuple(self.attention.start(batch, held, groups) for _ in range(2 if held else 0))
        return LongformerState(rings=rings, prefix=prefix, length=0)

    def split(self, x: Tensor) -> list[Tensor]:
        """The heads of x [..., H or G, K] by their kinds."""
        return self.attention.split(x, [count for count, _ in self.kinds])

    def push(self, state: LongformerState, k: list[Tensor], v: list[Tensor]) -> tuple[KeyValue, ...]:
        """The rings with new keys and values of each kind in them."""
        news = zip(state.rings, k, v, self.kinds, strict=True)
        return tuple(
            append_ring(ring, one, two, (self.size - 1) * gap + 1) for ring, one, two, (_, gap) in news
        )

    def others(
        self, q: Tensor, keys: list[tuple[Tensor, Tensor]], known: tuple[Tensor, Tensor], end: int
    ) -> Tensor:
        """Queries [B, T, H, K] up to `end` over windows and prefix; keys and values of each kind end there too."""
        answers = []
        prefix = zip(self.split(known[0]), self.split(known[1]), strict=True)
        for own, (k, v), pinned, (_, gap) in zip(self.split(q), keys, prefix, self.kinds, strict=True):
            # What lies in the prefix is read there.
            cut = max(0, self.prefix - end + k.shape[1])
            first = pinned if self.prefix else None
            answers.append(
                banded(own, k[:, cut:], v[:, cut:], window=self.size, gap=gap, end=end, pinned=first)[0]
            )
        return torch.cat(answers, dim=2)

    def forward(self, x: Tensor, state: LongformerState | None = None) -> tuple[Tensor, Any]:
        start = state.length if state else 0
        end, ahead = start + x.shape[1], max(0, min(self.prefix - start, x.shape[1]))
        q, k, v = self.attention(x, start)
        keys = list(zip(self.split(k), self.split(v), strict=True))
        after = None
        if state is not None:
            pasts = [read_ring(ring) for ring in state.rings]
            after = replace(state, rings=self.push(state, self.split(k), self.split(v)), length=end)
            keys = [joined(past, *new) for past, new in zip(pasts, keys, strict=True)]
        parts = []
        sets = state.prefix if state and self.own else (None, None)
        known = recall(sets[0], min(start, self.prefix), k[:, :ahead], v[:, :ahead])
        if self.own is not None and ahead:
            q_own, k_own, v_own = self.own(x[:, :ahead], start)
            k_own, v_own = recall(sets[1], start, k_own, v_own)
            parts.append(dense(q_own, k_own, v_own, first=start)[0])
        if ahead < x.shape[1]:
            parts.append(self.others(q[:, ahead:], keys, known, end))
        return self.attention.finish(torch.cat(parts, dim=1), x), after

    def step(self, x: Tensor, state: LongformerState) -> tuple[Tensor, LongformerState]:
        at = state.length
        q, k, v = self.attention(x[:, None], at)
        rings = self.push(state, self.split(k), self.split(v))
        if self.own is not None and at < self.prefix:
            keep(state.prefix[0], at, k, v)
            q, k, v = self.own(x[:, None], at)
            keep(state.prefix[1], at, k, v)
            slots, known = torch.arange(at + 1, device=x.device), state.prefix[1]
            attended, _ = block_attention_step(q[:, 0], known.keys, known.values, slots)
        else:
            answers = []
            for own, ring, (_, gap) in zip(self.split(q[:, 0]), rings, self.kinds, strict=True):
                seen = range(at, max(self.prefix - 1, at - self.size * gap), -gap)
                slots = torch.tensor(seen, device=x.device) % ring.keys.shape[1]
                answers.append(block_attention_step(own, ring.keys, ring.values, slots))
            outputs, sums = zip(*answers, strict=True)
            attended, total = torch.cat(outputs, dim=1), torch.cat(sums, dim=1)
            if self.own is not None:
                slots, known = torch.arange(self.prefix, device=x.device), state.prefix[0]
                ahead, more = block_attention_step(q[:, 0], known.keys, known.values, slots)
                attended, _ = merge((attended, ahead), (total, more))
        return self.attention.finish(attended, x), replace(state, rings=rings, length=at + 1)

"""The Sparse Transformer's fixed attention: a token's own block, and the last tokens, alone kept, of earlier blocks.

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
    dense,
    fit_grouped,
    grouped_cost,
    joined,
    keep,
    recall,
    two_kinds,
    walled,
)
from search_space.setting import choice
from search_space.spec import Cost, Mixer, MixerSpec, Need, Reach
from search_space.state import KeyValue, append_ring, read_ring


@dataclass(frozen=True, kw_only=True)
class Fixed(MixerSpec):
    """The fixed attention of the Sparse Transformer: blocks of `stride` tokens, the last `summary` of each a summary.

    Heads that read summaries alone give nought until there is one.
    """

    name: ClassVar[str] = "fixed"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "pattern"
    source: ClassVar[str] = "Child et al. 2019, arXiv:1904.10509"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    stride: int | None = choice(32, 64, 128, 256, 512, unit="tokens", searched=True)
    summary: int | None = choice(4, 8, 16, 32, unit="tokens", searched=True)
    mode: str = choice("union", "layer", "head")
    """Block and summaries in one softmax, one a layer in turn, or one for each half of the key heads."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        stride = self.stride or max(self.summary or 0, round_to(frame.train_length**0.5, 4))
        summary = self.summary or round_to(stride / 8, 4)
        if summary > stride:
            raise ValueError(f"fixed: summary={summary} is more than a block of stride={stride}; choose less")
        return replace(
            self, stride=stride, summary=summary, heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )

    def kept(self, length: int) -> int:
        """Tokens of summaries among the first `length`, of a spec that is sized."""
        assert self.stride and self.summary
        whole, rest = divmod(length, self.stride)
        return whole * self.summary + max(0, rest - self.stride + self.summary)

    def shrunk_from(self, large: Self) -> Self:
        assert self.stride and self.summary and large.stride and large.summary
        # Where both shrank to their least, every token would be a summary, and the layer full attention.
        return replace(self, stride=max(self.stride, self.summary * min(4, large.stride // large.summary)))

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.stride and spec.summary and spec.heads and spec.kv_heads and spec.head_dim
        length, stride, summary = frame.context, spec.stride, spec.summary
        whole, rest = divmod(length, stride)
        own = whole * stride * (stride + 1) // 2 + rest * (rest + 1) // 2
        earlier = summary * (stride * whole * (whole - 1) // 2 + rest * whole)
        open_rest = max(0, rest - stride + summary)
        inside = whole * summary * (summary + 1) // 2 + open_rest * (open_rest + 1) // 2
        near, far = (length - 1) % stride + 1, (length - 1) // stride * summary
        seen: dict[Kind, int] = {"near": own, "far": earlier + inside, "both": own + earlier}
        reads: dict[Kind, int] = {"near": near, "far": spec.kept(length), "both": near + far}
        kinds = two_kinds(spec.mode, spec.kv_heads, frame.place.index)
        caches = []
        for kind, count in kinds:
            if kind != "far":
                caches.append(("block", count * min(length, stride), count * near))
            if kind != "near":
                read = far if kind == "both" else spec.kept(length)
                caches.append(("summary", count * spec.kept(length), count * read))
        return grouped_cost(
            frame,
            (spec.heads, spec.kv_heads, spec.head_dim),
            qk_norm=self.qk_norm,
            mean=sum(count * seen[kind] for kind, count in kinds) / spec.kv_heads / length,
            last=sum(count * reads[kind] for kind, count in kinds) / spec.kv_heads,
            caches=caches,
        )

    def build(self, frame: Frame) -> Mixer:
        return FixedMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class FixedState:
    """For each kind of head a ring as long as a block, the summaries, or both in this order."""

    caches: tuple[tuple[KeyValue, ...], ...]
    length: int


class FixedMixer(Mixer):
    """A summary is the keys and values of a block's last tokens, written as they come."""

    def __init__(self, spec: Fixed, frame: Frame) -> None:
        super().__init__()
        assert spec.stride and spec.summary and spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.stride, self.summary = spec, spec.stride, spec.summary
        kinds = two_kinds(spec.mode, spec.kv_heads, frame.place.index)
        self.kinds, self.counts = [kind for kind, _ in kinds], [count for _, count in kinds]
        self.attention = Grouped(
            frame, spec.heads, spec.kv_heads, spec.head_dim, rotary=spec.rotary, qk_norm=spec.qk_norm
        )

    def start(self, batch: int, max_len: int) -> FixedState:
        block, kept = min(max_len, self.stride), self.spec.kept(max_len)
        slots: dict[Kind, list[int]] = {"near": [block], "far": [kept], "both": [block, kept]}
        caches = tuple(
            tuple(self.attention.start(batch, each, count) for each in slots[kind])
            for kind, count in zip(self.kinds, self.counts, strict=True)
        )
        return FixedState(caches=caches, length=0)

    def last(self, start: int, k: Tensor) -> Tensor:
        """Which of the tokens of k [B, T, G, K], of which `start` came before, belong to a summary."""
        at = torch.arange(start, start + k.shape[1], device="cpu")
        return (at[at % self.stride >= self.stride - self.summary] - start).to(k.device)

    def attend(
        self, kind: Kind, q: Tensor, block: tuple[Tensor, ...], summaries: tuple[Tensor, ...], start: int
    ) -> Tensor:
        """One kind of heads: queries [B, T, H, K] over blocks, the first of which is whole, and summaries."""
        count = summaries[0].shape[1]
        if kind == "far" and count == 0:
            return torch.zeros_like(q)
        if kind == "near" or count == 0:
            return walled(q, block[0], block[1], block=self.stride)[0]
        number = torch.arange(count, device=q.device)
        begin = number // self.summary * self.stride
        # Beside its own block a token reads summaries of blocks that are over; else whatever has come of them.
        if kind == "far":
            seen = begin + self.stride - self.summary + number % self.summary
            return dense(q, summaries[0], summaries[1], first=start, positions=seen)[0]
        near = walled(q, block[0], block[1], block=self.stride)
        far = dense(q, summaries[0], summaries[1], first=start, positions=begin + self.stride)
        return merge((near[0], far[0]), (near[1], far[1]))[0]

    def forward(self, x: Tensor, state: FixedState | None = None) -> tuple[Tensor, Any]:
        start = state.length if state else 0
        outputs, caches = [], []
        for number, (q, k, v) in enumerate(self.attention.parts(x, start, self.counts)):
            kind, held = self.kinds[number], state.caches[number] if state else ()
            block, last = (k, v), self.last(start, k)
            if held and kind != "far":
                old_k, old_v = (y[:, y.shape[1] - start % self.stride :] for y in read_ring(held[0]))
                block = joined((old_k, old_v), k, v)
                held = (append_ring(held[0], k, v, self.stride), *held[1:])
            kept = held[-1] if held and kind != "near" else None
            summaries = recall(kept, self.spec.kept(start), k[:, last], v[:, last])
            outputs.append(self.attend(kind, q, block, summaries, start))
            caches.append(held)
        after = FixedState(caches=tuple(caches), length=start + x.shape[1]) if state else None
        return self.attention.finish(torch.cat(outputs, dim=2), x), after

    def step(self, x: Tensor, state: FixedState) -> tuple[Tensor, FixedState]:
        at, outputs, caches = state.length, [], []
        near = torch.arange(at % self.stride + 1, device=x.device)
        for number, (q, k, v) in enumerate(self.attention.parts(x[:, None], at, self.counts)):
            kind, held, lists = self.kinds[number], state.caches[number], []
            if kind != "far":
                held = (append_ring(held[0], k, v, self.stride), *held[1:])
                lists.append(near)
            if kind != "near":
                if at % self.stride >= self.stride - self.summary:
                    keep(held[-1], self.spec.kept(at), k, v)
                count = at // self.stride * self.summary if kind == "both" else self.spec.kept(at + 1)
                lists.append(torch.arange(count, device=x.device))
            answers = [
                block_attention_step(q[:, 0], cache.keys, cache.values, slots)
                for cache, slots in zip(held, lists, strict=True)
                if slots.numel()
            ]
            outputs.append(merge(*zip(*answers, strict=True))[0] if answers else torch.zeros_like(q[:, 0]))
            caches.append(held)
        after = FixedState(caches=tuple(caches), length=at + 1)
        return self.attention.finish(torch.cat(outputs, dim=1), x), after

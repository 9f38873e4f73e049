"""Linformer in causal blocks: a token reads its own block exactly, and of each block before it a few learnt slots.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, C tokens of a block, R slots of a block,
n blocks, P matrices (one for keys and values, or one for each).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.block_attention.ops import block_attention_step, merge
from search_space.frame import Frame, round_to
from search_space.grouped import Grouped, fit_grouped, grouped_cost, joined, keep, recall
from search_space.setting import choice
from search_space.slots import read_blocks
from search_space.spec import Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append_ring, read_ring


@dataclass(frozen=True, kw_only=True)
class Linformer(MixerSpec):
    """Linformer (arXiv:2006.04768) projects the n keys of a text to r by a learnt matrix. This causal form is ours.

    The paper's matrix mixes all positions, future ones too, and fixes n. Here it is R x C, and each block of C tokens
    that is over becomes R slots by it. A token reads its own block up to itself, and the slots of the blocks before,
    in one softmax. The token that ends a block still reads the block; the next one reads the slots. Keys are projected
    before they are turned, and a slot stands where its block ends. Work and cache are R/C of full attention's, no less.
    """

    name: ClassVar[str] = "linformer"
    family: ClassVar[str] = "sparse"
    source: ClassVar[str] = "Wang et al. 2020, arXiv:2006.04768; causal blocks ours"
    reach: ClassVar[Reach] = "all"

    block: int | None = choice(16, 32, 64, 128, 256, unit="tokens", searched=True)
    slots: float = choice(0.125, 0.0625, 0.25, 0.5, 1.0, searched=True)
    """Slots over tokens of a block; there is one slot at least."""
    shared: bool = choice(True, False)
    """Whether keys and values are projected by the same matrix."""
    per_head: bool = choice(False, True)
    """Whether each key head has matrices of its own."""
    counted: bool = choice(False, True)
    """Whether a slot's score is raised by ln(C/R), as if all its tokens were there."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        block = self.block or round_to(frame.train_length**0.5, 16)
        return replace(self, block=block, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def each(self) -> int:
        """R, of a spec that is sized."""
        assert self.block
        return max(1, round(self.block * self.slots))

    def matrices(self) -> tuple[int, int, int, int]:
        """The shape of what is learnt of slots, [P, G or 1, R, C], of a spec that is sized."""
        assert self.block and self.kv_heads
        return 1 if self.shared else 2, self.kv_heads if self.per_head else 1, self.each(), self.block

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        length, block, each = frame.context, spec.block, spec.each()
        whole, rest = divmod(length, block)
        own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
        earlier = each * (block * whole * (whole - 1) // 2 + rest * whole)
        near, far = (length - 1) % block + 1, (length - 1) // block * each
        groups = spec.kv_heads
        cost = grouped_cost(
            frame,
            (spec.heads, groups, spec.head_dim),
            qk_norm=self.qk_norm,
            mean=(own + earlier) / length,
            last=near + far,
            caches=(
                ("block", groups * min(length, block), groups * near),
                ("slot", groups * whole * each, groups * far),
            ),
        )
        # A token's share of making the slots of its keys and values.
        made = 4 * groups * each * spec.head_dim
        return replace(
            cost,
            params=cost.params + math.prod(spec.matrices()),
            flops_prefill=cost.flops_prefill + made * whole * block / length,
            flops_decode=cost.flops_decode + made,
        )

    def build(self, frame: Frame) -> Mixer:
        return LinformerMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class LinformerState:
    """A ring of the open block, its keys not turned, and all slots, their keys turned."""

    block: KeyValue
    slots: KeyValue


class LinformerMixer(Mixer):
    """At first a slot is the mean of its share of the block."""

    def __init__(self, spec: Linformer, frame: Frame) -> None:
        super().__init__()
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        self.block, self.each = spec.block, spec.each()
        self.bonus = math.log(self.block / self.each) if spec.counted else 0.0
        self.attention = Grouped(
            frame, spec.heads, spec.kv_heads, spec.head_dim, rotary=spec.rotary, qk_norm=spec.qk_norm
        )
        slot = torch.arange(self.block) * self.each // self.block
        share = (slot == torch.arange(self.each)[:, None]).float()
        share = share / share.sum(1, keepdim=True)
        self.squeeze = nn.Parameter(share.expand(spec.matrices()).clone())

    def start(self, batch: int, max_len: int) -> LinformerState:
        own = self.attention
        slots = max_len // self.block * self.each
        block = own.start(batch, min(max_len, self.block), own.kv_heads)
        return LinformerState(block=block, slots=own.start(batch, slots, own.kv_heads))

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to turned queries [B, T, H, K], and keys, not turned, and values [B, T, G, K]."""
        own, head = self.attention, (*x.shape[:2], -1, self.attention.head_dim)
        q, k = own.query_norm(own.query(x).view(head)), own.key_norm(own.key(x).view(head))
        return own.positions.turn(q, start), k, own.value(x).view(head)

    def make(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The slots [B, n R, G, K] of whole blocks of keys, not turned, and values [B, n C, G, K] from `start` on."""
        keys, values = self.squeezed(k, self.squeeze[0]), self.squeezed(v, self.squeeze[-1])
        # The slots of a block all stand at its end, so that they turn like one token with more heads.
        end, turn = start + self.block - 1, self.attention.positions.turn
        keys = turn(keys.flatten(2, 3), end, stride=self.block).view_as(keys)
        return keys.flatten(1, 2), values.flatten(1, 2)

    def squeezed(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x [B, n C, G, K] under [G or 1, R, C]: [B, n, R, G, K]."""
        matrix = matrix.to(x.dtype)
        blocks = x.unflatten(1, (x.shape[1] // self.block, self.block))
        if matrix.shape[0] == 1:
            slots: Tensor = torch.matmul(matrix[0], blocks.flatten(3)).unflatten(3, x.shape[2:])
            return slots
        return torch.matmul(matrix, blocks.transpose(2, 3)).transpose(2, 3)

    def forward(self, x: Tensor, state: LinformerState | None = None) -> tuple[Tensor, Any]:
        start = state.block.length if state else 0
        opened = start % self.block
        q, k, v = self.project(x, start)
        if state is not None:
            past_k, past_v = (y[:, y.shape[1] - opened :] for y in read_ring(state.block))
            state = replace(state, block=append_ring(state.block, k, v, self.block))
            k, v = joined((past_k, past_v), k, v)
        whole = k.shape[1] // self.block * self.block
        made = self.make(k[:, :whole], v[:, :whole], start - opened)
        slots = recall(state.slots if state else None, start // self.block * self.each, *made)
        k = self.attention.positions.turn(k, start - opened)
        read = read_blocks(q, k, v, slots, start=start, block=self.block, each=self.each, bonus=self.bonus)
        return self.attention.finish(read, x), state

    def step(self, x: Tensor, state: LinformerState) -> tuple[Tensor, LinformerState]:
        at = state.block.length
        place, count = at % self.block, at // self.block * self.each
        q, k, v = self.project(x[:, None], at)
        ring = append_ring(state.block, k, v, self.block)
        keys = self.attention.positions.turn(ring.keys[:, : place + 1].to(q.dtype), at - place)
        query, near = q[:, 0], torch.arange(place + 1, device=x.device)
        read, total = block_attention_step(query, keys, ring.values[:, : place + 1], near)
        if count:
            far, others = block_attention_step(
                query, state.slots.keys, state.slots.values, torch.arange(count, device=x.device)
            )
            read, _ = merge((read, far), (total, others + self.bonus))
        if place + 1 == self.block:
            keep(state.slots, count, *self.make(ring.keys.to(k.dtype), ring.values.to(v.dtype), at - place))
        return self.attention.finish(read, x), replace(state, block=ring)

"""Block-sparse attention: the first blocks, the last blocks and some that a hash of layer, head and block draws.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, N query blocks, M blocks listed for each.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels.block_attention.ops import block_attention, block_attention_step
from search_space.frame import Frame
from search_space.grouped import Grouped, fit_grouped, grouped_cost
from search_space.setting import choice
from search_space.spec import Cost, Mixer, MixerSpec, Need, Reach
from search_space.state import KeyValue, append

WORD = 2**32 - 1
"""The hash works on 32 bits."""


@dataclass(frozen=True, kw_only=True)
class BigBird(MixerSpec):
    """BigBird made causal: without its last global block, and drawing from the past alone (the causal form is ours)."""

    name: ClassVar[str] = "bigbird"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "pattern"
    source: ClassVar[str] = "Zaheer et al. 2020, arXiv:2007.14062; causal form ours"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    block: int | None = choice(16, 32, 64, unit="tokens")
    first: int = choice(1, 2, 0)
    """Blocks at the beginning that every token reads."""
    near: int = choice(3, 2, 4, 1, 8)
    """Blocks up to a token's own, that one included."""
    random: int = choice(3, 0, 1, 2, 4, 6, searched=True)
    """Blocks between those, drawn for each block and key head."""
    seed: int = choice(0, 1, 2, 3)
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        # Published for 4,096 tokens; shorter texts keep the number of blocks, so that choosing still matters.
        block = self.block or min(64, max(4, frame.train_length // 64 // 4 * 4))
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        return replace(self, block=block, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        most = self.first + self.near + self.random
        last = visible(frame.context, spec.block, most)
        return grouped_cost(
            frame,
            (spec.heads, spec.kv_heads, spec.head_dim),
            qk_norm=self.qk_norm,
            mean=all_visible(frame.context, spec.block, most) / frame.context,
            last=last,
            caches=[("", spec.kv_heads * frame.context, spec.kv_heads * last)],
        )

    def build(self, frame: Frame) -> Mixer:
        return BigBirdMixer(self.sized(frame), frame)


def visible(length: int, block: int, most: int) -> int:
    """Keys that the last of `length` tokens sees, of `most` blocks at the most: its own is read up to itself."""
    past, inside = divmod(length - 1, block)
    return min(past, most - 1) * block + inside + 1


def all_visible(length: int, block: int, most: int) -> int:
    """Keys that all of `length` tokens see together."""
    whole, rest = divmod(length, block)
    short = min(whole, most)
    pasts = short * (short - 1) // 2 + (whole - short) * (most - 1)
    own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    return pasts * block * block + rest * min(whole, most - 1) * block + own


def scramble(x: Tensor) -> Tensor:
    """Numbers below 2³² to others, each bit of the answer hanging on all (the final mix of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & WORD
    return x ^ (x >> 16)


@lru_cache(maxsize=512)
def block_table(spec: BigBird, layer: int, begin: int, end: int) -> Tensor:
    """The blocks [G, N, M] that the queries of blocks `begin` to `end` read, -1 for none, no block twice.

    The draws are a pure function of seed, layer, key head and block: Floyd's sampling without replacement
    (Bentley and Floyd 1987), its dice thrown by a hash.
    """
    assert spec.kv_heads
    own = torch.arange(begin, end, device="cpu")
    first = torch.arange(spec.first).expand(len(own), -1)
    near = own[:, None] - torch.arange(spec.near)
    fixed = torch.cat([first.where(first <= own[:, None], -1), near.where(near >= spec.first, -1)], dim=1)
    columns = list(fixed.expand(spec.kv_heads, -1, -1).unbind(-1))
    choices = own - spec.near - spec.first + 1
    head = torch.arange(spec.kv_heads)[:, None]
    seeded = scramble(scramble(torch.tensor(spec.seed * 2**16 + layer)) ^ head)
    drawn: list[Tensor] = []
    for number in range(spec.random):
        # With fewer choices than draws, the first draws find nothing and the others take all.
        limit = choices - spec.random + number
        dice = scramble(scramble(seeded ^ own) ^ (number + 1)) % (limit + 1).clamp(min=1)
        taken = torch.zeros_like(dice, dtype=torch.bool)
        for other in drawn:
            taken |= other == dice
        drawn.append(torch.where(taken, limit, dice).masked_fill(limit < 0, -1))
    columns += [one.where(one < 0, one + spec.first) for one in drawn]
    return torch.stack(columns, dim=-1)


class BigBirdMixer(Mixer):
    """Every key head reads its own list of blocks; the keys of all tokens are kept, turned."""

    def __init__(self, spec: BigBird, frame: Frame) -> None:
        super().__init__()
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.layer, self.block = spec, frame.place.index, spec.block
        self.attention = Grouped(
            frame, spec.heads, spec.kv_heads, spec.head_dim, rotary=spec.rotary, qk_norm=spec.qk_norm
        )

    def start(self, batch: int, max_len: int) -> KeyValue:
        return self.attention.start(batch, max_len, self.attention.kv_heads)

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        start = state.length if state else 0
        q, k, v = self.attention(x, start)
        if state is not None:
            state = append(state, k, v)
            k, v = state.keys[:, : state.length].to(q.dtype), state.values[:, : state.length].to(q.dtype)
        table = block_table(self.spec, self.layer, start // self.block, (k.shape[1] - 1) // self.block + 1)
        attended, _ = block_attention(
            q, k, v, table.to(q.device), block=self.block, key_block=self.block, first=start
        )
        return self.attention.finish(attended, x), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = self.attention(x[:, None], state.length)
        own = state.length // self.block
        state = append(state, k, v)
        row = block_table(self.spec, self.layer, own, own + 1)[:, 0]
        # Every head reads as many blocks; what differs is which, and none but its own is cut short.
        past = row[(row >= 0) & (row != own)].view(row.shape[0], -1)
        slots = (past[..., None] * self.block + torch.arange(self.block)).flatten(1)
        inside = torch.arange(own * self.block, state.length).expand(row.shape[0], -1)
        attended, _ = block_attention_step(
            q[:, 0].to(state.keys.dtype),
            state.keys,
            state.values,
            torch.cat([slots, inside], dim=1).to(state.keys.device),
        )
        return self.attention.finish(attended, x), state

"""What the mixers of sparse attention share: grouped projections with rotary positions, their price, and lists of keys.

Letters: B batch, T time, S keys, D width, H query heads, G key heads, K head width, V value width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels.block_attention.ops import block_attention
from kernels.softmax_attention.ops import softmax_attention_with_sums
from search_space.frame import Frame
from search_space.parts import Norm, attend_flops, fit_heads
from search_space.positions import Positions
from search_space.spec import DTYPES, CacheTensor, Cost
from search_space.state import KeyValue, start_key_value

Kind = Literal["near", "far", "both"]
"""Which of two patterns a key head reads: the tokens at hand, the distant ones, or both in one softmax."""

QUERY_BLOCK = 64
"""Queries that gather their keys together: fewer gather too often, more see too little of what was gathered."""

KEY_BLOCK = 32
"""Keys of a dense part that are left out together where they are all to come."""


def fit_grouped(
    name: str, frame: Frame, heads: int | None, kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Heads, key heads and head width where some are left to the frame: heads that fill the width, keys for each of them.

    Raises:
        ValueError: the key heads do not share the query heads evenly.
    """
    heads, head_dim = fit_heads(frame, heads, head_dim)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ValueError(
            f"{name}: kv_heads={kv_heads} does not divide its {heads} heads at width {frame.width}; "
            f"choose a divisor of {heads}"
        )
    return heads, kv_heads, head_dim


def grouped_cost(
    frame: Frame,
    sizes: tuple[int, int, int],
    *,
    qk_norm: bool,
    mean: float,
    last: float,
    caches: Sequence[tuple[str, int, int]],
) -> Cost:
    """The price of such a mixer of H, G and K (`sizes`).

    mean: keys that a head sees, averaged over heads and over a prefill of the context; last: those of its last token.
    caches: by name, stored and read vectors of one key head for one text, all key heads added up.
    """
    heads, kv_heads, head_dim = sizes
    weights = frame.width * head_dim * 2 * (heads + kv_heads)
    one = frame.batch * head_dim * frame.dtype_bytes
    return Cost(
        params=weights + (2 * head_dim if qk_norm else 0),
        flops_prefill=2 * weights + attend_flops(heads, head_dim, head_dim, mean),
        flops_decode=2 * weights + attend_flops(heads, head_dim, head_dim, last),
        cache=tuple(
            CacheTensor(name=f"{name} {what}".strip(), stored_bytes=one * stored, read_bytes=one * read)
            for name, stored, read in caches
            for what in ("keys", "values")
        ),
    )


class Grouped(nn.Module):
    """The projections around attention with grouped keys: queries, keys, values, their norms and turns, and out."""

    def __init__(
        self,
        frame: Frame,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rotary: float,
        qk_norm: bool,
        out: bool = True,
    ) -> None:
        super().__init__()
        self.frame, self.positions = frame, Positions.of(frame, "rope", rotary)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.query = nn.Linear(frame.width, heads * head_dim, bias=False)
        self.key = nn.Linear(frame.width, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(frame.width, kv_heads * head_dim, bias=False)
        self.query_norm = Norm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = Norm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(heads * head_dim, frame.width, bias=False) if out else None

    def forward(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised and turned."""
        head = (*x.shape[:2], -1, self.head_dim)
        q = self.query_norm(self.query(x).view(head))
        k = self.key_norm(self.key(x).view(head))
        return self.positions.turn(q, start), self.positions.turn(k, start), self.value(x).view(head)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Project the heads' outputs [..., H, K] to [..., D], in x's type."""
        assert self.out is not None
        y: Tensor = self.out(attended.flatten(-2).to(x.dtype))
        return y

    def parts(self, x: Tensor, start: int, counts: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`forward`, in parts of so many key heads."""
        q, k, v = (self.split(y, counts) for y in self(x, start))
        return list(zip(q, k, v, strict=True))

    def split(self, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The heads of x [..., H or G, K] in parts of so many key heads."""
        share = x.shape[-2] // self.kv_heads
        return list(x.split([count * share for count in counts], dim=-2))

    def start(self, batch: int, slots: int, kv_heads: int) -> KeyValue:
        """An empty cache of some of the key heads."""
        device, dtype = self.query.weight.device, DTYPES[self.frame.dtype]
        return start_key_value(
            batch, slots, kv_heads, self.head_dim, self.head_dim, device=device, dtype=dtype
        )


def joined(past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache [B, S, G, *] with new ones behind them, in the type of the new."""
    return torch.cat([past[0].to(k.dtype), k], dim=1), torch.cat([past[1].to(v.dtype), v], dim=1)


def two_kinds(mode: str, kv_heads: int, layer: int) -> list[tuple[Kind, int]]:
    """Key heads by what they read of two patterns, in order.

    union: both; layer: the one at hand in even layers, the distant in odd ones; head: half the key heads each, the
    odd one at hand, and both where there is but one.
    """
    if mode == "layer":
        return [("far" if layer % 2 else "near", kv_heads)]
    if mode == "head" and kv_heads > 1:
        return [("near", kv_heads - kv_heads // 2), ("far", kv_heads // 2)]
    return [("both", kv_heads)]


def ramp(count: int, most: int) -> int:
    """1 + 2 + … over `count` numbers, none above `most`: keys that all tokens see together through a window."""
    short = min(count, most)
    return short * (short + 1) // 2 + (count - short) * most


def banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    gap: int = 1,
    end: int = 0,
    pinned: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over `window` keys up to one's own, one of every `gap` tokens, and the log-sum-exp.

    q [B, T, H, K] and k [B, S, G, K], v [B, S, G, V] end at position `end`, which matters where there are gaps.
    All read besides the keys and values [B, P, G, *] that are pinned.
    """
    if gap > 1:
        first = end - q.shape[1]
        rows = [every(x, gap, end - x.shape[1]) for x in (q, k, v)]
        if pinned is not None:
            pinned = (pinned[0].repeat_interleave(gap, 0), pinned[1].repeat_interleave(gap, 0))
        output, total = banded(*rows, window=window, pinned=pinned)
        return together(output, gap, first, q.shape[1]), together(total, gap, first, q.shape[1])
    if pinned is None:
        return softmax_attention_with_sums(q, k, v, window=window)
    k, v = torch.cat([pinned[0], k], dim=1), torch.cat([pinned[1], v], dim=1)
    return softmax_attention_with_sums(q, k, v, window=window, sinks=pinned[0].shape[1])


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, first: int, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over every key at a position up to one's own; for keys that are few.

    q [B, T, H, K] from position `first` on; k [B, S, G, K] and v [B, S, G, V] at `positions` [S], which never fall,
    or from 0 on.
    """
    if positions is None:
        positions = torch.arange(k.shape[1], device=q.device)
    block, key_block = min(QUERY_BLOCK, first + q.shape[1]), min(KEY_BLOCK, k.shape[1])
    begins = positions[::key_block]
    last = (
        torch.arange(first // block + 1, (first + q.shape[1] - 1) // block + 2, device=q.device) * block - 1
    )
    blocks = torch.arange(len(begins), device=q.device)
    index = torch.where(begins <= last[:, None], blocks, -1)
    return block_attention(q, k, v, index, block=block, key_block=key_block, first=first, positions=positions)


def walled(q: Tensor, k: Tensor, v: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """Attention inside blocks of text: every token over its own block up to itself, and the log-sum-exp.

    k [B, S, G, K] and v [B, S, G, V] begin where a block does, and q [B, T, H, K] ends where they end.
    """
    first, count, end = k.shape[1] - q.shape[1], -(-k.shape[1] // block), k.shape[1]
    if count == 1:
        return softmax_attention_with_sums(q, k, v)
    texts = (
        pad(x, (0, 0, 0, 0, end - x.shape[1], count * block - end)).unflatten(1, (count, block)).flatten(0, 1)
        for x in (q, k, v)
    )
    output, total = (x.unflatten(0, (-1, count)).flatten(1, 2) for x in softmax_attention_with_sums(*texts))
    return output[:, first:end], total[:, first:end]


def every(x: Tensor, stride: int, first: int) -> Tensor:
    """Tokens [B, T, *] from position `first` on, as `stride` sequences of every stride-th: [B stride, rows, *].

    Sequence i holds the positions i, i + stride, …; the rows begin with that of `first` and end with that of the
    last token, and what is missing of them is nought.
    """
    front = first % stride
    back = -(front + x.shape[1]) % stride
    if front or back:
        x = pad(x, (0, 0) * (x.dim() - 2) + (front, back))
    sequences: Tensor = x.unflatten(1, (-1, stride)).transpose(1, 2).flatten(0, 1)
    return sequences


def together(x: Tensor, stride: int, first: int, length: int) -> Tensor:
    """The tokens [B, T, *] that `every` took apart."""
    x = x.unflatten(0, (-1, stride)).transpose(1, 2).flatten(1, 2)
    kept: Tensor = x[:, first % stride : first % stride + length]
    return kept


def keep(kept: KeyValue, start: int, k: Tensor, v: Tensor) -> None:
    """Write new keys and values [B, T, G, *] into the slots from `start` on.

    Raises:
        ValueError: they do not fit.
    """
    end = start + k.shape[1]
    if end > kept.keys.shape[1]:
        raise ValueError(
            f"{end} tokens do not fit a cache of {kept.keys.shape[1]}: start it with a larger max_len"
        )
    kept.keys[:, start:end] = k
    kept.values[:, start:end] = v


def recall(kept: KeyValue | None, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write new keys and values behind the `start` that are kept; all of them, in the type of the new."""
    if kept is None:
        return k, v
    keep(kept, start, k, v)
    end = start + k.shape[1]
    return kept.keys[:, :end].to(k.dtype), kept.values[:, :end].to(v.dtype)

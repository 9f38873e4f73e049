"""Attention in segments: what mixers share that walk a text segment by segment and carry a memory from one to the next.

Letters: B batch, T time, D width, H heads, K head width, n segments of S tokens, L keys that a segment may see, S among them.
Relative positions after Transformer-XL (arXiv:1901.02860).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.derived import Derived
from search_space.state import KeyValue, read_span


def default_segment(train_length: int) -> int:
    """An eighth of the training length: a text then has segments enough for its memory to matter."""
    return max(4, train_length // 8 // 4 * 4)


def mean_seen(context: int, segment: int, memory: int) -> float:
    """Keys of a query's own segment and of the memory's tokens before it, averaged over a prefill of the context."""
    whole, rest = divmod(context, segment)
    own = whole * segment * (segment + 1) / 2 + rest * (rest + 1) / 2
    # Segments from 0 on that have no more before them than the memory takes.
    growing = min(whole, memory // segment + 1)
    before = segment**2 * growing * (growing - 1) / 2 + (whole - growing) * segment * memory
    return (own + before + rest * min(whole * segment, memory)) / context


def seen_at(position: int, segment: int, memory: int) -> int:
    """Keys of its own segment and of the memory's tokens before it that the token at a position sees."""
    begin = position - position % segment
    return position + 1 - max(0, begin - memory)


def slots_at(position: int, segment: int, memory: int, slots: int, tokens: int) -> int:
    """Slots of `tokens` tokens each that stand before the memory of the token at a position, `slots` at most."""
    return min(slots, max(0, position - position % segment - memory) // tokens)


def mean_slots(context: int, segment: int, memory: int, slots: int, tokens: int) -> float:
    """The same, averaged over a prefill of the context."""
    whole, rest = divmod(context, segment)
    # Segments from which on the slots are all there.
    full = min(whole, -(-(memory + slots * tokens) // segment))
    growing = sum(slots_at(number * segment, segment, memory, slots, tokens) for number in range(full))
    last = slots_at(whole * segment, segment, memory, slots, tokens)
    return (segment * (growing + (whole - full) * slots) + rest * last) / context


def cut(x: Tensor, start: int, segment: int) -> Tensor:
    """x [B, T, …] from the position `start` on in whole segments [B, n, S, …], filled up with noughts at both ends."""
    return spans(x, start, segment, 0, start // segment, count_segments(start, x.shape[1], segment))


def count_segments(start: int, time: int, segment: int) -> int:
    """Segments that `time` tokens from a position on lie in."""
    return -(-(start + time) // segment) - start // segment


def spans(x: Tensor, start: int, segment: int, memory: int, first: int, count: int) -> Tensor:
    """What `count` segments from the `first` on see of x [B, T, …], which begins at the position `start`.

    Returns [B, n, memory + S, …]: each segment with what stands before it, noughts where x holds nothing.
    """
    front = start - first * segment + memory
    back = (first + count) * segment - start - x.shape[1]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (front, back))
    return x.unfold(1, memory + segment, segment).movedim(-1, 2)


def sinusoids(count: int, width: int, *, device: torch.device) -> Tensor:
    """[count, width] sines and cosines of the distances 0, 1, …, as of the original positions (arXiv:1706.03762)."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angle = torch.arange(count, device=device, dtype=torch.float32)[:, None] * 10000**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def shift(x: Tensor) -> Tensor:
    """Scores by distance [..., S, L], the farthest first, to scores by key: row i moves S - 1 - i places to the left.

    What lies behind the query is then arbitrary, and must be masked.
    """
    rows, columns = x.shape[-2:]
    moved = F.pad(x, (1, 0)).reshape(*x.shape[:-2], columns + 1, rows)
    return moved[..., 1:, :].reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class InSegments:
    """Queries [B, n, S, H, K], keys and values [B, n, M + S, H, K], what is seen of them [n, S, M + S], new ones [B, T, H, K].

    `place` is where in the first segment the first token stands.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor
    new: tuple[Tensor, Tensor]
    place: int


class RelativeAttention(nn.Module):
    """Projections of attention whose scores are ((q + u)·k + (q + w)·r) / √K, r being a map of the distance's sinusoids."""

    def __init__(self, width: int, heads: int, head_dim: int, reach: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.width, self.reach = heads, head_dim, width, reach
        inner = heads * head_dim
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.position = nn.Linear(width, inner, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.out = nn.Linear(inner, width, bias=False)
        self.kept: Derived[Tensor] = Derived()

    def heads_of(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x [..., D] through one of the projections, [..., H, K]."""
        y: Tensor = layer(x).unflatten(-1, (self.heads, self.head_dim))
        return y

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x [B, T, D]: two of [B, T, H, K]."""
        return self.heads_of(self.key, x), self.heads_of(self.value, x)

    def in_segments(self, x: Tensor, ring: KeyValue | None, segment: int, memory: int) -> "InSegments":
        """x [B, T, D] behind what a ring holds, each segment beside the memory before it, which x learns nothing from."""
        start = ring.length if ring else 0
        first, count = start // segment, count_segments(start, x.shape[1], segment)
        begin = min(start, max(0, first * segment - memory))
        past = read_span(ring, begin, start) if ring else None
        now = self.keys_values(x)
        old = self.keys_values(x.detach()) if torch.is_grad_enabled() else now
        joined = []
        for number in (0, 1):
            near, distant = now[number], old[number]
            if past is not None:
                before = past[number].to(near.dtype)
                near, distant = torch.cat([before, near], dim=1), torch.cat([before, distant], dim=1)
            near = spans(near, begin, segment, 0, first, count)
            distant = spans(distant, begin, segment, memory, first, count)[:, :, :memory]
            joined.append(torch.cat([distant, near], dim=2))
        return InSegments(
            queries=cut(self.heads_of(self.query, x), start, segment),
            keys=joined[0],
            values=joined[1],
            visible=visible_keys(first, count, segment, memory, device=x.device),
            new=now,
            place=start - first * segment,
        )

    def finish(self, read: Tensor, place: int, time: int) -> Tensor:
        """What `time` tokens from a place of the first segment on read, [B, n, S, H, K], to [B, time, D]."""
        y: Tensor = self.out(read.flatten(1, 2)[:, place : place + time].flatten(2))
        return y

    def places(self) -> Tensor:
        """r of the distances 0 … reach - 1, [reach, H, K]."""

        def make() -> Tensor:
            weight = self.position.weight
            table = sinusoids(self.reach, self.width, device=weight.device).to(weight.dtype)
            return self.heads_of(self.position, table)

        return self.kept.get([self.position.weight], make)

    def scores(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """q [..., S, H, K] with k [..., L, H, K] and with r of L distances: two of [..., H, S, L]."""
        q, scale = wide(q), self.head_dim**-0.5
        content = torch.einsum("...shk,...lhk->...hsl", (q + wide(self.content_bias)) * scale, wide(k))
        position = torch.einsum("...shk,lhk->...hsl", (q + wide(self.position_bias)) * scale, wide(places))
        return content, position

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Segments q [B, n, S, H, K] over k and v [B, n, L, H, K], the last key beside the last query; [B, n, S, H, K].

        visible [n, S, L] has a key for every query, none behind it.
        """
        with torch.autocast(q.device.type, enabled=False):
            content, position = self.scores(q, k, self.places()[: k.shape[2]].flip(0))
            scores = (content + shift(position)).masked_fill(~visible[:, None], -torch.inf)
            return torch.einsum("...hsl,...lhk->...shk", scores.softmax(-1), wide(v)).to(q.dtype)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token q [B, H, K] over k and v [B, L, H, K] in the order of time, itself the last; [B, H, K]."""
        with torch.autocast(q.device.type, enabled=False):
            content, position = self.scores(q[:, None], k, self.places()[: k.shape[1]].flip(0))
            read = torch.einsum("bhsl,blhk->bshk", (content + position).softmax(-1), wide(v))
            return read[:, 0].to(q.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relative_params(width: int, inner: int) -> int:
    """Parameters of a `RelativeAttention`: five matrices and two biases."""
    return 5 * width * inner + 2 * inner


def visible_keys(first: int, count: int, segment: int, memory: int, *, device: torch.device) -> Tensor:
    """[n, S, memory + S]: which of the keys that stand in a segment's span each of its queries sees."""
    begin = torch.arange(first, first + count, device=device)[:, None, None] * segment
    query = begin + torch.arange(segment, device=device)[:, None]
    key = begin - memory + torch.arange(memory + segment, device=device)
    return (key >= 0) & (key <= query)


def read_by_content(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of segments q [B, n, S, H, K] over k and v [B, n, L, H, K] without places; 0 where nothing is seen.

    seen [n, L] is the same for all queries of a segment.
    """
    scores = torch.einsum("bnshk,bnlhk->bnhsl", wide(q), wide(k)) * q.shape[-1] ** -0.5
    hidden = ~seen[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bnhsl,bnlhk->bnshk", weights, wide(v))

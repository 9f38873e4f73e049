"""Infini-attention: attention within a segment, blended by head with a matrix that holds all segments before it.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), n segments of S tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention
from search_space.frame import Frame
from search_space.parts import attend_flops, fit_heads
from search_space.positions import Positions
from search_space.segments import count_segments, cut, default_segment, mean_seen, seen_at, wide
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import push


@dataclass(frozen=True, kw_only=True)
class Infini(MixerSpec):
    """Infini-attention (arXiv:2404.07143): σ(q)M / σ(q)z of the memory and the segment's softmax, g and 1 − g of them.

    σ is ELU + 1, g one sigmoid a head. The memory takes a segment in when the segment is complete. Positions turn
    queries and keys within the segment only. In the first segment, whose memory is empty, attention stands alone.
    """

    name: ClassVar[str] = "infini"
    family: ClassVar[str] = "memory"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Munkhdalai et al. 2024, arXiv:2404.07143"

    segment: int | None = choice(256, 512, 1024, 2048, unit="tokens", searched=True)
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    update: str = choice("delta", "linear")
    """Whether a segment writes its values, or what the memory does not hold of them yet."""
    rotary: float = choice(1.0, 0.5, 0.0)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        segment = self.segment or default_segment(frame.train_length)
        return replace(self, segment=segment, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.segment and spec.heads and spec.head_dim
        heads, key, context = spec.heads, spec.head_dim, frame.context
        weights, matrix = 4 * frame.width * heads * key, heads * key * (key + 1)
        # A read and a write a token, and what the delta rule reads before it writes.
        memory = 2 * matrix * (3 if self.update == "delta" else 2)
        seen = seen_at(context - 1, spec.segment, 0)
        row, state = frame.batch * heads * key * frame.dtype_bytes, frame.batch * heads * key * 4
        stored, read = row * min(context, spec.segment), row * seen
        used = int(context > spec.segment)
        return Cost(
            params=weights + heads,
            flops_prefill=2 * weights
            + memory
            + attend_flops(heads, key, key, mean_seen(context, spec.segment, 0)),
            flops_decode=2 * weights + memory + attend_flops(heads, key, key, seen),
            cache=(
                CacheTensor(name="keys", stored_bytes=stored, read_bytes=read),
                CacheTensor(name="values", stored_bytes=stored, read_bytes=read),
                CacheTensor(name="matrix", stored_bytes=state * key, read_bytes=used * state * key),
                CacheTensor(name="sums", stored_bytes=state, read_bytes=used * state),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return InfiniMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class InfiniState:
    """Keys, not turned, and values [B, S, H, K] of the open segment; matrix [B, H, K, K] and norm [B, H, K], float32."""

    keys: Tensor
    values: Tensor
    matrix: Tensor
    norm: Tensor
    length: int


class InfiniMixer(Mixer):
    """The segments' attention all at once; the memory from segment to segment."""

    def __init__(self, spec: Infini, frame: Frame) -> None:
        super().__init__()
        assert spec.segment and spec.heads and spec.head_dim
        self.spec, self.frame, self.segment = spec, frame, spec.segment
        self.heads, self.head_dim = spec.heads, spec.head_dim
        inner = self.heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, inner, bias=False)
        self.value = nn.Linear(frame.width, inner, bias=False)
        self.blend = nn.Parameter(torch.zeros(self.heads))
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> InfiniState:
        device, dtype = self.query.weight.device, DTYPES[self.frame.dtype]
        opened = (batch, min(max_len, self.segment), self.heads, self.head_dim)
        return InfiniState(
            keys=torch.zeros(opened, device=device, dtype=dtype),
            values=torch.zeros(opened, device=device, dtype=dtype),
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device),
            norm=torch.zeros(batch, self.heads, self.head_dim, device=device),
            length=0,
        )

    def turn(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, T, H, K] turned by its positions in the segment."""
        return Positions.of(self.frame, "rope", self.spec.rotary).turn(x, start)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to queries, keys and values [..., H, K]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        return q, k, v

    def write(self, matrix: Tensor, norm: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The memory with a whole segment of keys and values [B, S, H, K] in it."""
        with torch.autocast(keys.device.type, enabled=False):
            keys, values = feature(keys), wide(values)
            if self.spec.update == "delta":
                values = values - recall(keys, matrix, norm)
            return matrix + torch.einsum("bshk,bshv->bhkv", keys, values), norm + keys.sum(1)

    def finish(self, local: Tensor, distant: Tensor, share: Tensor) -> Tensor:
        """Blend the two [..., H, K], `share` [..., H, 1] of the distant one, and project."""
        y: Tensor = self.out((local + share * (distant - local)).flatten(-2).to(local.dtype))
        return y

    def share(self) -> Tensor:
        """g of each head, [H, 1]."""
        return torch.sigmoid(wide(self.blend))[:, None]

    def forward(self, x: Tensor, state: InfiniState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        start, size, time = state.length if state else 0, self.segment, x.shape[1]
        opened, count = start % size, count_segments(start, time, size)
        if state is not None:
            # The open segment is read again from its start; nobody asks what its old tokens saw.
            k = torch.cat([state.keys[:, :opened].to(k.dtype), k], dim=1)
            v = torch.cat([state.values[:, :opened].to(v.dtype), v], dim=1)
        queries = cut(q, start, size)
        keys, values = (cut(part, start - opened, size) for part in (k, v))
        turned_q, turned_k = (self.turn(part.flatten(0, 1)) for part in (queries, keys))
        local = softmax_attention(turned_q, turned_k, values.flatten(0, 1)).unflatten(0, (-1, count))
        memory, distant = (state.matrix, state.norm) if state else self.nothing(x), []
        for number in range(count):
            distant.append(recall(feature(queries[:, number]), *memory))
            if (number + 1) * size <= k.shape[1]:
                memory = self.write(*memory, keys[:, number], values[:, number])
        known = torch.arange(count, device=x.device) + start // size > 0
        y = self.finish(local, torch.stack(distant, dim=1), self.share() * known[:, None, None, None])
        y = y.flatten(1, 2)[:, opened : opened + time]
        if state is None:
            return y, None
        whole = k.shape[1] // size * size
        push(state.keys, k[:, whole:], 0)
        push(state.values, v[:, whole:], 0)
        return y, replace(state, matrix=memory[0], norm=memory[1], length=start + time)

    def step(self, x: Tensor, state: InfiniState) -> tuple[Tensor, InfiniState]:
        q, k, v = self.project(x[:, None])
        place, memory = state.length % self.segment, (state.matrix, state.norm)
        # Like a prefill's, this token's own key and value are not rounded before it reads them.
        keys = torch.cat([state.keys[:, :place].to(k.dtype), k], dim=1)
        values = torch.cat([state.values[:, :place].to(v.dtype), v], dim=1)
        push(state.keys, k, place)
        push(state.values, v, place)
        y = softmax_attention(self.turn(q, place), self.turn(keys), values)[:, 0]
        if state.length < self.segment:
            y = self.out(y.flatten(-2))
        else:
            y = self.finish(y, recall(feature(q), *memory)[:, 0], self.share())
        if place + 1 == self.segment:
            memory = self.write(*memory, keys, values)
        return y, replace(state, matrix=memory[0], norm=memory[1], length=state.length + 1)

    def nothing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An empty memory for x [B, T, D]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (x.shape[0], self.heads, self.head_dim)
        return x.new_zeros(*shape, self.head_dim, dtype=dtype), x.new_zeros(shape, dtype=dtype)


def feature(x: Tensor) -> Tensor:
    """ELU + 1, at least in float32."""
    return F.elu(wide(x)) + 1


def recall(q: Tensor, matrix: Tensor, norm: Tensor) -> Tensor:
    """What features q [B, S, H, K] find in a memory: [B, S, H, K], 0 in an empty one."""
    with torch.autocast(q.device.type, enabled=False):
        weight = torch.einsum("bshk,bhk->bsh", q, norm).unsqueeze(-1)
        return torch.einsum("bshk,bhkv->bshv", q, matrix) / torch.where(weight > 0, weight, 1)

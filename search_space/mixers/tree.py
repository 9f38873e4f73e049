"""Tree: every token walks down a tree of summaries to a few chunks of the past, and reads those word by word.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, F fan-out, N nodes, M nodes read as summaries.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels.retrieved_attention.ops import retrieved_attention
from kernels.routed_attention.ops import routed_attention, routed_attention_step
from kernels.softmax_attention.ops import merge
from search_space.frame import Frame
from search_space.grouped import Grouped, fit_grouped
from search_space.nodes import Nodes
from search_space.parts import attend_flops
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append

WALK = 1024
"""Queries that walk down together."""


@dataclass(frozen=True, kw_only=True)
class Tree(MixerSpec):
    """Hierarchical reading as a layer: ours, in the manner of MemWalker (arXiv:2310.05029), where a language model
    walks down a tree of written summaries.

    Here a summary is the mean of the keys and of the values of a node's tokens. A leaf is a `chunk` that is past, and
    `fan_out` nodes of a level make one above as soon as they are all there. On each level every key head enters the
    `top_k` nodes whose keys have the largest product with its queries (their sum, where several share it), and finds
    their children on the next; of equal nodes it enters the earlier. The chunks that it reaches are read token by
    token, and so is the chunk of the token itself. Every node that was found and not entered joins the same softmax
    as a single key and value that count for all tokens of the node (their number's logarithm is added to the score).
    So the whole past is read once, what is far from the question coarsely; the walk has no weights of its own, and
    learns because the scores by which it enters are those by which it reads. Nothing learns from the choice itself.
    """

    name: ClassVar[str] = "tree"
    family: ClassVar[str] = "memory"
    source: ClassVar[str] = "ours, in the manner of Chen et al. 2023, arXiv:2310.05029"
    reach: ClassVar[Reach] = "all"

    chunk: int | None = choice(16, 32, 64, 128, 256, unit="tokens", searched=True)
    fan_out: int = choice(4, 2, 8, 16)
    top_k: int = choice(4, 1, 2, 8, 16, searched=True)
    """Nodes of each level that are entered."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        chunk = self.chunk or max(4, frame.train_length // 64 // 4 * 4)
        return replace(self, chunk=chunk, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.chunk and spec.heads and spec.kv_heads and spec.head_dim
        heads, key, cached, context = spec.heads, spec.head_dim, spec.kv_heads * spec.head_dim, frame.context
        weights = 2 * frame.width * (heads * key + cached)
        nodes = Nodes(chunk=spec.chunk, fan_out=spec.fan_out, tokens=context)
        place = torch.arange(context)
        chunks, opened = place // spec.chunk, place % spec.chunk + 1
        met = nodes.met(chunks, spec.top_k)
        found = sum((own for own, _ in met), torch.zeros_like(place))
        tokens = opened + (met[-1][1] * spec.chunk if met else 0)
        summed = found - sum((own for _, own in met), torch.zeros_like(place))

        def flops(read: float, walked: float) -> float:
            return (
                2 * weights
                + attend_flops(heads, key, key, read)
                + attend_flops(spec.kv_heads or 1, key, 0, walked)
            )

        row = frame.batch * cached * frame.dtype_bytes
        caches = [
            ("keys", context, int(tokens[-1])),
            ("values", context, int(tokens[-1])),
            ("summary keys", sum(nodes.counts), int(found[-1])),
            ("summary values", sum(nodes.counts), int(summed[-1])),
        ]
        return Cost(
            params=weights + (2 * key if spec.qk_norm else 0),
            flops_prefill=flops(float((tokens + summed).double().mean()), float(found.double().mean())),
            flops_decode=flops(float(tokens[-1] + summed[-1]), float(found[-1])),
            cache=tuple(
                CacheTensor(name=name, stored_bytes=row * stored, read_bytes=row * read)
                for name, stored, read in caches
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return TreeMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class TreeState:
    """All keys and values, and those of every node [B, N, G, K], level after level from the chunks on."""

    cache: KeyValue
    keys: Tensor
    values: Tensor


class TreeMixer(Mixer):
    """Project, normalise, turn, walk down, attend to chunks and to summaries in one softmax, project; keys are kept turned."""

    def __init__(self, spec: Tree, frame: Frame) -> None:
        super().__init__()
        assert spec.chunk and spec.heads and spec.kv_heads and spec.head_dim
        self.chunk, self.fan_out, self.top_k, self.dtype = (
            spec.chunk,
            spec.fan_out,
            spec.top_k,
            DTYPES[frame.dtype],
        )
        self.projections = Grouped(
            frame, spec.heads, spec.kv_heads, spec.head_dim, rotary=spec.rotary, qk_norm=spec.qk_norm
        )

    def nodes(self, tokens: int) -> Nodes:
        """The tree of a text of so many tokens."""
        return Nodes(chunk=self.chunk, fan_out=self.fan_out, tokens=tokens)

    def start(self, batch: int, max_len: int) -> TreeState:
        cache = self.projections.start(batch, max_len, self.projections.kv_heads)
        shape = (batch, sum(self.nodes(max_len).counts), *cache.keys.shape[2:])
        keys, values = (torch.zeros(shape, device=cache.keys.device, dtype=self.dtype) for _ in range(2))
        return TreeState(cache=cache, keys=keys, values=values)

    def add(self, state: TreeState, k: Tensor, v: Tensor) -> TreeState:
        """The state with keys and values [B, T, G, K] behind it."""
        start, cache = state.cache.length, append(state.cache, k, v)
        nodes = self.nodes(cache.keys.shape[1])
        nodes.grow(state.keys, cache.keys, start, cache.length)
        nodes.grow(state.values, cache.values, start, cache.length)
        return replace(state, cache=cache)

    def walk(self, q: Tensor, keys: Tensor, nodes: Nodes, start: int) -> tuple[Tensor, Tensor]:
        """The nodes [B, T, G, M] that queries [B, T, H, K] from a place on read as summaries, and their chunks [B, T, G, E].

        The token's own chunk is the first of them.
        """
        asked = q.detach().unflatten(2, (self.projections.kv_heads, -1)).sum(3)
        here = torch.arange(start, start + q.shape[1], device=q.device) // self.chunk
        own = here[:, None, None].expand(*asked.shape[:3], 1)
        if not nodes.counts:
            return own[..., :0], own
        parts = [
            nodes.walk(some, keys, chunks, self.top_k)
            for some, chunks in zip(asked.split(WALK, dim=1), here.split(WALK), strict=True)
        ]
        left, entered = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return left, torch.cat([own, entered], dim=-1)

    def join(
        self, q: Tensor, keys: Tensor, values: Tensor, nodes: Nodes, left: Tensor, read: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What was read of chunks, with the sums, and the nodes that are left [B, T, G, M], in one softmax: [B, T, H, K]."""
        if not left.shape[-1]:
            return read[0]
        places = left.repeat_interleave(q.shape[2] // left.shape[2], dim=2)
        bias = nodes.sizes(self.top_k, q.device).log().expand(places.shape)
        coarse, total = retrieved_attention(q, keys, values, places, bias=bias)
        return merge((read[0], coarse.to(read[0].dtype)), (read[1], total))[0]

    def forward(self, x: Tensor, state: TreeState | None = None) -> tuple[Tensor, Any]:
        start = state.cache.length if state else 0
        q, k, v = self.projections(x, start)
        if state is None:
            nodes = self.nodes(x.shape[1])
            keys, values = nodes.table(k), nodes.table(v)
        else:
            state = self.add(state, k, v)
            cache, keys, values = state.cache, state.keys, state.values
            nodes = self.nodes(cache.keys.shape[1])
            k, v = (part[:, : cache.length].to(q.dtype) for part in (cache.keys, cache.values))
        left, chunks = self.walk(q, keys, nodes, start)
        read = routed_attention(q, k, v, chunks, block=self.chunk)
        return self.projections.finish(self.join(q, keys, values, nodes, left, read), x), state

    def step(self, x: Tensor, state: TreeState) -> tuple[Tensor, TreeState]:
        q, k, v = self.projections(x[:, None], state.cache.length)
        state = self.add(state, k, v)
        cache, nodes = state.cache, self.nodes(state.cache.keys.shape[1])
        left, chunks = self.walk(q, state.keys, nodes, cache.length - 1)
        output, sums = routed_attention_step(
            q[:, 0], cache.keys, cache.values, chunks[:, 0], block=self.chunk, length=cache.length
        )
        read = output[:, None].to(q.dtype), sums[:, None]
        return self.projections.finish(self.join(q, state.keys, state.values, nodes, left, read), x[:, None])[
            :, 0
        ], state

"""DeepSeek's sparse attention: latent attention over few tokens, which a light index with its own small keys chooses.

Letters: B batch, T time, S cached tokens, D width, H heads, K head width, R shared key width, C latent rank,
J index heads, I index width, N chosen tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels.selected_attention.ops import selected_attention
from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.indexer import Index, Looked, index_weights
from search_space.latent import LatentMixer, LatentSizes, Projected, latent_sizes
from search_space.parts import attend_flops, mean_visible
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Need, Reach, Stream
from search_space.state import push


@dataclass(frozen=True, kw_only=True)
class DSA(MixerSpec):
    """DeepSeek-V3.2's attention (arXiv:2512.02556): mla over the `top_k` tokens whose index scores are largest.

    The index learns from the attention alone: its inputs are detached, and its loss, the divergence of its softmax
    from the mean of the heads' weights, goes into the stream. Equal scores go to the later token; up to `top_k` tokens
    all are read and the index rests. V3.2 has index_heads=64, index_dim=128, top_k=2048.
    """

    name: ClassVar[str] = "dsa"
    family: ClassVar[str] = "latent"
    reach: ClassVar[Reach] = "chosen"
    source: ClassVar[str] = "DeepSeek-V3.2, arXiv:2512.02556"
    needs: ClassVar[frozenset[Need]] = frozenset({"stream"})

    top_k: int | None = choice(128, 256, 512, 1024, 2048, 4096, unit="tokens", searched=True)
    rank: int | None = choice(128, 256, 384, 512, unit="rank", searched=True)
    query_rank: int | None = choice(0, 512, 1024, 1536, unit="rank")
    """The latent that queries come from, those of the index too; 0 for both from the input."""
    shared: int | None = choice(32, 64, unit="head")
    heads: int | None = choice(8, 16, 32, 64, 128, unit="heads")
    head_dim: int | None = choice(64, 128, unit="head")
    index_heads: int | None = choice(4, 8, 16, 32, 64, unit="groups")
    index_dim: int | None = choice(32, 64, 128, unit="head")
    rotary: float = choice(1.0, 0.0)
    index: str = choice("own", "shared")
    """Shared: what the last layer with an index of its own chose; the latest tokens where none stands before."""
    signal: str = choice("sparse", "dense")
    """What the index learns from: the chosen tokens, or all; with dense, training attends to all (the warm-up)."""

    def sized(self, frame: Frame) -> Self:
        sizes = latent_sizes(self, frame)
        index_heads = self.index_heads or (sizes.heads // 2 if sizes.heads % 2 == 0 else 1)
        if sizes.heads % index_heads:
            raise ValueError(f"dsa: index_heads={index_heads} does not divide its {sizes.heads} heads")
        return replace(
            self,
            top_k=self.top_k or max(4, frame.train_length // 8 // 4 * 4),
            **vars(sizes),
            index_heads=index_heads,
            index_dim=self.index_dim or sizes.head_dim,
        )

    def cost(self, frame: Frame) -> Cost:
        spec, sizes = self.sized(frame), latent_sizes(self, frame)
        assert spec.top_k and spec.index_heads and spec.index_dim
        own, sparse = self.index == "own", frame.context > spec.top_k
        heads, width = (spec.index_heads, spec.index_dim) if own else (0, 0)
        indexer = index_weights(sizes.query_rank or frame.width, frame.width, heads, width)
        weights = sizes.weights(frame.width) + indexer
        row = frame.batch * frame.dtype_bytes
        latents, keys = sizes.rank + sizes.shared, row * frame.context * width
        absorbed = attend_flops(sizes.heads, latents, sizes.rank, 1)
        expanded = attend_flops(sizes.heads, sizes.head_dim + sizes.shared, sizes.head_dim, 1)
        read = (absorbed if sparse else expanded) * mean_visible(frame.context, spec.top_k)
        index = 2 * heads * width if sparse else 0
        cache = (
            CacheTensor(
                name="latents",
                stored_bytes=row * frame.context * latents,
                read_bytes=row * min(frame.context, spec.top_k) * latents,
            ),
            CacheTensor(name="index", stored_bytes=keys, read_bytes=keys if sparse else 0),
        )
        return Cost(
            params=sizes.params(frame.width) + indexer + 2 * width,
            flops_prefill=2 * weights + read + index * mean_visible(frame.context),
            flops_decode=2 * weights + absorbed * min(frame.context, spec.top_k) + index * frame.context,
            cache=cache if own else cache[:1],
        )

    def build(self, frame: Frame) -> Mixer:
        return DSAMixer(self.sized(frame), latent_sizes(self, frame), frame)


@dataclass(frozen=True, kw_only=True)
class DSAState:
    """Latents [B, S, C + R], and the index's keys [B, S, I]; None where the index is another layer's."""

    latents: Tensor
    index: Tensor | None
    length: int


class DSAMixer(LatentMixer):
    """Absorbed attention over gathered latents; all of them, expanded, where no more than `top_k` were seen."""

    def __init__(self, spec: DSA, sizes: LatentSizes, frame: Frame) -> None:
        super().__init__(sizes, frame, rotary=spec.rotary)
        assert spec.top_k and spec.index_heads and spec.index_dim
        self.top_k, self.warming = spec.top_k, spec.signal == "dense"
        source = sizes.query_rank or frame.width
        own = spec.index == "own"
        self.index = Index(source, frame.width, spec.index_heads, spec.index_dim) if own else None

    def start(self, batch: int, max_len: int) -> DSAState:
        latents = self.empty(batch, max_len, self.rank + self.shared)
        index = None if self.index is None else self.empty(batch, max_len, self.index.head_dim)
        return DSAState(latents=latents, index=index, length=0)

    def forward(self, x: Tensor, state: DSAState | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: DSAState) -> tuple[Tensor, DSAState]:
        y, state, _ = self.step_with(x, state, Stream())
        return y, state

    def look(self, x: Tensor, state: DSAState | None) -> tuple[Projected, Tensor, Looked | None, Any]:
        """x [B, T, D] projected, the latents that it may read, its index over their keys, and the state behind it."""
        start = state.length if state else 0
        new, looked = self.project(x, start), None
        if self.index is not None:
            turned = min(self.shared, self.index.head_dim)
            looked = self.index(x, new.source, lambda y: self.turn(y, start), turned)
        if state is None:
            return new, new.latents, looked, None
        end = push(state.latents, new.latents, start)
        if looked is not None and state.index is not None:
            push(state.index, looked.keys, start)
            looked = looked.with_keys(state.index[:, :end])
        return new, state.latents[:, :end], looked, replace(state, length=end)

    def choose(self, looked: Looked | None, x: Tensor, seen: int, stream: Stream) -> Tensor:
        """Places [B, T, N] among the tokens seen, N being `top_k`, for each of x [B, T, D]."""
        if looked is not None:
            return looked.select(self.top_k)
        if DSA.name not in stream.values:
            last = torch.arange(seen - x.shape[1], seen, device=x.device)[:, None]
            latest = last - torch.arange(self.top_k - 1, -1, -1, device=x.device)
            return latest.clamp(min=-1).expand(x.shape[0], -1, -1)
        chosen = stream.values[DSA.name]
        if chosen.shape[-1] != self.top_k:
            raise ValueError(
                f"dsa: this layer reads top_k={self.top_k} tokens, but the layer whose index it shares chose "
                f"{chosen.shape[-1]}: give both the same top_k"
            )
        return chosen.view(x.shape[0], x.shape[1], -1)

    def forward_with(self, x: Tensor, state: DSAState | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        new, latents, looked, state = self.look(x, state)
        latents, seen = latents.to(new.queries.dtype), latents.shape[1]
        learner = looked if self.training and torch.is_grad_enabled() else None
        if seen > self.top_k:
            chosen = self.choose(looked, x, seen, stream)
            stream = stream.with_value(DSA.name, chosen)
        if seen > self.top_k and not (self.training and self.warming):
            queries, learns = self.absorb(new.queries), learner is not None
            read, shares = selected_attention(
                queries, latents, chosen, value=self.rank, scale=self.scale, shares=learns
            )
            if learner is not None and shares is not None:
                stream = stream.with_loss(learner.sparse_loss(chosen, shares))
            return self.finish(read.to(new.queries.dtype)).to(x.dtype), state, stream
        keys, values = self.expand(latents)
        if learner is not None:
            stream = stream.with_loss(learner.dense_loss(new.queries, keys, self.scale))
        attended = softmax_attention(new.queries, keys, values, scale=self.scale)
        return self.out(attended.flatten(2).to(x.dtype)), state, stream

    def step_with(self, x: Tensor, state: DSAState, stream: Stream) -> tuple[Tensor, DSAState, Stream]:
        new, latents, looked, state = self.look(x[:, None], state)
        seen, queries = latents.shape[1], self.absorb(new.queries).to(latents.dtype)
        if seen > self.top_k:
            # Only the rows that are chosen are read.
            chosen = self.choose(looked, x[:, None], seen, stream)
            stream = stream.with_value(DSA.name, chosen[:, 0])
            read, _ = selected_attention(
                queries, latents, chosen, value=self.rank, scale=self.scale, shares=False
            )
            read = read[:, 0]
        else:
            keys, values = latents[:, :, None], latents[:, :, None, : self.rank]
            read = softmax_attention_step(queries[:, 0], keys, values, visible=seen, scale=self.scale)
        return self.finish(read.to(new.queries.dtype)).to(x.dtype), state, stream

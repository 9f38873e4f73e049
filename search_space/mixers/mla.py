"""Multi-head latent attention: exact softmax attention whose cache is one low-rank latent a token, shared by all heads;
`query_rank` gives queries a latent too.

Letters: B batch, T time, D width, H heads, K head width, R shared key width, C latent rank.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.latent import LatentMixer, LatentState, latent_sizes, pushed
from search_space.parts import attend_flops, mean_visible
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach


@dataclass(frozen=True, kw_only=True)
class MLA(MixerSpec):
    """DeepSeek-V2's attention (arXiv:2405.04434); with rotary=0 it is Kimi Linear's, whose shared part does not turn.

    DeepSeek-V3's is mla[rank=512,query_rank=1536,shared=64,heads=128,head_dim=128].
    """

    name: ClassVar[str] = "mla"
    family: ClassVar[str] = "latent"
    reach: ClassVar[Reach] = "all"
    source: ClassVar[str] = "DeepSeek-V2, arXiv:2405.04434; without positions: Kimi Linear, arXiv:2510.26692"

    rank: int | None = choice(128, 256, 384, 512, unit="rank", searched=True)
    query_rank: int = choice(0, 512, 1024, 1536, unit="rank", default=0)
    """The latent that queries come from; 0 for queries that are projected in one piece."""
    shared: int | None = choice(32, 64, unit="head")
    heads: int | None = choice(8, 16, 32, 64, 128, unit="heads")
    head_dim: int | None = choice(64, 128, unit="head")
    rotary: float = choice(1.0, 0.0)

    def sized(self, frame: Frame) -> Self:
        return replace(self, **vars(latent_sizes(self, frame)))

    def cost(self, frame: Frame) -> Cost:
        sizes = latent_sizes(self, frame)
        held = frame.batch * frame.context * (sizes.rank + sizes.shared) * frame.dtype_bytes
        key, weights = sizes.head_dim + sizes.shared, sizes.weights(frame.width)
        expanded = attend_flops(sizes.heads, key, sizes.head_dim, mean_visible(frame.context))
        absorbed = attend_flops(sizes.heads, sizes.rank + sizes.shared, sizes.rank, frame.context)
        return Cost(
            params=sizes.params(frame.width),
            flops_prefill=2 * weights + expanded,
            flops_decode=2 * weights + absorbed,
            cache=(CacheTensor(name="latents", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return MLAMixer(latent_sizes(self, frame), frame, rotary=self.rotary)


class MLAMixer(LatentMixer):
    """Expanded keys and values for training and prefill; at decode the up-projections are absorbed into the query."""

    def start(self, batch: int, max_len: int) -> LatentState:
        return LatentState(latents=self.empty(batch, max_len, self.rank + self.shared), length=0)

    def forward(self, x: Tensor, state: LatentState | None = None) -> tuple[Tensor, Any]:
        new = self.project(x, state.length if state else 0)
        latents = new.latents
        if state is not None:
            state = pushed(state, latents)
            latents = state.latents[:, : state.length].to(new.queries.dtype)
        keys, values = self.expand(latents)
        return self.out(
            softmax_attention(new.queries, keys, values, scale=self.scale).flatten(2).to(x.dtype)
        ), state

    def step(self, x: Tensor, state: LatentState) -> tuple[Tensor, LatentState]:
        new = self.project(x[:, None], state.length)
        state = pushed(state, new.latents)
        cached = state.latents[:, :, None]
        read = softmax_attention_step(
            self.absorb(new.queries[:, 0]).to(cached.dtype),
            cached,
            cached[..., : self.rank],
            visible=state.length,
            scale=self.scale,
        )
        return self.finish(read.to(new.queries.dtype)).to(x.dtype), state

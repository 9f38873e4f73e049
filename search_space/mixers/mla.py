"""Multi-head latent attention: exact softmax attention whose cache is one low-rank latent a token, shared by all heads.

Letters: B batch, T time, S cached tokens, D width, H heads, K head width, R shared key width, C latent rank.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame, round_to
from search_space.parts import Norm, attend_flops, fit_heads, mean_visible
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec


@dataclass(frozen=True, kw_only=True)
class MLA(MixerSpec):
    """DeepSeek-V2's attention (arXiv:2405.04434); with rotary=0 it is Kimi Linear's, whose shared part does not turn."""

    name: ClassVar[str] = "mla"
    family: ClassVar[str] = "latent"
    source: ClassVar[str] = "DeepSeek-V2, arXiv:2405.04434; without positions: Kimi Linear, arXiv:2510.26692"

    rank: int | None = choice(128, 256, 384, 512, unit="rank", searched=True)
    shared: int | None = choice(32, 64, unit="head")
    heads: int | None = choice(8, 16, 32, 64, 128, unit="heads")
    head_dim: int | None = choice(64, 128, unit="head")
    rotary: float = choice(1.0, 0.0)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(
            self,
            rank=self.rank or min(512, round_to(frame.width / 4, 8)),
            shared=self.shared or round_to(head_dim / 2, 8),
            heads=heads,
            head_dim=head_dim,
        )

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.rank and spec.shared and spec.heads and spec.head_dim
        inner = spec.heads * spec.head_dim
        weights = (
            frame.width * (inner + spec.heads * spec.shared + spec.rank + spec.shared)
            + 2 * spec.rank * inner
            + inner * frame.width
        )
        held = frame.batch * frame.context * (spec.rank + spec.shared) * frame.dtype_bytes
        expanded = attend_flops(
            spec.heads, spec.head_dim + spec.shared, spec.head_dim, mean_visible(frame.context)
        )
        absorbed = attend_flops(spec.heads, spec.rank + spec.shared, spec.rank, frame.context)
        return Cost(
            params=weights + spec.rank,
            flops_prefill=2 * weights + expanded,
            flops_decode=2 * weights + absorbed,
            cache=(CacheTensor(name="latents", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return MLAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MLAState:
    """Latents [B, S, C + R]: the normalised latent and the shared key, turned if there are positions."""

    latents: Tensor
    length: int


class MLAMixer(Mixer):
    """Expanded keys and values for training and prefill; at decode the up-projections are absorbed into the query."""

    def __init__(self, spec: MLA, frame: Frame) -> None:
        super().__init__()
        assert spec.rank and spec.shared and spec.heads and spec.head_dim
        self.frame, self.positions = frame, Positions.of(frame, "rope", spec.rotary)
        self.rank, self.shared, self.heads, self.head_dim = spec.rank, spec.shared, spec.heads, spec.head_dim
        self.scale = (self.head_dim + self.shared) ** -0.5
        if spec.rotary:
            # DeepSeek's YaRN sharpens the whole score and not only what turns.
            self.scale *= self.positions.scaling.gain**2
        self.query = nn.Linear(frame.width, self.heads * (self.head_dim + self.shared), bias=False)
        self.down = nn.Linear(frame.width, self.rank + self.shared, bias=False)
        self.norm = Norm(self.rank, eps=1e-6)
        self.up = nn.Linear(self.rank, self.heads * 2 * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> MLAState:
        shape = (batch, max_len, self.rank + self.shared)
        return MLAState(
            latents=torch.zeros(shape, device=self.down.weight.device, dtype=DTYPES[self.frame.dtype]),
            length=0,
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K + R] and latents [B, T, C + R]."""
        q = self.query(x).unflatten(-1, (self.heads, self.head_dim + self.shared))
        latent, key = self.down(x).split([self.rank, self.shared], dim=-1)
        own, turned = q.split([self.head_dim, self.shared], dim=-1)
        turned = self.positions.turn(turned, start, sharpen=False)
        key = self.positions.turn(key[:, :, None], start, sharpen=False)[:, :, 0]
        return torch.cat([own, turned], dim=-1), torch.cat([self.norm(latent), key], dim=-1)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, S, C + R] to keys [B, S, H, K + R] and values [B, S, H, K]."""
        latent, key = latents.split([self.rank, self.shared], dim=-1)
        own, value = self.up(latent).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)
        return torch.cat([own, key[:, :, None].expand(-1, -1, self.heads, -1)], dim=-1), value

    def push(self, state: MLAState, latents: Tensor) -> MLAState:
        """Write new latents after what is there."""
        end = state.length + latents.shape[1]
        if end > state.latents.shape[1]:
            raise ValueError(
                f"{end} tokens do not fit a cache of {state.latents.shape[1]}: start it with a larger max_len"
            )
        state.latents[:, state.length : end] = latents
        return replace(state, length=end)

    def forward(self, x: Tensor, state: MLAState | None = None) -> tuple[Tensor, Any]:
        q, latents = self.project(x, state.length if state else 0)
        if state is not None:
            state = self.push(state, latents)
            latents = state.latents[:, : state.length].to(q.dtype)
        keys, values = self.expand(latents)
        return self.out(softmax_attention(q, keys, values, scale=self.scale).flatten(2).to(x.dtype)), state

    def step(self, x: Tensor, state: MLAState) -> tuple[Tensor, MLAState]:
        q, latents = self.project(x[:, None], state.length)
        state = self.push(state, latents)
        up_key, up_value = self.up.weight.view(self.heads, 2, self.head_dim, self.rank).unbind(1)
        own, turned = q[:, 0].split([self.head_dim, self.shared], dim=-1)
        absorbed = torch.cat([torch.einsum("bhk,hkc->bhc", own, up_key.to(own.dtype)), turned], dim=-1)
        cached = state.latents[:, :, None]
        read = softmax_attention_step(
            absorbed.to(cached.dtype),
            cached,
            cached[..., : self.rank],
            visible=state.length,
            scale=self.scale,
        )
        values = torch.einsum("bhc,hkc->bhk", read.to(up_value.dtype), up_value)
        return self.out(values.flatten(1).to(x.dtype)), state

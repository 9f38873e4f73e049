"""What the latent attentions share: projections through one low-rank latent a token, its expansion, its cache, its price.

Letters: B batch, T time, S cached tokens, D width, H heads, K head width, R shared key width, C latent rank, Q query rank.
After DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from search_space.frame import Frame, round_to
from search_space.parts import Norm, fit_heads
from search_space.positions import Positions
from search_space.spec import DTYPES, Mixer
from search_space.state import push


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """Sizes of one latent attention; `query_rank` 0 is a query projected in one piece."""

    rank: int
    query_rank: int
    shared: int
    heads: int
    head_dim: int

    def query_weights(self, width: int) -> int:
        """Weights of the query's matrices, the norm of its latent not among them."""
        wide = self.heads * (self.head_dim + self.shared)
        return self.query_rank * (width + wide) if self.query_rank else width * wide

    def weights(self, width: int) -> int:
        """Weights of all matrices."""
        inner = self.heads * self.head_dim
        return (
            self.query_weights(width)
            + width * (self.rank + self.shared)
            + 2 * self.rank * inner
            + inner * width
        )

    def params(self, width: int) -> int:
        """Weights, and the gains of the latents' norms."""
        return self.weights(width) + self.rank + self.query_rank


class LatentSettings(Protocol):
    """What a latent attention's spec lets one choose of its sizes; None is left to the frame."""

    @property
    def rank(self) -> int | None: ...
    @property
    def query_rank(self) -> int | None: ...
    @property
    def shared(self) -> int | None: ...
    @property
    def heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...


def latent_sizes(spec: LatentSettings, frame: Frame) -> LatentSizes:
    """The sizes in a frame: left to it, a quarter of the width is latent, up to 512, and half of it for queries, up to 1536."""
    heads, head_dim = fit_heads(frame, spec.heads, spec.head_dim)
    low = spec.query_rank
    return LatentSizes(
        rank=spec.rank or min(512, round_to(frame.width / 4, 8)),
        query_rank=min(1536, round_to(frame.width / 2, 8)) if low is None else low,
        shared=spec.shared or round_to(head_dim / 2, 8),
        heads=heads,
        head_dim=head_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Of some tokens: queries [B, T, H, K + R], latents [B, T, C + R], and what the queries came from [B, T, Q or D]."""

    queries: Tensor
    latents: Tensor
    source: Tensor


class LatentMixer(Mixer):
    """The projections of a latent attention; which latents are read, and in which form, is the mixer's own."""

    def __init__(self, sizes: LatentSizes, frame: Frame, *, rotary: float) -> None:
        super().__init__()
        self.frame, self.positions = frame, Positions.of(frame, "rope", rotary)
        self.rank, self.shared, self.heads, self.head_dim = (
            sizes.rank,
            sizes.shared,
            sizes.heads,
            sizes.head_dim,
        )
        self.scale = (self.head_dim + self.shared) ** -0.5
        if rotary:
            # DeepSeek's YaRN sharpens the whole score and not only what turns.
            self.scale *= self.positions.scaling.gain**2
        wide = self.heads * (self.head_dim + self.shared)
        self.query_down = (
            nn.Linear(frame.width, sizes.query_rank, bias=False) if sizes.query_rank else nn.Identity()
        )
        self.query_norm = Norm(sizes.query_rank, eps=1e-6) if sizes.query_rank else nn.Identity()
        self.query = nn.Linear(sizes.query_rank or frame.width, wide, bias=False)
        self.down = nn.Linear(frame.width, self.rank + self.shared, bias=False)
        self.norm = Norm(self.rank, eps=1e-6)
        self.up = nn.Linear(self.rank, self.heads * 2 * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def empty(self, batch: int, slots: int, width: int) -> Tensor:
        """An empty cache [B, slots, width] in the frame's type."""
        return torch.zeros(
            batch, slots, width, device=self.down.weight.device, dtype=DTYPES[self.frame.dtype]
        )

    def turn(self, x: Tensor, start: int) -> Tensor:
        """x [B, T, H, R] turned by its positions start, start + 1, …"""
        return self.positions.turn(x, start, sharpen=False)

    def project(self, x: Tensor, start: int) -> Projected:
        """x [B, T, D] at the positions from `start` on."""
        source = self.query_norm(self.query_down(x))
        q = self.query(source).unflatten(-1, (self.heads, self.head_dim + self.shared))
        latent, key = self.down(x).split([self.rank, self.shared], dim=-1)
        own, turned = q.split([self.head_dim, self.shared], dim=-1)
        key = self.turn(key[:, :, None], start)[:, :, 0]
        return Projected(
            queries=torch.cat([own, self.turn(turned, start)], dim=-1),
            latents=torch.cat([self.norm(latent), key], dim=-1),
            source=source,
        )

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, S, C + R] to keys [B, S, H, K + R] and values [B, S, H, K]."""
        latent, key = latents.split([self.rank, self.shared], dim=-1)
        own, value = self.up(latent).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)
        return torch.cat([own, key[:, :, None].expand(-1, -1, self.heads, -1)], dim=-1), value

    def absorb(self, queries: Tensor) -> Tensor:
        """Queries [..., H, K + R] to those that latents are scored by, [..., H, C + R]."""
        own, turned = queries.split([self.head_dim, self.shared], dim=-1)
        up_key = self._up(0, own)
        return torch.cat([torch.einsum("...hk,hkc->...hc", own, up_key), turned.to(up_key.dtype)], dim=-1)

    def finish(self, read: Tensor) -> Tensor:
        """Mixtures of latents [..., H, C], one a head, to the output [..., D]."""
        values = torch.einsum("...hc,hkc->...hk", read, self._up(1, read))
        y: Tensor = self.out(values.flatten(-2))
        return y

    def _up(self, part: int, like: Tensor) -> Tensor:
        """The half of the up-projection that makes keys (0) or values (1), [H, K, C]."""
        return self.up.weight.view(self.heads, 2, self.head_dim, self.rank)[:, part].to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class LatentState:
    """Latents [B, S, C + R]: the normalised latent and the shared key, turned if there are positions."""

    latents: Tensor
    length: int


def pushed(state: LatentState, latents: Tensor) -> LatentState:
    """The state with new latents [B, T, C + R] behind the old ones."""
    return replace(state, length=push(state.latents, latents, state.length))

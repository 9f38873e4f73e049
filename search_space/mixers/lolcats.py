"""LoLCATs: softmax attention over a window, and linear attention with learnt features over all that came before it.

Letters: B batch, T time, S keys, D width, H query heads, G key heads, J heads with sums, K head width, F features of
each sign, w window.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels.scalar_decay.ops import scalar_decay
from kernels.window_mass.ops import window_mass, window_mass_step
from search_space.frame import Frame
from search_space.heads import HeadPlan, fit_kv_heads
from search_space.hedgehog import Hedgehog, spread
from search_space.parts import mean_visible
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append_ring, read_ring, start_key_value

CHUNK = 64
PUBLISHED_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class LoLCATs(MixerSpec):
    """The hybrid attention of LoLCATs (arXiv:2410.10254), with the feature map of Hedgehog (arXiv:2402.04347).

    o = (γ Σ exp(a_s - c) v_s + φ(q) S) / (γ Σ exp(a_s - c) + φ(q) z): the sums run over the window, a are its scores
    and c the largest of them, S and z sum φ(k) vᵀ and φ(k) of the tokens before it, and φ(x) = [softmax(x W),
    softmax(-x W)] after the rotary turn. γ is a sigmoid by head. The score c is taken from the window alone, so that
    the two shares are no estimate of one softmax; what is published is kept. `search_space.linearise` makes such a
    layer of one with softmax.
    """

    name: ClassVar[str] = "lolcats"
    family: ClassVar[str] = "linear_attention"
    source: ClassVar[str] = "Zhang et al. 2024, arXiv:2410.10254; features: arXiv:2402.04347"
    reach: ClassVar[Reach] = "state"

    window: int | None = choice(16, 32, 64, 128, 256, unit="tokens", searched=True)
    features: int | None = choice(32, 64, 128, unit="state", searched=True)
    """F; a token has twice as many."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    tied: bool = choice(False, True)
    """Whether the query heads of a key head share the map of its keys, and with it S and z."""
    share: float = choice(0.1, 0.5)
    """What γ is at first."""
    complement: bool = choice(False, True)
    """Whether what is linear counts 1 - γ in place of 1."""
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)
    gate: bool | str = choice(False, True, "head")

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_kv_heads("lolcats", frame, self.heads, self.kv_heads, self.head_dim)
        window = self.window or min(PUBLISHED_WINDOW, max(4, frame.train_length // 8 // 4 * 4))
        features = self.features or frame.state_size(64)
        return replace(
            self, window=window, features=features, heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )

    def plan(self, frame: Frame) -> HeadPlan:
        """The heads, of a spec that is sized."""
        assert self.heads and self.kv_heads and self.head_dim
        positions = Positions.of(frame, "rope", self.rotary)
        return HeadPlan(
            width=frame.width, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, positions=positions,
            qk_norm=self.qk_norm, gate=self.gate, soft_cap=None, learned_sink=False,
        )  # fmt: skip

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.window and spec.features and spec.heads and spec.kv_heads
        plan, length, both = spec.plan(frame), frame.context, 2 * spec.features
        work, near = 2 * plan.weights, min(length, spec.window)
        heads, summed, size = spec.heads, spec.kv_heads if spec.tied else spec.heads, plan.head_dim
        maps = (heads + summed) * size * spec.features
        # What one token that leaves the window costs: maps, folding in, reading.
        far = 2 * maps + 2 * (heads + summed) * both * (size + 1)
        within = 2 * heads * (both + size + 1) * CHUNK / 2
        left = max(0, length - spec.window)
        held = frame.batch * near * plan.kv_heads * size * frame.dtype_bytes
        sums = frame.batch * summed * both * (size + 1) * 4
        cache = (("keys", held), ("values", held), ("sums", sums))
        return Cost(
            params=plan.params + maps + heads,
            flops_prefill=work + plan.flops(mean_visible(length, near)) + (far + within) * left / length,
            flops_decode=work + plan.flops(near) + (far if left else 0),
            cache=tuple(CacheTensor(name=name, stored_bytes=own, read_bytes=own) for name, own in cache),
        )

    def build(self, frame: Frame) -> Mixer:
        return LoLCATsMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class LoLCATsState:
    """A ring of the window, keys turned, and of the tokens before it the sums [B, J, 2 F, K + 1], float32, z the last."""

    ring: KeyValue
    sums: Tensor


class LoLCATsMixer(Mixer):
    """A token's features are made when it leaves the window; z rides along as one more value that is always one."""

    def __init__(self, spec: LoLCATs, frame: Frame) -> None:
        super().__init__()
        assert spec.window and spec.features
        self.frame, self.plan, self.window = frame, spec.plan(frame), spec.window
        self.complement = spec.complement
        heads, size = self.plan.heads, self.plan.head_dim
        self.summed = self.plan.kv_heads if spec.tied else heads
        self.query, self.key, self.value = self.plan.projections()
        self.gate = self.plan.output_gate()
        self.query_norm, self.key_norm = self.plan.norms()
        self.query_map = Hedgehog(heads, size, spec.features)
        self.key_map = Hedgehog(self.summed, size, spec.features)
        self.share = nn.Parameter(torch.full((heads,), math.log(spec.share / (1 - spec.share))))
        self.out = nn.Linear(self.plan.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> LoLCATsState:
        plan, device = self.plan, self.query.weight.device
        slots, sizes = min(max_len, self.window), (plan.kv_heads, plan.head_dim, plan.head_dim)
        ring = start_key_value(batch, slots, *sizes, device=device, dtype=DTYPES[self.frame.dtype])
        shape = (batch, self.summed, 2 * self.key_map.weight.shape[-1], plan.head_dim + 1)
        return LoLCATsState(ring=ring, sums=torch.zeros(shape, device=device))

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised and turned."""
        norms = (self.query_norm, self.key_norm)
        return self.plan.place(self.query(x), self.key(x), self.value(x), norms, start)

    def mix(self, near: Tensor, mass: Tensor, far: Tensor) -> Tensor:
        """One quotient of the window's [..., H, K] and its mass [..., H], and of what was read of sums [..., H, K + 1]."""
        with torch.autocast(near.device.type, enabled=False):
            share = torch.sigmoid(self.share.float()).unsqueeze(-1)
            weight = share * mass.unsqueeze(-1)
            far = far * (1 - share) if self.complement else far
            return (weight * near + far[..., :-1]) / (weight + far[..., -1:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs [B, T, H, K] over keys and values [B, S, G, K], w at most before the queries', and the sums."""
        heads, left = self.plan.heads, k.shape[1] - self.window
        near, mass = window_mass(q, k, v, window=self.window)
        if left <= 0:
            return near, sums
        # The first key left the window when the first of as many last queries came.
        values = spread(pad(v[:, :left].float(), (0, 1), value=1.0), heads)
        asked, written = self.query_map(q[:, -left:]), spread(self.key_map(k[:, :left]), heads)
        before = None if sums is None else spread(sums, heads, dim=1)
        far, last = scalar_decay(asked, written, values, None, before, chunk=CHUNK)
        if sums is not None:
            sums = last[:, :: heads // self.summed].contiguous()
        return self.mix(near, mass, pad(far, (0, 0, 0, 0, q.shape[1] - left, 0))), sums

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gate the heads' outputs [B, T, H, K] and project them to [B, T, D]."""
        gate = None if self.gate is None else self.gate(x)
        y: Tensor = self.out(self.plan.close(attended.to(x.dtype), gate))
        return y

    def forward(self, x: Tensor, state: LoLCATsState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.ring.length if state else 0)
        if state is None:
            return self.finish(self.attend(q, k, v, None)[0], x), None
        past_k, past_v = read_ring(state.ring)
        ring = append_ring(state.ring, k, v, self.window)
        k, v = torch.cat([past_k.to(k.dtype), k], dim=1), torch.cat([past_v.to(v.dtype), v], dim=1)
        attended, sums = self.attend(q, k, v, state.sums)
        assert sums is not None
        return self.finish(attended, x), LoLCATsState(ring=ring, sums=sums)

    def step(self, x: Tensor, state: LoLCATsState) -> tuple[Tensor, LoLCATsState]:
        at, sums = state.ring.length, state.sums
        q, k, v = self.project(x[:, None], at)
        if at >= self.window:
            place = slice(at % self.window, at % self.window + 1)
            key, value = state.ring.keys[:, place], state.ring.values[:, place].float()
            written = self.key_map(key)[:, 0]
            values = spread(pad(value, (0, 1), value=1.0), self.summed)[:, 0]
            sums = torch.addcmul(sums, written.unsqueeze(-1), values.unsqueeze(-2))
        ring = append_ring(state.ring, k, v, self.window)
        attended, mass = window_mass_step(q[:, 0], ring.keys, ring.values, visible=min(at + 1, self.window))
        if at >= self.window:
            asked = self.query_map(q)[:, 0].unflatten(1, (self.summed, -1))
            with torch.autocast(x.device.type, enabled=False):
                far = torch.matmul(asked, sums).flatten(1, 2)
            attended = self.mix(attended, mass, far)
        y = self.finish(attended[:, None], x[:, None])[:, 0]
        return y, replace(state, ring=ring, sums=sums)

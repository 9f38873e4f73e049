"""Mixture of block attention: every query reads its own block, and of the earlier ones those whose mean key suits it
best; sparse at decode too.

Letters: B batch, T time, D width, H query heads, G key heads, C heads that choose, K head width, N blocks.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.routed_attention.ops import routed_attention, routed_attention_step
from search_space.frame import Frame
from search_space.parts import Norm, attend_flops, fit_heads
from search_space.positions import Positions
from search_space.routing import block_sums, choose, mean_chosen
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append, start_key_value


@dataclass(frozen=True, kw_only=True)
class MoBA(MixerSpec):
    """Block attention with a router without weights (arXiv:2502.13189), sparse at decode too.

    A head scores each completed block by its query times the mean of the block's keys, in float32; the block of the
    token itself is always read, and counts among the `top_k`. Of blocks with equal scores the earlier one is read. The
    sums behind the means stay float32 in any frame, so that a step chooses as training did.
    """

    name: ClassVar[str] = "moba"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "chosen"
    source: ClassVar[str] = "Lu 2025, arXiv:2502.13189"

    block: int | None = choice(64, 128, 256, 512, 1024, 4096, unit="tokens", searched=True)
    top_k: int = choice(3, 1, 2, 4, 6, 8, 12, 16)
    """Blocks that a query reads, its own among them."""
    shared: bool = choice(False, True)
    """Whether the heads of a key group choose together, by the sum of their queries."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        kv_heads = self.kv_heads or heads
        if heads % kv_heads:
            raise ValueError(
                f"moba: kv_heads={kv_heads} does not divide its {heads} heads at width {frame.width}"
            )
        # Three sixteenths of the training length are read, as with 512 tokens of 8192.
        block = self.block or max(4, frame.train_length // 16 // 4 * 4)
        return replace(self, block=block, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        inner, cached = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        weights = frame.width * 2 * (inner + cached)
        choosers = spec.kv_heads if spec.shared else spec.heads
        past = (frame.context - 1) // spec.block
        opened = frame.context - past * spec.block
        others = min(past, spec.top_k - 1) * spec.block
        # Heads of a group that choose for themselves may choose apart.
        rows = min(frame.context, others * (choosers // spec.kv_heads) + opened)
        held, row = frame.batch * frame.context * cached, frame.batch * cached * frame.dtype_bytes
        sums = frame.batch * (past + 1) * cached * 4
        scored = (frame.context + 1) / (2 * spec.block)
        return Cost(
            params=weights + (2 * spec.head_dim if self.qk_norm else 0),
            flops_prefill=2 * weights
            + attend_flops(
                spec.heads, spec.head_dim, spec.head_dim, mean_chosen(frame.context, spec.block, spec.top_k)
            )
            + attend_flops(choosers, spec.head_dim, 0, scored),
            flops_decode=2 * weights
            + attend_flops(spec.heads, spec.head_dim, spec.head_dim, others + opened)
            + attend_flops(choosers, spec.head_dim, 0, past),
            cache=(
                CacheTensor(name="keys", stored_bytes=held * frame.dtype_bytes, read_bytes=rows * row),
                CacheTensor(name="values", stored_bytes=held * frame.dtype_bytes, read_bytes=rows * row),
                CacheTensor(name="sums", stored_bytes=sums, read_bytes=sums),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return MoBAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MoBAState:
    """All keys and values, and the sums of the keys of each block [B, N, G, K] in float32, the open one's last."""

    cache: KeyValue
    sums: Tensor


class MoBAMixer(Mixer):
    """Project, normalise, rotate, choose blocks, attend to them, project; the keys are kept rotated."""

    def __init__(self, spec: MoBA, frame: Frame) -> None:
        super().__init__()
        assert spec.block and spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.frame, self.block, self.top_k = spec, frame, spec.block, spec.top_k
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.query = nn.Linear(frame.width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.query_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.key_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> MoBAState:
        device, sizes = self.query.weight.device, (self.kv_heads, self.head_dim)
        cache = start_key_value(
            batch, max_len, *sizes, self.head_dim, device=device, dtype=DTYPES[self.frame.dtype]
        )
        return MoBAState(
            cache=cache, sums=torch.zeros(batch, -(-max_len // self.block), *sizes, device=device)
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised and rotated."""
        head = (*x.shape[:2], -1, self.head_dim)
        q = self.query_norm(self.query(x).view(head))
        k = self.key_norm(self.key(x).view(head))
        positions = Positions.of(self.frame, "rope", self.spec.rotary)
        return positions.turn(q, start), positions.turn(k, start), self.value(x).view(head)

    @torch.no_grad()
    def route(self, q: Tensor, sums: Tensor, start: int) -> Tensor:
        """The blocks [B, T, C, top_k] of queries [B, T, H, K] from position `start`; sums [B, N, G, K]; -1 for none."""
        with torch.autocast(q.device.type, enabled=False):
            grouped = q.float().unflatten(2, (self.kv_heads, -1))
            if self.spec.shared:
                grouped = grouped.sum(3, keepdim=True)
            means = sums.float() / self.block
            scores = torch.einsum("btgrk,bngk->btgrn", grouped, means).flatten(2, 3)
        here = torch.arange(start, start + q.shape[1], device=q.device)[:, None, None] // self.block
        past = torch.arange(sums.shape[1], device=q.device) < here
        best = choose(scores.masked_fill(~past, -torch.inf), self.top_k - 1)
        return torch.cat([here.expand(*best.shape[:-1], 1), best], dim=-1)

    def add(self, state: MoBAState, k: Tensor, v: Tensor) -> MoBAState:
        """The state with keys and values [B, T, G, K] behind it."""
        start = state.cache.length
        cache = append(state.cache, k, v)
        new = block_sums(k.float(), start, self.block)
        first = start // self.block
        state.sums[:, first : first + new.shape[1]] += new
        return replace(state, cache=cache)

    def forward(self, x: Tensor, state: MoBAState | None = None) -> tuple[Tensor, Any]:
        start = state.cache.length if state else 0
        q, k, v = self.project(x, start)
        if state is None:
            sums = block_sums(k.detach().float(), 0, self.block)
        else:
            state = self.add(state, k, v)
            sums = state.sums[:, : -(-state.cache.length // self.block)]
            k, v = (
                past[:, : state.cache.length].to(q.dtype) for past in (state.cache.keys, state.cache.values)
            )
        attended, _ = routed_attention(q, k, v, self.route(q, sums, start), block=self.block)
        return self.out(attended.flatten(2).to(x.dtype)), state

    def step(self, x: Tensor, state: MoBAState) -> tuple[Tensor, MoBAState]:
        start = state.cache.length
        q, k, v = self.project(x[:, None], start)
        state = self.add(state, k, v)
        blocks = self.route(q, state.sums[:, : start // self.block + 1], start)[:, 0]
        cache = state.cache
        own = q[:, 0].to(cache.keys.dtype)
        attended, _ = routed_attention_step(
            own, cache.keys, cache.values, blocks, block=self.block, length=start + 1
        )
        return self.out(attended.flatten(1).to(x.dtype)), state

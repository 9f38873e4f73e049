"""Causal softmax attention with grouped keys: every token reads every earlier one, exactly. Positions rotary, sloped
(ALiBi), fading (xPos) or none; optional query-key norm, gate by channel or head, capped scores, learned sink.

Letters: B batch, T time, D width, H query heads, G key heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.heads import HeadPlan, fit_kv_heads
from search_space.parts import mean_visible
from search_space.positions import POSITIONS
from search_space.routing import mean_chosen
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach, Stream
from search_space.state import KeyValue, append, start_key_value


@dataclass(frozen=True, kw_only=True)
class Full(MixerSpec):
    """Grouped-query attention (arXiv:1706.03762, 2305.13245); norm of queries and keys (arXiv:2010.04245), gate
    (arXiv:2505.06708), cap of the scores (arXiv:2408.00118), learned sink (arXiv:2508.10925). A frame or pass with a
    `star_block` prefills by Star Attention (arXiv:2411.17116)."""

    name: ClassVar[str] = "full"
    family: ClassVar[str] = "attention"
    reach: ClassVar[Reach] = "all"
    source: ClassVar[str] = "Vaswani 2017, arXiv:1706.03762; grouped: Ainslie 2023, arXiv:2305.13245"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups", searched=True)
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    position: str = choice(*POSITIONS)
    qk_norm: bool = choice(False, True)
    gate: bool | str = choice(False, True, "head")
    soft_cap: int = choice(0, 30, 50)
    learned_sink: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_kv_heads("full", frame, self.heads, self.kv_heads, self.head_dim)
        return replace(self, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        plan = HeadPlan.of(self.sized(frame), frame)
        held = frame.batch * frame.context * plan.kv_heads * plan.head_dim * frame.dtype_bytes
        star = frame.star_block
        seen = mean_chosen(frame.context, star, 2) if star else mean_visible(frame.context)
        return Cost(
            params=plan.params,
            flops_prefill=2 * plan.weights + plan.flops(seen),
            flops_decode=2 * plan.weights + plan.flops(frame.context),
            cache=(
                CacheTensor(name="keys", stored_bytes=held, read_bytes=held),
                CacheTensor(name="values", stored_bytes=held, read_bytes=held),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return FullMixer(self.sized(frame), frame)


class FullMixer(Mixer):
    """Project, normalise, turn, attend, gate, project; the keys are kept turned."""

    def __init__(self, spec: Full, frame: Frame) -> None:
        super().__init__()
        self.frame, self.plan = frame, HeadPlan.of(spec, frame)
        self.query, self.key, self.value = self.plan.projections()
        self.gate = self.plan.output_gate()
        self.query_norm, self.key_norm = self.plan.norms()
        self.sink = self.plan.sink()
        self.out = nn.Linear(self.plan.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KeyValue:
        return start_key_value(
            batch,
            max_len,
            self.plan.kv_heads,
            self.plan.head_dim,
            self.plan.head_dim,
            device=self.query.weight.device,
            dtype=DTYPES[self.frame.dtype],
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised and turned."""
        norms = (self.query_norm, self.key_norm)
        return self.plan.place(self.query(x), self.key(x), self.value(x), norms, start)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gate the heads' outputs [B, T, H, K] and project them to [B, T, D]."""
        gate = None if self.gate is None else self.gate(x)
        y: Tensor = self.out(self.plan.close(attended.to(x.dtype), gate))
        return y

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        if state is not None:
            state = append(state, k, v)
            k, v = state.keys[:, : state.length].to(q.dtype), state.values[:, : state.length].to(q.dtype)
        return self.finish(self.plan.attend(q, k, v, self.sink), x), state

    def forward_with(self, x: Tensor, state: KeyValue | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        if not stream.star_block:
            return super().forward_with(x, state, stream)
        y, state = self.prefill_star(x, state, stream.star_block)
        return y, state, stream

    def prefill_star(self, x: Tensor, state: KeyValue | None, block: int) -> tuple[Tensor, Any]:
        """`forward` of a context [B, T, D] by Star Attention: a token reads its own block up to itself, and the first block.

        The cache is that of `forward`, so that a query or an answer behind the context (`forward`, `step`) reads all
        of it. Where the blocks are spread over machines, each computes the first block again, twice the tokens in all.
        These copies see themselves alone, and with the positions of the first block they are the first block in every
        layer; here it is computed once, and priced so. From the second layer on the cache holds other keys than exact
        attention would have left.
        """
        start = state.length if state else 0
        q, k, v = self.project(x, start)
        if state is not None:
            state = append(state, k, v)
            k, v = state.keys[:, : state.length].to(q.dtype), state.values[:, : state.length].to(q.dtype)
        # Tokens left out matter to slopes and fading alone; turned keys know where they stand.
        counts = self.plan.positions.kind in ("alibi", "xpos")
        outputs = []
        for first in range(start // block * block, k.shape[1], block):
            last, anchor = min(first + block, k.shape[1]), min(first, block)
            queries = q[:, max(first - start, 0) : last - start]
            keys, values = (torch.cat([all_[:, :anchor], all_[:, first:last]], dim=1) for all_ in (k, v))
            sinks, skipped = (anchor, first - anchor) if counts else (0, 0)
            outputs.append(self.plan.attend(queries, keys, values, self.sink, sinks=sinks, skipped=skipped))
        return self.finish(torch.cat(outputs, dim=1), x), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = self.project(x[:, None], state.length)
        state = append(state, k, v)
        attended = self.plan.attend_step(q[:, 0], state.keys, state.values, self.sink, length=state.length)
        return self.finish(attended[:, None], x[:, None])[:, 0], state

"""Sliding-window attention: every token reads the last `size` tokens, itself among them, from a ring of that size; the
settings of `full`, and first tokens kept as sinks, spans by head.

The first `sinks` tokens may stay visible besides, and heads may have windows of different sizes.
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
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append_ring, read_ring, start_key_value

LEAST_SPAN = 4
"""Tokens that a head sees at least, and the step of sizes."""


@dataclass(frozen=True, kw_only=True)
class Window(MixerSpec):
    """As in Mistral (arXiv:2310.06825); first tokens as in StreamingLLM (arXiv:2309.17453, at their own positions),
    a learned sink as in gpt-oss (arXiv:2508.10925), spans by head as in MoA (arXiv:2406.14909)."""

    name: ClassVar[str] = "window"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "window"
    source: ClassVar[str] = "Beltagy 2020, arXiv:2004.05150; Mistral, arXiv:2310.06825"

    size: int | None = choice(128, 256, 512, 1024, 2048, 4096, unit="tokens", searched=True)
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    sinks: int = choice(0, 1, 4)
    spans: str = choice("equal", "halving")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    position: str = choice(*POSITIONS)
    qk_norm: bool = choice(False, True)
    gate: bool | str = choice(False, True, "head")
    soft_cap: int = choice(0, 30, 50)
    learned_sink: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_kv_heads("window", frame, self.heads, self.kv_heads, self.head_dim)
        # An eighth of the training length: far enough to be useful, short enough that the window is felt.
        size = self.size or max(LEAST_SPAN, frame.train_length // 8 // LEAST_SPAN * LEAST_SPAN)
        return replace(self, size=size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Key heads that share a window, as (first, behind the last, tokens), of a spec that is sized.

        "halving" gives a quarter of them each the whole size, a half, a quarter and an eighth of it.
        """
        assert self.size and self.kv_heads
        if self.spans == "equal":
            return ((0, self.kv_heads, self.size),)
        runs: list[tuple[int, int, int]] = []
        for group in range(self.kv_heads):
            span = max(LEAST_SPAN, (self.size >> 4 * group // self.kv_heads) // LEAST_SPAN * LEAST_SPAN)
            if runs and runs[-1][2] == span:
                runs[-1] = (runs[-1][0], group + 1, span)
            else:
                runs.append((group, group + 1, span))
        return tuple(runs)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        plan = HeadPlan.of(spec, frame)
        slots = prefill = decode = 0.0
        for first, last, span in spec.runs():
            share, tokens = (last - first) / plan.kv_heads, span + self.sinks
            slots += (last - first) * min(frame.context, tokens)
            prefill += share * plan.flops(mean_visible(frame.context, tokens))
            decode += share * plan.flops(min(frame.context, tokens))
        held = int(slots) * frame.batch * plan.head_dim * frame.dtype_bytes
        return Cost(
            params=plan.params,
            flops_prefill=2 * plan.weights + prefill,
            flops_decode=2 * plan.weights + decode,
            cache=(
                CacheTensor(name="keys", stored_bytes=held, read_bytes=held),
                CacheTensor(name="values", stored_bytes=held, read_bytes=held),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return WindowMixer(self.sized(frame), frame)


class WindowMixer(Mixer):
    """As full attention, over one ring for each size of window; keys are kept turned by their absolute positions."""

    def __init__(self, spec: Window, frame: Frame) -> None:
        super().__init__()
        self.frame, self.plan = frame, HeadPlan.of(spec, frame)
        self.runs, self.sinks = spec.runs(), spec.sinks
        self.query, self.key, self.value = self.plan.projections()
        self.gate = self.plan.output_gate()
        self.query_norm, self.key_norm = self.plan.norms()
        self.sink = self.plan.sink()
        self.out = nn.Linear(self.plan.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> tuple[KeyValue, ...]:
        """One ring for each size of window, the first tokens in front."""
        return tuple(
            start_key_value(
                batch,
                min(max_len, span + self.sinks),
                last - first,
                self.plan.head_dim,
                self.plan.head_dim,
                device=self.query.weight.device,
                dtype=DTYPES[self.frame.dtype],
            )
            for first, last, span in self.runs
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

    def heads(self, first: int, last: int) -> slice:
        """The query heads of some key heads."""
        shared = self.plan.heads // self.plan.kv_heads
        return slice(first * shared, last * shared)

    def forward(self, x: Tensor, state: tuple[KeyValue, ...] | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state[0].length if state else 0)
        outputs, rings = [], []
        for number, (first, last, span) in enumerate(self.runs):
            heads, keys, values, skipped = (
                self.heads(first, last),
                k[:, :, first:last],
                v[:, :, first:last],
                0,
            )
            if state is not None:
                past_k, past_v = read_ring(state[number], self.sinks)
                skipped = state[number].length - past_k.shape[1]
                rings.append(append_ring(state[number], keys, values, span, self.sinks))
                keys = torch.cat([past_k.to(k.dtype), keys], dim=1)
                values = torch.cat([past_v.to(v.dtype), values], dim=1)
            outputs.append(
                self.plan.attend(
                    q[:, :, heads],
                    keys,
                    values,
                    self.sink,
                    heads=heads,
                    window=span,
                    sinks=self.sinks,
                    skipped=skipped if self.sinks else 0,
                )
            )
        return self.finish(torch.cat(outputs, dim=2), x), None if state is None else tuple(rings)

    def step(self, x: Tensor, state: tuple[KeyValue, ...]) -> tuple[Tensor, tuple[KeyValue, ...]]:
        q, k, v = self.project(x[:, None], state[0].length)
        outputs, rings = [], []
        for ring, (first, last, span) in zip(state, self.runs, strict=True):
            heads = self.heads(first, last)
            ring = append_ring(ring, k[:, :, first:last], v[:, :, first:last], span, self.sinks)
            outputs.append(
                self.plan.attend_step(
                    q[:, 0, heads],
                    ring.keys,
                    ring.values,
                    self.sink,
                    length=ring.length,
                    heads=heads,
                    pinned=self.sinks,
                )
            )
            rings.append(ring)
        return self.finish(torch.cat(outputs, dim=1)[:, None], x[:, None])[:, 0], tuple(rings)

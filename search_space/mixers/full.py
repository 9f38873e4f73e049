"""Full causal softmax attention with grouped keys: every token reads every earlier one, exactly.

Letters: B batch, T time, D width, H query heads, G key heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.parts import Norm, attend_flops, fit_heads, mean_visible
from search_space.rotary import rotate
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec
from search_space.state import KeyValue, append, start_key_value


@dataclass(frozen=True, kw_only=True)
class Full(MixerSpec):
    """Grouped-query attention (arXiv:1706.03762, 2305.13245), with rotary positions, query-key norm and gate."""

    name: ClassVar[str] = "full"
    family: ClassVar[str] = "attention"
    source: ClassVar[str] = "Vaswani 2017, arXiv:1706.03762; grouped: Ainslie 2023, arXiv:2305.13245"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups", searched=True)
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)
    gate: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        kv_heads = self.kv_heads or heads
        if heads % kv_heads:
            raise ValueError(
                f"full: kv_heads={kv_heads} does not divide its {heads} heads at width {frame.width}"
            )
        return replace(self, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.kv_heads and spec.head_dim
        inner, cached = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        weights = frame.width * (inner * (3 if self.gate else 2) + cached)
        held = frame.batch * frame.context * cached // 2 * frame.dtype_bytes
        return Cost(
            params=weights + (2 * spec.head_dim if self.qk_norm else 0),
            flops_prefill=2 * weights
            + attend_flops(spec.heads, spec.head_dim, spec.head_dim, mean_visible(frame.context)),
            flops_decode=2 * weights + attend_flops(spec.heads, spec.head_dim, spec.head_dim, frame.context),
            cache=(
                CacheTensor(name="keys", stored_bytes=held, read_bytes=held),
                CacheTensor(name="values", stored_bytes=held, read_bytes=held),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return FullMixer(self.sized(frame), frame)


class FullMixer(Mixer):
    """Project, normalise, rotate, attend, gate, project; the keys are kept rotated."""

    def __init__(self, spec: Full, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.frame = spec, frame
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        inner = self.heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.gate = nn.Linear(frame.width, inner, bias=False) if spec.gate else None
        self.query_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.key_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KeyValue:
        return start_key_value(
            batch,
            max_len,
            self.kv_heads,
            self.head_dim,
            self.head_dim,
            device=self.query.weight.device,
            dtype=DTYPES[self.frame.dtype],
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised and rotated."""
        head = (*x.shape[:2], -1, self.head_dim)
        q = self.query_norm(self.query(x).view(head))
        k = self.key_norm(self.key(x).view(head))
        turn = {"fraction": self.spec.rotary, "base": self.frame.rotary_base}
        return rotate(q, start, **turn), rotate(k, start, **turn), self.value(x).view(head)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gate the heads' outputs [B, T, H, K] and project them to [B, T, D]."""
        attended = attended.flatten(2).to(x.dtype)
        if self.gate is not None:
            attended = attended * torch.sigmoid(self.gate(x))
        y: Tensor = self.out(attended)
        return y

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        if state is not None:
            state = append(state, k, v)
            k, v = state.keys[:, : state.length].to(q.dtype), state.values[:, : state.length].to(q.dtype)
        return self.finish(softmax_attention(q, k, v), x), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = self.project(x[:, None], state.length)
        state = append(state, k, v)
        attended = softmax_attention_step(
            q[:, 0].to(state.keys.dtype), state.keys, state.values, visible=state.length
        )
        return self.finish(attended[:, None], x[:, None])[:, 0], state

"""Sliding-window attention: every token reads the last `size` tokens, itself among them, from a ring of that size.

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
from search_space.state import KeyValue, append_ring, read_ring, start_key_value


@dataclass(frozen=True, kw_only=True)
class Window(MixerSpec):
    """Sliding-window attention as in Mistral (arXiv:2310.06825), grouped keys, rotary positions."""

    name: ClassVar[str] = "window"
    family: ClassVar[str] = "sparse"
    source: ClassVar[str] = "Beltagy 2020, arXiv:2004.05150; Mistral, arXiv:2310.06825"

    size: int | None = choice(128, 256, 512, 1024, 2048, 4096, unit="tokens", searched=True)
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
                f"window: kv_heads={kv_heads} does not divide its {heads} heads at width {frame.width}"
            )
        # An eighth of the training length: far enough to be useful, short enough that the window is felt.
        size = self.size or max(4, frame.train_length // 8 // 4 * 4)
        return replace(self, size=size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim
        inner, cached = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        weights = frame.width * (2 * inner + cached)
        slots = min(frame.context, spec.size)
        held = frame.batch * slots * cached // 2 * frame.dtype_bytes
        visible = mean_visible(frame.context, spec.size)
        return Cost(
            params=weights + (2 * spec.head_dim if self.qk_norm else 0),
            flops_prefill=2 * weights + attend_flops(spec.heads, spec.head_dim, spec.head_dim, visible),
            flops_decode=2 * weights + attend_flops(spec.heads, spec.head_dim, spec.head_dim, slots),
            cache=(
                CacheTensor(name="keys", stored_bytes=held, read_bytes=held),
                CacheTensor(name="values", stored_bytes=held, read_bytes=held),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return WindowMixer(self.sized(frame), frame)


class WindowMixer(Mixer):
    """As full attention, over a ring; keys are kept rotated by their absolute positions."""

    def __init__(self, spec: Window, frame: Frame) -> None:
        super().__init__()
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.frame, self.size = spec, frame, spec.size
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.query = nn.Linear(frame.width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(frame.width, self.kv_heads * self.head_dim, bias=False)
        self.query_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.key_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KeyValue:
        return start_key_value(
            batch,
            min(max_len, self.size),
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

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        if state is not None:
            past_k, past_v = read_ring(state)
            state = append_ring(state, k, v, self.size)
            k, v = torch.cat([past_k.to(k.dtype), k], dim=1), torch.cat([past_v.to(v.dtype), v], dim=1)
        attended = softmax_attention(q, k, v, window=self.size)
        return self.out(attended.flatten(2).to(x.dtype)), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = self.project(x[:, None], state.length)
        state = append_ring(state, k, v, self.size)
        visible = min(state.length, state.keys.shape[1])
        attended = softmax_attention_step(
            q[:, 0].to(state.keys.dtype), state.keys, state.values, visible=visible
        )
        return self.out(attended.flatten(1).to(x.dtype)), state

"""Retrieval: a window over the last tokens, and of all tokens before it those few that suit a query best.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, w window, N retrieved tokens, M bank entries.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.retrieved_attention.ops import nearest_keys, retrieved_attention
from kernels.softmax_attention.ops import merge, softmax_attention_with_sums
from search_space.frame import Frame
from search_space.grouped import fit_grouped
from search_space.parts import Norm, attend_flops, mean_visible
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append, start_key_value


@dataclass(frozen=True, kw_only=True)
class Retrieval(MixerSpec):
    """Attention to the last `window` tokens and to the `top_k` best of all before them, found by every head for itself.

    With `combine=gate` each of the two has its softmax, and a learned gate of each head blends them (Memorizing
    Transformers, arXiv:2203.08913), where anything was retrieved; with `joint` they share one. Keys are kept without
    positions, so that ranks do not depend on distances; `rotary` turns the window's alone. Of equal scores the most
    recent token is retrieved. The search is exact and reads every key. In the paper the memory holds tokens of
    earlier training steps, and nothing learns through it; here they are the same text's, and what is retrieved
    learns as all else does, the choice excepted. A bank of the mixer (`with_bank`) is the paper's memory.
    """

    name: ClassVar[str] = "retrieval"
    family: ClassVar[str] = "memory"
    source: ClassVar[str] = "Wu 2022, arXiv:2203.08913; joint softmax as Bertsch 2023, arXiv:2305.01625"
    reach: ClassVar[Reach] = "chosen"

    window: int | None = choice(64, 128, 256, 512, 1024, unit="tokens", searched=True)
    top_k: int | None = choice(16, 32, 64, 128, 256, unit="tokens", searched=True)
    """Tokens before the window that a head retrieves; shrinks as the window does."""
    combine: str = choice("gate", "joint")
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)
    qk_norm: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        heads, kv_heads, head_dim = fit_grouped(self.name, frame, self.heads, self.kv_heads, self.head_dim)
        window = self.window or max(4, frame.train_length // 8 // 4 * 4)
        # The paper's 32 tokens beside a window of 512, and not fewer than four.
        top_k = self.top_k or max(4, window // 16 // 4 * 4)
        return replace(self, window=window, top_k=top_k, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.window and spec.top_k and spec.heads and spec.kv_heads and spec.head_dim
        heads, key, context = spec.heads, spec.head_dim, frame.context
        inner, cached = heads * key, spec.kv_heads * key
        weights = 2 * frame.width * (inner + cached)
        near, past = min(context, spec.window), max(0, context - spec.window)
        found = min(past, spec.top_k)
        # Candidates and retrieved tokens, averaged over a prefill: none until the window is full.
        searched = past * (past + 1) / (2 * context)
        mean_found = past * mean_visible(past, spec.top_k) / context if past else 0.0
        row = frame.batch * cached * frame.dtype_bytes
        # Heads that share keys may retrieve apart. The search reads every key, also those it does not find.
        values = min(past, found * (heads // spec.kv_heads)) + near
        return Cost(
            params=weights + (2 * key if spec.qk_norm else 0) + (heads if spec.combine == "gate" else 0),
            flops_prefill=2 * weights
            + attend_flops(heads, key, key, mean_visible(context, spec.window) + mean_found)
            + attend_flops(heads, key, 0, searched),
            flops_decode=2 * weights
            + attend_flops(heads, key, key, near + found)
            + attend_flops(heads, key, 0, past),
            cache=(
                CacheTensor(name="keys", stored_bytes=row * context, read_bytes=row * context),
                CacheTensor(name="values", stored_bytes=row * context, read_bytes=row * values),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return RetrievalMixer(self.sized(frame), frame)


class RetrievalMixer(Mixer):
    """Project, normalise, search, attend to the window and to what was found, blend, project; keys are kept unturned."""

    def __init__(self, spec: Retrieval, frame: Frame) -> None:
        super().__init__()
        assert spec.window and spec.top_k and spec.heads and spec.kv_heads and spec.head_dim
        self.frame, self.window, self.top_k = frame, spec.window, spec.top_k
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.positions = Positions.of(frame, "rope", spec.rotary)
        inner, cached = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, cached, bias=False)
        self.value = nn.Linear(frame.width, cached, bias=False)
        self.query_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.key_norm = Norm(self.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.gate = nn.Parameter(torch.zeros(self.heads)) if spec.combine == "gate" else None
        self.out = nn.Linear(inner, frame.width, bias=False)
        self.bank_keys: Tensor | None
        self.bank_values: Tensor | None
        self.register_buffer("bank_keys", None, persistent=False)
        self.register_buffer("bank_values", None, persistent=False)

    def with_bank(self, keys: Tensor, values: Tensor) -> Self:
        """This mixer with a frozen bank of keys and values, both [M, G, K], searched together with the past.

        Keys are taken as the search compares them: normalised, unturned. Every token may retrieve from the bank, the
        first one too; of equal scores a token of the text comes before the bank, and a later entry before an earlier.
        The bank is neither parameter nor state, is not saved, and is in no cost.

        Raises:
            ValueError: keys or values have another shape.
        """
        shape = (len(keys), self.kv_heads, self.head_dim)
        for name, part in (("keys", keys), ("values", values)):
            if not len(keys) or tuple(part.shape) != shape:
                raise ValueError(
                    f"retrieval: the bank's {name} have shape {list(part.shape)}, but must be [M, G, K] = "
                    f"{list(shape)} with at least one entry; project them as this layer does"
                )
        self.bank_keys, self.bank_values = keys.detach().clone(), values.detach().clone()
        return self

    def start(self, batch: int, max_len: int) -> KeyValue:
        sizes, device = (self.kv_heads, self.head_dim, self.head_dim), self.query.weight.device
        return start_key_value(batch, max_len, *sizes, device=device, dtype=DTYPES[self.frame.dtype])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, H, K], keys and values [B, T, G, K], normalised."""
        head = (*x.shape[:2], -1, self.head_dim)
        q, k = self.query_norm(self.query(x).view(head)), self.key_norm(self.key(x).view(head))
        return q, k, self.value(x).view(head)

    def retrieve(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What queries [B, T, H, K] find among the first visible[t] of keys and values [B, S, G, K], and in the bank.

        Returns [B, T, H, K] and the log-sum-exp [B, T, H]; 0 and -inf where there is nothing.
        """
        sources = [(k, v, visible)]
        if self.bank_keys is not None and self.bank_values is not None:
            bank = [
                part.to(k.dtype).expand(len(k), -1, -1, -1) for part in (self.bank_keys, self.bank_values)
            ]
            sources.append((bank[0], bank[1], torch.full_like(visible, len(self.bank_keys))))
        found = [nearest_keys(q, keys, seen, keep=self.top_k) for keys, _, seen in sources]
        places = [named for named, _ in found]
        if len(found) > 1:
            # The best of both: a stable order, in which the text comes first.
            order = torch.cat([own for _, own in found], dim=-1).argsort(dim=-1, descending=True, stable=True)
            ranks = order.argsort(dim=-1).split([named.shape[-1] for named in places], dim=-1)
            places = [
                named.masked_fill(rank >= self.top_k, -1) for named, rank in zip(places, ranks, strict=True)
            ]
        read = [
            retrieved_attention(q, keys, values, named)
            for (keys, values, _), named in zip(sources, places, strict=True)
        ]
        return merge(*zip(*read, strict=True)) if len(read) > 1 else read[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Queries [B, T, H, K], the last of `length` tokens, over a cache of keys and values [B, S, G, K] that holds them."""
        start = length - q.shape[1]
        first = max(0, start - self.window + 1)
        near_k, near_v = (part[:, first:length].to(q.dtype) for part in (k, v))
        turned = self.positions.turn(q, start), self.positions.turn(near_k, first)
        local, local_sum = softmax_attention_with_sums(*turned, near_v, window=self.window)
        past = torch.arange(start + 1, length + 1, device=q.device).sub(self.window).clamp(min=0)
        distant, distant_sum = self.retrieve(q, k, v, past)
        distant = distant.to(q.dtype)
        if self.gate is None:
            return merge((local, distant), (local_sum, distant_sum))[0]
        share = torch.sigmoid(self.gate) * (distant_sum > -torch.inf)
        return torch.lerp(local, distant, share.unsqueeze(-1).to(local.dtype))

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        length = x.shape[1]
        if state is not None:
            state = append(state, k, v)
            k, v, length = state.keys, state.values, state.length
        return self.out(self.attend(q, k, v, length).flatten(2).to(x.dtype)), state

    def step(self, x: Tensor, state: KeyValue) -> tuple[Tensor, KeyValue]:
        y, state = self(x[:, None], state)
        return y[:, 0], state

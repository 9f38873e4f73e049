"""Native sparse attention: summaries of the whole past, the blocks that they point to, and a window, each gated.

Letters: B batch, T time, D width, H query heads, G key heads, K head width, N slots (summaries), J blocks.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.routed_attention.ops import routed_attention, routed_attention_step
from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame, nearest_divisor
from search_space.parts import attend_flops, fit_groups, fit_heads, mean_visible
from search_space.positions import Positions
from search_space.routing import mean_chosen
from search_space.setting import choice
from search_space.slots import (  # fmt: skip
    Pair,
    Slots,
    Squeeze,
    mean_slots,
    push_slots,
    read_slots,
    slots_of,
    start_slots,
    whole_slots,
)
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach
from search_space.state import KeyValue, append, append_ring, read_ring, start_key_value


@dataclass(frozen=True, kw_only=True)
class NSA(MixerSpec):
    """NSA (arXiv:2502.11089), keys and values of its own for each branch, blocks chosen by key group.

    Slots are made of keys without positions, and read by queries without: their positions are learnt within the slot.
    A block's score is the weight of the slots that overlap it. The token's own block, the one before and the first
    are always read, in this order where fewer are; of blocks with equal scores the earlier one is read.
    """

    name: ClassVar[str] = "nsa"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "all"
    source: ClassVar[str] = "Yuan 2025, arXiv:2502.11089"

    block: int | None = choice(64, 32, 128, unit="tokens")
    stride: int | None = choice(16, 8, 32, 64, unit="tokens")
    """Tokens from slot to slot; the divisor of the block nearest to it is taken."""
    overlap: int = choice(2, 1)
    """Strides that a slot sums up."""
    selected: int | None = choice(512, 1024, 2048, unit="tokens", searched=True)
    """Tokens in the blocks that a query reads."""
    window: int | None = choice(512, 256, 1024, unit="tokens", searched=True)
    compress: str = choice("mlp", "mean")
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        kv_heads = fit_groups("nsa", frame, heads, self.kv_heads or heads)

        def share(given: int | None, part: int) -> int:
            return given or max(4, frame.train_length // part // 4 * 4)

        # As published, 64, 16, 1024 and 512 tokens, where the training length is 4096.
        block = share(self.block, 64)
        stride = nearest_divisor(block, share(self.stride, 256), 4)
        spec = replace(self, block=block, stride=stride, selected=share(self.selected, 4))
        window = share(self.window, 8)
        return replace(spec, window=window, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.selected and spec.block and spec.stride and spec.window
        assert spec.heads and spec.kv_heads and spec.head_dim
        size, context, length = spec.head_dim, frame.context, spec.overlap * spec.stride
        inner, cached = spec.heads * size, spec.kv_heads * size
        weights = frame.width * (2 * inner + 6 * cached + 3 * spec.heads)
        squeeze = 2 * (length + 1) * size**2 if self.compress == "mlp" else 0
        slots, count = slots_of(context, length, spec.stride), max(1, spec.selected // spec.block)
        past = (context - 1) // spec.block
        rows = context - (past - min(past, count - 1)) * spec.block
        seen = mean_slots(context, length, spec.stride)
        seen += mean_chosen(context, spec.block, count) + mean_visible(context, spec.window)
        work = 2 * weights + 2 * spec.kv_heads * squeeze / spec.stride
        near, tail = min(context, spec.window), min(context, length)
        row = 2 * frame.batch * cached * frame.dtype_bytes
        tensors = {"blocks": (context, rows), "window": (near, near), "slots": (slots, slots), "tail": (tail, tail)}  # fmt: skip
        return Cost(
            params=weights + 3 * spec.heads + (squeeze + 2 * length * size if squeeze else 0),
            flops_prefill=work + attend_flops(spec.heads, size, size, seen),
            flops_decode=work + attend_flops(spec.heads, size, size, slots + rows + near),
            cache=tuple(
                CacheTensor(name=name, stored_bytes=stored * row, read_bytes=read * row)
                for name, (stored, read) in tensors.items()
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return NSAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class NSAState:
    """Every key and value for the blocks, a ring for the window, and the slots."""

    cache: KeyValue
    near: KeyValue
    slots: Slots


class NSAMixer(Mixer):
    """Project, squeeze, read the slots, choose blocks by their weights, read blocks and window, gate, project."""

    def __init__(self, spec: NSA, frame: Frame) -> None:
        super().__init__()
        assert spec.selected and spec.block and spec.stride and spec.window
        assert spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.frame, self.block, self.window = spec, frame, spec.block, spec.window
        self.count = max(1, spec.selected // spec.block)
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        inner, cached = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, 3 * cached, bias=False)
        self.value = nn.Linear(frame.width, 3 * cached, bias=False)
        self.gate = nn.Linear(frame.width, 3 * self.heads)
        squeeze, learnt = (self.head_dim, spec.overlap * spec.stride, spec.stride), spec.compress == "mlp"
        self.squeeze_key = Squeeze(*squeeze, learnt=learnt)
        self.squeeze_value = Squeeze(*squeeze, learnt=learnt)
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> NSAState:
        device, dtype = self.query.weight.device, DTYPES[self.frame.dtype]
        heads, size = self.kv_heads, self.head_dim
        cache, near = (
            start_key_value(batch, min(max_len, slots), heads, size, size, device=device, dtype=dtype)
            for slots in (max_len, self.window)
        )
        slots = start_slots(batch, max_len, self.squeeze_key, heads, size, device=device, dtype=dtype)
        return NSAState(cache=cache, near=near, slots=slots)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, tuple[Pair, Pair, Pair]]:
        """x [B, T, D] to queries [B, T, H, K] plain and rotated, and keys and values [B, T, G, K] of the three branches."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        slot_k, k, near_k = self.key(x).unflatten(-1, (3, self.kv_heads, -1)).unbind(2)
        slot_v, v, near_v = self.value(x).unflatten(-1, (3, self.kv_heads, -1)).unbind(2)
        positions = Positions.of(self.frame, "rope", self.spec.rotary)
        pairs = ((slot_k, slot_v), (positions.turn(k, start), v), (positions.turn(near_k, start), near_v))
        return q, positions.turn(q, start), pairs

    def finish(self, reads: list[Tensor], x: Tensor) -> Tensor:
        """The three readings [..., H, K] under their gates, projected."""
        gates = torch.sigmoid(self.gate(x)).unflatten(-1, (3, self.heads, 1))
        y: Tensor = self.out((gates * torch.stack(reads, dim=-3).to(x.dtype)).sum(-3).flatten(-2))
        return y

    def forward(self, x: Tensor, state: NSAState | None = None) -> tuple[Tensor, Any]:
        start = state.cache.length if state else 0
        q, turned, ((slot_k, slot_v), (k, v), (near_k, near_v)) = self.project(x, start)
        if state is None:
            slots = (self.squeeze_key(slot_k), self.squeeze_value(slot_v))
        else:
            past = read_ring(state.near)
            state = self.push(state, (slot_k, slot_v), (k, v), (near_k, near_v))
            near_k, near_v = (torch.cat([old.to(q.dtype), new], dim=1) for old, new in zip(past, (near_k, near_v), strict=True))  # fmt: skip
            cached, end = (state.cache.keys, state.cache.values), state.cache.length
            k, v = (part[:, :end].to(q.dtype) for part in cached)
            slots = whole_slots(state.slots, self.squeeze_key)
        read, blocks = read_slots(q, *slots, self.squeeze_key, start, self.block, self.count)
        selected, _ = routed_attention(turned, k, v, blocks, block=self.block)
        near = softmax_attention(turned, near_k, near_v, window=self.window)
        return self.finish([read, selected, near], x), state

    def push(self, state: NSAState, slot: Pair, block: Pair, near: Pair) -> NSAState:
        """The state with the keys and values [B, T, G, K] of the three branches behind it."""
        return NSAState(
            cache=append(state.cache, *block),
            near=append_ring(state.near, *near, self.window),
            slots=push_slots(state.slots, *slot, self.squeeze_key, self.squeeze_value),
        )

    def step(self, x: Tensor, state: NSAState) -> tuple[Tensor, NSAState]:
        start = state.cache.length
        q, turned, branches = self.project(x[:, None], start)
        state = self.push(state, *branches)
        cache, near = state.cache, state.near
        slots = whole_slots(state.slots, self.squeeze_key)
        read, blocks = read_slots(q, *slots, self.squeeze_key, start, self.block, self.count)
        turned = turned[:, 0].to(cache.keys.dtype)
        selected, _ = routed_attention_step(
            turned, cache.keys, cache.values, blocks[:, 0], block=self.block, length=start + 1
        )
        visible = min(near.length, near.keys.shape[1])
        close = softmax_attention_step(turned, near.keys, near.values, visible=visible)
        return self.finish([read[:, 0], selected, close], x), state

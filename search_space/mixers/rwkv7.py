"""RWKV-7: a matrix by head whose key channels fade, and from which each token takes out what one direction holds.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), H K = D.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.low_rank_delta.ops import low_rank_delta, low_rank_delta_step
from search_space.frame import Frame
from search_space.parts import unit
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach, Stream

CHUNK = 64
STREAMS = 6
"""Reads, decay, keys, values, correction and gate, each with its own mixture of a token and the one before."""
HARDEST = -math.exp(-0.5)
"""The smallest log-decay of a token."""
NORM_EPSILON = 64e-5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class RWKV7(MixerSpec):
    """RWKV-7, "Goose" (arXiv:2503.14456): vector decay, vector rates of learning in context, one value for all layers.

    The first such layer of a network leaves its value in the stream, and later ones mix it into their own. Initial
    values follow the layer's place, as published; the last projection starts as an ordinary one, not at zero.
    """

    name: ClassVar[str] = "rwkv7"
    family: ClassVar[str] = "delta"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Peng 2025, arXiv:2503.14456"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth", "stream", "width"})

    head_dim: int | None = choice(32, 64, 128, unit="head", searched=True)
    rank_ratio: float = choice(1.0, 0.5, 2.0)
    """Ranks of decay, correction, value and gate over the published ones."""

    def sized(self, frame: Frame) -> Self:
        head_dim = self.head_dim or frame.head_size(64, frame.width)
        if frame.width % head_dim:
            raise ValueError(
                f"rwkv7: head_dim={head_dim} does not divide the width {frame.width}, which its heads fill"
            )
        return replace(self, head_dim=head_dim)

    def ranks(self, frame: Frame) -> tuple[int, int, int]:
        """Of decay and correction, of the value (none in the first such layer), and of the gate: as in the released networks."""
        fast, value, gate = (
            int(self.rank_ratio * max(32, round(ideal / 32) * 32))
            for ideal in (1.8 * frame.width**0.5, 1.3 * frame.width**0.5, 0.6 * frame.width**0.8)
        )
        return fast, value if self.name in frame.place.earlier else 0, gate

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.head_dim
        width, key = frame.width, spec.head_dim
        fast, value, gate = spec.ranks(frame)
        weights = width * (4 * width + 2 * (2 * fast + value + gate))
        vectors = width * (STREAMS + 7 + (1 if value else 0))
        chunk = CHUNK * 16 * key + 8 * key * key + 2 * CHUNK * CHUNK / 3
        held, tail = frame.batch * width * key * 4, frame.batch * width * frame.dtype_bytes
        return Cost(
            params=weights + vectors,
            flops_prefill=2 * weights + width // key * chunk,
            flops_decode=2 * weights + 8 * width * key,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return RWKV7Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class RWKV7State:
    """Matrix [B, H, K, K], float32, and the last token's input, tail [B, D]."""

    matrix: Tensor
    tail: Tensor


class LowRank(nn.Module):
    """A bias [D], if one is given, plus a map of low rank, bent between its halves; as wide as float32."""

    def __init__(self, width: int, rank: int, bend: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        # Small, not zero as published: otherwise the other half would learn nothing in the first step.
        nn.init.uniform_(self.down.weight, -0.1 * width**-0.5, 0.1 * width**-0.5)
        nn.init.orthogonal_(self.up.weight, gain=0.1)
        self.bias, self.bend = None if bias is None else nn.Parameter(bias), bend

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.bend(self.down(x)))
        return y if self.bias is None else self.bias.float() + y.float()


class RWKV7Mixer(Mixer):
    """Mix each token with the one before, project, run the delta rule, normalise each head, add a bonus, gate, project."""

    def __init__(self, spec: RWKV7, frame: Frame) -> None:
        super().__init__()
        assert spec.head_dim
        self.frame, self.head_dim, width = frame, spec.head_dim, frame.width
        fast, value, gate = spec.ranks(frame)
        done = frame.place.index / max(1, frame.place.depth - 1)
        left = 1 - frame.place.index / frame.place.depth
        place = torch.arange(width) / width
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
        self.shares = nn.Parameter(1 - place ** (left * powers[:, None]))
        ramp = torch.arange(width) / (width - 1)
        within = (torch.arange(width) % self.head_dim) / (self.head_dim - 1) * 2 - 1
        zigzag = within * within.abs()
        self.decay = LowRank(width, fast, torch.tanh, 6 * ramp ** (1 + done**0.3) - 5.5 + 2.5 * zigzag)
        self.rate = LowRank(width, fast, nn.Identity(), 0.3 * zigzag + 0.4 * (ramp - 0.5) - 0.19)
        self.blend = LowRank(width, value, nn.Identity(), 0.73 - 0.4 * (ramp - 0.5)) if value else None
        self.gate = LowRank(width, gate, torch.sigmoid, None)
        self.read = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.direction = nn.Parameter(0.71 - 0.1 * (ramp - 0.5))
        self.key_rate = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.full((width,), -0.04))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width, bias=False)

    def start(self, batch: int, max_len: int) -> RWKV7State:  # noqa: ARG002
        device, width, key = self.key.weight.device, self.frame.width, self.head_dim
        return RWKV7State(
            matrix=torch.zeros(batch, width // key, key, key, device=device),
            tail=torch.zeros(batch, width, device=device, dtype=DTYPES[self.frame.dtype]),
        )

    def scan_inputs(self, x: Tensor, before: Tensor, stream: Stream) -> tuple[Inputs, Tensor, Stream]:
        """What the operator takes, [..., H, K] each, the gate [..., D], and the stream, of x and its forerunners [..., D]."""
        change = before - x
        read, decay, key, value, rate, gate = (x + change * share.to(x.dtype) for share in self.shares)
        r, k, v = self.read(read).float(), self.key(key).float(), self.value(value)
        if self.blend is None:
            stream = stream.with_value(RWKV7.name, v)
        elif RWKV7.name in stream.values:
            first = stream.values[RWKV7.name]
            v = v + (first - v) * torch.sigmoid(self.blend(value)).to(v.dtype)
        else:
            raise ValueError(
                "rwkv7: this layer mixes in the value of the network's first such layer, and the stream holds none: "
                "run it within its network, or build it for a place with no rwkv7 earlier"
            )
        log_decay, rate = HARDEST * torch.sigmoid(self.decay(decay)), torch.sigmoid(self.rate(rate))
        head = (-1, self.head_dim)
        erased = unit((k * self.direction.float()).unflatten(-1, head))
        k = k * (1 + (rate - 1) * self.key_rate.float())
        r, k, v, log_decay, rate = (part.unflatten(-1, head) for part in (r, k, v.float(), log_decay, rate))
        return (r, k, v, log_decay, -erased, erased * rate), self.gate(gate), stream

    def finish(self, seen: Tensor, inputs: Inputs, gate: Tensor) -> Tensor:
        """Normalise each head of what was seen [..., H, K], add the token's own value by its bonus, gate, project."""
        read, key, value, *_ = inputs
        normed = F.layer_norm(seen, (self.head_dim,), eps=NORM_EPSILON).flatten(-2)
        normed = normed * self.norm_weight.float() + self.norm_bias.float()
        weight = (read * key * self.bonus.float().unflatten(-1, (-1, self.head_dim))).sum(-1, keepdim=True)
        y: Tensor = self.out((normed + (weight * value).flatten(-2)).to(gate.dtype) * gate)
        return y

    def forward(self, x: Tensor, state: RWKV7State | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        y, state, _ = self.step_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: RWKV7State | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        tail = torch.zeros_like(x[:, 0]) if state is None else state.tail.to(x.dtype)
        inputs, gate, stream = self.scan_inputs(x, torch.cat([tail.unsqueeze(1), x[:, :-1]], dim=1), stream)
        seen, matrix = low_rank_delta(*inputs, state.matrix if state else None, chunk=CHUNK, bound=-HARDEST)
        return self.finish(seen, inputs, gate), self.kept(matrix, x[:, -1]) if state else None, stream

    def step_with(self, x: Tensor, state: RWKV7State, stream: Stream) -> tuple[Tensor, RWKV7State, Stream]:
        inputs, gate, stream = self.scan_inputs(x, state.tail.to(x.dtype), stream)
        seen, matrix = low_rank_delta_step(*inputs, state.matrix)
        return self.finish(seen, inputs, gate), self.kept(matrix, x), stream

    def kept(self, matrix: Tensor, last: Tensor) -> RWKV7State:
        """The state with a copy of the last token's input [B, D], in the frame's type."""
        return RWKV7State(matrix=matrix, tail=last.to(DTYPES[self.frame.dtype], copy=True))

"""RWKV-6: a matrix by head that fades by key channel, read before it is written, from inputs mixed with the token before.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), N = B·T, R rank.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.channel_decay.ops import channel_decay, channel_decay_step
from search_space.frame import Frame, round_to
from search_space.parts import fit_heads
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach

CHUNK = 64
STREAMS = 5
"""Decay, keys, values, queries and gate, each with its own mixture of a token and the one before."""
NORM_EPSILON = 64e-5
WIDEST_EXPONENT = 10.0


@dataclass(frozen=True, kw_only=True)
class RWKV6(MixerSpec):
    """RWKV-6, "Finch" (arXiv:2404.05892): data-dependent token shift and decay of low rank, a bonus for the token itself.

    Initial values follow the layer's place, as published; the projections start as ordinary linear maps do.
    """

    name: ClassVar[str] = "rwkv6"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Peng 2024, arXiv:2404.05892"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    heads: int | None = choice(16, 32, 40, 64, unit="heads")
    head_dim: int | None = choice(32, 64, 128, unit="head", searched=True)
    rank_ratio: float = choice(1.0, 0.5, 2.0)
    """Ranks over the published ones: at a width below 4096 32 for the token shift and 64 for the decay, else twice that."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=64)
        return replace(self, heads=heads, head_dim=head_dim)

    def ranks(self, width: int) -> tuple[int, int]:
        """Of the token shift and of the decay; below the published widths in proportion to the width."""
        published = 64 if width >= 4096 else min(32, round_to(width / 32, 8))
        return int(self.rank_ratio * published), int(self.rank_ratio * 2 * published)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        inner = spec.heads * spec.head_dim
        shift, decay = spec.ranks(frame.width)
        weights = frame.width * (5 * inner + 2 * STREAMS * shift + decay) + decay * inner
        matrix = inner * spec.head_dim
        held, tail = frame.batch * matrix * 4, frame.batch * frame.width * frame.dtype_bytes
        return Cost(
            params=weights + (1 + STREAMS) * frame.width + 4 * inner,
            flops_prefill=2 * weights + 4 * CHUNK * inner + 4 * matrix,
            flops_decode=2 * weights + 5 * matrix,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return RWKV6Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class RWKV6State:
    """Matrix [B, H, K, K], float32, and the last token's input, tail [B, D]."""

    matrix: Tensor
    tail: Tensor


class RWKV6Mixer(Mixer):
    """Mix each token with the one before, project, read and write, normalise each head, gate, project."""

    def __init__(self, spec: RWKV6, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.frame, self.heads, self.head_dim = frame, spec.heads, spec.head_dim
        inner, width = self.heads * self.head_dim, frame.width
        shift, decay = spec.ranks(width)
        index, depth = frame.place.index, frame.place.depth
        done, left = index / max(1, depth - 1), 1 - index / depth
        mixtures = first_mixtures(width, done, left)
        self.shift = nn.Parameter(mixtures[0].clone())
        self.shifts = nn.Parameter(mixtures)
        self.shift_down = nn.Linear(width, STREAMS * shift, bias=False)
        self.shift_up = nn.Parameter(torch.empty(STREAMS, shift, width).uniform_(-0.01, 0.01))
        place = torch.linspace(0, 1, inner)
        self.decay = nn.Parameter(5 * place ** (0.7 + 1.3 * done) - 6)
        self.decay_down = nn.Linear(width, decay, bias=False)
        self.decay_up = nn.Linear(decay, inner, bias=False)
        nn.init.uniform_(self.decay_up.weight, -0.01, 0.01)
        zigzag = 0.1 * (torch.arange(1, inner + 1) % 3 - 1)
        self.bonus = nn.Parameter((done * (1 - place) + zigzag).unflatten(0, (self.heads, -1)))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.query = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.norm_bias = nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def start(self, batch: int, max_len: int) -> RWKV6State:  # noqa: ARG002
        device, dtype = self.key.weight.device, DTYPES[self.frame.dtype]
        return RWKV6State(
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device),
            tail=torch.zeros(batch, self.frame.width, device=device, dtype=dtype),
        )

    def scan_inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and log-decays [..., H, K], and the gate [..., H K], of x and its forerunners [..., D]."""
        change = before - x
        low = torch.tanh(self.shift_down(x + change * self.shift)).view(-1, STREAMS, self.shift_up.shape[1])
        share = torch.baddbmm(self.shifts.unsqueeze(1), low.transpose(0, 1), self.shift_up)
        decay, key, value, query, gate = (x + change * share.view(STREAMS, *x.shape)).unbind(0)
        rate = self.decay.float() + self.decay_up(torch.tanh(self.decay_down(decay))).float()
        # Beyond the bound nothing is left of a channel within a token, and the exponential would overflow.
        log_decay = -rate.clamp(max=WIDEST_EXPONENT).exp()
        q, k, v, log_decay = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.query(query), self.key(key), self.value(value), log_decay)
        )
        return q, k, v, log_decay, F.silu(self.gate(gate))

    def finish(self, read: Tensor, gate: Tensor) -> Tensor:
        """Normalise each head of read [..., H, K] to mean nought and variance one, gate, project."""
        normed = F.layer_norm(read.float(), (self.head_dim,), eps=NORM_EPSILON).flatten(-2)
        normed = normed * self.norm_weight.float() + self.norm_bias.float()
        y: Tensor = self.out(normed.to(gate.dtype) * gate)
        return y

    def forward(self, x: Tensor, state: RWKV6State | None = None) -> tuple[Tensor, Any]:
        tail = torch.zeros_like(x[:, 0]) if state is None else state.tail.to(x.dtype)
        q, k, v, log_decay, gate = self.scan_inputs(x, torch.cat([tail.unsqueeze(1), x[:, :-1]], dim=1))
        read, matrix = channel_decay(
            q, k, v, log_decay, state.matrix if state else None, bonus=self.bonus, chunk=CHUNK
        )
        return self.finish(read, gate), self.kept(matrix, x[:, -1]) if state else None

    def step(self, x: Tensor, state: RWKV6State) -> tuple[Tensor, RWKV6State]:
        q, k, v, log_decay, gate = self.scan_inputs(x, state.tail.to(x.dtype))
        read, matrix = channel_decay_step(q, k, v, log_decay, state.matrix, bonus=self.bonus)
        return self.finish(read, gate), self.kept(matrix, x)

    def kept(self, matrix: Tensor, last: Tensor) -> RWKV6State:
        """The state with a copy of the last token's input [B, D], in the frame's type."""
        return RWKV6State(matrix=matrix, tail=last.to(DTYPES[self.frame.dtype], copy=True))


def first_mixtures(width: int, done: float, left: float) -> Tensor:
    """[5, D] shares of the token before, by stream: all at the first channel, less at later ones and in later layers."""
    place = torch.arange(width) / width
    even, half = 1 - place**left, 1 - place ** (0.5 * left)
    return torch.stack([even, even, even - 0.3 * done, half, half])

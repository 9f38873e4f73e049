"""Kimi delta attention: a matrix by head in which every key channel fades by itself, and writes correct what is there.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.channel_delta.ops import channel_delta, channel_delta_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.parts import Norm, decay_bias, fit_heads, log_rates, unit
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec

TAPS = 4
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class KDA(MixerSpec):
    """Kimi Linear's layer (arXiv:2510.26692): gated delta rule by channel, short convolutions, low-rank gates."""

    name: ClassVar[str] = "kda"
    family: ClassVar[str] = "delta"
    source: ClassVar[str] = "Kimi Team 2025, arXiv:2510.26692"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head", searched=True)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        heads, key = spec.heads, spec.head_dim
        inner = heads * key
        weights = frame.width * (4 * inner + heads + 2 * key) + 2 * key * inner
        taps = 3 * inner * TAPS
        chunk = heads * (10 * CHUNK * key + 6 * key * key + 2 * CHUNK * CHUNK / 3)
        held = frame.batch * inner * key * 4
        tail = frame.batch * 3 * inner * (TAPS - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + heads + inner + key,
            flops_prefill=2 * (weights + taps) + chunk,
            flops_decode=2 * (weights + taps) + 7 * inner * key,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return KDAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class KDAState:
    """Matrix [B, H, K, K], float32, and the last inputs of the convolutions, tail [B, 3, 3 H K]."""

    matrix: Tensor
    tail: Tensor


class KDAMixer(Mixer):
    """Project, convolve, normalise queries and keys, run the delta rule, gate by a sigmoid, project."""

    def __init__(self, spec: KDA, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.frame, self.heads, self.head_dim = frame, spec.heads, spec.head_dim
        inner = self.heads * self.head_dim
        self.enter = nn.Linear(frame.width, 3 * inner, bias=False)
        self.taps = nn.Parameter(torch.empty(3 * inner, TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.forget_down = nn.Linear(frame.width, self.head_dim, bias=False)
        self.forget_up = nn.Linear(self.head_dim, inner, bias=False)
        self.log_rate = nn.Parameter(log_rates(self.heads))
        self.step_bias = nn.Parameter(decay_bias(inner))
        self.write = nn.Linear(frame.width, self.heads, bias=False)
        self.gate_down = nn.Linear(frame.width, self.head_dim, bias=False)
        self.gate_up = nn.Linear(self.head_dim, inner, bias=False)
        self.norm = Norm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> KDAState:  # noqa: ARG002
        device = self.enter.weight.device
        return KDAState(
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device),
            tail=torch.zeros(
                batch, TAPS - 1, self.enter.out_features, device=device, dtype=DTYPES[self.frame.dtype]
            ),
        )

    def delta_inputs(self, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and log-decays [..., H, K], and write strengths [..., H], of x [..., D]."""
        head = (self.heads, self.head_dim)
        q, k, v = (part.unflatten(-1, head) for part in mixed.chunk(3, dim=-1))
        q, k = unit(q.float()) * self.head_dim**-0.5, unit(k.float())
        step = self.forget_up(self.forget_down(x)).float() + self.step_bias.float()
        log_decay = -self.log_rate.float().exp()[:, None] * F.softplus(step.unflatten(-1, head))
        return q, k, v.float(), log_decay, torch.sigmoid(self.write(x).float())

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, K], gate it by x [..., D], project."""
        gate = torch.sigmoid(self.gate_up(self.gate_down(x)))
        y: Tensor = self.out(self.norm(read).flatten(-2).to(gate.dtype) * gate)
        return y

    def forward(self, x: Tensor, state: KDAState | None = None) -> tuple[Tensor, Any]:
        mixed = self.enter(x)
        mixed, tail = short_convolution(
            mixed, self.taps, None, state.tail.to(mixed.dtype) if state else None, activation="silu"
        )
        q, k, v, log_decay, beta = self.delta_inputs(mixed, x)
        read, matrix = channel_delta(q, k, v, log_decay, beta, state.matrix if state else None, chunk=CHUNK)
        kept = replace(state, matrix=matrix, tail=tail.to(state.tail.dtype)) if state else None
        return self.finish(read, x), kept

    def step(self, x: Tensor, state: KDAState) -> tuple[Tensor, KDAState]:
        mixed = self.enter(x)
        mixed, tail = short_convolution_step(
            mixed, self.taps, None, state.tail.to(mixed.dtype), activation="silu"
        )
        q, k, v, log_decay, beta = self.delta_inputs(mixed, x)
        read, matrix = channel_delta_step(q, k, v, log_decay, beta, state.matrix)
        return self.finish(read, x), replace(state, matrix=matrix, tail=tail.to(state.tail.dtype))

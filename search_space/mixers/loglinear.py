"""Log-linear attention: a matrix for the last token, one for the two before, the four before …: Mamba-2's or gated
DeltaNet's, each read with its own weight.

Letters: B batch, T time, D width, H heads, P head width, N state size, L levels.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.log_linear.ops import log_linear, log_linear_step
from kernels.norm.ops import rms_norm
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.parts import decay_bias, fit_heads, log_rates, unit
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach

TAPS = 4
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class LogLinear(MixerSpec):
    """Log-linear Mamba-2 or gated DeltaNet (arXiv:2506.04761): a text of T tokens is kept in log2(T) + 1 matrices."""

    name: ClassVar[str] = "loglinear"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Guo 2025, arXiv:2506.04761"
    needs: ClassVar[frozenset[Need]] = frozenset({"length"})

    base: str = choice("mamba2", "gated_delta", searched=True)
    state: int | None = choice(16, 32, 64, 128, 256, unit="state", searched=True)
    heads: int | None = choice(8, 16, 32, 64, 128, unit="heads")
    head_dim: int | None = choice(32, 64, 128, 256, unit="head")

    @property
    def delta(self) -> bool:
        """Whether writes correct what is there, with keys of each head's own; else heads share one key and query."""
        return self.base == "gated_delta"

    def sized(self, frame: Frame) -> Self:
        published, inner = (128, frame.width) if self.delta else (64, 2 * frame.width)
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=published, inner=inner)
        return replace(self, state=self.state or frame.state_size(128), heads=heads, head_dim=head_dim)

    def sizes(self) -> tuple[int, int, int]:
        """Widths of a sized spec: of all values, of all queries and keys, and of the numbers that each head needs."""
        assert self.state and self.heads and self.head_dim
        return (
            self.heads * self.head_dim,
            2 * self.state * (self.heads if self.delta else 1),
            self.heads * (2 if self.delta else 1),
        )

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state and spec.heads and spec.head_dim
        (inner, shared, by_head), levels = spec.sizes(), levels_for(frame.longest)
        weights = frame.width * (3 * inner + shared + by_head + spec.heads * levels)
        taps = (inner + shared) * TAPS
        own = 2 * spec.heads + (spec.head_dim if self.delta else spec.heads + inner)
        matrix = inner * spec.state
        # Those that hold something once the context is read.
        live = (frame.context - 1).bit_count() + 1
        joined = 4 * matrix * ((frame.context - 1) // CHUNK).bit_length()
        within: float = 2 * CHUNK * (spec.heads * spec.state + inner) + 4 * matrix
        if self.delta:
            within = CHUNK * (6 * spec.heads * spec.state + 4 * inner) + 6 * matrix
            within += 2 * spec.heads * CHUNK * CHUNK / 3
        held, tail = frame.batch * matrix * 4, frame.batch * (inner + shared) * (TAPS - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + own + spec.heads * levels,
            flops_prefill=2 * (weights + taps) + within + joined,
            # Every level is read and all but the fresh one fade, by the delta rule after a correction; a write and two
            # additions where levels join.
            flops_decode=2 * (weights + taps) + ((7 if self.delta else 3) * (live - 1) + 5) * matrix,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held * levels, read_bytes=held * min(live, levels)),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return LogLinearMixer(self.sized(frame), frame)


def levels_for(longest: int) -> int:
    """Levels that tell all distances in a text of `longest` tokens apart: ceil(log2(longest)) + 1, at least two."""
    return max(1, (longest - 1).bit_length()) + 1


@dataclass(frozen=True, kw_only=True)
class LogLinearState:
    """Matrices [B, H, L, N, P], float32, the convolution's last inputs, tail [B, 3, *], and the tokens seen."""

    matrix: Tensor
    tail: Tensor
    length: int


class LogLinearMixer(Mixer):
    """Project, convolve, scan by levels, normalise and gate as the base does, project."""

    def __init__(self, spec: LogLinear, frame: Frame) -> None:
        super().__init__()
        assert spec.state and spec.heads and spec.head_dim
        self.frame, self.delta = frame, spec.delta
        self.heads, self.head_dim, self.state_size = spec.heads, spec.head_dim, spec.state
        self.inner, self.shared, by_head = spec.sizes()
        self.levels = levels_for(frame.longest)
        self.widths = [self.inner, self.inner + self.shared, by_head, self.heads * self.levels]
        self.enter = nn.Linear(frame.width, sum(self.widths), bias=False)
        self.taps = nn.Parameter(torch.empty(self.widths[1], TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.level_gain = nn.Parameter(torch.ones(self.heads, self.levels))
        self.log_rate = nn.Parameter(log_rates(self.heads))
        self.step_bias = nn.Parameter(decay_bias(self.heads))
        self.skip = None if self.delta else nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim if self.delta else self.inner))
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> LogLinearState:  # noqa: ARG002
        device = self.enter.weight.device
        shape = (batch, self.heads, self.levels, self.state_size, self.head_dim)
        tail = (batch, TAPS - 1, self.widths[1])
        return LogLinearState(
            matrix=torch.zeros(shape, device=device),
            tail=torch.zeros(tail, device=device, dtype=DTYPES[self.frame.dtype]),
            length=0,
        )

    def scan_inputs(
        self, mixed: Tensor, numbers: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys [..., G, N], values [..., H, P], log-decays [..., H], weights [..., H, L], write strengths."""
        values, q, k = mixed.split([self.inner, self.shared // 2, self.shared // 2], dim=-1)
        q, k = (part.float().unflatten(-1, (-1, self.state_size)) for part in (q, k))
        v = values.float().unflatten(-1, (self.heads, self.head_dim))
        step = F.softplus(numbers[..., : self.heads].float() + self.step_bias.float())
        log_decay = -self.log_rate.float().exp() * step
        gain = levels.float().unflatten(-1, (self.heads, self.levels)) * self.level_gain.float()
        if not self.delta:
            return q, k, v * step[..., None], log_decay, F.softplus(gain), None
        beta = torch.sigmoid(numbers[..., self.heads :].float())
        return unit(q, scale=self.state_size**-0.5), unit(k), v, log_decay, F.softplus(gain), beta

    def finish(self, read: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
        """Gate what was read [..., H, P]: after each head's norm, or before one norm of all, behind a skip connection."""
        weight = self.norm_weight.float()
        if self.skip is None:
            wide = gate.float().unflatten(-1, read.shape[-2:])
            normed = rms_norm(read, weight, eps=1e-6, gate=wide).flatten(-2).to(gate.dtype)
        else:
            values = mixed[..., : self.inner].float().unflatten(-1, read.shape[-2:])
            read = (read + values * self.skip.float()[:, None]).flatten(-2)
            normed = rms_norm(read, weight, eps=1e-5, gate=gate, before=True)
        y: Tensor = self.out(normed)
        return y

    def forward(self, x: Tensor, state: LogLinearState | None = None) -> tuple[Tensor, Any]:
        gate, mixed, numbers, levels = self.enter(x).split(self.widths, dim=-1)
        mixed, tail = short_convolution(
            mixed, self.taps, None, state.tail.to(mixed.dtype) if state else None, activation="silu"
        )
        inputs, length = self.scan_inputs(mixed, numbers, levels), state.length if state else 0
        read, matrix = log_linear(*inputs, state.matrix if state else None, length, chunk=CHUNK)
        y = self.finish(read, mixed, gate)
        if state is None:
            return y, None
        return y, LogLinearState(matrix=matrix, tail=tail.to(state.tail.dtype), length=length + x.shape[1])

    def step(self, x: Tensor, state: LogLinearState) -> tuple[Tensor, LogLinearState]:
        gate, mixed, numbers, levels = self.enter(x).split(self.widths, dim=-1)
        mixed, tail = short_convolution_step(
            mixed, self.taps, None, state.tail.to(mixed.dtype), activation="silu"
        )
        inputs = self.scan_inputs(mixed, numbers, levels)
        read, matrix = log_linear_step(*inputs, state.matrix, state.length)
        return self.finish(read, mixed, gate), LogLinearState(
            matrix=matrix, tail=tail.to(state.tail.dtype), length=state.length + 1
        )

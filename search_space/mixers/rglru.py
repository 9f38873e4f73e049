"""Griffin's recurrent block: gated channels that fade one by one behind a short convolution, beside a GeLU gate.

Letters: B batch, T time, D width, H heads, K head width, I = H K channels of the recurrence.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach

TAPS = 4
SHARPNESS = 8.0
SCAN_FLOPS = 9
LEAST_SQUARE = 2.5e-7
"""Below it the root's slope would pass 1000, where RecurrentGemma clips it; only a channel that forgets nothing is there."""


@dataclass(frozen=True, kw_only=True)
class RGLRU(MixerSpec):
    """The real-gated linear recurrent unit of Griffin (arXiv:2402.19427) in its block, as in RecurrentGemma.

    The recurrence is heads times head_dim wide, the model's width unless written; a gate sees the channels of its head.
    """

    name: ClassVar[str] = "rglru"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "De et al. 2024, arXiv:2402.19427"

    heads: int | None = choice(8, 10, 16, 20, 22, unit="heads", searched=True)
    head_dim: int | None = choice(128, 256, unit="head")

    def sized(self, frame: Frame) -> Self:
        head_dim = self.head_dim or frame.head_size(256, frame.width)
        return replace(self, heads=self.heads or max(1, frame.width // head_dim), head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        inner = spec.heads * spec.head_dim
        weights = 3 * frame.width * inner + 2 * inner * spec.head_dim + inner * TAPS
        held, tail = frame.batch * inner * 4, frame.batch * inner * (TAPS - 1) * frame.dtype_bytes
        flops = 2 * weights + SCAN_FLOPS * inner
        return Cost(
            params=weights + 6 * inner + frame.width,
            flops_prefill=flops,
            flops_decode=flops,
            cache=(
                CacheTensor(name="hidden", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return RGLRUMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class RGLRUState:
    """Hidden [B, I], float32, the last inputs of the convolution, tail [B, 3, I], and the number of tokens seen."""

    hidden: Tensor
    tail: Tensor
    length: int


class RGLRUMixer(Mixer):
    """Two projections: one is convolved and scanned, the other gates the result through a GeLU."""

    def __init__(self, spec: RGLRU, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.frame, self.heads, self.inner = frame, spec.heads, spec.heads * spec.head_dim
        self.gate = nn.Linear(frame.width, self.inner)
        self.enter = nn.Linear(frame.width, self.inner)
        for linear in (self.gate, self.enter):
            nn.init.normal_(linear.weight, std=frame.width**-0.5)
            nn.init.zeros_(linear.bias)
        self.taps = nn.Parameter(torch.empty(self.inner, TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.taps_bias = nn.Parameter(torch.zeros(self.inner))
        # Of the input gate, then of the recurrence gate.
        self.heads_weight = nn.Parameter(
            torch.randn(2, spec.heads, spec.head_dim, spec.head_dim) * spec.head_dim**-0.5
        )
        self.heads_bias = nn.Parameter(torch.zeros(2, self.inner))
        # exp(-softplus) is the fading of an eighth of an open gate: its square is uniform in 0.9² … 0.999².
        square = torch.empty(self.inner).uniform_(0.9**2, 0.999**2)
        self.rate = nn.Parameter(torch.log(torch.expm1(-0.5 * square.log())))
        self.out = nn.Linear(self.inner, frame.width)
        nn.init.zeros_(self.out.bias)

    def start(self, batch: int, max_len: int) -> RGLRUState:  # noqa: ARG002
        device = self.enter.weight.device
        return RGLRUState(
            hidden=torch.zeros(batch, self.inner, device=device),
            tail=torch.zeros(batch, TAPS - 1, self.inner, device=device, dtype=DTYPES[self.frame.dtype]),
            length=0,
        )

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-decays, gated inputs, and by what those are damped: [..., I], float32, of the convolved x [..., I]."""
        by_head = x.unflatten(-1, (self.heads, -1))
        gates = torch.einsum("...hk,ghkl->...ghl", by_head, self.heads_weight.to(x.dtype)).flatten(-2)
        gates = torch.sigmoid(gates.float() + self.heads_bias.float())
        log_decay = -SHARPNESS * gates[..., 1, :] * F.softplus(self.rate.float())
        damped = (-torch.expm1(2 * log_decay)).clamp(min=LEAST_SQUARE).sqrt()
        return log_decay, x.float() * gates[..., 0, :], damped

    def finish(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Gate the hidden state [..., I] by x [..., D], and project."""
        gate = F.gelu(self.gate(x), approximate="tanh")
        y: Tensor = self.out(hidden.to(gate.dtype) * gate)
        return y

    def forward(self, x: Tensor, state: RGLRUState | None = None) -> tuple[Tensor, Any]:
        mixed = self.enter(x)
        mixed, tail = short_convolution(
            mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype) if state else None
        )
        log_decay, inputs, damped = self.scan_inputs(mixed)
        if state is None or state.length == 0:
            # Damping makes room for what is held already; at the start of a text that is nothing.
            damped = torch.cat([torch.ones_like(damped[:, :1]), damped[:, 1:]], dim=1)
        hidden, last = diagonal_scan(log_decay, inputs * damped, state.hidden if state else None)
        if state is None:
            return self.finish(hidden, x), None
        length = state.length + x.shape[1]
        return self.finish(hidden, x), RGLRUState(hidden=last, tail=tail.to(state.tail.dtype), length=length)

    def step(self, x: Tensor, state: RGLRUState) -> tuple[Tensor, RGLRUState]:
        mixed = self.enter(x)
        mixed, tail = short_convolution_step(mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype))
        log_decay, inputs, damped = self.scan_inputs(mixed)
        hidden = diagonal_scan_step(log_decay, inputs * damped if state.length else inputs, state.hidden)
        length = state.length + 1
        return self.finish(hidden, x), RGLRUState(
            hidden=hidden, tail=tail.to(state.tail.dtype), length=length
        )

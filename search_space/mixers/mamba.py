"""Mamba: every channel keeps a small vector that fades at N rates, by steps chosen from the token; `norms` makes it
Jamba's.

Letters: B batch, T time, D width, I inner width, N state size, R rank of the steps, W taps.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.selective_scan.ops import selective_scan, selective_scan_step
from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.frame import Frame, round_to
from search_space.parts import Norm, decay_bias, scanned_name
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach, Stream

NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Mamba(MixerSpec):
    """The selective state-space model (arXiv:2312.00752); with norms on steps, write and read it is Jamba's."""

    name: ClassVar[str] = "mamba"
    family: ClassVar[str] = "state_space"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Gu and Dao 2023, arXiv:2312.00752; norms: Jamba, arXiv:2403.19887"

    state: int | None = choice(8, 16, 32, unit="state", searched=True)
    expand: float = choice(2.0, 1.0, 1.5, searched=True)
    rank: int | None = choice(64, 128, 160, 256, unit="rank")
    """A sixteenth of the width unless written."""
    taps: int = choice(4, 2)
    norms: bool = choice(False, True)

    def sized(self, frame: Frame) -> Self:
        return replace(
            self,
            state=self.state or frame.state_size(16),
            rank=self.rank or round_to(frame.width / 16, 8),
        )

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state and spec.rank
        inner = spec.inner(frame)
        weights = 3 * frame.width * inner + inner * (2 * spec.rank + 2 * spec.state)
        taps, matrix = inner * spec.taps, inner * spec.state
        gains = spec.rank + 2 * spec.state if spec.norms else 0
        flops = 2 * (weights + taps) + 9 * matrix
        held, tail = frame.batch * matrix * 4, frame.batch * inner * (spec.taps - 1) * frame.dtype_bytes
        return Cost(
            params=weights + taps + matrix + 3 * inner + gains,
            flops_prefill=flops,
            flops_decode=flops,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def inner(self, frame: Frame) -> int:
        """Channels of the recurrence."""
        return int(frame.width * self.expand)

    def build(self, frame: Frame) -> Mixer:
        return MambaMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MambaState:
    """Matrix [B, I, N], float32, and the last inputs of the convolution, tail [B, W - 1, I]."""

    matrix: Tensor
    tail: Tensor


class MambaMixer(Mixer):
    """Project, convolve, choose steps, write and read from what came out, scan, gate, project.

    What the scan gives, before the gate, is left in the stream for a `gmu` of a later layer.
    """

    def __init__(self, spec: Mamba, frame: Frame) -> None:
        super().__init__()
        assert spec.state and spec.rank
        self.frame, self.inner = frame, spec.inner(frame)
        self.parts = [spec.rank, spec.state, spec.state]
        self.enter = nn.Linear(frame.width, 2 * self.inner, bias=False)
        bound = spec.taps**-0.5
        self.taps = nn.Parameter(torch.empty(self.inner, spec.taps).uniform_(-bound, bound))
        self.taps_bias = nn.Parameter(torch.zeros(self.inner))
        self.select = nn.Linear(self.inner, sum(self.parts), bias=False)
        self.step_up = nn.Linear(spec.rank, self.inner, bias=False)
        self.step_bias = nn.Parameter(decay_bias(self.inner))
        rates = torch.arange(1.0, spec.state + 1).log()
        self.log_rate = nn.Parameter(rates.repeat(self.inner, 1))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.norms = nn.ModuleList(Norm(part, eps=NORM_EPSILON) for part in self.parts if spec.norms)
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> MambaState:  # noqa: ARG002
        device = self.enter.weight.device
        return MambaState(
            matrix=torch.zeros(batch, *self.log_rate.shape, device=device),
            tail=torch.zeros(
                batch, self.taps.shape[1] - 1, self.inner, device=device, dtype=DTYPES[self.frame.dtype]
            ),
        )

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [..., I] with its steps, the rates, write and read vectors [..., N], and the skip: what the scan takes."""
        step, write, read = self.select(x).split(self.parts, dim=-1)
        if self.norms:
            step, write, read = (
                norm(part) for norm, part in zip(self.norms, (step, write, read), strict=True)
            )
        delta = F.softplus(self.step_up(step).float() + self.step_bias.float())
        return x, delta, -self.log_rate.float().exp(), write, read, self.skip

    def forward(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        y, state, _ = self.step_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: MambaState | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        mixed, gate = self.enter(x).chunk(2, dim=-1)
        mixed, tail = short_convolution(
            mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype) if state else None, activation="silu"
        )
        y, matrix = selective_scan(*self.scan_inputs(mixed), state.matrix if state else None)
        kept = replace(state, matrix=matrix, tail=tail.to(state.tail.dtype)) if state else None
        return self.out(y * F.silu(gate)), kept, stream.with_value(scanned_name(self.inner), y)

    def step_with(self, x: Tensor, state: MambaState, stream: Stream) -> tuple[Tensor, MambaState, Stream]:
        mixed, gate = self.enter(x).chunk(2, dim=-1)
        mixed, tail = short_convolution_step(
            mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype), activation="silu"
        )
        y, matrix = selective_scan_step(*self.scan_inputs(mixed), state.matrix)
        kept = replace(state, matrix=matrix, tail=tail.to(state.tail.dtype))
        return self.out(y * F.silu(gate)), kept, stream.with_value(scanned_name(self.inner), y)

"""Simple recurrent unit: a gated vector and a highway around it, by gates that look at the token alone; with peepholes
they see the state, and training is sequential.

Letters: B batch, T time, D width, I inner width.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step
from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach


@dataclass(frozen=True, kw_only=True)
class SRU(MixerSpec):
    """The simple recurrent unit (arXiv:1709.02755), with or without the peepholes that its later versions have.

    With peepholes a gate sees the cell before it, and training walks the tokens one by one. Where the inner width is
    the model's, the highway carries the input itself and there is no output projection, as published; otherwise the
    highway and the output have a projection each.
    """

    name: ClassVar[str] = "sru"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Lei et al. 2018, arXiv:1709.02755"

    expand: float = choice(1.0, 1.5, 2.0, searched=True)
    peephole: bool = choice(False, True)
    activation: str = choice("identity", "tanh")
    highway: int = choice(0, -1, -2, -3)
    """Initial bias of the highway's gate: the lower, the more of the input passes by."""

    @property
    def sequential(self) -> bool:
        return self.peephole

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        return self

    def inner(self, frame: Frame) -> int:
        """Channels of the recurrence."""
        return int(frame.width * self.expand)

    def cost(self, frame: Frame) -> Cost:
        inner = self.inner(frame)
        weights = frame.width * inner * (3 if inner == frame.width else 5)
        held = frame.batch * inner * 4
        return Cost(
            params=weights + inner * (4 if self.peephole else 2),
            flops_prefill=2 * weights + 20 * inner,
            flops_decode=2 * weights + 20 * inner,
            cache=(CacheTensor(name="cell", stored_bytes=held, read_bytes=held),),
            serial_steps=frame.context if self.peephole else 0,
        )

    def build(self, frame: Frame) -> Mixer:
        return SRUMixer(self, frame)


@dataclass(frozen=True, kw_only=True)
class SRUState:
    """Cell [B, I], float32."""

    cell: Tensor


class SRUMixer(Mixer):
    """One projection for input and gates, a recurrence channel by channel, and a highway around it."""

    def __init__(self, spec: SRU, frame: Frame) -> None:
        super().__init__()
        self.inner, self.activation = spec.inner(frame), spec.activation
        self.enter = nn.Linear(frame.width, 3 * self.inner, bias=False)
        nn.init.uniform_(self.enter.weight, -math.sqrt(3 / frame.width), math.sqrt(3 / frame.width))
        self.forget_bias = nn.Parameter(torch.zeros(self.inner))
        self.highway_bias = nn.Parameter(torch.full((self.inner,), float(spec.highway)))
        # What passes by is made as large at the start as what comes through.
        self.highway_scale = math.sqrt(1 + 2 * math.exp(spec.highway))
        self.peepholes: nn.Parameter | None = None
        if spec.peephole:
            self.peepholes = nn.Parameter(torch.empty(2, self.inner).uniform_(-math.sqrt(3), math.sqrt(3)))
            # Two terms in each gate where there was one: each has half the variance.
            with torch.no_grad():
                self.peepholes.mul_(math.sqrt(0.5))
                self.enter.weight[self.inner :].mul_(math.sqrt(0.5))
        wider = self.inner != frame.width
        self.highway = nn.Linear(frame.width, self.inner, bias=False) if wider else None
        self.out = nn.Linear(self.inner, frame.width, bias=False) if wider else None

    def start(self, batch: int, max_len: int) -> SRUState:  # noqa: ARG002
        device = self.enter.weight.device
        return SRUState(cell=torch.zeros(batch, self.inner, device=device))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input, forget gate and highway gate before their sigmoids and peepholes, float32, [..., I] of x [..., D]."""
        new, forget, reset = self.enter(x).float().chunk(3, dim=-1)
        return new, forget + self.forget_bias.float(), reset + self.highway_bias.float()

    def walk(self, new: Tensor, forget: Tensor, reset: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Every cell [B, T, I] where gates see the cell before them, and the highway's gate with what it saw."""
        assert self.peepholes is not None
        for_forget, for_reset = self.peepholes.float()
        cells = [cell]
        for here, gate in zip(new.unbind(1), forget.unbind(1), strict=True):
            cell = torch.lerp(here, cell, torch.sigmoid(torch.addcmul(gate, for_forget, cell)))
            cells.append(cell)
        held = torch.stack(cells, dim=1)
        return held[:, 1:], torch.addcmul(reset, for_reset, held[:, :-1])

    def finish(self, x: Tensor, reset: Tensor, cell: Tensor) -> Tensor:
        """Mix what the cell [..., I] holds with the input that passes by."""
        passing = (x if self.highway is None else self.highway(x)).float() * self.highway_scale
        active = torch.tanh(cell) if self.activation == "tanh" else cell
        y = torch.lerp(passing, active, torch.sigmoid(reset)).to(x.dtype)
        return y if self.out is None else self.out(y)

    def forward(self, x: Tensor, state: SRUState | None = None) -> tuple[Tensor, Any]:
        new, forget, reset = self.project(x)
        first = state.cell if state else new.new_zeros(x.shape[0], self.inner)
        if self.peepholes is None:
            cells, last = diagonal_scan(F.logsigmoid(forget), new * torch.sigmoid(-forget), first)
        else:
            cells, reset = self.walk(new, forget, reset, first)
            last = cells[:, -1].clone()
        return self.finish(x, reset, cells), replace(state, cell=last) if state else None

    def step(self, x: Tensor, state: SRUState) -> tuple[Tensor, SRUState]:
        new, forget, reset = self.project(x)
        if self.peepholes is None:
            cell = diagonal_scan_step(F.logsigmoid(forget), new * torch.sigmoid(-forget), state.cell)
            return self.finish(x, reset, cell), replace(state, cell=cell)
        cells, resets = self.walk(new.unsqueeze(1), forget.unsqueeze(1), reset.unsqueeze(1), state.cell)
        return self.finish(x, resets[:, 0], cells[:, 0]), replace(state, cell=cells[:, 0].clone())

"""Clockwork network: modules that tick at periods 1, 2, 4, …, the slow ones telling the fast; sequential training.

Letters: B batch, T time, D width, M modules, K units of a module, I = M K units in all.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach


@dataclass(frozen=True, kw_only=True)
class Clockwork(MixerSpec):
    """The clockwork RNN (arXiv:1402.3511): module i moves at tokens that base^i divides, and holds still between.

    A module sees itself and the slower ones. A period longer than the text makes a module that moves once, at the
    first token. Training walks the tokens one by one.
    """

    name: ClassVar[str] = "clockwork"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Koutník et al. 2014, arXiv:1402.3511"

    modules: int = choice(4, 2, 8)
    base: int = choice(2, 4)
    ratio: float = choice(1.0, 0.5, searched=True)

    @property
    def sequential(self) -> bool:
        return True

    @property
    def periods(self) -> list[int]:
        """Tokens from tick to tick, the fastest module first."""
        return [self.base**index for index in range(self.modules)]

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        return self

    def units(self, frame: Frame) -> int:
        """Units of one module."""
        return max(1, int(frame.width * self.ratio) // self.modules)

    def cost(self, frame: Frame) -> Cost:
        units, width = self.units(frame), frame.width
        inner = self.modules * units
        seen = [units * (self.modules - index) for index in range(self.modules)]
        # Of the weights of a module, a token meets the part that its period says.
        used = sum(units * (own + width) / period for own, period in zip(seen, self.periods, strict=True))
        held = frame.batch * inner * 4
        return Cost(
            params=units * sum(seen) + inner * (width + 1) + inner * width,
            flops_prefill=2 * used + 2 * inner * width,
            flops_decode=2 * used + 2 * inner * width,
            cache=(CacheTensor(name="hidden", stored_bytes=held, read_bytes=held),),
            serial_steps=frame.context,
        )

    def build(self, frame: Frame) -> Mixer:
        return ClockworkMixer(self, frame)


@dataclass(frozen=True, kw_only=True)
class ClockworkState:
    """Hidden [B, I], float32, the fastest module first, and the clock: the number of tokens seen."""

    hidden: Tensor
    length: int


class ClockworkMixer(Mixer):
    """Modules that tick together are the fastest ones, so the rows that move are always the first ones."""

    def __init__(self, spec: Clockwork, frame: Frame) -> None:
        super().__init__()
        self.modules_count, self.units, self.periods = spec.modules, spec.units(frame), spec.periods
        self.inner = self.modules_count * self.units
        self.enter = nn.Linear(frame.width, self.inner)
        pairs = self.modules_count * (self.modules_count + 1) // 2
        bound = self.inner**-0.5
        # From the modules j ≥ i to the module i, row after row of the upper block triangle.
        self.between = nn.Parameter(torch.empty(pairs, self.units, self.units).uniform_(-bound, bound))
        self.out = nn.Linear(self.inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> ClockworkState:  # noqa: ARG002
        hidden = torch.zeros(batch, self.inner, device=self.out.weight.device)
        return ClockworkState(hidden=hidden, length=0)

    def ticking(self, token: int) -> int:
        """How many modules move at a token."""
        return sum(token % period == 0 for period in self.periods)

    def recurrence(self, count: int) -> Tensor:
        """What the units of the first modules see of the token before, [units, I], nought from faster modules."""
        rows, at = [], 0
        for index in range(count):
            slower = self.modules_count - index
            seen = self.between[at : at + slower].transpose(0, 1).flatten(1)
            rows.append(F.pad(seen, (index * self.units, 0)))
            at += slower
        return torch.cat(rows).float()

    def drives(self, x: Tensor, counts: list[int]) -> list[Tensor]:
        """What the tokens of x [B, T, D] say to the modules that move at each, [B, moving units] and float32."""
        drives: dict[int, Tensor] = {}
        for count in set(counts):
            tokens = [t for t, own in enumerate(counts) if own == count]
            rows = count * self.units
            said = F.linear(x[:, tokens], self.enter.weight[:rows], self.enter.bias[:rows]).float()
            drives |= zip(tokens, said.unbind(1), strict=True)
        return [drives[t] for t in range(len(counts))]

    def walk(self, x: Tensor, hidden: Tensor, length: int) -> Tensor:
        """Every hidden state [B, T, I] of x [B, T, D], one token after another."""
        counts = [self.ticking(length + t) for t in range(x.shape[1])]
        drives, states = self.drives(x, counts), []
        with torch.autocast(x.device.type, enabled=False):
            whole = self.recurrence(max(counts))
            seen = {count: whole[: count * self.units].T for count in set(counts)}
            for count, drive in zip(counts, drives, strict=True):
                moved = torch.tanh(torch.addmm(drive, hidden, seen[count]))
                hidden = torch.cat([moved, hidden[:, count * self.units :]], dim=1)
                states.append(hidden)
            return torch.stack(states, dim=1)

    def forward(self, x: Tensor, state: ClockworkState | None = None) -> tuple[Tensor, Any]:
        first = state.hidden if state else x.new_zeros(x.shape[0], self.inner, dtype=torch.float32)
        length = state.length if state else 0
        states = self.walk(x, first, length)
        y = self.out(states.to(x.dtype))
        if state is None:
            return y, None
        return y, ClockworkState(hidden=states[:, -1].clone(), length=length + x.shape[1])

    def step(self, x: Tensor, state: ClockworkState) -> tuple[Tensor, ClockworkState]:
        y, state = self(x.unsqueeze(1), state)
        return y[:, 0], state

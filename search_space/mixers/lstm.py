"""Long short-term memory: a cell behind three gates that see the whole state of the token before; sequential training.

Letters: B batch, T time, D width, I hidden width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.stacked import stackable
from search_space.frame import Frame
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

CELL_FLOPS = 9
"""A channel and token: four activations, three products, a sum, and the cell's own activation."""


@dataclass(frozen=True, kw_only=True)
class LSTM(MixerSpec):
    """The LSTM with forget gates (arXiv:1503.04069 names its parts), then a projection; training walks the tokens."""

    name: ClassVar[str] = "lstm"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Hochreiter and Schmidhuber 1997; as in Greff et al. 2015, arXiv:1503.04069"

    ratio: float = choice(1.0, 0.5, 2.0, searched=True)
    forget: float = choice(1.0, 0.0, 3.0)
    """Initial bias of the forget gate: the higher, the longer the memory at the start."""

    @property
    def sequential(self) -> bool:
        return True

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        return self

    def hidden(self, frame: Frame) -> int:
        """Channels of the hidden state."""
        return int(frame.width * self.ratio)

    def cost(self, frame: Frame) -> Cost:
        hidden = self.hidden(frame)
        weights = 4 * hidden * (frame.width + hidden) + hidden * frame.width
        held = frame.batch * hidden * 4
        return Cost(
            params=weights + 8 * hidden,
            flops_prefill=2 * weights + CELL_FLOPS * hidden,
            flops_decode=2 * weights + CELL_FLOPS * hidden,
            cache=tuple(
                CacheTensor(name=name, stored_bytes=held, read_bytes=held) for name in ("hidden", "cell")
            ),
            serial_steps=frame.context,
        )

    def build(self, frame: Frame) -> Mixer:
        return LSTMMixer(self, frame)


@dataclass(frozen=True, kw_only=True)
class LSTMState:
    """Hidden and cell, both [B, I] and float32."""

    hidden: Tensor
    cell: Tensor


@stackable(each=("weight_in", "weight_back", "bias_in", "bias_back"))
def _walk(
    x: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    weight_in: Tensor,
    weight_back: Tensor,
    bias_in: Tensor,
    bias_back: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM over x [B, T, D] from hidden and cell [B, U], None for noughts: [B, T, U] and the last two."""
    first = x.new_zeros(x.shape[0], weight_back.shape[1])
    state = [(first if tensor is None else tensor)[None] for tensor in (hidden, cell)]
    weights = [weight_in, weight_back, bias_in, bias_back]
    read, last, end = torch.lstm(x, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    # Copies: torch may hand out views of all the tokens' states.
    return read, last[0].clone(), end[0].clone()


class LSTMMixer(Mixer):
    """PyTorch's own LSTM, its arithmetic held in float32, and a projection back."""

    def __init__(self, spec: LSTM, frame: Frame) -> None:
        super().__init__()
        self.hidden = spec.hidden(frame)
        self.lstm = nn.LSTM(frame.width, self.hidden, batch_first=True)
        self.out = nn.Linear(self.hidden, frame.width, bias=False)
        with torch.no_grad():
            # torch adds two biases, of which one says all.
            weights = self.weights()
            weights["bias_hh_l0"].zero_()
            weights["bias_ih_l0"].zero_()[self.hidden : 2 * self.hidden] = spec.forget

    def start(self, batch: int, max_len: int) -> LSTMState:  # noqa: ARG002
        shape, device = (batch, self.hidden), self.out.weight.device
        return LSTMState(hidden=torch.zeros(shape, device=device), cell=torch.zeros(shape, device=device))

    def weights(self) -> dict[str, nn.Parameter]:
        """The LSTM's own, by torch's names."""
        return dict(self.lstm.named_parameters())

    def forward(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, Any]:
        first = (state.hidden, state.cell) if state else (None, None)
        with torch.autocast(x.device.type, enabled=False):
            # A cell kept in fewer bits forgets, so the weights are widened where they are narrow.
            wide = [weight.float() for weight in self.weights().values()]
            hidden, last, cell = _walk(x.float(), *first, *wide)
        y = self.out(hidden.to(x.dtype))
        return y, replace(state, hidden=last, cell=cell) if state else None

    def step(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        # By hand: one token reads the weights once, in their own type.
        own = self.weights()
        gates = F.linear(x, own["weight_ih_l0"], own["bias_ih_l0"])
        gates = gates + F.linear(state.hidden.to(x.dtype), own["weight_hh_l0"], own["bias_hh_l0"])
        enter, forget, candidate, leave = gates.float().chunk(4, dim=-1)
        cell = torch.sigmoid(forget) * state.cell + torch.sigmoid(enter) * torch.tanh(candidate)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        return self.out(hidden.to(x.dtype)), replace(state, hidden=hidden, cell=cell)

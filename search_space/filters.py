"""Long filters of Hyena's convolutions: written by a small network, or sums of modes; each with what it carries on.

Letters: B batch, T time, D channels of a filter, G channels that come in (each read by D/G filters), O convolutions in
a row, E features of a position, F hidden width, M modes.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.long_convolution.ops import long_convolution, long_convolution_step
from kernels.modal_filter.ops import modal_filter, modal_response, modal_state, modal_step
from search_space.derived import Derived
from search_space.modes import SLOW, log_uniform, slow, wide

BANDS = 16
FEATURES = 2 * BANDS + 1
FASTEST, SLOWEST = 0.3, 1.5
"""Shares of the longest text after which the windows of the first and the last channel have fallen to a hundredth."""
BLOCK = 4096


class LongFilters(nn.Module, ABC):
    """The filters of O convolutions in a row. `made` is what a pass works out once; `kept` is one convolution's state."""

    @abstractmethod
    def start(self, number: int, batch: int, max_len: int) -> Tensor:
        """An empty state of one convolution."""

    @abstractmethod
    def make(self, length: int) -> list[Any]:
        """What texts up to `length` are convolved with, one item a convolution."""

    @abstractmethod
    def convolve(
        self, made: Any, w: Tensor, kept: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """w [B, T, G] behind `length` tokens to [B, T, D], and the state."""

    @abstractmethod
    def step(self, number: int, w: Tensor, kept: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """One token, [B, G] to [B, D]."""


def spread(w: Tensor, channels: int) -> Tensor:
    """[..., G] to [..., D]: neighbouring filters read the same channel."""
    return w if w.shape[-1] == channels else w.repeat_interleave(channels // w.shape[-1], dim=-1)


class ImplicitFilters(LongFilters):
    """Hyena's (arXiv:2302.10866): a network of sines reads the position, and a window fades what it says.

    The position is a share of the longest text, so the filter is another one where that is another. Its state is every
    input that there was. The window has unit energy: without that, outputs would grow with the root of the length.
    """

    def __init__(
        self, widths: list[int], channels: int, *, hidden: int, omega: int, longest: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.widths, self.channels, self.longest, self.dtype = widths, channels, longest, dtype
        self.layers = nn.ModuleList(
            [nn.Linear(FEATURES, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)]
        )
        self.frequency = nn.Parameter(torch.full((hidden,), float(omega)))
        self.out = nn.Linear(hidden, len(widths) * channels, bias=False)
        self.derived: Derived[Tensor] = Derived()

    @staticmethod
    def count_params(convolutions: int, channels: int, hidden: int) -> int:
        """Parameters of such filters."""
        return (FEATURES + 1) * hidden + 2 * (hidden + 1) * hidden + hidden + hidden * convolutions * channels

    def taps(self, begin: int, end: int) -> Tensor:
        """[O, D, end - begin]."""
        if end > self.longest:
            raise ValueError(
                f"{end} tokens do not fit a filter of {self.longest}: build it in a frame with a larger max_length"
            )
        device = self.frequency.device
        with torch.autocast(device.type, enabled=False):
            place = torch.arange(begin, end, device=device, dtype=wide(self.frequency).dtype)[:, None]
            share = place / max(1, self.longest - 1)
            band = torch.linspace(1e-4, BANDS - 1, BANDS, device=device, dtype=place.dtype)
            angle = 2 * math.pi * place / self.longest * band
            y = torch.cat([share, angle.cos(), -angle.sin()], dim=-1)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                y = F.linear(y, wide(layer.weight), wide(layer.bias))
                y = (wide(self.frequency) * y).sin()
            fall = torch.linspace(1 / SLOWEST, 1 / FASTEST, self.channels, device=device, dtype=place.dtype)
            fall = fall * math.log(100)
            window = (2 * fall / self.longest).sqrt() * (-share * fall).exp()
            taps = F.linear(y, wide(self.out.weight)).unflatten(1, (-1, self.channels))
            faded: Tensor = (taps * window[:, None]).permute(1, 2, 0)
            return faded

    def start(self, number: int, batch: int, max_len: int) -> Tensor:
        shape = (batch, max_len, self.widths[number])
        return torch.zeros(shape, device=self.frequency.device, dtype=self.dtype)

    def make(self, length: int) -> list[Tensor]:
        return list(self.taps(0, length))

    def convolve(
        self, made: Tensor, w: Tensor, kept: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor | None]:
        wide = spread(w, self.channels)
        if kept is None:
            return long_convolution(wide, made), None
        y = long_convolution(wide, made, spread(kept[:, :length], self.channels).to(w.dtype))
        return y, self.write(kept, w, length)

    def step(self, number: int, w: Tensor, kept: Tensor, length: int) -> tuple[Tensor, Tensor]:
        def table() -> Tensor:
            # In blocks and in the cache's type: the whole in float32 may be larger than the weights of the network.
            blocks = range(0, self.longest, BLOCK)
            parts = [self.taps(begin, min(begin + BLOCK, self.longest)).mT.to(self.dtype) for begin in blocks]
            # Contiguous by lag, as steps read it.
            return torch.cat(parts, dim=1).mT

        kept = self.write(kept, w.unsqueeze(1), length)
        taps = self.derived.get(self.parameters(), table)[number]
        past = spread(kept[:, :length], self.channels)
        return long_convolution_step(spread(w, self.channels), taps, past), kept

    def write(self, kept: Tensor, w: Tensor, length: int) -> Tensor:
        """Put [B, T, G] behind what is there."""
        end = length + w.shape[1]
        if end > kept.shape[1]:
            raise ValueError(
                f"{end} tokens do not fit a cache of {kept.shape[1]}: start it with a larger max_len"
            )
        kept[:, length:end] = w
        return kept


class ModalFilters(LongFilters):
    """StripedHyena's: each filter is 2 Re Σ R_n λ_n^t, and so is a recurrence that keeps one number a mode.

    A residue is kept as a share of what gives its mode unit energy (as in LRU, arXiv:2303.06349): slow modes have
    small residues, and a rate that suits the others would throw them about.
    """

    def __init__(self, widths: list[int], channels: int, *, modes: int) -> None:
        super().__init__()
        self.channels = channels
        shape = (len(widths), channels, modes)
        self.rate = slow(log_uniform(1e-3, 1.0, *shape))
        self.angle = slow(torch.empty(shape).uniform_(0, math.pi))
        self.residue = nn.Parameter(torch.randn(*shape, 2) * (4 * modes) ** -0.5)
        self.derived: Derived[tuple[Tensor, Tensor]] = Derived()

    def modes(self) -> tuple[Tensor, Tensor]:
        """Log-poles and residues [O, D, M]."""
        decay = (wide(self.rate) * SLOW).exp()
        log_pole = torch.complex(-decay, wide(self.angle) * SLOW)
        return log_pole, torch.view_as_complex(wide(self.residue)) * unit_energy(decay)

    def start(self, number: int, batch: int, max_len: int) -> Tensor:  # noqa: ARG002
        shape = (batch, *self.rate.shape[1:])
        return torch.zeros(shape, device=self.rate.device, dtype=torch.complex64)

    def make(self, length: int) -> list[tuple[Tensor, Tensor]]:  # noqa: ARG002
        return list(zip(*self.modes(), strict=True))

    def convolve(
        self,
        made: tuple[Tensor, Tensor],
        w: Tensor,
        kept: Tensor | None,
        length: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:
        log_pole, residue = made
        wide = spread(w, self.channels)
        y = long_convolution(wide, modal_filter(log_pole, residue, w.shape[1]))
        if kept is None:
            return y, None
        y = y + modal_response(kept, log_pole, residue, w.shape[1]).to(y.dtype)
        return y, modal_state(wide, log_pole, kept)

    def step(self, number: int, w: Tensor, kept: Tensor, length: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        def stepped() -> tuple[Tensor, Tensor]:
            log_pole, residue = self.modes()
            return log_pole.exp(), residue

        pole, residue = self.derived.get(self.parameters(), stepped)
        return modal_step(spread(w, self.channels), pole[number], residue[number], kept)


def unit_energy(decay: Tensor) -> Tensor:
    """What a mode of this decay is multiplied with so that its squares add up to one."""
    return (-torch.expm1(-2 * decay)).sqrt()

"""Hyena: long convolutions of each channel with gates between them; an implicit filter keeps every input, a modal one
(StripedHyena's) a few numbers a channel.

Letters: B batch, T time, D width, G = D / groups, N order (gates), M modes.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.short_convolution.ops import short_convolution, short_convolution_step
from search_space.filters import FEATURES, ImplicitFilters, LongFilters, ModalFilters, spread
from search_space.frame import Frame
from search_space.modes import fft_flops
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach

TAPS = 3


@dataclass(frozen=True, kw_only=True)
class Hyena(MixerSpec):
    """Hyena (arXiv:2302.10866): w ← gate ⊙ w, w ← filter * w + skip ⊙ w, N - 1 times, and one last gate.

    An implicit filter must keep every input; a modal one, as in StripedHyena (arXiv:2403.17844), keeps M modes.
    """

    name: ClassVar[str] = "hyena"
    family: ClassVar[str] = "convolution"
    reach: ClassVar[Reach] = "all"
    source: ClassVar[str] = "Poli 2023, arXiv:2302.10866; modal: Massaroli 2023, arXiv:2310.18780"
    needs: ClassVar[frozenset[Need]] = frozenset({"length"})

    filter: str = choice("implicit", "modal", searched=True)
    order: int = choice(2, 3)
    modes: int = choice(8, 2, 4, 16, 32, searched=True)
    groups: int = choice(1, 2, 4, 8)
    hidden: int = choice(64, 32)
    omega: int = choice(14, 10, 1)

    def sized(self, frame: Frame) -> Self:  # noqa: ARG002
        """What the other kind of filter is set to means nothing, and goes back to its default."""
        unset = type(self)()
        if self.filter == "modal":
            return replace(self, hidden=unset.hidden, omega=unset.omega)
        return replace(self, modes=unset.modes)

    def widths(self, frame: Frame) -> list[int]:
        """What comes into each convolution: the first one's inputs are shared by a group."""
        return [frame.width // self.groups] + [frame.width] * (self.order - 2)

    def cost(self, frame: Frame) -> Cost:
        spec, width, batch = self.sized(frame), frame.width, frame.batch
        long = spec.order - 1
        entered = width + spec.order * width // spec.groups
        projections = width * (entered + width)
        params = projections + entered + width + entered * (TAPS + 1) + long * width
        if spec.filter == "modal":
            own = 4 * spec.modes * long * width
            made, step = 8 * spec.modes * long * width, 14 * spec.modes * long * width
            held = batch * long * width * spec.modes * 8
        else:
            own = ImplicitFilters.count_params(long, width, spec.hidden)
            made = 2 * spec.hidden * (FEATURES + 2 * spec.hidden + long * width)
            step = 2 * frame.context * long * width
            held = batch * frame.context * sum(spec.widths(frame)) * frame.dtype_bytes
        tail = batch * entered * (TAPS - 1) * frame.dtype_bytes
        every = 2 * projections + 2 * TAPS * entered + (2 * spec.order + 2 * long) * width
        return Cost(
            params=params + own,
            flops_prefill=every + long * width * fft_flops(frame.context) + made / batch,
            flops_decode=every + step,
            cache=(
                CacheTensor(
                    name="modes" if spec.filter == "modal" else "inputs", stored_bytes=held, read_bytes=held
                ),
                CacheTensor(name="tail", stored_bytes=tail, read_bytes=tail),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return HyenaMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class HyenaState:
    """For each convolution its inputs [B, S, G or D] or its modes [B, D, M], complex64; and the short one's tail."""

    kept: tuple[Tensor, ...]
    tail: Tensor
    length: int


class HyenaMixer(Mixer):
    """Project, convolve over three tokens, then gate and convolve over all of them in turn, gate, project."""

    def __init__(self, spec: Hyena, frame: Frame) -> None:
        super().__init__()
        self.frame, widths = frame, spec.widths(frame)
        shared = frame.width // spec.groups
        self.sizes = [frame.width] + [shared] * spec.order
        self.enter = nn.Linear(frame.width, sum(self.sizes))
        self.taps = nn.Parameter(torch.empty(sum(self.sizes), TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.taps_bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.filters: LongFilters = (
            ModalFilters(widths, frame.width, modes=spec.modes)
            if spec.filter == "modal"
            else ImplicitFilters(
                widths,
                frame.width,
                hidden=spec.hidden,
                omega=spec.omega,
                longest=frame.longest,
                dtype=DTYPES[frame.dtype],
            )
        )
        self.skip = nn.Parameter(torch.randn(len(widths), frame.width))
        self.out = nn.Linear(frame.width, frame.width)

    def start(self, batch: int, max_len: int) -> HyenaState:
        numbers = range(len(self.skip))
        shape = (batch, TAPS - 1, sum(self.sizes))
        return HyenaState(
            kept=tuple(self.filters.start(number, batch, max_len) for number in numbers),
            tail=torch.zeros(shape, device=self.taps.device, dtype=DTYPES[self.frame.dtype]),
            length=0,
        )

    def skipped(self, number: int, y: Tensor, w: Tensor) -> Tensor:
        """What a convolution gave, and a share of what went in."""
        return y + spread(w, y.shape[-1]) * self.skip[number].to(y.dtype)

    def forward(self, x: Tensor, state: HyenaState | None = None) -> tuple[Tensor, Any]:
        mixed = self.enter(x)
        tail = state.tail.to(mixed.dtype) if state else None
        mixed, tail = short_convolution(mixed, self.taps, self.taps_bias, tail)
        last, *gates, w = mixed.split(self.sizes, dim=-1)
        length = state.length if state else 0
        kept = []
        for number, made in enumerate(self.filters.make(length + x.shape[1])):
            w = w * spread(gates[number], w.shape[-1])
            y, own = self.filters.convolve(made, w, state.kept[number] if state else None, length)
            if own is not None:
                kept.append(own)
            w = self.skipped(number, y, w)
        y = self.out(last * w)
        if state is None:
            return y, None
        tail = tail.to(state.tail.dtype)
        return y, replace(state, kept=tuple(kept), tail=tail, length=length + x.shape[1])

    def step(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        mixed = self.enter(x)
        mixed, tail = short_convolution_step(mixed, self.taps, self.taps_bias, state.tail.to(mixed.dtype))
        last, *gates, w = mixed.split(self.sizes, dim=-1)
        kept = []
        for number, gate in enumerate(gates):
            w = w * spread(gate, w.shape[-1])
            y, own = self.filters.step(number, w, state.kept[number], state.length)
            kept.append(own)
            w = self.skipped(number, y, w)
        tail = tail.to(state.tail.dtype)
        return self.out(last * w), replace(state, kept=tuple(kept), tail=tail, length=state.length + 1)

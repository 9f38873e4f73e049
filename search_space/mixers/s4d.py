"""S4D: every channel is a filter of its own, a sum of fading modes, run as a convolution or as a recurrence.

Letters: B batch, T time, D width, N real numbers of a state by channel, M modes (N/2 pairs, or N real ones).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.diagonal_scan.ops import mode_scan, mode_scan_backend, mode_scan_step
from kernels.long_convolution.ops import long_convolution
from kernels.modal_filter.ops import modal_filter, modal_response, modal_state
from search_space.derived import Derived
from search_space.frame import Frame
from search_space.modes import SLOW, GatedOut, fft_flops, first_poles, log_uniform, slow, wide
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

STEP_MIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class S4D(MixerSpec):
    """A diagonal state space in each channel (arXiv:2206.11893), then GELU and a gated linear map."""

    name: ClassVar[str] = "s4d"
    family: ClassVar[str] = "state_space"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Gu, Gupta, Goel and Ré 2022, arXiv:2206.11893"

    state: int | None = choice(64, 16, 32, 128, unit="state", searched=True)
    init: str = choice("legs", "lin", "inv", "real")
    disc: str = choice("zoh", "bilinear")
    step_max: float = choice(0.1, 0.01)

    def sized(self, frame: Frame) -> Self:
        if self.init == "real" and self.disc == "bilinear":
            raise ValueError(
                "s4d: init=real needs disc=zoh: the bilinear factor of a real mode may be negative, and is then no "
                "fading mode"
            )
        return replace(self, state=self.state or frame.state_size(64))

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state
        width, modes = frame.width, spec.state // 2
        projection = 2 * width * width
        # A pair is two numbers of pole and two of reading; so are two real modes.
        params = projection + 2 * width + width * (2 * spec.state + 2)
        # N/2 complex numbers of eight bytes, or N real ones of four.
        held = frame.batch * width * spec.state * 4
        # A filter is made once a pass, for all sequences.
        made = 8 * modes * width / frame.batch
        return Cost(
            params=params,
            flops_prefill=2 * projection + fft_flops(frame.context) * width + made,
            flops_decode=2 * projection + 7 * spec.state * width,
            cache=(CacheTensor(name="modes", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return S4DMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class S4DState:
    """Modes [B, D, M], complex64, or float32 where they are real."""

    modes: Tensor


class S4DMixer(Mixer):
    """Filter each channel, add a share of the input, leave through a gate.

    By a scan of its modes where a kernel walks the text in one launch, else by a convolution with the filter.
    """

    def __init__(self, spec: S4D, frame: Frame) -> None:
        super().__init__()
        assert spec.state
        self.real, self.zoh = spec.init == "real", spec.disc == "zoh"
        poles = first_poles(spec.init, spec.state).expand(frame.width, -1)
        self.rate = slow((-poles.real).log())
        if self.real:
            self.read = nn.Parameter(torch.randn(poles.shape))
        else:
            self.angle = slow(poles.imag)
            # Unit variance as a complex number.
            self.read = nn.Parameter(torch.randn(*poles.shape, 2) * 0.5**0.5)
        self.log_step = slow(log_uniform(STEP_MIN, spec.step_max, frame.width))
        self.skip = nn.Parameter(torch.randn(frame.width))
        self.out = GatedOut(frame.width)
        self.derived: Derived[tuple[Tensor, Tensor]] = Derived()

    def start(self, batch: int, max_len: int) -> S4DState:  # noqa: ARG002
        dtype = torch.float32 if self.real else torch.complex64
        shape = (batch, *self.rate.shape)
        return S4DState(modes=torch.zeros(shape, device=self.rate.device, dtype=dtype))

    def modes(self) -> tuple[Tensor, Tensor]:
        """Log-poles and weights [D, M] of the discrete recurrence."""
        step = (wide(self.log_step) * SLOW).exp().unsqueeze(-1)
        decay = -(wide(self.rate) * SLOW).exp()
        if self.real:
            return step * decay, wide(self.read) * torch.expm1(step * decay) / decay
        pole = torch.complex(decay, wide(self.angle) * SLOW)
        read = torch.view_as_complex(wide(self.read))
        if self.zoh:
            return step * pole, read * torch.expm1(step * pole) / pole
        half = step * pole / 2
        # Two logarithms of numbers near one: that of their ratio would round small steps away.
        return torch.log1p(half) - torch.log1p(-half), read * step / (1 - half)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.out(y.to(x.dtype) + x * self.skip.to(x.dtype))
        return result

    def forward(self, x: Tensor, state: S4DState | None = None) -> tuple[Tensor, Any]:
        time = x.shape[1]
        log_pole, weight = self.modes()
        held = state.modes if state else None
        if mode_scan_backend(log_pole, weight, x, held) == "triton":
            y, modes = mode_scan(log_pole, weight, x, held)
            return self.finish(y, x), replace(state, modes=modes) if state else None
        y = long_convolution(x, modal_filter(log_pole, weight, time))
        if state is None:
            return self.finish(y, x), None
        y = y + modal_response(state.modes, log_pole, weight, time)
        return self.finish(y, x), replace(state, modes=modal_state(x, log_pole, state.modes))

    def step(self, x: Tensor, state: S4DState) -> tuple[Tensor, S4DState]:
        def stepped() -> tuple[Tensor, Tensor]:
            log_pole, weight = self.modes()
            return log_pole.exp(), weight

        pole, weight = self.derived.get(self.parameters(), stepped)
        y, modes = mode_scan_step(pole, weight, x, state.modes)
        return self.finish(y, x), replace(state, modes=modes)

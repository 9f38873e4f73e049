"""S4: every channel is the filter of one structured state space, made by Cauchy sums and stepped in linear time.

Letters: B batch, T time, D width, N real numbers of a state by channel, P = N/2 pairs of conjugate modes.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.cauchy_filter.ops import (
    Discrete,
    cauchy_discrete,
    cauchy_filter,
    cauchy_response,
    cauchy_state,
    cauchy_step,
)
from kernels.long_convolution.ops import long_convolution
from search_space.derived import Derived
from search_space.frame import Frame
from search_space.modes import SLOW, GatedOut, fft_flops, legendre, log_uniform, slow, wide
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

STEP_MIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class S4(MixerSpec):
    """Diagonal plus rank one in each channel (arXiv:2111.00396), then GELU and a gated linear map.

    Its discretisation is bilinear and no choice: the exponential of such a matrix is dense, and has neither Cauchy
    sums nor a step in linear time.
    """

    name: ClassVar[str] = "s4"
    family: ClassVar[str] = "state_space"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Gu, Goel and Ré 2021, arXiv:2111.00396"

    state: int | None = choice(64, 16, 32, 128, unit="state", searched=True)
    step_max: float = choice(0.1, 0.01)

    def sized(self, frame: Frame) -> Self:
        return replace(self, state=self.state or frame.state_size(64))

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.state
        width, state = frame.width, spec.state
        projection = 2 * width * width
        held = frame.batch * width * state * 4
        # A filter is made once a pass, for all sequences: its Cauchy sums, and the power that says where it is cut.
        doublings = max(1, (frame.context - 1).bit_length())
        made = width * (4 * state + 2 * state**3 * doublings / frame.context) / frame.batch
        return Cost(
            params=projection + 2 * width + 3 * state + width * (state + 2),
            flops_prefill=2 * projection + fft_flops(frame.context) * width + made,
            flops_decode=2 * projection + 12 * state * width,
            cache=(CacheTensor(name="modes", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return S4Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class S4State:
    """Modes [B, D, P], complex64: one of each pair of conjugates."""

    modes: Tensor


class S4Mixer(Mixer):
    """Convolve each channel with its filter, add a share of the input, leave through a gate."""

    def __init__(self, spec: S4, frame: Frame) -> None:
        super().__init__()
        assert spec.state
        pole, low_rank, write = legendre(spec.state)
        self.rate = slow((-pole.real).log())
        self.angle = slow(pole.imag)
        self.low_rank = slow(torch.view_as_real(low_rank))
        self.write = slow(torch.view_as_real(write))
        # Unit variance as a complex number.
        self.read = nn.Parameter(torch.randn(frame.width, spec.state // 2, 2) * 0.5**0.5)
        self.log_step = slow(log_uniform(STEP_MIN, spec.step_max, frame.width))
        self.skip = nn.Parameter(torch.randn(frame.width))
        self.out = GatedOut(frame.width)
        self.derived: Derived[tuple[Discrete, Tensor]] = Derived()

    def start(self, batch: int, max_len: int) -> S4State:  # noqa: ARG002
        shape = self.read.shape[:2]
        return S4State(modes=torch.zeros(batch, *shape, device=self.read.device, dtype=torch.complex64))

    def space(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Λ, P and B [P], C [D, P] and Δ [D]."""
        pole = torch.complex(-(wide(self.rate) * SLOW).exp(), wide(self.angle) * SLOW)
        low_rank, write = (torch.view_as_complex(wide(x) * SLOW) for x in (self.low_rank, self.write))
        read = torch.view_as_complex(wide(self.read))
        return pole, low_rank, write, read, (wide(self.log_step) * SLOW).exp()

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.out(y.to(x.dtype) + x * self.skip.to(x.dtype))
        return result

    def forward(self, x: Tensor, state: S4State | None = None) -> tuple[Tensor, Any]:
        time = x.shape[1]
        pole, low_rank, write, read, step = self.space()
        y = long_convolution(x, cauchy_filter(pole, low_rank, write, read, step, time))
        if state is None:
            return self.finish(y, x), None
        y = y + cauchy_response(state.modes, pole, low_rank, read, step, time)
        modes = cauchy_state(x, pole, low_rank, write, step, state.modes)
        return self.finish(y, x), replace(state, modes=modes)

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        def stepped() -> tuple[Discrete, Tensor]:
            pole, low_rank, write, read, step = self.space()
            return cauchy_discrete(pole, low_rank, write, step), read

        known, read = self.derived.get(self.parameters(), stepped)
        y, modes = cauchy_step(x, known, read, state.modes)
        return self.finish(y, x), replace(state, modes=modes)

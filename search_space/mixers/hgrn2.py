"""HGRN2: a gated recurrence expanded to a matrix by head; the key writes what the decay forgets, bounded by depth.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), which is the expansion.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.channel_decay.ops import channel_decay, channel_decay_step
from search_space.frame import Frame
from search_space.parts import Norm, fit_heads
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Need, Reach

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class HGRN2(MixerSpec):
    """HGRN2 (arXiv:2404.07904): gated linear attention whose keys are one minus the decay, bounded from below by depth.

    The paper learns one table of lower bounds for all layers, the running sum of a softmax over the layers without
    its first entry. Here each layer keeps the value at which that table starts: its index over the number of layers.
    """

    name: ClassVar[str] = "hgrn2"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Qin 2024, arXiv:2404.07904"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(32, 64, 128, 256, unit="head", searched=True)
    """The expansion: numbers of state for each channel of the values."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        inner = spec.heads * spec.head_dim
        weights, matrix = 4 * frame.width * inner, inner * spec.head_dim
        held = frame.batch * matrix * 4
        return Cost(
            params=weights + inner,
            flops_prefill=2 * weights + 4 * CHUNK * inner + 4 * matrix,
            flops_decode=2 * weights + 5 * matrix,
            cache=(CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return HGRN2Mixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class HGRN2State:
    """Matrix [B, H, K, K], float32."""

    matrix: Tensor


class HGRN2Mixer(Mixer):
    """Project to queries, gates and values; fade and write by the same gate; normalise over all heads, project."""

    def __init__(self, spec: HGRN2, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.least_decay = frame.place.index / frame.place.depth
        inner = self.heads * self.head_dim
        self.enter = nn.Linear(frame.width, 3 * inner, bias=False)
        self.norm = Norm(inner, eps=1e-5)
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> HGRN2State:  # noqa: ARG002
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return HGRN2State(matrix=torch.zeros(shape, device=self.enter.weight.device, dtype=torch.float32))

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and log-decays [..., H, K] of x [..., D]."""
        query, forget, v = (
            part.unflatten(-1, (self.heads, self.head_dim)) for part in self.enter(x).chunk(3, dim=-1)
        )
        forget = forget.float()
        k = (1 - self.least_decay) * torch.sigmoid(-forget)
        # Without a bound the key may round to one, and the logarithm of one minus it would be infinite.
        log_decay = torch.log1p(-k) if self.least_decay else F.logsigmoid(forget)
        return F.silu(query) * self.head_dim**-0.5, k, v, log_decay

    def finish(self, read: Tensor) -> Tensor:
        """Normalise read [..., H, K] over all heads, and project."""
        y: Tensor = self.out(self.norm(read.flatten(-2)))
        return y

    def forward(self, x: Tensor, state: HGRN2State | None = None) -> tuple[Tensor, Any]:
        read, matrix = channel_decay(*self.scan_inputs(x), state.matrix if state else None, chunk=CHUNK)
        return self.finish(read), HGRN2State(matrix=matrix) if state else None

    def step(self, x: Tensor, state: HGRN2State) -> tuple[Tensor, HGRN2State]:
        read, matrix = channel_decay_step(*self.scan_inputs(x), state.matrix)
        return self.finish(read), HGRN2State(matrix=matrix)

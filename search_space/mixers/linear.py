"""Linear attention: each head sums keys times values into one matrix, which never fades, read through a positive
feature map.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from search_space.frame import Frame
from search_space.parts import fit_heads
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Reach

CHUNK = 64
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Linear(MixerSpec):
    """The linear transformer (arXiv:2006.16236): softmax replaced by a positive feature map and a running sum."""

    name: ClassVar[str] = "linear"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Katharopoulos 2020, arXiv:2006.16236"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(32, 64, 128, 256, unit="head", searched=True)
    feature: str = choice("elu", "relu")

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        weights = 4 * frame.width * spec.heads * spec.head_dim
        matrix = spec.heads * spec.head_dim * (spec.head_dim + 1)
        held = frame.batch * matrix * 4
        return Cost(
            params=weights,
            flops_prefill=2 * weights + 4 * matrix + 2 * spec.heads * (2 * spec.head_dim + 1) * CHUNK / 2,
            flops_decode=2 * weights + 4 * matrix,
            cache=(CacheTensor(name="sums", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return LinearMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class LinearState:
    """Sums [B, H, K, K + 1], float32: keys times values, and in the last column the keys themselves."""

    sums: Tensor


class LinearMixer(Mixer):
    """The normaliser rides along as one more value that is always one."""

    def __init__(self, spec: Linear, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.feature = spec.feature
        inner = self.heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, inner, bias=False)
        self.value = nn.Linear(frame.width, inner, bias=False)
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> LinearState:  # noqa: ARG002
        shape = (batch, self.heads, self.head_dim, self.head_dim + 1)
        return LinearState(sums=torch.zeros(shape, device=self.query.weight.device, dtype=torch.float32))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to positive queries and keys [B, T, H, K], and values [B, T, H, K + 1] that end in one."""
        head = (*x.shape[:-1], self.heads, self.head_dim)
        positive = F.relu if self.feature == "relu" else lambda z: F.elu(z) + 1
        q, k, v = (
            positive(self.query(x).view(head)),
            positive(self.key(x).view(head)),
            self.value(x).view(head),
        )
        return q, k, F.pad(v, (0, 1), value=1.0)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Divide what was read [..., H, K + 1] by its last column, and project."""
        y: Tensor = self.out((read[..., :-1] / (read[..., -1:] + EPSILON)).flatten(-2).to(x.dtype))
        return y

    def forward(self, x: Tensor, state: LinearState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        read, sums = scalar_decay(q, k, v, None, state.sums if state else None, chunk=CHUNK)
        return self.finish(read, x), replace(state, sums=sums) if state else None

    def step(self, x: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        q, k, v = self.project(x)
        read, sums = scalar_decay_step(q, k, v, None, state.sums)
        return self.finish(read, x), replace(state, sums=sums)

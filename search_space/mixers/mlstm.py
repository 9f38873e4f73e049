"""mLSTM: a matrix by head with exponential input gates and a forget gate, and a sum that normalises what is read.

Letters: B batch, T time, D width, H heads, K key head width, V value head width.
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
CAP = 15.0
EPSILON = 1e-6
NOTHING = -1e30
"""The peak before the first token: below every exponent, and a number, so that differences are numbers too."""


@dataclass(frozen=True, kw_only=True)
class MLSTM(MixerSpec):
    """The matrix LSTM of xLSTM 7B: keys of half the width, capped gates, a layer norm by head, sigmoid output gate."""

    name: ClassVar[str] = "mlstm"
    family: ClassVar[str] = "recurrent"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Beck et al. 2024, arXiv:2405.04517; the block of xLSTM 7B, arXiv:2503.13427"

    heads: int | None = choice(4, 8, 16, unit="heads")
    head_dim: int | None = choice(128, 256, 512, unit="head", searched=True)
    """Width of a head's values."""
    key_share: float = choice(0.5, 1.0)
    """Width of a head's keys over that of its values."""

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim, published=512)
        return replace(self, heads=heads, head_dim=head_dim)

    @property
    def key_dim(self) -> int:
        """Width of a head's keys, once the sizes are filled in."""
        assert self.head_dim
        return int(self.head_dim * self.key_share)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        key, value = spec.heads * spec.key_dim, spec.heads * spec.head_dim
        weights = frame.width * (2 * key + 3 * value + 2 * spec.heads)
        sums, peak = key * (spec.head_dim + 1), spec.heads
        return Cost(
            params=weights + 2 * spec.heads + value,
            flops_prefill=2 * weights + 2 * CHUNK * (key + value + spec.heads) + 4 * sums,
            flops_decode=2 * weights + 5 * sums,
            cache=tuple(
                CacheTensor(name=name, stored_bytes=held, read_bytes=held)
                for name, held in (("sums", frame.batch * sums * 4), ("peak", frame.batch * peak * 4))
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return MLSTMMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MLSTMState:
    """Sums [B, H, K, V + 1] of keys times values and, last, of keys, over exp of the peak [B, H]; both float32."""

    sums: Tensor
    peak: Tensor


class MLSTMMixer(Mixer):
    """Both sums are kept over the exponential of the largest exponent so far, and the normaliser is one more value."""

    def __init__(self, spec: MLSTM, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.heads, self.head_dim, self.key_dim = spec.heads, spec.head_dim, spec.key_dim
        key, value = self.heads * self.key_dim, self.heads * self.head_dim
        self.query = nn.Linear(frame.width, key, bias=False)
        self.key = nn.Linear(frame.width, key, bias=False)
        self.value = nn.Linear(frame.width, value, bias=False)
        self.gate = nn.Linear(frame.width, value, bias=False)
        self.write = nn.Linear(frame.width, self.heads)
        self.keep = nn.Linear(frame.width, self.heads)
        self.norm_weight = nn.Parameter(torch.ones(value))
        self.out = nn.Linear(value, frame.width, bias=False)
        with torch.no_grad():
            self.write.weight.zero_()
            self.write.bias.normal_(std=0.1)
            self.keep.weight.zero_()
            self.keep.bias.copy_(torch.linspace(3, 6, self.heads))

    def start(self, batch: int, max_len: int) -> MLSTMState:  # noqa: ARG002
        device = self.query.weight.device
        return MLSTMState(
            sums=torch.zeros(batch, self.heads, self.key_dim, self.head_dim + 1, device=device),
            peak=torch.full((batch, self.heads), NOTHING, device=device),
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to queries, keys [..., H, K], and values [..., H, V + 1] that end in one; float32."""
        q, k, v = (
            layer(x).float().unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        return q * self.key_dim**-0.5, k, F.pad(v, (0, 1), value=1.0)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms [..., H] of what a token keeps of the past and of what it is written with; float32."""
        write, keep = (CAP * torch.tanh(layer(x).float() / CAP) for layer in (self.write, self.keep))
        return F.logsigmoid(keep), write

    def finish(self, read: Tensor, peak: Tensor, x: Tensor) -> Tensor:
        """Divide what was read [..., H, V + 1] by its last column, no smaller than one before scaling; norm, gate, project."""
        y = read[..., :-1] / torch.maximum(read[..., -1:].abs(), torch.exp(-peak)[..., None])
        normed = F.layer_norm(y, (self.head_dim,), eps=EPSILON).flatten(-2) * self.norm_weight.float()
        result: Tensor = self.out(normed.to(x.dtype) * torch.sigmoid(self.gate(x)))
        return result

    def forward(self, x: Tensor, state: MLSTMState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        keep, write = self.gates(x)
        # The peak is m_t = max(keep_t + m_{t−1}, write_t) = F_t + max over s ≤ t of (write_s − F_s), F the sum of keep.
        # The result does not depend on it, so no gradient goes through it; in float64, because F grows and grows.
        with torch.no_grad():
            total = keep.double().cumsum(1)
            first = state.peak if state else torch.full_like(keep[:, 0], NOTHING)
            since = torch.cat([first[:, None].double(), write - total], dim=1)
            highest = since.cummax(dim=1).values
            fade = (highest[:, :-1] - highest[:, 1:]).float()
            scale = (since - highest)[:, 1:].float()
            peak = (total + highest[:, 1:]).float()
        k = k * torch.exp(_value(scale, write))[..., None]
        read, sums = scalar_decay(q, k, v, _value(fade, keep), state.sums if state else None, chunk=CHUNK)
        kept = MLSTMState(sums=sums, peak=peak[:, -1].clone()) if state else None
        return self.finish(read, peak, x), kept

    def step(self, x: Tensor, state: MLSTMState) -> tuple[Tensor, MLSTMState]:
        q, k, v = self.project(x)
        keep, write = self.gates(x)
        peak = torch.maximum(keep + state.peak, write)
        k = k * torch.exp(write - peak)[..., None]
        # In this order the rounding of the peak, which the sums stand over, is taken back and does not add up.
        fade = keep + (state.peak - peak)
        read, sums = scalar_decay_step(q, k, v, fade, state.sums)
        return self.finish(read, peak, x), MLSTMState(sums=sums, peak=peak)


def _value(value: Tensor, gradient: Tensor) -> Tensor:
    """The first number exactly, with the gradient of the second."""
    return value + (gradient - gradient.detach())

"""Lightning attention: unnormalised linear attention whose heads fade at fixed rates, more slowly the deeper the layer.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm.ops import rms_norm
from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step
from search_space.frame import Frame, Place
from search_space.parts import fit_groups, fit_heads
from search_space.positions import Positions
from search_space.setting import choice
from search_space.spec import CacheTensor, Cost, Mixer, MixerSpec, Need, Reach

CHUNK = 64
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Lightning(MixerSpec):
    """MiniMax-01's layer (arXiv:2501.08313): SiLU on all projections, decay by head and depth, one norm, sigmoid gate."""

    name: ClassVar[str] = "lightning"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "MiniMax 2025, arXiv:2501.08313; Qin et al. 2024, arXiv:2401.04658"
    needs: ClassVar[frozenset[Need]] = frozenset({"depth"})

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(64, 128, 256, unit="head", searched=True)
    groups: int | None = choice(1, 4, 8, unit="groups")
    """Groups of heads that are normalised apart; one norm over all heads where it is left out."""
    rotary: float = choice(0.0, 0.5, 1.0)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        groups = fit_groups(self.name, frame, heads, self.groups)
        return replace(self, heads=heads, head_dim=head_dim, groups=groups)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        inner = spec.heads * spec.head_dim
        weights = 5 * frame.width * inner
        matrix = inner * spec.head_dim
        held = frame.batch * matrix * 4
        return Cost(
            params=weights + inner,
            flops_prefill=2 * weights + 4 * CHUNK * inner + 4 * matrix,
            flops_decode=2 * weights + 5 * matrix,
            cache=(CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),),
        )

    def build(self, frame: Frame) -> Mixer:
        return LightningMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class LightningState:
    """Matrix [B, H, K, K], float32; `length` tokens were seen."""

    matrix: Tensor
    length: int


class LightningMixer(Mixer):
    """Project, scan, normalise, gate, project."""

    def __init__(self, spec: Lightning, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim and spec.groups
        self.heads, self.head_dim, self.groups = spec.heads, spec.head_dim, spec.groups
        self.positions = Positions.of(frame, "rope", spec.rotary)
        inner = self.heads * self.head_dim
        self.enter = nn.Linear(frame.width, 3 * inner, bias=False)
        self.gate = nn.Linear(frame.width, inner, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, frame.width, bias=False)
        self.register_buffer("log_decay", log_decays(self.heads, frame.place), persistent=False)
        self.log_decay: Tensor

    def start(self, batch: int, max_len: int) -> LightningState:  # noqa: ARG002
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return LightningState(matrix=torch.zeros(shape, device=self.enter.weight.device), length=0)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] at positions from `start` on to queries, keys and values [B, T, H, K]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in F.silu(self.enter(x)).chunk(3, dim=-1))
        q, k = (self.positions.turn(part, start) for part in (q, k))
        return q, k, v

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise read [..., H, K] by group, gate it by x [..., D], project."""
        normed = rms_norm(
            read.flatten(-2),
            self.norm_weight.float(),
            eps=EPSILON,
            gate=self.gate(x),
            activation="sigmoid",
            groups=self.groups,
            dtype=x.dtype,
        )
        y: Tensor = self.out(normed)
        return y

    def forward(self, x: Tensor, state: LightningState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, state.length if state else 0)
        decay = self.log_decay.expand(*x.shape[:2], -1)
        read, matrix = scalar_decay(q, k, v, decay, state.matrix if state else None, chunk=CHUNK)
        kept = LightningState(matrix=matrix, length=state.length + x.shape[1]) if state else None
        return self.finish(read, x), kept

    def step(self, x: Tensor, state: LightningState) -> tuple[Tensor, LightningState]:
        q, k, v = (part.squeeze(1) for part in self.project(x.unsqueeze(1), state.length))
        decay = self.log_decay.expand(x.shape[0], -1)
        read, matrix = scalar_decay_step(q, k, v, decay, state.matrix)
        return self.finish(read, x), LightningState(matrix=matrix, length=state.length + 1)


def log_decays(heads: int, place: Place) -> Tensor:
    """[H] what a head fades by, 2^(−8 (h + 1) / H), less the deeper the layer stands, and next to nothing in the last."""
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return (-slope * (1 - place.index / (place.depth - 1 + 1e-5) + 1e-5)).float()

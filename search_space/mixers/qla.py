"""Quasi-linear attention, VISTA's summary of a history: the keys times values of the blocks before a token's own pass
through a nonlinearity before they are read.

Letters: B batch, T time, D width, H heads, K head width (of keys and of values), C tokens of a block.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.quasi_linear.ops import Activation, fold_block, quasi_linear, quasi_linear_step
from search_space.frame import Frame
from search_space.parts import Norm, attend_flops, fit_heads
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Reach


@dataclass(frozen=True, kw_only=True)
class QLA(MixerSpec):
    """The attention of VISTA's history summary (arXiv:2510.22049), made causal.

    The paper sums up a whole history in both directions and lets candidates read it one by one. The causal form is
    ours: a token reads the activated sum over the blocks before its own, and its own block linearly up to itself. With
    blocks of one token every token is a candidate as in the paper; the output norm and gate are ours too.
    """

    name: ClassVar[str] = "qla"
    family: ClassVar[str] = "linear_attention"
    reach: ClassVar[Reach] = "state"
    source: ClassVar[str] = "Chen et al. 2025, arXiv:2510.22049; causal blocks ours"

    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    head_dim: int | None = choice(32, 64, 128, 256, unit="head", searched=True)
    block: int = choice(16, 1, 64)
    """Tokens between two readings of the matrix."""
    activation: str = choice("silu", "identity")
    """What the matrix passes through; with identity this is linear attention without a normaliser."""
    scaling: str = choice("mean", "none", "decay")
    """How the matrix is kept from growing: its mean is activated, nothing is done, or each head fades at a learned rate."""
    gate: bool = choice(True, False)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        return replace(self, heads=heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.heads and spec.head_dim
        heads, key = spec.heads, spec.head_dim
        weights = (5 if spec.gate else 4) * frame.width * heads * key
        matrix = heads * key * key
        activated = matrix if spec.activation == "silu" else 0
        work = 2 * weights + 4 * matrix + attend_flops(heads, key, key, (spec.block + 1) / 2)
        held = frame.batch * matrix * 4
        opened = frame.batch * spec.block * heads * key * frame.dtype_bytes
        return Cost(
            params=weights + key + (heads if spec.scaling == "decay" else 0),
            flops_prefill=work + activated / spec.block,
            flops_decode=work + activated,
            cache=(
                CacheTensor(name="matrix", stored_bytes=held, read_bytes=held),
                CacheTensor(name="keys", stored_bytes=opened, read_bytes=opened),
                CacheTensor(name="values", stored_bytes=opened, read_bytes=opened),
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return QLAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class QLAState:
    """Matrix [B, H, K, K], float32, of the blocks that are whole; keys and values [B, C, H, K] of the open one.

    `length` tokens were seen, of which length mod C stand in the open block, first slots first.
    """

    matrix: Tensor
    keys: Tensor
    values: Tensor
    length: int


class QLAMixer(Mixer):
    """Project with SiLU on queries and keys, read, normalise each head, gate, project."""

    def __init__(self, spec: QLA, frame: Frame) -> None:
        super().__init__()
        assert spec.heads and spec.head_dim
        self.heads, self.head_dim, self.block = spec.heads, spec.head_dim, spec.block
        self.activation: Activation | None = "silu" if spec.activation == "silu" else None
        self.mean, self.dtype = spec.scaling == "mean", DTYPES[frame.dtype]
        inner = self.heads * self.head_dim
        self.query = nn.Linear(frame.width, inner, bias=False)
        self.key = nn.Linear(frame.width, inner, bias=False)
        self.value = nn.Linear(frame.width, inner, bias=False)
        self.gate = nn.Linear(frame.width, inner, bias=False) if spec.gate else None
        self.log_rate = nn.Parameter(log_slopes(self.heads)) if spec.scaling == "decay" else None
        self.norm = Norm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(inner, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> QLAState:  # noqa: ARG002
        device, shape = self.query.weight.device, (batch, self.block, self.heads, self.head_dim)
        return QLAState(
            matrix=torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device),
            keys=torch.zeros(shape, device=device, dtype=self.dtype),
            values=torch.zeros(shape, device=device, dtype=self.dtype),
            length=0,
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to queries, keys and values [..., H, K]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        return F.silu(q), F.silu(k), v

    def log_decay(self) -> Tensor | None:
        """[H], or None where nothing fades."""
        return None if self.log_rate is None else -self.log_rate.float().exp()

    def seen(self, length: int) -> int | None:
        """Tokens that the matrix sums at this length, where their mean is activated."""
        return length - length % self.block if self.mean else None

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise each head of read [..., H, K], gate it by x [..., D], project."""
        if self.gate is None:
            y = self.norm(read).to(x.dtype)
        else:
            y = self.norm(read, self.gate(x).view(read.shape), activation="sigmoid")
        result: Tensor = self.out(y.flatten(-2))
        return result

    def forward(self, x: Tensor, state: QLAState | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        opened = state.length % self.block if state else 0
        if state is not None and opened:
            # The open block is read again from its start; nobody asks what its old tokens saw.
            k = torch.cat([state.keys[:, :opened].to(k.dtype), k], dim=1)
            v = torch.cat([state.values[:, :opened].to(v.dtype), v], dim=1)
            q = torch.cat([torch.zeros_like(q[:, :1]).expand(-1, opened, -1, -1), q], dim=1)
        read, matrix = quasi_linear(
            q,
            k,
            v,
            self.log_decay(),
            state.matrix if state else None,
            block=self.block,
            seen=self.seen(state.length if state else 0),
            activation=self.activation,
        )
        y = self.finish(read[:, opened:], x)
        if state is None:
            return y, None
        rest = k.shape[1] % self.block
        keys, values = torch.zeros_like(state.keys), torch.zeros_like(state.values)
        keys[:, :rest], values[:, :rest] = k[:, k.shape[1] - rest :], v[:, v.shape[1] - rest :]
        return y, QLAState(matrix=matrix, keys=keys, values=values, length=state.length + x.shape[1])

    def step(self, x: Tensor, state: QLAState) -> tuple[Tensor, QLAState]:
        q, k, v = self.project(x)
        place = state.length % self.block
        # Like a prefill's, this token's own key and value are not rounded before it reads them.
        near_keys = torch.cat([state.keys[:, :place].to(k.dtype), k[:, None]], dim=1)
        near_values = torch.cat([state.values[:, :place].to(v.dtype), v[:, None]], dim=1)
        decay, matrix, seen = self.log_decay(), state.matrix, self.seen(state.length)
        read = quasi_linear_step(
            q, near_keys, near_values, decay, matrix, seen=seen, activation=self.activation
        )
        keys, values = state.keys.clone(), state.values.clone()
        keys[:, place], values[:, place] = k.to(keys.dtype), v.to(values.dtype)
        if place + 1 == self.block:
            matrix = fold_block(keys, values, decay, matrix)
        kept = QLAState(matrix=matrix, keys=keys, values=values, length=state.length + 1)
        return self.finish(read, x), kept


def log_slopes(heads: int) -> Tensor:
    """[H] logarithms of the rates 2^(−8 (h + 1) / H): heads that look back a few tokens, and some that look far."""
    return torch.arange(1, heads + 1) / heads * math.log(2.0**-8)

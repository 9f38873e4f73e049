"""What full and windowed attention share: projections by head with norm, positions and gate, and how they attend.

Letters: B batch, T time, S keys, D width, H query heads, G key heads, K head width.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step
from search_space.frame import Frame
from search_space.parts import Norm, attend_flops, fit_heads
from search_space.positions import Positions

FADE_QUERIES = 8192
"""Queries of one origin under xPos: a query grows by at most e^20 and is met by a key that shrank."""


class HeadSettings(Protocol):
    """The settings that a spec must have for `HeadPlan.of`, its sizes filled in."""

    @property
    def heads(self) -> int | None: ...
    @property
    def kv_heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def position(self) -> str: ...
    @property
    def rotary(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def gate(self) -> bool | str: ...
    @property
    def soft_cap(self) -> int: ...
    @property
    def learned_sink(self) -> bool: ...


def fit_kv_heads(
    name: str,
    frame: Frame,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    *,
    inner: int | None = None,
) -> tuple[int, int, int]:
    """Heads, key heads and their width where some are left to the frame, to fill `inner` or the width together.

    As many key heads as heads by default.

    Raises:
        ValueError: the key heads do not share the heads evenly.
    """
    heads, head_dim = fit_heads(frame, heads, head_dim, inner=inner)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ValueError(
            f"{name}: kv_heads={kv_heads} does not divide its {heads} heads at width {frame.width}"
        )
    return heads, kv_heads, head_dim


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Sizes and kinds of one attention layer's heads: what they cost, the modules they need, what those do."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    gate: bool | str
    """False; True for a gate of each channel; "head" for one of each head (arXiv:2505.06708)."""
    soft_cap: float | None
    learned_sink: bool
    positions: Positions

    @classmethod
    def of(cls, spec: HeadSettings, frame: Frame) -> Self:
        """The plan of a spec that is sized."""
        assert spec.heads and spec.kv_heads and spec.head_dim
        return cls(
            width=frame.width,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            qk_norm=spec.qk_norm,
            gate=spec.gate,
            soft_cap=float(spec.soft_cap) or None,
            learned_sink=spec.learned_sink,
            positions=Positions.of(frame, spec.position, spec.rotary),
        )

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def gates(self) -> int:
        """Channels of the gate."""
        return self.heads if self.gate == "head" else self.inner if self.gate else 0

    @property
    def weights(self) -> int:
        """Parameters of the matrices, each of which a token meets once."""
        return self.width * (2 * self.inner + 2 * self.kv_heads * self.head_dim + self.gates)

    @property
    def params(self) -> int:
        """Parameters in all."""
        norms = 2 * self.head_dim if self.qk_norm else 0
        return self.weights + norms + (self.heads if self.learned_sink else 0)

    def flops(self, keys: float) -> float:
        """FLOPs of attending for one token over a number of keys."""
        return attend_flops(self.heads, self.head_dim, self.head_dim, keys)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Those of queries, keys and values."""
        shared = self.kv_heads * self.head_dim
        query = nn.Linear(self.width, self.inner, bias=False)
        return query, nn.Linear(self.width, shared, bias=False), nn.Linear(self.width, shared, bias=False)

    def output_gate(self) -> nn.Linear | None:
        """The gate's projection."""
        return nn.Linear(self.width, self.gates, bias=False) if self.gates else None

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """Those of queries and keys."""
        if not self.qk_norm:
            return nn.Identity(), nn.Identity()
        return Norm(self.head_dim, eps=1e-6), Norm(self.head_dim, eps=1e-6)

    def sink(self) -> nn.Parameter | None:
        """[H] logits of the learned sink, at first as strong as one key that nothing is known of."""
        return nn.Parameter(torch.zeros(self.heads)) if self.learned_sink else None

    def place(
        self, q: Tensor, k: Tensor, v: Tensor, norms: tuple[nn.Module, nn.Module], start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected q [B, T, H·K], k and v [B, T, G·K] by head, normalised and turned, from position `start` on."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        q, k = norms[0](q), norms[1](k)
        return self.positions.turn(q, start), self.positions.turn(k, start), v

    def close(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """The heads' outputs [B, T, H, K] through the gate's logits, as [B, T, H·K]."""
        if gate is None:
            return attended.flatten(2)
        if self.gate == "head":
            return (attended * torch.sigmoid(gate).unsqueeze(-1)).flatten(2)
        return attended.flatten(2) * torch.sigmoid(gate)

    def slopes(self, heads: slice, device: torch.device) -> Tensor | None:
        """[H] of those heads, where positions are slopes."""
        slopes = self.positions.slopes(self.heads, device)
        return None if slopes is None else slopes[heads]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        *,
        heads: slice = slice(None),
        window: int | None = None,
        sinks: int = 0,
        skipped: int = 0,
    ) -> Tensor:
        """`softmax_attention` of some of the heads, as the plan says; arguments as there."""
        slopes = self.slopes(heads, q.device)
        logits = None if sink is None else sink[heads]
        outputs, past = [], k.shape[1] - q.shape[1]
        for queries in q.split(FADE_QUERIES if self.positions.fades else q.shape[1], dim=1):
            end = past + queries.shape[1]
            keys, values = k[:, :end], v[:, :end]
            if self.positions.fades:
                # All distances are from the last query, so that keys only shrink.
                back = torch.arange(end - 1, -1, -1, device=q.device)
                back[:sinks] += skipped
                queries = self.positions.fade(queries, -back[past:])
                keys = self.positions.fade(keys, back)
            outputs.append(
                softmax_attention(
                    queries,
                    keys,
                    values,
                    window=window,
                    soft_cap=self.soft_cap,
                    slopes=slopes,
                    sinks=sinks,
                    skipped=skipped,
                    sink_logits=logits,
                )
            )
            past = end
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def attend_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        *,
        length: int,
        heads: slice = slice(None),
        pinned: int = 0,
    ) -> Tensor:
        """One query [B, H, K] over a cache, or a ring whose first slots are pinned, that has seen `length` tokens."""
        visible = min(length, k.shape[1])
        keys, values, back = k[:, :visible], v[:, :visible], None
        if self.positions.kind in ("alibi", "xpos"):
            back = distances(length, k.shape[1], pinned, k.device)
        if self.positions.fades:
            assert back is not None
            keys = self.positions.fade(keys, back)
        return softmax_attention_step(
            q.to(k.dtype),
            keys,
            values,
            visible=visible,
            soft_cap=self.soft_cap,
            slopes=self.slopes(heads, q.device),
            sink_logits=None if sink is None else sink[heads],
            distance=back,
        )


def distances(length: int, slots: int, pinned: int, device: torch.device) -> Tensor:
    """[S] how many tokens before the last of `length` lies what a ring holds, whose first slots hold the first tokens."""
    slot = torch.arange(min(length, slots), device=device)
    around = max(1, slots - pinned)
    return torch.where(slot < pinned, length - 1 - slot, (length - 1 - slot) % around)

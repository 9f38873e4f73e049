"""The light index of DeepSeek's sparse attention: its queries and keys, and what it learns from the attention.

Letters: B batch, T time, S keys, D width, Q query source, H heads, K key width, J index heads, I index width, N chosen.
After DeepSeek-V3.2 (arXiv:2512.02556).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.selected_attention.ops import index_divergence, index_scores, select_keys


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What the index makes of some tokens: queries [B, T, J, I], keys [B, S, I], weights [B, T, J]."""

    queries: Tensor
    keys: Tensor
    weights: Tensor

    def select(self, count: int) -> Tensor:
        """The places of `count` keys for each query, [B, T, N]."""
        return select_keys(self.queries, self.keys, self.weights, keep=count)

    def with_keys(self, keys: Tensor) -> "Looked":
        """The same queries over other keys."""
        return replace(self, keys=keys)

    def sparse_loss(self, chosen: Tensor, shares: Tensor) -> Tensor:
        """Mean divergence of the index from the attention's shares [B, T, N] among the chosen keys."""
        scores = index_scores(self.queries, self.keys, self.weights, chosen)
        return _divergence(scores, shares) / (chosen.shape[0] * chosen.shape[1])

    def dense_loss(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """The same among all keys: queries [B, T, H, K], keys [B, S, H, K]."""
        return index_divergence(self.queries, self.keys, self.weights, queries, keys, scale=scale)


def _divergence(scores: Tensor, shares: Tensor) -> Tensor:
    """Σ_t KL(p_t ‖ softmax(I_t)) of scores I and shares p [B, T, N]; −∞ is a score that does not count."""
    logs = scores.log_softmax(-1).masked_fill(scores.isinf(), 0)
    shares = shares.to(logs.dtype)
    return (torch.xlogy(shares, shares) - shares * logs).sum()


class Index(nn.Module):
    """J small queries a token, one key shared by them, and how much each query counts."""

    def __init__(self, source: int, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(source, heads * head_dim, bias=False)
        self.key = nn.Linear(width, head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weight = nn.Linear(width, heads, bias=False)

    def forward(self, x: Tensor, source: Tensor, turn: Callable[[Tensor], Tensor], turned: int) -> Looked:
        """Of x [B, T, D] and its queries' source [B, T, Q], detached: the first `turned` widths have positions."""
        x, source = x.detach(), source.detach()

        def place(y: Tensor) -> Tensor:
            return torch.cat([turn(y[..., :turned]), y[..., turned:]], dim=-1)

        return Looked(
            queries=place(self.query(source).unflatten(-1, (self.heads, -1))),
            keys=place(self.norm(self.key(x)).to(x.dtype)[:, :, None])[:, :, 0],
            weights=self.weight(x) * (self.heads * self.head_dim) ** -0.5,
        )


def index_weights(source: int, width: int, heads: int, head_dim: int) -> int:
    """Weights of an index's matrices; its norm has 2 · head_dim more."""
    return source * heads * head_dim + width * (head_dim + heads)

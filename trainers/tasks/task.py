"""What a proxy task is: it makes batches, and turns predictions on held-out ones into scores.

Letters: B batch, T time, N scored positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""The target of positions that are not scored."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens [B, T] and targets [B, T], IGNORED where nothing is asked."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """A task's result: `score` from 0 (chance) to 1 (perfect), and the metrics behind it."""

    score: float
    metrics: Mapping[str, float]


Predict = Callable[[Tensor, Tensor], Tensor]
"""Tokens [B, T] and a mask [B, T] of asked positions to logits [N, V], in the order of the mask."""


class Task(Protocol):
    """A generator of sequences with right answers."""

    @property
    def name(self) -> str:
        """The word that configurations and results use."""

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""

    def check(self, length: int) -> None:
        """Raise ValueError if sequences of this length cannot be made."""

    def longest(self, length: int) -> int:
        """Tokens of the longest sequence that is trained on or scored at this length."""

    def batch(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """A training batch; the same generator state gives the same batch."""

    def score(self, predict: Predict, length: int) -> Score:
        """The score on held-out sequences, the same ones for every model."""

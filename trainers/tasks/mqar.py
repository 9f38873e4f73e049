"""Multi-query associative recall: pairs of key and value are told once, then keys are asked in a random order.

    tokens   k3 v8 k1 v5  0 k1  0  0 k3  0 …        labels   .. .. .. ..  . v5  .  . v8  . …

Keys and values are drawn without replacement, so nothing but the sequence itself says which belongs to which.
Queries come soon rather than late: slot i with a probability in proportion to i^(a-1), a = 0.01.
After Zoology, Arora et al. 2023, arXiv:2312.04927.

Letters: B batch, T time, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.tasks.task import IGNORED, Batch, Predict, Score

POWER = 0.01
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Mqar:
    """Recall at several numbers of pairs at once; the score is the mean accuracy over them.

    Raises:
        ValueError: the vocabulary is odd or too small for the pairs, or there are no pairs.
    """

    pairs: Sequence[int] = (2, 4, 8)
    vocabulary: int = 40
    held_out: int = 256
    """Sequences for each number of pairs."""

    name = "mqar"

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(
                f"mqar: pairs {tuple(self.pairs)} are not valid: give at least one number above 0"
            )
        if self.vocabulary % 2 or self.vocabulary // 2 - 1 < max(self.pairs):
            raise ValueError(
                f"mqar: a vocabulary of {self.vocabulary} is not valid for {max(self.pairs)} pairs: "
                f"use an even one of at least {2 * max(self.pairs) + 2}"
            )

    def check(self, length: int) -> None:
        """Raise ValueError if the length has no room for the fewest pairs."""
        self.fitting(length)

    def longest(self, length: int) -> int:
        """The length itself: recall is scored at the length of its training."""
        return length

    def batch(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """Equal shares of every number of pairs that fits the length, a quarter of it at most."""
        fitting = self.fitting(length)
        shares = [size // len(fitting) + (index < size % len(fitting)) for index in range(len(fitting))]
        parts = [
            self.make(share, length, pairs, rng)
            for share, pairs in zip(shares, fitting, strict=True)
            if share
        ]
        return Batch(
            tokens=torch.cat([part.tokens for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
        )

    def fitting(self, length: int) -> list[int]:
        """The numbers of pairs that leave room for their queries; raises ValueError if none does."""
        fitting = [pairs for pairs in self.pairs if 4 * pairs <= length]
        if not fitting:
            raise ValueError(
                f"mqar: length {length} is too short for {min(self.pairs)} pairs: use at least {4 * min(self.pairs)}"
            )
        return fitting

    def make(self, size: int, length: int, pairs: int, rng: torch.Generator) -> Batch:
        """[B, T] sequences that all hold the same number of pairs."""
        half = self.vocabulary // 2
        keys = torch.rand(size, half - 1, generator=rng).argsort(dim=1)[:, :pairs] + 1
        values = torch.rand(size, half, generator=rng).argsort(dim=1)[:, :pairs] + half
        tokens = torch.zeros(size, length, dtype=torch.int64)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        slots = (length - 2 * pairs) // 2
        # Gumbel noise on log-probabilities and a top-k: draws without replacement in proportion to them.
        log_weight = (POWER - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
        noise = -torch.empty(size, slots, dtype=torch.float64).exponential_(generator=rng).log()
        places = 2 * pairs + 2 * (log_weight + noise).topk(pairs, dim=1).indices
        targets = torch.full((size, length), IGNORED, dtype=torch.int64)
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return Batch(tokens=tokens, targets=targets)

    def score(self, predict: Predict, length: int) -> Score:
        """Accuracy over chance on held-out sequences, averaged over the numbers of pairs."""
        rng = torch.Generator().manual_seed(HELD_OUT_SEED)
        metrics = {}
        for pairs in self.fitting(length):
            batch = self.make(self.held_out, length, pairs, rng)
            asked = batch.targets != IGNORED
            right = predict(batch.tokens, asked).argmax(dim=-1).cpu() == batch.targets[asked]
            metrics[f"mqar_accuracy_{pairs}"] = right.double().mean().item()
        chance = 2 / self.vocabulary
        accuracy = sum(metrics.values()) / len(metrics)
        return Score(score=max(0.0, (accuracy - chance) / (1 - chance)), metrics=metrics)


def with_pairs(pairs: Sequence[int]) -> Mqar:
    """The task at these numbers of pairs, with a vocabulary that holds the largest."""
    return Mqar(pairs=tuple(pairs), vocabulary=max(Mqar.vocabulary, 2 * max(pairs) + 2))

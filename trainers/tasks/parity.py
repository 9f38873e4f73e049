"""Parity of random bits, scored on texts longer than those of the training: the cheapest test of tracking a state.

    tokens   1 0 1 1 0 1 …        labels   1 1 0 1 1 0 …

Every token asks for the parity of all bits so far. Training shows lengths from 4 up to the budget's, so that the end of
a text is no cue; the score is taken from there to four times as far, where counting by position fails.
After Grazzi et al. 2024, arXiv:2411.12537.

Letters: B batch, T time.
"""

from dataclasses import dataclass

import torch

from trainers.tasks.task import IGNORED, Batch, Predict, Score

LEAST = 4
FURTHER = 4
HELD_OUT_SEED = 1_000_033


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Running parity; the score is the accuracy beyond the training length, scaled so that guessing is 0."""

    held_out: int = 128
    """Sequences."""

    name = "parity"
    vocabulary = 2

    def check(self, length: int) -> None:
        """Raise ValueError if a text is too short to vary."""
        if length < 2 * LEAST:
            raise ValueError(f"parity: length {length} is too short: use at least {2 * LEAST}")

    def longest(self, length: int) -> int:
        """Four times the training length."""
        return FURTHER * length

    def batch(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """Texts of a length between 4 and `length` each; what lies behind the end is not asked."""
        batch = self.make(size, length, rng)
        ends = torch.randint(LEAST, length + 1, (size, 1), generator=rng)
        return Batch(
            tokens=batch.tokens, targets=batch.targets.masked_fill(torch.arange(length) >= ends, IGNORED)
        )

    def make(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """[B, T] random bits and the parity of all up to each."""
        bits = torch.randint(0, 2, (size, length), generator=rng)
        return Batch(tokens=bits, targets=bits.cumsum(dim=1) % 2)

    def score(self, predict: Predict, length: int) -> Score:
        """Accuracy at positions from the training length on to four times as far, 0 for guessing and 1 for perfect."""
        batch = self.make(self.held_out, FURTHER * length, torch.Generator().manual_seed(HELD_OUT_SEED))
        asked = torch.ones_like(batch.tokens, dtype=torch.bool)
        right = (predict(batch.tokens, asked).argmax(dim=-1).cpu() == batch.targets[asked]).double()
        right = right.view_as(batch.tokens)
        spans = {1: (length * 3 // 4, length), 2: (length, 2 * length), 4: (2 * length, 4 * length)}
        metrics = {
            f"parity_accuracy_{times}x": right[:, start:end].mean().item()
            for times, (start, end) in spans.items()
        }
        return Score(score=max(0.0, 2 * right[:, length:].mean().item() - 1), metrics=metrics)

"""A needle in a haystack: one key and its value told early among filler, and asked again far behind.

    tokens   f3 f7 k2 v5 f1 f1 f6 k2 f4 … f2 k2        labels   .. .. .. .. .. .. .. v5 .. … .. v5

Filler is drawn anew for every token, and the key comes back at places where every distance is as likely. Nothing else
could be meant, so what counts is how far a value is carried, or found again. The score is taken with the question as
the last token of texts of twice and four times the training length.
After Mohtashami and Jaggi 2023, arXiv:2305.16300, in words of one token.

Letters: B batch, T time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.tasks.task import IGNORED, Batch, Predict, Score

WORDS = 16
"""Of filler, then of keys, then of values."""
EARLY = 4
"""The needle lies in the first of so many parts of a training text."""
QUESTIONS = 4
TIMES = (1, 2, 4)
LEAST = 4 * EARLY
HELD_OUT_SEED = 1_000_037


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Recall of one pair over a distance; the score is the accuracy beyond the training length, 0 for guessing a value."""

    held_out: int = 256
    """Sequences at each length."""

    name = "needle"
    vocabulary = 3 * WORDS

    def check(self, length: int) -> None:
        """Raise ValueError if a text has no room for a needle, hay and a question."""
        if length < LEAST:
            raise ValueError(f"needle: length {length} is too short: use at least {LEAST}")

    def longest(self, length: int) -> int:
        """Four times the training length."""
        return max(TIMES) * length

    def batch(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """The needle anywhere in the first quarter, and up to four questions anywhere behind it."""
        places = torch.randint(0, length // EARLY, (size, 1), generator=rng)
        share = torch.rand(size, QUESTIONS, generator=rng)
        questions = places + 2 + ((length - 2 - places) * share).long()
        return self.make(length, places, questions, rng)

    def make(self, length: int, places: Tensor, questions: Tensor, rng: torch.Generator) -> Batch:
        """[B, T] hay with a needle at places [B, 1] and its key again at questions [B, Q], which are asked."""
        size = len(places)
        tokens = torch.randint(0, WORDS, (size, length), generator=rng)
        key = torch.randint(WORDS, 2 * WORDS, (size, 1), generator=rng)
        value = torch.randint(2 * WORDS, 3 * WORDS, (size, 1), generator=rng)
        tokens.scatter_(1, places, key).scatter_(1, places + 1, value)
        tokens.scatter_(1, questions, key.expand_as(questions))
        targets = torch.full((size, length), IGNORED, dtype=torch.int64)
        targets.scatter_(1, questions, value.expand_as(questions))
        return Batch(tokens=tokens, targets=targets)

    def score(self, predict: Predict, length: int) -> Score:
        """Accuracy at one, two and four times the length; the latter two make the score."""
        rng = torch.Generator().manual_seed(HELD_OUT_SEED)
        metrics = {}
        for times in TIMES:
            places = torch.randint(0, length // EARLY, (self.held_out, 1), generator=rng)
            last = torch.full_like(places, times * length - 1)
            batch = self.make(times * length, places, last, rng)
            right = (
                predict(batch.tokens, batch.targets != IGNORED).argmax(dim=-1).cpu() == batch.targets[:, -1]
            )
            metrics[f"needle_accuracy_{times}x"] = right.double().mean().item()
        accuracy = (metrics["needle_accuracy_2x"] + metrics["needle_accuracy_4x"]) / 2
        return Score(score=max(0.0, (accuracy - 1 / WORDS) / (1 - 1 / WORDS)), metrics=metrics)

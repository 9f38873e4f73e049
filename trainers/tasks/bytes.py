"""Byte-level language modelling: predict every next byte of real text; no tokenizer, a vocabulary of 256.

The score compares with a reader who knows how often each byte occurs and nothing of its context: 0 is no better than
that, 1 would be perfect foresight.

Letters: B batch, T time.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from trainers.tasks.corpus import STDLIB, Corpus, load
from trainers.tasks.task import Batch, Predict, Score


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Next-byte prediction on a corpus; raises ValueError as `corpus.load` when it is first read."""

    data: str = STDLIB
    held_out: int = 192
    """Held-out sequences, spread evenly over the held-out text."""

    name: str = field(default="bytes", init=False)
    vocabulary: int = field(default=256, init=False)

    @property
    def corpus(self) -> Corpus:
        """The text, read once a process."""
        return load(self.data)

    @property
    def unigram_bits(self) -> float:
        """Bits a byte of the context-free reader."""
        return self.corpus.unigram_bits

    def check(self, length: int) -> None:
        """Raise ValueError if the text cannot be read, or either part of it is too short for the length."""
        for part in (self.corpus.train, self.corpus.held_out):
            self._room(len(part), length)

    def longest(self, length: int) -> int:
        """The length itself."""
        return length

    def batch(self, size: int, length: int, rng: torch.Generator) -> Batch:
        """Random stretches of the training text."""
        starts = torch.randint(0, self._room(len(self._train), length), (size,), generator=rng)
        return _cut(self._train, starts, length)

    @cached_property
    def _train(self) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self.corpus.train, dtype=np.uint8).copy())

    @cached_property
    def _held_out(self) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self.corpus.held_out, dtype=np.uint8).copy())

    def _room(self, size: int, length: int) -> int:
        if size <= length:
            raise ValueError(
                f"data: {self.data} has {size} bytes in a split, too few for sequences of {length}"
            )
        return size - length

    def score(self, predict: Predict, length: int) -> Score:
        """One minus the bits a byte over those of the context-free reader; zlib's bits stand beside for scale."""
        room = self._room(len(self._held_out), length)
        starts = torch.linspace(0, room - 1, min(self.held_out, room)).long()
        batch = _cut(self._held_out, starts, length)
        logits = predict(batch.tokens, torch.ones_like(batch.tokens, dtype=torch.bool))
        bits = F.cross_entropy(logits.float().cpu(), batch.targets.flatten()).item() / math.log(2)
        return Score(
            score=max(0.0, 1 - bits / self.unigram_bits),
            metrics={
                "bits_per_byte": bits,
                "unigram_bits_per_byte": self.unigram_bits,
                "zlib_bits_per_byte": self.corpus.zlib_bits,
            },
        )


def _cut(text: torch.Tensor, starts: torch.Tensor, length: int) -> Batch:
    """Stretches [B, T] that begin at `starts`, and the same moved by one as targets."""
    places = starts[:, None] + torch.arange(length + 1)
    cut = text[places].long()
    return Batch(tokens=cut[:, :-1], targets=cut[:, 1:])

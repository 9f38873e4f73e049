"""Parity: the labels, the lengths that training shows, and a score that only a tracked state can reach."""

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
from trainers.outcome import Measured
from trainers.tasks.parity import Parity
from trainers.tasks.registry import make_task
from trainers.tasks.task import IGNORED

TASK = Parity()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(answers: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(answers, 2).double()


def test_every_label_is_the_parity_of_the_bits_so_far() -> None:
    batch = TASK.make(20, 13, rng())
    for bits, labels in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert labels == [sum(bits[: t + 1]) % 2 for t in range(13)]
    assert 0.3 < batch.tokens.double().mean() < 0.7


def test_training_shows_every_length_from_four_up_and_asks_nothing_behind_the_end() -> None:
    batch = TASK.batch(4000, 16, rng())
    asked = batch.targets != IGNORED
    ends = asked.sum(1)
    assert set(ends.tolist()) == set(range(4, 17))
    assert all(
        row[: int(end)].all() and not row[int(end) :].any() for row, end in zip(asked, ends, strict=True)
    )
    again = TASK.batch(4000, 16, rng())
    assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.targets, batch.targets)


def test_only_the_running_parity_scores_beyond_the_training_length() -> None:
    perfect = TASK.score(lambda tokens, asked: logits_of((tokens.cumsum(1) % 2)[asked]), 16)
    assert perfect.score == 1.0 and set(perfect.metrics.values()) == {1.0}
    guess = TASK.score(lambda tokens, asked: logits_of(tokens[asked]), 16)
    assert guess.score < 0.1

    def forgets(tokens: Tensor, asked: Tensor) -> Tensor:
        """Right up to the training length, and the parity of what is left after it."""
        first = tokens.cumsum(1) % 2
        later = tokens[:, 16:].cumsum(1) % 2
        return logits_of(torch.cat([first[:, :16], later], dim=1)[asked])

    short = TASK.score(forgets, 16)
    assert short.metrics["parity_accuracy_1x"] == 1.0 and short.score < 0.2


def test_a_text_that_cannot_vary_is_refused() -> None:
    with pytest.raises(ValueError, match="use at least 8"):
        TASK.check(7)
    TASK.check(8)
    assert TASK.longest(16) == 64
    with pytest.raises(ValueError, match="only mqar does"):
        make_task("parity", "stdlib", (2,))


def test_a_model_is_built_for_the_length_at_which_it_is_scored() -> None:
    budget = TaskBudget(name="parity", weight=1.0, steps=2, batch=4, learning_rates=(1e-2,))
    job = Job(
        layers=tuple(read("full").to_json()),
        frame=Frame(width=16, train_length=12, context=12, dtype="float32"),
        budget=Budget(tasks=(budget,), length=12, data="stdlib"),
        seed=0,
    )
    outcome = evaluate(job)
    assert isinstance(outcome, Measured)
    assert set(outcome.metrics) == {"parity_accuracy_1x", "parity_accuracy_2x", "parity_accuracy_4x"}

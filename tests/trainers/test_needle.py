"""The needle: what a text tells and asks, at which distances, and a score that needs what was told far back."""

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
from trainers.outcome import Measured
from trainers.tasks.needle import WORDS, Needle
from trainers.tasks.registry import make_task
from trainers.tasks.task import IGNORED

TASK = Needle()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(answers: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(answers, TASK.vocabulary).double()


def values_of(tokens: Tensor) -> Tensor:
    """The only value of each row."""
    return tokens[tokens >= 2 * WORDS].view(len(tokens))


def test_a_text_holds_one_pair_and_every_question_asks_for_its_value() -> None:
    batch = TASK.batch(400, 32, rng())
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        (place,) = (t for t, token in enumerate(row) if token >= 2 * WORDS)
        assert 1 <= place <= 8 and WORDS <= row[place - 1] < 2 * WORDS
        asked = [t for t, target in enumerate(targets) if target != IGNORED]
        assert 1 <= len(asked) <= 4 and min(asked) > place
        assert {targets[t] for t in asked} == {row[place]} and {row[t] for t in asked} == {row[place - 1]}
        assert all(token < WORDS for t, token in enumerate(row) if t not in (place - 1, place, *asked))
    again = TASK.batch(400, 32, rng())
    assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.targets, batch.targets)
    assert not torch.equal(TASK.batch(400, 32, rng(1)).tokens, batch.tokens)


def test_every_word_occurs_and_every_distance_is_asked_alike() -> None:
    batch = TASK.batch(20_000, 32, rng())
    assert set(batch.tokens.flatten().tolist()) == set(range(3 * WORDS))
    asked = batch.targets != IGNORED
    assert not asked[:, :2].any()
    # Behind the first quarter every place is open to every text, and is asked about as often as the next.
    rate = asked[:, 10:].double().mean(0)
    assert rate.max() / rate.min() < 1.15


def test_the_score_asks_once_at_the_end_and_at_up_to_four_times_the_length() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(tokens: Tensor, asked: Tensor) -> Tensor:
        seen.append((tokens, asked))
        return logits_of(values_of(tokens))

    score = TASK.score(watch, 16)
    assert score.score == 1.0
    assert score.metrics == {f"needle_accuracy_{times}x": 1.0 for times in (1, 2, 4)}
    assert [tuple(tokens.shape) for tokens, _ in seen] == [(256, 16), (256, 32), (256, 64)]
    for tokens, asked in seen:
        assert asked[:, -1].all() and asked.sum() == len(tokens)
        # It was told at the beginning, however long the text is.
        assert ((tokens >= 2 * WORDS).nonzero()[:, 1] <= 4).all()
    TASK.score(watch, 16)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(seen[:3], seen[3:], strict=True))


def test_who_guesses_or_looks_no_further_than_the_training_length_scores_nothing() -> None:
    guesses = rng(3)

    def guess(tokens: Tensor, asked: Tensor) -> Tensor:
        del asked
        return logits_of(torch.randint(2 * WORDS, 3 * WORDS, (len(tokens),), generator=guesses))

    assert TASK.score(guess, 16).score < 0.06

    def near(tokens: Tensor, asked: Tensor) -> Tensor:
        """Right where the value is among the last 16 tokens."""
        del asked
        return logits_of(tokens[:, -16:].amax(1))

    short = TASK.score(near, 16)
    assert short.metrics["needle_accuracy_1x"] == 1.0 and short.score == 0.0


def test_a_text_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="use at least 16"):
        TASK.check(15)
    TASK.check(16)
    assert TASK.longest(16) == 64
    assert make_task("needle", "stdlib") == TASK
    with pytest.raises(ValueError, match="only mqar does"):
        make_task("needle", "stdlib", (2,))


def test_a_model_is_built_for_the_length_at_which_it_is_scored() -> None:
    budget = TaskBudget(name="needle", weight=1.0, steps=2, batch=4, learning_rates=(1e-2,))
    job = Job(
        layers=tuple(read("hyena").to_json()),
        frame=Frame(width=16, train_length=16, context=16, dtype="float32"),
        budget=Budget(tasks=(budget,), length=16, data="stdlib"),
        seed=0,
    )
    outcome = evaluate(job)
    assert isinstance(outcome, Measured)
    assert set(outcome.metrics) == {"needle_accuracy_1x", "needle_accuracy_2x", "needle_accuracy_4x"}

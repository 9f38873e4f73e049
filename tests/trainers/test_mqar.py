"""Recall: what a sequence tells, what it asks, and that only the sequence itself knows the answer."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trainers.tasks.mqar import Mqar
from trainers.tasks.registry import make_task
from trainers.tasks.task import IGNORED, Batch

TASK = Mqar(pairs=(3, 5), vocabulary=24)
HALF = 12


def batch_of(seed: int = 0, size: int = 64, length: int = 40, pairs: int = 5) -> Batch:
    return TASK.make(size, length, pairs, torch.Generator().manual_seed(seed))


def told(tokens: Tensor, pairs: int) -> list[dict[int, int]]:
    return [dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True)) for row in tokens.tolist()]


def test_keys_and_values_are_of_two_ranges_and_none_comes_twice() -> None:
    context = batch_of(size=200).tokens[:, :10]
    keys, values = context[:, 0::2], context[:, 1::2]
    assert int(keys.min()) >= 1 and int(keys.max()) < HALF
    assert int(values.min()) >= HALF and int(values.max()) < 24
    for column in (keys, values):
        assert all(len(set(row)) == 5 for row in column.tolist())
    # Every word of both ranges occurs.
    assert set(keys.flatten().tolist()) == set(range(1, HALF))
    assert set(values.flatten().tolist()) == set(range(HALF, 24))


def test_every_key_is_asked_once_after_the_context_and_answered_as_told() -> None:
    batch = batch_of()
    for row, targets, pairs in zip(
        batch.tokens.tolist(), batch.targets.tolist(), told(batch.tokens, 5), strict=True
    ):
        asked = [place for place, target in enumerate(targets) if target != IGNORED]
        assert sorted(row[place] for place in asked) == sorted(pairs)
        assert all(place >= 10 and place % 2 == 0 for place in asked)
        assert [targets[place] for place in asked] == [pairs[row[place]] for place in asked]
        # Nothing else stands there, and nothing else is asked.
        assert all(row[place] == 0 for place in range(10, 40) if place not in asked)


@pytest.mark.parametrize("length", [20, 21, 40])
def test_any_length_from_four_times_the_pairs_has_room(length: int) -> None:
    batch = batch_of(length=length)
    assert batch.tokens.shape == batch.targets.shape == (64, length)
    assert ((batch.targets != IGNORED).sum(1) == 5).all()


def test_keys_are_asked_sooner_rather_than_later_but_in_no_fixed_order() -> None:
    task = Mqar(pairs=(4,), vocabulary=40)
    batch = task.make(4000, 72, 4, torch.Generator().manual_seed(0))
    asked = (batch.targets != IGNORED)[:, 8::2].double().mean(0)  # 32 slots
    assert asked.sum().item() == pytest.approx(4)
    # In proportion to i^-0.99, the first slot is drawn far more often than the middle ones, and those than the last.
    assert asked[0] > 4 * asked[8] > 8 * asked[31]
    falls = [float(asked[a:b].mean()) for a, b in ((0, 1), (1, 3), (3, 8), (8, 16), (16, 32))]
    assert falls == sorted(falls, reverse=True)
    expected = torch.arange(1, 33, dtype=torch.float64) ** -0.99
    first = batch.targets[:, 8::2].ne(IGNORED)
    single = Mqar(pairs=(1,), vocabulary=40).make(20000, 66, 1, torch.Generator().manual_seed(1))
    share = (single.targets != IGNORED)[:, 2::2].double().mean(0)
    assert share == pytest.approx(expected / expected.sum(), abs=0.01)
    orders = {tuple(batch.tokens[row, 8::2][first[row]].argsort().tolist()) for row in range(200)}
    assert len(orders) == 24


def test_equal_seeds_give_equal_batches() -> None:
    one, two, other = batch_of(3), batch_of(3), batch_of(4)
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.targets, two.targets)
    assert not torch.equal(one.tokens, other.tokens)


def test_a_batch_shares_itself_among_the_numbers_of_pairs_that_fit() -> None:
    rng = torch.Generator().manual_seed(0)
    batch = TASK.batch(9, 20, rng)
    assert (batch.targets != IGNORED).sum(1).tolist() == [3] * 5 + [5] * 4
    assert (TASK.batch(4, 19, rng).targets != IGNORED).sum(1).tolist() == [3] * 4
    assert TASK.batch(1, 20, rng).tokens.shape == (1, 20)


def test_a_length_without_room_is_refused_with_the_way_out() -> None:
    rng = torch.Generator().manual_seed(0)
    for call in (lambda: TASK.batch(4, 11, rng), lambda: TASK.check(11)):
        with pytest.raises(ValueError, match="length 11 is too short for 3 pairs: use at least 12"):
            call()
    TASK.check(12)


@pytest.mark.parametrize(
    ("pairs", "vocabulary", "message"),
    [
        ((4,), 9, "use an even one of at least 10"),
        ((4,), 8, "use an even one of at least 10"),
        ((), 40, "at least one number above 0"),
        ((0, 4), 40, "at least one number above 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(pairs: Sequence[int], vocabulary: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar(pairs=pairs, vocabulary=vocabulary)
    assert Mqar(pairs=(4,), vocabulary=10).make(8, 16, 4, torch.Generator().manual_seed(0))


def look_up(tokens: Tensor, asked: Tensor) -> Tensor:
    """Answers from the pairs that were told, whatever their number."""
    answers = []
    for row, mask in zip(tokens.tolist(), asked.tolist(), strict=True):
        told_first = {key: value for key, value in zip(row[0::2], row[1::2], strict=False) if value >= HALF}
        answers += [told_first[row[place]] for place, is_asked in enumerate(mask) if is_asked]
    return torch.nn.functional.one_hot(torch.tensor(answers), 24).float()


def test_who_looks_it_up_scores_one() -> None:
    score = TASK.score(look_up, 40)
    assert score.score == pytest.approx(1.0)
    assert score.metrics == {"mqar_accuracy_3": 1.0, "mqar_accuracy_5": 1.0}


def test_who_guesses_scores_nothing() -> None:
    rng = torch.Generator().manual_seed(0)

    def guess(_tokens: Tensor, asked: Tensor) -> Tensor:
        logits = torch.rand(int(asked.sum()), 24, generator=rng)
        logits[:, :HALF] = -1  # even who knows that answers are values
        return logits

    score = TASK.score(guess, 40)
    assert score.score < 0.03
    assert all(0.05 < accuracy < 0.12 for accuracy in score.metrics.values())


def test_half_of_the_answers_is_half_of_the_score() -> None:
    def half(tokens: Tensor, asked: Tensor) -> Tensor:
        logits = look_up(tokens, asked)
        logits[::2] = 0
        logits[::2, 0] = 1
        return logits

    accuracy = 0.5
    assert TASK.score(half, 40).score == pytest.approx((accuracy - 1 / HALF) / (1 - 1 / HALF), abs=1e-3)


def test_the_held_out_sequences_are_the_same_for_all_and_not_those_of_training() -> None:
    seen: list[Tensor] = []

    def watch(tokens: Tensor, asked: Tensor) -> Tensor:
        seen.append(tokens)
        return torch.zeros(int(asked.sum()), 24)

    TASK.score(watch, 40)
    torch.manual_seed(5)
    TASK.score(watch, 40)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert len(seen[0]) == TASK.held_out
    assert not any(torch.equal(seen[1][:64], batch_of(seed).tokens) for seed in range(5))


def test_more_pairs_bring_the_vocabulary_that_they_need() -> None:
    task = make_task("mqar", "stdlib", (4, 24))
    assert isinstance(task, Mqar)
    assert task.pairs == (4, 24)
    assert task.vocabulary == 50
    assert task.fitting(96) == [4, 24]
    assert make_task("mqar", "stdlib") == Mqar()
    with pytest.raises(ValueError, match="only mqar"):
        make_task("bytes", "stdlib", (4,))

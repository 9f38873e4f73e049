"""What an evaluation is expected to take holds its training and every scoring, and is not known of one that fails."""

import time

import pytest
import torch

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers import probe as probe_module
from trainers.evaluate import Budget, Job, TaskBudget
from trainers.probe import probe

SLOW_S = 0.2


def job(rates: tuple[float, ...], rungs: tuple[float, ...] = ()) -> Job:
    frame = Frame(width=16, train_length=16, context=16, dtype="float32")
    tasks = (TaskBudget(name="mqar", weight=1.0, steps=1, batch=2, learning_rates=rates, pairs=(2,)),)
    budget = Budget(tasks=tasks, length=16, data="stdlib", rungs=rungs)
    return Job(layers=tuple(read("linear").to_json()), frame=frame, budget=budget, seed=0)


def test_every_rate_is_scored_at_every_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe_module.score_of

    def slowly(*arguments):
        time.sleep(SLOW_S)
        return real(*arguments)

    monkeypatch.setattr(probe_module, "score_of", slowly)
    scorings = 3 * 2
    expected = probe(job((0.001, 0.01, 0.1), rungs=(0.5,)))
    assert expected is not None and expected >= scorings * SLOW_S


def test_of_what_fails_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(job((1e30,))) is None

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe_module, "score_of", full)
    assert probe(job((0.001,))) is None


def test_it_leaves_the_random_numbers_as_they_were() -> None:
    before = torch.get_rng_state()
    probe(job((0.001,)))
    assert torch.equal(torch.get_rng_state(), before)

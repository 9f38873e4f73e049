"""The door of the trainers: what comes back, that it is the same twice, and which ending means what."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.vocabulary import read
from trainers import evaluate as door
from trainers.evaluate import Job, TaskBudget, evaluate
from trainers.loop import NotFinite, Trained, Training, train
from trainers.model import ProxyModel
from trainers.outcome import Measured, Unfit
from trainers.tasks.mqar import Mqar

Make = Callable[..., Job]
GOLDEN = Path(__file__).with_name("golden.json")


def measured(job: Job) -> Measured:
    outcome = evaluate(job)
    assert isinstance(outcome, Measured), outcome
    return outcome


def test_a_measured_trial_says_what_was_done(make_job: Make) -> None:
    outcome = measured(make_job())
    assert (outcome.steps, outcome.tokens) == (4, 4 * 8 * 16)
    assert set(outcome.scores) == {"mqar"} and 0 <= outcome.quality <= 1
    assert outcome.quality == outcome.scores["mqar"]
    assert outcome.metrics and all(name.startswith("mqar_accuracy_") for name in outcome.metrics)
    assert outcome.details["learning_rates"] == {"mqar": 0.01}
    assert outcome.details["layout"] == str(read("full kda"))
    steps, losses = zip(*outcome.details["curves"]["mqar"], strict=True)
    assert steps == (0, 1, 2, 3) and all(map(math.isfinite, losses))
    assert 0 < outcome.train_s <= outcome.worker_s
    json.dumps(dict(outcome.details), allow_nan=False)


def test_the_quality_is_the_weighted_mean_of_the_tasks(make_job: Make) -> None:
    tasks = (
        TaskBudget(name="mqar", weight=3.0, steps=2, batch=4, learning_rates=(0.01,)),
        TaskBudget(name="bytes", weight=1.0, steps=30, batch=8, learning_rates=(0.01,)),
    )
    outcome = measured(make_job(tasks=tasks))
    assert set(outcome.scores) == {"mqar", "bytes"}
    assert outcome.quality == pytest.approx((3 * outcome.scores["mqar"] + outcome.scores["bytes"]) / 4)
    assert outcome.steps == 32 and outcome.tokens == (2 * 4 + 30 * 8) * 16
    assert len(outcome.details["data"]["sha256"]) == 64 and outcome.details["data"]["source"] == "stdlib"
    alone = measured(make_job(tasks=tasks[1:]))
    assert alone.scores["bytes"] == outcome.scores["bytes"]


def test_the_same_job_gives_the_same_bits_and_another_seed_does_not(make_job: Make) -> None:
    first, second, other = measured(make_job()), measured(make_job()), measured(make_job(seed=1))
    assert first.details == second.details and first.metrics == second.metrics
    assert other.details["curves"] != first.details["curves"]


def test_rotary_positions_are_those_of_the_jobs_frame(make_job: Make) -> None:
    job = make_job()
    curves = [
        measured(replace(job, frame=replace(job.frame, **changes))).details["curves"]["mqar"]
        for changes in (
            {},
            {"rotary_base": 100.0},
            {"rotary_scaling": "linear", "rotary_factor": 4.0},
            {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_length": 16},
            {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_length": 64},
        )
    ]
    assert all(one != other for number, one in enumerate(curves) for other in curves[:number])


def test_the_global_generators_are_left_alone_and_play_no_part(make_job: Make) -> None:
    torch.manual_seed(11)
    random.seed(11)
    before, plain = torch.get_rng_state(), random.getstate()
    first = measured(make_job())
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == plain
    torch.manual_seed(12)
    assert measured(make_job()).details == first.details
    assert isinstance(evaluate(make_job(rates=(1e38,))), Unfit)
    torch.manual_seed(11)
    evaluate(make_job(rates=(1e38,)))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_layouts_meet_the_same_data(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = door.train

    def watch(model: Any, task: Any, *arguments: Any, **options: Any) -> Any:
        make = task.batch

        class Watched(type(task)):  # type: ignore[misc]
            def batch(self, *given: Any) -> Any:
                made = make(*given)
                seen[-1].append(made.tokens)
                return made

        seen.append([])
        return real(model, Watched(), *arguments, **options)

    monkeypatch.setattr(door, "train", watch)
    measured(make_job("full"))
    measured(make_job("3*mamba2"))
    assert len(seen[0]) == 4
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_the_best_learning_rate_counts_and_all_of_them_are_counted(make_job: Make) -> None:
    def score(rate: float) -> float:
        return measured(make_job("full", steps=60, rates=(rate,))).quality

    rates = (1e-5, 0.02)
    apart = [score(rate) for rate in rates]
    assert apart[1] > apart[0]
    for order in (rates, rates[::-1]):
        both = measured(make_job("full", steps=60, rates=order))
        assert both.quality == apart[1] and both.details["learning_rates"] == {"mqar": 0.02}
        assert both.steps == 120


def test_a_layout_is_unfit_only_if_every_learning_rate_runs_away(make_job: Make) -> None:
    outcome = evaluate(make_job(rates=(1e38,)))
    assert isinstance(outcome, Unfit)
    assert "mqar, learning rate 1e+38" in outcome.why and "step" in outcome.why
    saved = measured(make_job(rates=(1e38, 0.01)))
    assert saved.details["learning_rates"] == {"mqar": 0.01}
    assert saved.quality == measured(make_job()).quality


def test_a_run_that_ends_in_no_number_is_unfit(make_job: Make) -> None:
    """The last step may be the one that breaks the weights: then only the score shows it."""
    task = TaskBudget(name="bytes", weight=1.0, steps=1, batch=2, learning_rates=(1e38,))
    outcome = evaluate(make_job("full", tasks=(task,)))
    assert isinstance(outcome, Unfit)
    assert "bits_per_byte is nan after step 0" in outcome.why


def test_a_loss_that_is_no_number_names_task_and_step(
    make_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_away(*_arguments: Any, **_options: Any) -> Any:
        raise NotFinite("the loss is nan at step 17")

    monkeypatch.setattr(door, "train", run_away)
    assert evaluate(make_job()) == Unfit(
        why="mqar, learning rate 0.01: the loss is nan at step 17", diverged=True
    )


def test_a_trial_that_outlasts_its_limit_is_unfit(make_job: Make) -> None:
    outcome = evaluate(make_job(steps=100_000, time_limit_s=0.05))
    assert isinstance(outcome, Unfit)
    assert "mqar: over its time limit of 0.05 s, stopped at step" in outcome.why


def test_a_device_without_memory_is_unfit(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 TiB\nand more words")

    monkeypatch.setattr(door, "train", full)
    assert evaluate(make_job()) == Unfit(
        why="mqar: the device is out of memory: tried to allocate 2 TiB", out_of_memory=True
    )


def test_a_bug_is_raised(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_arguments: Any, **_options: Any) -> Any:
        raise IndexError("a bug")

    monkeypatch.setattr(door, "train", stumble)
    with pytest.raises(IndexError):
        evaluate(make_job())


def test_an_unknown_task_is_refused(make_job: Make) -> None:
    task = TaskBudget(name="mqarr", weight=1.0, steps=1, batch=2, learning_rates=(0.01,))
    with pytest.raises(ValueError, match="did you mean mqar"):
        evaluate(make_job(tasks=(task,)))


AGAIN = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
asked = json.loads(sys.argv[2])
task = TaskBudget(**(asked["task"] | {"learning_rates": tuple(asked["task"]["learning_rates"])}))
job = Job(
    layers=tuple(asked["layers"]), frame=Frame(**asked["frame"]), seed=asked["seed"],
    budget=Budget(tasks=(task,), length=asked["length"], data="stdlib"),
)
print(json.dumps(evaluate(job).details["curves"]["mqar"]))
"""


def train_on_recall(text: str, *, width: int, length: int, steps: int, batch: int) -> tuple[Trained, float]:
    """One run with everything written out, so that no default of a search plays a part; and its score."""
    torch.manual_seed(0)
    frame = Frame(width=width, train_length=length, context=length, dtype="float32", vocabulary=32)
    model = ProxyModel(read(text), frame, stem_taps=4)
    task = Mqar(pairs=(4,), vocabulary=32)
    training = Training(
        steps=steps, batch=batch, length=length, learning_rate=0.01, weight_decay=0.1, warmup_share=0.1,
        clip=1.0, precision="float32",
    )  # fmt: skip
    trained = train(model, task, training, seed=0, device=torch.device("cpu"))
    model.eval()

    def predict(tokens: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad():
            return model.head(model(tokens)[asked])

    return trained, task.score(predict, length).score


def test_the_golden_trial() -> None:
    """All six mixers, six steps: a change of this curve is a change of what every stored result means."""
    layout = "full window[size=8] linear mamba2/none kda mla"
    trained, _ = train_on_recall(layout, width=32, length=24, steps=6, batch=8)
    expected = json.loads(GOLDEN.read_text())
    assert expected["layout"] == layout
    assert [loss for _, loss in trained.curve] == pytest.approx(expected["losses"], rel=1e-4)


def test_a_trial_is_the_same_to_the_last_bit_in_another_process(make_job: Make) -> None:
    job = make_job("full window[size=8] linear mamba2/none kda mla", width=32, length=24, steps=6)
    task = job.budget.tasks[0]
    asked = {
        "layers": list(job.layers),
        "frame": {"width": 32, "train_length": 24, "context": 24, "dtype": "float32"},
        "task": vars(task) | {"learning_rates": list(task.learning_rates)},
        "length": 24,
        "seed": job.seed,
    }
    root = Path(next(iter(sys.modules["trainers"].__path__))).parent
    curves = [
        subprocess.run(
            [sys.executable, "-c", AGAIN, str(root), json.dumps(asked)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert curves[0] == curves[1]
    assert json.loads(curves[0]) == measured(job).details["curves"]["mqar"]


@pytest.mark.slow
def test_recall_separates_full_attention_and_a_large_state_from_small_windows() -> None:
    """Quality must say what a layout can do: windows of four tokens do not reach back to the pairs."""
    scores = {
        text: train_on_recall(text, width=32, length=24, steps=200, batch=32)[1]
        for text in ("2*full", "2*kda", "2*window[size=4]")
    }
    assert scores["2*window[size=4]"] < 0.3, scores
    assert min(scores["2*full"], scores["2*kda"]) > 0.7, scores

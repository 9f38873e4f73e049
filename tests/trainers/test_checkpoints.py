"""A training that rested at a rung ends on the very bits of one that did not, and says so where it could not."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from search_space.mixers.performer import PerformerMixer
from search_space.vocabulary import CHANNELS, VOCABULARY, read
from trainers import checkpoint
from trainers.checkpoint import Damaged, load, place_of, unpack
from trainers.evaluate import Budget, Job, TaskBudget, checkpoint_key, evaluate, members_of
from trainers.members import track_of, train_members
from trainers.outcome import Measured, Unfit
from trainers.tasks.registry import make_task

Make = Callable[..., Job]
RUNGS = (0.25, 0.6)
TASKS = (
    TaskBudget(name="mqar", weight=1.0, steps=8, batch=4, learning_rates=(0.003, 0.02)),
    TaskBudget(name="bytes", weight=2.0, steps=5, batch=4, learning_rates=(0.01,)),
)
TEXTS = {"gmu": "mamba gmu", "cross_layer": "2*cross_layer"}
EVERY = [
    *(TEXTS.get(word, word) for word in VOCABULARY),
    *(f"linear/{channel}" for channel in CHANNELS),
    "linear/moe[router=sigmoid]",
]


def measured(job: Job) -> Measured:
    outcome = evaluate(job)
    assert isinstance(outcome, Measured), outcome
    return outcome


def in_parts(job: Job, folder: Path, stops: tuple[int, ...] = (0, 1, 2)) -> list[Measured]:
    """The job by way of these rungs, each in a call of its own."""
    starts = (None, *stops[:-1])
    return [
        measured(replace(job, rung=rung, start=start, checkpoints=str(folder)))
        for rung, start in zip(stops, starts, strict=True)
    ]


def results(outcome: Measured) -> tuple[object, ...]:
    return outcome.quality, outcome.scores, outcome.metrics, outcome.steps, outcome.tokens


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "layout",
    [
        "full kda",
        "linear/moe[experts=8,router=sigmoid,balance=0.01] mamba2",
        "performer[features=16]",
        "memory_tokens",
    ],
)
def test_a_run_in_parts_ends_on_the_bits_of_the_run_in_one(
    make_job: Make, layout: str, tmp_path: Path
) -> None:
    job = make_job(layout, tasks=TASKS, rungs=RUNGS)
    plain = measured(make_job(layout, tasks=TASKS))
    whole, parts = measured(job), in_parts(job, tmp_path)
    assert results(parts[-1]) == results(whole) == results(plain)
    assert parts[-1].details["curves"] == whole.details["curves"] == plain.details["curves"]
    assert [results(part) for part in parts[:-1]] == [results(passed) for passed in whole.rungs]
    assert whole.rung == 2 and [passed.rung for passed in whole.rungs] == [0, 1]
    assert plain.rungs == () and plain.rung == 0
    skipped = in_parts(job, tmp_path / "other", (0, 2))
    assert results(skipped[-1]) == results(whole)
    assert [passed.rung for passed in skipped[-1].rungs] == [1]
    assert results(skipped[-1].rungs[0]) == results(whole.rungs[1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("rates", [(0.01,), (0.003, 0.02)])
def test_every_word_of_the_vocabulary_can_rest(
    make_job: Make, layout: str, rates: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = PerformerMixer.__init__

    def impatient(mixer: PerformerMixer, *arguments: object) -> None:
        made(mixer, *arguments)  # type: ignore[arg-type]
        mixer.redraw = 2

    monkeypatch.setattr(PerformerMixer, "__init__", impatient)
    job = make_job(layout, width=32, steps=6, rates=rates, rungs=(0.5,))
    first, last = in_parts(job, tmp_path, (0, 1))
    whole = measured(job)
    assert first.details["curves"] != last.details["curves"]
    assert last.details["curves"] == whole.details["curves"] and results(last) == results(whole)


def test_weights_end_on_the_same_bits_too(
    make_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = []

    def watch(members, *arguments, **options):
        trained = train_members(members, *arguments, **options)
        ended.append([weight.clone() for member in members for weight in member.model.state_dict().values()])
        return trained

    monkeypatch.setattr("trainers.evaluate.train_members", watch)
    job = make_job("linear/moe[router=sigmoid]", steps=6, rates=(0.003, 0.02), rungs=(0.5,))
    in_parts(job, tmp_path, (0, 1))
    measured(job)
    assert len(ended) == 4
    assert all(torch.equal(one, other) for one, other in zip(ended[1], ended[3], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(ended[0], ended[1], strict=True))


def test_a_call_counts_what_it_trained_and_a_result_what_it_took(make_job: Make, tmp_path: Path) -> None:
    job = make_job(tasks=TASKS, rungs=RUNGS)
    parts, whole = in_parts(job, tmp_path), measured(job)
    # Two learning rates of mqar and one of bytes: 2, 5 and 8 steps of the one, 1, 3 and 5 of the other.
    assert [part.steps for part in parts] == [5, 13, 21]
    assert [part.tokens for part in parts] == [steps * 4 * 16 for steps in (5, 13, 21)]
    assert [part.new_steps for part in parts] == [5, 8, 8]
    assert [part.new_steps for part in (*whole.rungs, whole)] == [5, 13, 21]
    for sooner, later in pairwise(parts):
        assert sooner.train_s < later.train_s and sooner.worker_s < later.worker_s
    assert all(part.train_s <= part.worker_s for part in (*parts, *whole.rungs, whole))


def test_only_those_that_rest_leave_a_file(make_job: Make, tmp_path: Path) -> None:
    job = make_job(tasks=TASKS, rungs=RUNGS)
    key = checkpoint_key(job)
    in_parts(job, tmp_path)
    assert files(tmp_path) == sorted(
        f"{key}-rung{rung}.{kind}" for rung in (0, 1) for kind in ("safetensors", "json")
    )
    checkpoint.forget(str(tmp_path), key, 0)
    checkpoint.forget(str(tmp_path), key, 0)
    assert files(tmp_path) == [f"{key}-rung1.json", f"{key}-rung1.safetensors"]


def test_who_diverged_before_the_rest_stays_out(make_job: Make, tmp_path: Path) -> None:
    job = make_job(steps=6, rates=(1e25, 0.01, 0.003), rungs=(0.5,))
    first, last = in_parts(job, tmp_path, (0, 1))
    whole = measured(job)
    assert results(last) == results(whole) and last.details["curves"] == whole.details["curves"]
    # It counts as far as it came: in its first or second step it left the finite range.
    assert whole.steps - 12 in (1, 2) and first.steps - 6 == whole.steps - 12
    assert last.new_steps == 6


def test_all_may_have_diverged_at_a_rung(make_job: Make, tmp_path: Path) -> None:
    job = replace(make_job(rates=(1e25, 1e26), rungs=(0.5,)), rung=0, checkpoints=str(tmp_path))
    outcome = evaluate(job)
    assert isinstance(outcome, Unfit) and "learning rate 1e+26" in outcome.why
    assert files(tmp_path) == []


def _cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-7])


def _flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(bytes(content))


def _of_another_format(place: Path) -> None:
    header = place.with_suffix(".json")
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_cut, "damaged"),
        (_flip, "damaged"),
        (_of_another_format, "its format is not"),
        (lambda place: place.unlink(), "there is no checkpoint"),
        (lambda place: place.with_suffix(".json").unlink(), "there is no checkpoint"),
        (lambda place: place.with_suffix(".json").write_text('{"form'), "cannot be read"),
        (lambda place: place.with_suffix(".json").write_text("[1]"), "damaged"),
        (lambda place: place.with_suffix(".json").write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_fault_21_a_damaged_file_means_training_from_the_start_and_saying_so(
    make_job: Make, tmp_path: Path, harm: Callable[[Path], None], why: str
) -> None:
    job = make_job(steps=6, rungs=(0.5,))
    in_parts(job, tmp_path, (0, 1))
    harm(place_of(str(tmp_path), checkpoint_key(job), 0))
    again = measured(replace(job, rung=1, start=0, checkpoints=str(tmp_path)))
    assert why in again.details["restarted"] and again.details["restarted"].endswith(
        "; trained from the start"
    )
    whole = measured(job)
    assert results(again) == results(whole) and again.new_steps == 6
    assert [results(passed) for passed in again.rungs] == [results(passed) for passed in whole.rungs]
    assert "restarted" not in whole.details


def test_nobody_takes_anothers_checkpoint(make_job: Make, tmp_path: Path) -> None:
    job = make_job("linear", steps=6, rungs=(0.5,))
    others = [
        make_job("linear[head_dim=8]", steps=6, rungs=(0.5,)),
        make_job("linear", steps=7, rungs=(0.5,)),
        make_job("linear", steps=6, rungs=(0.4,)),
        make_job("linear", steps=6, rungs=(0.5,), rates=(0.02,)),
        make_job("linear", steps=6, rungs=(0.5,), seed=1),
        make_job("linear", steps=6, rungs=(0.5,), weight_decay=0.2),
        make_job("linear", steps=6, rungs=(0.5,), length=24),
    ]
    keys = [checkpoint_key(one) for one in (job, *others)]
    assert len(set(keys)) == len(keys)
    measured(replace(job, rung=0, checkpoints=str(tmp_path)))
    for other, key in zip(others, keys[1:], strict=True):
        # Even under the other's name it is not the other's.
        for kind in (".safetensors", ".json"):
            content = place_of(str(tmp_path), keys[0], 0).with_suffix(kind).read_bytes()
            place_of(str(tmp_path), key, 0).with_suffix(kind).write_bytes(content)
        again = measured(replace(other, start=0, checkpoints=str(tmp_path)))
        assert "its key is not" in again.details["restarted"]
        assert results(again) == results(measured(other))


def test_where_it_lives_and_how_far_it_goes_are_not_part_of_its_key(make_job: Make) -> None:
    job = make_job(rungs=(0.5,))
    changes = [{"rung": 0}, {"time_limit_s": 3.0}, {"checkpoints": "there"}, {"start": 0, "checkpoints": "x"}]
    assert all(checkpoint_key(replace(job, **change)) == checkpoint_key(job) for change in changes)  # type: ignore[arg-type]


def test_another_model_under_the_same_key_is_told_apart(make_job: Make, tmp_path: Path) -> None:
    """As when the code of a mixer changes between two runs."""
    job = make_job("linear", steps=6, rungs=(0.5,))
    measured(replace(job, rung=0, checkpoints=str(tmp_path)))
    saved = load(str(tmp_path), checkpoint_key(job), 0)
    task, budget = make_task("mqar", "stdlib"), job.budget.tasks[0]
    for other in ("mamba2", "2*linear", "linear/none", "performer"):
        members = members_of(read(other), job, task, budget)
        with pytest.raises(Damaged, match="another model"):
            unpack("mqar", saved, [0], members, track_of(members, torch.device("cpu")), 1.0)


def test_fault_20_a_disk_that_is_full_costs_the_checkpoint_and_not_the_result(
    make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    job = make_job(steps=6, rungs=(0.5,))
    first = measured(replace(job, rung=0, checkpoints=str(tmp_path)))
    assert "No space left" in first.details["checkpoint"]
    assert files(tmp_path) == []
    monkeypatch.undo()
    assert "there is no checkpoint" in in_parts(job, tmp_path, (0, 1))[1].details.get(
        "restarted", "there is no checkpoint"
    )


def test_memory_that_only_the_stack_lacks_does_not_cost_the_rest(
    make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(steps=6, rates=(0.003, 1e25, 0.02), rungs=(0.5,))
    whole = measured(job)

    def small(*_arguments, **_options):
        raise torch.OutOfMemoryError("too much at once")

    monkeypatch.setattr("trainers.evaluate.train_members", small)
    first = measured(replace(job, rung=0, checkpoints=str(tmp_path)))
    last = measured(replace(job, start=0, checkpoints=str(tmp_path)))
    assert (first.steps, last.steps) == (whole.rungs[0].steps, whole.steps)
    assert last.new_steps == 6 and "restarted" not in last.details
    assert last.quality == pytest.approx(whole.quality, abs=0.02)
    # And what rested alone can go on stacked.
    monkeypatch.undo()
    stacked = measured(replace(job, start=0, checkpoints=str(tmp_path)))
    assert "restarted" not in stacked.details and stacked.steps == whole.steps


@pytest.mark.parametrize("rungs", [(0.0,), (1.0,), (0.5, 0.5), (0.6, 0.3), (-0.1, 0.5), (float("nan"),)])
def test_rungs_rise_between_nought_and_one(rungs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="they must rise"):
        Budget(tasks=TASKS, length=16, data="stdlib", rungs=rungs)


@pytest.mark.parametrize(
    "changes",
    [
        {"rung": 3},
        {"rung": -1},
        {"start": 0},
        {"rung": 1, "start": 1, "checkpoints": "x"},
        {"start": 2, "checkpoints": "x"},
    ],
)
def test_a_job_of_no_rung_is_refused(make_job: Make, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rung"):
        replace(make_job(rungs=RUNGS), **changes)  # type: ignore[arg-type]

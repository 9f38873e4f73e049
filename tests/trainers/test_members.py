"""Members trained stacked end where they would have ended alone, whatever their layout is."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from search_space.frame import Frame
from search_space.mixers.performer import PerformerMixer
from search_space.vocabulary import CHANNELS, VOCABULARY, read
from trainers import members as members_module
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
from trainers.graph import fit, prepare
from trainers.loop import NotFinite, OutOfTime, Trained, Training, loss_at, places_of, train
from trainers.members import Member, train_members
from trainers.model import ProxyModel
from trainers.outcome import Measured, Unfit
from trainers.stack import Stack
from trainers.tasks.mqar import Mqar
from trainers.tasks.task import IGNORED

CPU = torch.device("cpu")
TASK = Mqar(pairs=(2, 4))
TRAINING = Training(steps=4, batch=4, length=16, learning_rate=0.01)
# Layers that need others before them, and what the words alone do not reach.
TEXTS = {
    "gmu": "mamba gmu",
    "cross_layer": "2*cross_layer",
}
LAYOUTS = [
    *(TEXTS.get(word, word) for word in VOCABULARY),
    *(f"linear/{channel}" for channel in CHANNELS),
    "linear/moe[router=sigmoid]",
    "window[size=8]|mamba2&gate full[kv_heads=1]",
    "full[learned_sink=true,soft_cap=30]",
]


def member(text: str, rate: float, seed: int = 0, training: Training = TRAINING) -> Member:
    torch.manual_seed(seed)
    frame = Frame(width=32, train_length=16, context=16, batch=4, dtype="float32", vocabulary=TASK.vocabulary)
    model = ProxyModel(read(text), frame)
    for module in model.modules():
        if isinstance(module, PerformerMixer):
            # Within these few steps, so that what is drawn anew is drawn.
            module.redraw = 2
    return Member(
        model=model,
        training=replace(training, learning_rate=rate),
        seed=seed,
        random_state=torch.get_rng_state(),
    )


def alone(one: Member) -> Trained | NotFinite:
    torch.set_rng_state(one.random_state)
    try:
        return train(one.model, TASK, one.training, seed=one.seed, device=CPU)
    except NotFinite as error:
        return error


@pytest.mark.parametrize("text", LAYOUTS)
def test_stacked_is_as_alone(text: str) -> None:
    """In float64, where rounding has not grown to what could be taken for a defect, or hide one, after a few steps."""
    drawn = [(0.003, 0), (0.02, 0), (0.01, 5)]
    stacked, single = ([member(text, rate, seed) for rate, seed in drawn] for _ in range(2))
    for one in (*stacked, *single):
        one.model.double()
    together = train_members(stacked, TASK, device=CPU)
    for got, one in zip(together, single, strict=True):
        expected = alone(one)
        assert isinstance(got, Trained) and isinstance(expected, Trained)
        assert got.tokens == expected.tokens and got.stepping == "eager"
        for (step, loss), (wanted_step, wanted) in zip(got.curve, expected.curve, strict=True):
            assert step == wanted_step and loss == pytest.approx(wanted, rel=1e-8)


def test_in_float32_stacked_is_as_alone_where_rounding_is_not_amplified() -> None:
    long = replace(TRAINING, steps=30)
    for got, one in zip(
        train_members([member("2*full", rate, training=long) for rate in (0.001, 0.003)], TASK, device=CPU),
        [member("2*full", rate, training=long) for rate in (0.001, 0.003)],
        strict=True,
    ):
        expected = alone(one)
        assert isinstance(got, Trained) and isinstance(expected, Trained)
        assert [loss for _, loss in got.curve] == pytest.approx(
            [loss for _, loss in expected.curve], rel=1e-5
        )


@pytest.mark.parametrize("text", LAYOUTS)
def test_each_has_the_loss_and_the_gradients_that_it_has_alone(text: str) -> None:
    models = [member(text, 0.01, seed).model for seed in (1, 2, 3)]
    batch = TASK.batch(4, 16, torch.Generator().manual_seed(0))
    drawn = (batch.tokens, *places_of(batch.targets))
    expected = []
    for model in models:
        model.train()
        before = copy.deepcopy(model.state_dict())
        loss = loss_at(model, *drawn)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        model.load_state_dict(before)
        expected.append((loss.item(), gradients))
    stack = Stack(models)
    losses = stack.losses(*drawn)
    stack.backward(losses)
    for model, loss, (wanted, gradients) in zip(models, losses.tolist(), expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        largest = max(gradient.norm().item() for gradient in gradients if gradient is not None)
        for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
            if gradient is None:
                assert weight.grad is None or not weight.grad.any()
                continue
            assert weight.grad is not None
            apart = (weight.grad - gradient).norm().item()
            assert apart <= 1e-4 * max(gradient.norm().item(), 1e-2 * largest), f"{name}: {apart:.1e}"


def test_members_of_one_seed_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    batch = Mqar.batch

    def count(self, size, length, rng):
        drawn.append(size)
        return batch(self, size, length, rng)

    monkeypatch.setattr(Mqar, "batch", count)
    train_members([member("linear", rate) for rate in (0.001, 0.01, 0.1)], TASK, device=CPU)
    assert len(drawn) == TRAINING.steps
    drawn.clear()
    train_members([member("linear", 0.01, seed) for seed in (1, 2)], TASK, device=CPU)
    assert len(drawn) == 2 * TRAINING.steps


def test_who_diverges_leaves_and_the_others_go_on() -> None:
    rates = (0.01, 1e25, 0.003)
    stacked, single = ([member("full linear", rate) for rate in rates] for _ in range(2))
    together = train_members(stacked, TASK, device=CPU)
    expected = [alone(one) for one in single]
    assert isinstance(together[1], NotFinite) and isinstance(expected[1], NotFinite)
    assert str(together[1]).split(" at ")[1] == str(expected[1]).split(" at ")[1]
    for place in (0, 2):
        got, wanted = together[place], expected[place]
        assert isinstance(got, Trained) and isinstance(wanted, Trained)
        assert got.curve[-1][1] == pytest.approx(wanted.curve[-1][1], rel=1e-4)


def test_all_may_diverge() -> None:
    together = train_members([member("linear", rate) for rate in (1e25, 1e26)], TASK, device=CPU)
    assert all(isinstance(one, NotFinite) for one in together)


def test_time_runs_out_for_all_at_once() -> None:
    with pytest.raises(OutOfTime, match="stopped at step 0 of 4"):
        train_members([member("linear", 0.01)] * 1, TASK, device=CPU, out_of_time=lambda: True)


def test_a_group_of_one_is_as_alone() -> None:
    (got,) = train_members([member("kda", 0.01)], TASK, device=CPU)
    expected = alone(member("kda", 0.01))
    assert isinstance(got, Trained) and isinstance(expected, Trained)
    assert got.curve[-1][1] == pytest.approx(expected.curve[-1][1], rel=1e-5)


def job(rates: tuple[float, ...], **changes: float) -> Job:
    frame = Frame(width=32, train_length=16, context=16, dtype="float32")
    budget = TaskBudget(name="mqar", weight=1.0, steps=6, batch=4, learning_rates=rates, pairs=(2,))
    whole = Budget(tasks=(budget,), length=16, data="stdlib")
    return Job(layers=tuple(read("full linear").to_json()), frame=frame, budget=whole, seed=3, **changes)


def test_an_evaluation_takes_the_best_of_its_rates_in_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    stacked = members_module.train_members

    def watch(members, *arguments, **options):
        sizes.append(len(members))
        return stacked(members, *arguments, **options)

    monkeypatch.setattr("trainers.evaluate.train_members", watch)
    rates = (0.001, 0.01, 0.03)
    outcome = evaluate(job(rates))
    assert sizes == [3]
    assert isinstance(outcome, Measured)
    singles = [evaluate(job((rate,))) for rate in rates]
    assert sizes == [3]
    scores = [one.quality for one in singles if isinstance(one, Measured)]
    assert outcome.quality == pytest.approx(max(scores), abs=1e-6)
    assert outcome.steps == 18


def test_one_good_rate_is_enough_and_none_is_unfit() -> None:
    assert isinstance(evaluate(job((1e25, 0.01))), Measured)
    outcome = evaluate(job((1e25, 1e26)))
    assert isinstance(outcome, Unfit)
    assert "learning rate 1e+26" in outcome.why


def test_a_stack_that_fills_the_memory_is_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainers.evaluate.train_members", full)
    outcome = evaluate(job((0.001, 0.01)))
    assert isinstance(outcome, Measured)


def test_the_time_limit_holds_for_a_stack() -> None:
    outcome = evaluate(job((0.001, 0.01), time_limit_s=0.0))
    assert isinstance(outcome, Unfit)
    assert "over its time limit" in outcome.why


def test_on_a_cpu_the_step_is_run_as_it_is() -> None:
    class Step:
        device = CPU

    step = Step()
    assert prepare(step, ()) == (step, "eager")


def test_a_batch_is_fitted_to_static_shapes() -> None:
    like = (torch.zeros(2, 8), torch.zeros(6), torch.zeros(6))
    fitted = fit((torch.ones(2, 8), torch.tensor([1, 2]), torch.tensor([3, 4])), like)
    assert fitted is not None
    assert fitted[1].tolist() == [1, 2, 0, 0, 0, 0]
    assert fitted[2].tolist() == [3, 4, *[IGNORED] * 4]
    assert fit((torch.ones(2, 9), torch.ones(6), torch.ones(6)), like) is None
    assert fit((torch.ones(2, 8), torch.ones(7), torch.ones(7)), like) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_step_is_the_eager_one() -> None:
    device = torch.device("cuda")
    curves = []
    for replay in (False, True):
        group = [member("full gated_delta", rate) for rate in (0.003, 0.01)]
        for one in group:
            one.model.to(device)
        results = train_members(group, TASK, device=device, replay=replay)
        assert all(isinstance(one, Trained) for one in results)
        assert results[0].stepping == ("replayed" if replay else "eager")
        curves.append([loss for one in results for _, loss in one.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    assert not math.isnan(curves[0][0])

"""Our samplers as Optuna samplers of their own: any study, known costs, rules, batches, large spaces."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import Trial, TrialState, create_trial

from nas.config import resolve
from nas.plan import make_plan
from nas.samplers.choices import LayoutChoices, PlainChoices
from nas.samplers.evolution import EvolutionSampler, crowding
from nas.samplers.grid import GridSampler
from nas.samplers.layout import VEILED_UNTIL, LayoutSampler
from nas.samplers.optuna_sampler import OptunaChooser
from nas.samplers.sampler import Aim
from search_space.space import Space
from storage import pareto
from storage.records import Axis

PLACES, LETTERS = 5, ("a", "b", "c")
ASKED: dict[str, BaseDistribution] = {f"{place}": CategoricalDistribution(LETTERS) for place in range(PLACES)}
OURS = (LayoutSampler, EvolutionSampler)


def objective(trial: Trial) -> tuple[float, float]:
    word = "".join(trial.suggest_categorical(f"{place}", LETTERS) for place in range(PLACES))
    return score(word), cost(word)


def score(word: str) -> float:
    return word.count("ab") + 0.5 * word.count("c") - (word[0] == "c")


def cost(word: str) -> float:
    return 1.0 + 2.0 * word.count("c") + word.count("b")


def word_of(params: Any) -> str:
    return "".join(params[f"{place}"] for place in range(PLACES))


def known(params: Any) -> tuple[None, float]:
    return None, cost(word_of(params))


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("make", OURS)
def test_an_ordinary_study_is_optimised_without_a_trial_twice(make: Callable[..., Any]) -> None:
    study = optuna.create_study(sampler=make(seed=1), directions=["maximize", "minimize"])
    study.optimize(objective, n_trials=60)
    words = [word_of(trial.params) for trial in study.trials]
    # The first is drawn before it is known what a trial is asked.
    assert len(set(words)) == 60


def price(word: str) -> float:
    """A cost that no trial tells anything of but its own."""
    return random.Random(word).uniform(0.0, 12.0)


def share(study: optuna.Study, cost: Callable[[str], float]) -> float:
    every = ["".join(letters) for letters in np.stack(np.meshgrid(*[LETTERS] * PLACES)).reshape(PLACES, -1).T]
    low, high = np.array([-4.0, 0.0]), np.array([1.0, 12.0])

    def volume(words: list[str]) -> float:
        return pareto.hypervolume((np.array([(-score(w), cost(w)) for w in words]) - low) / (high - low))

    return volume([word_of(trial.params) for trial in study.trials]) / volume(every)


@pytest.mark.parametrize("cost", [cost, price])
def test_chance_is_beaten_and_what_cannot_be_learnt_is_worth_knowing(cost: Callable[[str], float]) -> None:
    def trained(trial: Trial) -> tuple[float, float]:
        word = "".join(trial.suggest_categorical(f"{place}", LETTERS) for place in range(PLACES))
        return score(word), cost(word)

    shares = {}
    for name, sampler in (
        ("known", lambda seed: LayoutSampler(lambda params: (None, cost(word_of(params))), seed=seed)),
        ("learnt", lambda seed: LayoutSampler(seed=seed)),
        ("random", lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    ):
        found = []
        for seed in range(6):
            study = optuna.create_study(sampler=sampler(seed), directions=["maximize", "minimize"])
            study.optimize(trained, n_trials=25)
            found.append(share(study, cost))
        shares[name] = float(np.mean(found))
    assert shares["known"] > 0.94 and shares["known"] > shares["random"] + 0.08
    assert shares["learnt"] > shares["random"] + (0.01 if cost is price else 0.1)
    # What a few trials tell as well is not worth much, what none tells is.
    assert shares["known"] > shares["learnt"] + (0.04 if cost is price else -0.03)


def test_every_second_of_the_first_proposals_guesses_what_is_known() -> None:
    """Such a one is what a sampler to whom nothing is known would ask; the others are not, and later none is."""

    def asked(sampler: LayoutSampler, finished: int) -> str:
        study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
        for place in range(finished):
            word = "".join(LETTERS[place // 3**digit % 3] for digit in range(PLACES))
            params = dict(zip(ASKED, word, strict=True))
            study.add_trial(
                create_trial(params=params, distributions=ASKED, values=[score(word), price(word)])
            )
        return word_of(study.ask(ASKED).params)

    def same(finished: int) -> bool:
        knowing = LayoutSampler(lambda params: (None, price(word_of(params))), seed=3)
        return asked(knowing, finished) == asked(LayoutSampler(seed=3), finished)

    assert all(same(finished) for finished in range(20, 30, 2))
    assert not any(same(finished) for finished in range(21, 30, 2))
    assert not all(same(finished) for finished in range(VEILED_UNTIL, VEILED_UNTIL + 10, 2))


@pytest.mark.parametrize("make", OURS)
def test_numbers_and_conditions_are_taken_as_well(make: Callable[..., Any]) -> None:
    def mixed(trial: Trial) -> float:
        kind = trial.suggest_categorical("kind", ("flat", "steep"))
        depth = trial.suggest_int("depth", 1, 40, step=3)
        rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
        extra = trial.suggest_int("extra", 0, 3) if kind == "steep" else 0
        return abs(depth - 22) / 10 + abs(math.log10(rate) + 2) + (kind == "flat") + 0.1 * extra

    study = optuna.create_study(sampler=make(seed=0))
    study.optimize(mixed, n_trials=60)
    rates = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rates.optimize(mixed, n_trials=60)
    late = np.mean([trial.values[0] for trial in study.trials[-20:]])
    assert late < np.mean([trial.values[0] for trial in rates.trials]) - 0.3


@pytest.mark.parametrize("make", OURS)
def test_running_trials_are_not_proposed_again_and_failures_are_survived(make: Callable[..., Any]) -> None:
    study = optuna.create_study(sampler=make(search_space=ASKED, seed=2), directions=["maximize", "minimize"])
    words = set()
    for batch in range(8):
        trials = [study.ask(ASKED) for _ in range(8)]
        words |= {word_of(trial.params) for trial in trials}
        for number, trial in enumerate(trials):
            word = word_of(trial.params)
            if number == 3:
                study.tell(trial, state=TrialState.FAIL if batch % 2 else TrialState.PRUNED)
            elif number == 4:
                study.tell(trial, [float("inf"), cost(word)])
            else:
                study.tell(trial, [score(word), cost(word)])
    assert len(words) == 64


def test_a_batch_spreads_when_running_trials_are_believed() -> None:

    def gains(aware: bool) -> float:
        study = optuna.create_study(
            sampler=LayoutSampler(known, batch_aware=aware, seed=0), directions=["maximize", "minimize"]
        )
        study.optimize(objective, n_trials=15)
        batch = [word_of(study.ask(ASKED).params) for _ in range(8)]
        return float(np.mean([cost(a) != cost(b) for a in batch for b in batch if a != b]))

    assert gains(True) > gains(False)


@pytest.mark.parametrize("make", OURS)
def test_a_rule_is_never_broken(make: Callable[..., Any]) -> None:
    sampler = make(search_space=ASKED, usable=lambda params: word_of(params).count("c") <= 1, seed=0)
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
    for _ in range(50):
        trial = study.ask(ASKED)
        word = word_of(trial.params)
        assert word.count("c") <= 1
        study.tell(trial, [score(word), cost(word)])


def test_an_exhausted_space_leaves_the_answer_to_chance() -> None:
    study = optuna.create_study(sampler=LayoutSampler(seed=0), directions=["minimize", "minimize"])
    asked: dict[str, BaseDistribution] = {name: CategoricalDistribution((0, 1)) for name in "xyz"}
    seen = set()
    for _ in range(10):
        trial = study.ask(asked)
        seen.add(tuple(trial.params.values()))
        study.tell(trial, [float(sum(trial.params.values())), 1.0])
    assert len(seen) == 8


@pytest.fixture
def wide() -> Space:
    return make_plan(
        resolve(
            {"tasks": {"mqar": {}}, "space": {"layers": 12, "constraints": ["full<=3", "full not first"]}}
        )
    ).space


@pytest.mark.parametrize("make", OURS)
def test_a_space_too_large_to_list_is_searched_inside_its_rules(
    make: Callable[..., Any], wide: Space
) -> None:
    def worth(text: str) -> float:
        return text.count("kda") + 2.0 * ("kda full" in text) - text.count("window") / 2

    study = optuna.create_study(sampler=make(space=wide, seed=0), directions=["maximize"])
    # Evolution spreads its first twenty, and asks fast.
    values, texts, count = [], set(), 22 if make is LayoutSampler else 80
    for _ in range(count):
        trial = study.ask()
        layout = wide.draw(OptunaChooser(trial))
        assert wide.why_not(layout) is None
        text = " ".join(layer.branches[0].mixer for layer in layout.layers)
        texts.add(layout.key)
        values.append(worth(text))
        study.tell(trial, values[-1])
    rng = random.Random(0)
    chance = [
        worth(" ".join(layer.branches[0].mixer for layer in wide.sample(rng).layers)) for _ in range(100)
    ]
    assert len(texts) == count and np.mean(values[-6:]) > np.quantile(chance, 0.9)


def test_moves_stay_in_the_space_and_reach_all_of_it(wide: Space) -> None:
    choices, rng = LayoutChoices(wide), random.Random(0)
    one, other = choices.sample(rng), choices.sample(rng)
    assert one is not None and other is not None
    kept = {key for _ in range(200) if (key := choices.change(one, rng)) is not None}
    assert len(kept) > 80
    for key in kept:
        params = choices.encoding.params(key)
        layout = LayoutChoices(wide).layout(key)
        assert wide.why_not(layout) is None and wide.params_of(layout) == params
    firsts, lasts = choices.layout(one).layers, choices.layout(other).layers
    for key in (choices.cross(one, other, rng) for _ in range(30)):
        if key is not None:
            layers = choices.layout(key).layers
            assert any(layers == firsts[:cut] + lasts[cut:] for cut in range(1, 12))


def test_all_layouts_of_a_small_space_are_listed_once(tiny: Callable[..., dict[str, Any]]) -> None:
    space = make_plan(resolve(tiny({"space": {"layers": 3, "constraints": ["full<=1"]}}))).space
    listed = LayoutChoices(space).all(1000)
    assert listed is not None
    assert len(listed) == len(set(listed)) == space.size().count
    assert LayoutChoices(space).all(space.size().count - 1) is None


def test_the_grid_tries_everything_once_in_an_order_of_the_seed(tiny: Callable[..., dict[str, Any]]) -> None:
    space = make_plan(resolve(tiny({"space": {"layers": 2}}))).space
    aim = Aim(axes=(Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),))
    count = space.size().count
    runs = [
        [str(sampler.ask(number, 0).layout) for number in range(count)]
        for sampler in (GridSampler(space, aim, seed=seed) for seed in (0, 0, 1))
    ]
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) == count and set(runs[0]) == set(runs[2])


def test_a_grid_over_too_much_is_refused(wide: Space) -> None:
    with pytest.raises(
        ValueError, match=r"sampler grid tries every layout, and the space has .* choose another"
    ):
        GridSampler(wide, Aim(axes=()), seed=0)


def test_plain_moves_of_a_single_parameter_work() -> None:
    choices = PlainChoices({"x": CategoricalDistribution((0, 1, 2))})
    rng = random.Random(0)
    assert {choices.change((0,), rng) for _ in range(40)} == {(0,), (1,), (2,)}
    assert choices.cross((0,), (2,), rng) == (2,) and choices.uniform() == []


def test_crowding_prefers_the_ends_and_the_lonely() -> None:
    values = np.array([[0.0, 1.0], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1], [1.0, 0.0], [2.0, 2.0]])
    distance = crowding(values)
    assert np.isinf(distance[[0, 4, 5]]).all()
    assert distance[1] < distance[2] < np.inf and distance[1] < distance[3]


def test_bad_arguments_name_the_way_out(wide: Space) -> None:
    with pytest.raises(ValueError, match="n_startup_trials=1"):
        LayoutSampler(n_startup_trials=1)
    with pytest.raises(ValueError, match="why_not for further rules"):
        LayoutSampler(space=wide, usable=lambda _: True)
    with pytest.raises(ValueError, match="population=1"):
        EvolutionSampler(population=1)
    study = optuna.create_study(
        sampler=LayoutSampler(lambda _: (None,), n_startup_trials=2, seed=0), directions=["minimize"] * 2
    )
    with pytest.raises(ValueError, match="known gives 1 values for 2 objectives"):
        study.optimize(objective, n_trials=5)

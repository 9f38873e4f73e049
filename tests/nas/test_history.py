"""What a sampler keeps of a study to save time is what it would read anew, whatever happened to the trials meanwhile."""

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import TrialState

from nas.samplers.encoding import Encoding
from nas.samplers.evolution import EvolutionSampler
from nas.samplers.history import PROPOSED, Questions, Reader
from nas.samplers.layout import LayoutSampler
from nas.samplers.optuna_sampler import Revisable

SPACE: dict[str, BaseDistribution] = {
    "mixer": CategoricalDistribution(("full", "window", "linear")),
    "heads": IntDistribution(1, 4),
    "rate": FloatDistribution(0.0, 1.0),
}
OTHERS: dict[str, BaseDistribution] = SPACE | {
    "rate": FloatDistribution(0.0, 2.0),
    "heads": IntDistribution(2, 6),
}
EVENTS = (
    "ask",
    "ask a part",
    "ask others",
    "tell",
    "tell",
    "fail",
    "prune",
    "tell again",
    "end at once",
    "infinite",
)


class Events:
    """A study to which things happen, in any order."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.memory = Revisable()
        self.study = optuna.create_study(
            storage=self.memory,
            directions=["minimize", "maximize"],
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )

    def happen(self, event: str) -> None:
        trials = self.study.get_trials(deepcopy=False)
        running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
        ended = [trial.number for trial in trials if trial.state.is_finished()]
        values = [self.rng.random(), self.rng.random()]
        if event.startswith("ask"):
            asked = (
                SPACE if event == "ask" else OTHERS if event == "ask others" else {"heads": SPACE["heads"]}
            )
            trial = self.study.ask(asked)
            if self.rng.random() < 0.5:
                self.memory.set_trial_system_attr(trial._trial_id, PROPOSED, dict(trial.params))
        elif event == "end at once":
            self.study.tell(self.study.ask(SPACE), values)
        elif event == "tell again" and ended:
            failed = self.rng.random() < 0.2
            state = TrialState.FAIL if failed else TrialState.COMPLETE
            self.memory.set_trial_state_values(self._id(self.rng.choice(ended)), state, values)
        elif event in ("tell", "fail", "prune", "infinite") and running:
            number = self._id(self.rng.choice(running))
            state = {"fail": TrialState.FAIL, "prune": TrialState.PRUNED}.get(event, TrialState.COMPLETE)
            told = {"tell": values, "infinite": [values[0], float("inf")]}.get(event)
            self.memory.set_trial_state_values(number, state, told)

    def _id(self, number: int) -> int:
        study_id = self.memory.get_study_id_from_name(self.study.study_name)
        return self.memory.get_trial_id_from_study_id_trial_number(study_id, number)


def plain(history: Any) -> tuple[Any, ...]:
    """Everything that a history says, orders included."""
    turned = (np.asarray(history.values).tolist(), np.asarray(history.beside).tolist())
    return history.finished, history.running, list(history.seen), *turned


@given(events=st.lists(st.sampled_from(EVENTS), max_size=40), seed=st.integers(0, 9), copies=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_what_would_be_read_anew(events: list[str], seed: int, copies: bool) -> None:
    world, encoding = Events(seed), Encoding(SPACE)
    kept, questions = Reader(encoding, (1.0, -1.0)), Questions()
    for event in events:
        world.happen(event)
        trials = world.study.get_trials(deepcopy=copies)
        but = world.rng.choice([-1, *(trial.number for trial in trials if not trial.state.is_finished())])
        assert plain(kept.read(trials, but)) == plain(Reader(encoding, (1.0, -1.0)).read(trials, but))
        if event != "tell again":
            # Optuna's own does not look at an ended trial again.
            assert questions.common(trials) == Questions().common(trials)
            assert questions.common(trials) == IntersectionSearchSpace(include_pruned=True).calculate(
                world.study
            )


def test_a_trial_that_is_told_again_counts_as_it_is_now() -> None:
    world = Events(0)
    for _ in range(4):
        world.happen("end at once")
    reader = Reader(Encoding(SPACE), (1.0, -1.0))
    before = reader.read(world.study.get_trials(deepcopy=False), but=-1)
    world.memory.set_trial_state_values(world._id(1), TrialState.COMPLETE, [7.0, 8.0])
    after = reader.read(world.study.get_trials(deepcopy=False), but=-1)
    assert after.values[1].tolist() == [7.0, -8.0]
    assert after.values[[0, 2, 3]].tolist() == before.values[[0, 2, 3]].tolist()
    world.memory.set_trial_state_values(world._id(1), TrialState.FAIL)
    assert len(reader.read(world.study.get_trials(deepcopy=False), but=-1).values) == 3


SMALL = {name: CategoricalDistribution(tuple(range(6))) for name in "abc"}


@pytest.fixture(params=[LayoutSampler, EvolutionSampler])
def make(request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
    return lambda: request.param(seed=0)


def go_on(study: optuna.Study, count: int, shift: int = 0) -> list[dict[str, Any]]:
    asked = []
    for _ in range(count):
        trial = study.ask(SMALL)
        asked.append(trial.params)
        study.tell(trial, float(sum((value - shift) ** 2 for value in trial.params.values())))
    return asked


def test_one_sampler_for_two_studies_tells_them_apart(make: Callable[[], BaseSampler]) -> None:
    """Studies in memory all go by the same number."""
    shared = make()
    studies = [optuna.create_study(sampler=shared) for _ in range(2)]
    for _ in range(7):
        for study, shift in zip(studies, (0, 5), strict=True):
            go_on(study, 2, shift)
    for study in studies:
        told = study.trials
        asked = study.ask(SMALL).params
        study.sampler = make()
        again = optuna.create_study(sampler=study.sampler)
        again.add_trials(told)
        assert again.ask(SMALL).params == asked


def test_a_copy_goes_on_as_its_original(make: Callable[[], BaseSampler]) -> None:
    study = optuna.create_study(sampler=make())
    go_on(study, 16)
    others = [pickle.loads(pickle.dumps(study.sampler)), copy.deepcopy(study.sampler)]
    asked = []
    for sampler in [*others, study.sampler]:
        one = optuna.create_study(sampler=sampler)
        one.add_trials(study.trials)
        asked.append(go_on(one, 4))
    assert asked[0] == asked[1] == asked[2]


def test_threads_that_ask_one_study_are_never_given_the_same(make: Callable[[], BaseSampler]) -> None:
    study = optuna.create_study(sampler=make())
    go_on(study, 12)
    found: list[tuple[Any, ...]] = []

    def ask() -> None:
        for _ in range(6):
            trial = study.ask(SMALL)
            found.append(tuple(trial.params.values()))
            study.tell(trial, float(sum(trial.params.values())))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24 == len(set(found))

"""What every sampler promises, asked of the whole list: a new one is tested by being listed."""

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from nas.config import resolve
from nas.plan import make_plan
from nas.samplers.registry import SAMPLERS, check_sampler, make_sampler
from nas.samplers.sampler import Aim, Known, Proposal, Sampler
from search_space.layout import Layout
from search_space.space import RandomChooser, Space
from storage.records import Axis

AIM = Aim(
    axes=(
        Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
        Axis(name="latency_ms", maximise=False, low=0.5, high=8.0, log=True, unit="ms"),
    )
)


@pytest.fixture(scope="module", params=["layer", "study"])
def space(request: pytest.FixtureRequest, tiny: Callable[..., dict[str, Any]]) -> Space:
    settings = {"full": {"kv_heads": [1, 2]}, "window": {"size": [8, 16, 32]}, "kda": {"head_dim": [16, 32]}}
    changes = {
        "space": {"layers": 3, "settings": settings, "channels": ["swiglu", "none"], "sharing": request.param}
    }
    return make_plan(resolve(tiny(changes))).space


@pytest.fixture(params=SAMPLERS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def many(name: str) -> int:
    """Trials after which a sampler goes by what it learnt; Optuna's Gaussian process takes half a second for each."""
    return 10 if name == "gp" else 24


@pytest.fixture
def make(name: str, space: Space) -> Callable[..., Sampler]:
    def new(seed: int = 0) -> Sampler:
        return make_sampler(name, space, AIM, seed=seed)

    return new


def cost_is_known(layout: Layout) -> tuple[None, float]:
    return None, judge(Proposal(layout=layout, params={}))[1]


def judge(proposal: Proposal) -> tuple[float, float]:
    """Two objectives that pull apart: windows are bad and cheap."""
    windows = sum(layer.branches[0].mixer == "window" for layer in proposal.layout.layers)
    return 1 - windows / 3, 5.0 - windows + len(str(proposal.layout)) / 1000


def drive(sampler: Sampler, count: int, first: int = 0) -> list[Proposal]:
    found = []
    for number in range(first, first + count):
        proposal = sampler.ask(number, 0)
        # Some are of no use, as trials that turn out unfit.
        sampler.tell(proposal.token, None if number % 7 == 3 else judge(proposal))
        found.append(proposal)
    return found


def known(proposal: Proposal, values: tuple[float, float] | None, *, failed: bool = False) -> Known:
    """As it comes back from the tables, through JSON."""
    stored = json.loads(json.dumps({"params": dict(proposal.params), "attrs": dict(proposal.attrs)}))
    return Known(params=stored["params"], attrs=stored["attrs"], values=values, failed=failed)


def test_proposals_lie_in_the_space(make: Callable[..., Sampler], many: int, space: Space) -> None:
    for proposal in drive(make(), many):
        assert len(proposal.layout) == 3
        assert space.params_of(proposal.layout) is not None
        asked = space.distributions()
        assert proposal.params and all(value in asked[name] for name, value in proposal.params.items())
        json.dumps(dict(proposal.attrs))


def test_the_choices_draw_the_same_layout_again(make: Callable[..., Sampler], space: Space) -> None:
    class Replay:
        def __init__(self, params: Any) -> None:
            self.params = params

        def choose(self, name: str, options: Any) -> Any:
            assert self.params[name] in options
            return self.params[name]

    for proposal in drive(make(), 12):
        assert space.draw(Replay(proposal.params)) == proposal.layout


def test_the_same_seed_gives_the_same_proposals_and_another_seed_others(
    make: Callable[..., Sampler], many: int
) -> None:
    first = [proposal.layout for proposal in drive(make(3), many)]
    assert [proposal.layout for proposal in drive(make(3), many)] == first
    assert [proposal.layout for proposal in drive(make(4), many)] != first


def test_the_global_generators_play_no_part(make: Callable[..., Sampler]) -> None:
    random.seed(1)
    first = [proposal.layout for proposal in drive(make(), 12)]
    random.seed(2)
    assert [proposal.layout for proposal in drive(make(), 12)] == first


def test_a_later_attempt_is_another_question(make: Callable[..., Sampler]) -> None:
    sampler = make()
    layouts = set()
    for attempt in range(12):
        proposal = sampler.ask(0, attempt)
        sampler.tell(proposal.token, None)
        layouts.add(proposal.layout)
    assert len(layouts) > 6


def test_pending_proposals_do_not_disturb(make: Callable[..., Sampler]) -> None:
    sampler = make()
    drive(sampler, 10)
    pending = [sampler.ask(number, 0) for number in range(10, 14)]
    assert len({proposal.token for proposal in pending}) == 4
    for proposal in reversed(pending):
        sampler.tell(proposal.token, judge(proposal))
    drive(sampler, 2, first=14)


def test_what_others_tried_is_learnt(make: Callable[..., Sampler], space: Space) -> None:
    sampler, rng = make(), random.Random(0)
    for number in range(20):
        layout = space.sample(rng)
        params = space.params_of(layout)
        assert params is not None
        values = judge(Proposal(layout=layout, params=params))
        token = sampler.learn(Known(params=params, attrs={}, values=values if number % 2 else None))
        assert token >= 0
        if not number % 2:
            sampler.tell(token, values)
    drive(sampler, 5, first=20)


def test_what_the_space_does_not_hold_does_no_harm(make: Callable[..., Sampler]) -> None:
    sampler = make()
    sampler.learn(Known(params={}, attrs={}, values=(0.5, 1.0)))
    for stranger in ({}, {"0.mixer": "mla"}, {"9.mixer": "full"}):
        sampler.tell(sampler.learn(Known(params=stranger, attrs={}, values=None)), (0.5, 1.0))
        sampler.tell(sampler.learn(Known(params=stranger, attrs={}, values=None)), None)
    sampler.tell(-1, (0.5, 1.0))
    drive(sampler, 10)


@pytest.mark.parametrize("early", [True, False])
def test_a_rebuilt_sampler_goes_on_as_one_that_was_never_interrupted(
    make: Callable[..., Sampler], many: int, early: bool
) -> None:
    count = 5 if early else many
    steady = make()
    told = drive(steady, count)
    pending = steady.ask(count, 0)
    rebuilt = make()
    for number, proposal in enumerate(told):
        failed = number % 7 == 3
        rebuilt.learn(known(proposal, None if failed else judge(proposal), failed=failed))
    rebuilt.learn(known(pending, None))
    for attempt in range(3):
        assert rebuilt.ask(count + 1, attempt).layout == steady.ask(count + 1, attempt).layout


@pytest.mark.parametrize("failed", [False, True])
def test_what_is_told_again_takes_the_place_of_what_was_told(
    make: Callable[..., Sampler], failed: bool
) -> None:
    """As of a trial that rested at a rung and went on: later nobody can tell that it was ever guessed."""
    guessed, straight = make(), make()
    told = drive(straight, 14)
    for number, proposal in enumerate(told):
        token = guessed.learn(known(proposal, (0.9, 0.5)))
        values = None if failed and number == 5 else judge(proposal)
        guessed.tell(token, (0.1, 9.0))
        guessed.tell(token, values)
    plain = make()
    for number, proposal in enumerate(told):
        token = plain.learn(known(proposal, None))
        plain.tell(token, None if failed and number == 5 else judge(proposal))
    for attempt in range(3):
        assert guessed.ask(14, attempt).layout == plain.ask(14, attempt).layout


def test_nothing_is_written_and_nothing_warned(
    make: Callable[..., Sampler], many: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        drive(make(), many)
    assert [str(warning.message) for warning in warned] == []
    assert capfd.readouterr() == ("", "")


def test_an_unknown_sampler_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no sampler 'tpee'; did you mean tpe"):
        check_sampler("tpee")


LEARNING = {name: 60 for name in SAMPLERS if name not in ("random", "grid", "gp")} | {"gp": 20}
"""Trials by sampler, the last third of which must do better than chance."""


@pytest.mark.parametrize("name", LEARNING)
def test_a_sampler_that_learns_finds_more_than_chance(name: str, tiny: Callable[..., dict[str, Any]]) -> None:
    space = make_plan(resolve(tiny({"space": {"layers": 6}, "target": {"depth": 6}}))).space

    def windows_found(seed: int) -> float:
        aim = Aim(axes=(Axis(name="quality", maximise=True, low=0.0, high=6.0, log=False),))
        sampler = make_sampler(name, space, aim, seed=seed)
        late, trials = 0, LEARNING[name]
        for number in range(trials):
            proposal = sampler.ask(number, 0)
            windows = sum(layer.branches[0].mixer == "window" for layer in proposal.layout.layers)
            sampler.tell(proposal.token, (float(windows),))
            late += windows if 3 * number >= 2 * trials else 0
        return late / (trials / 3)

    rng = random.Random(0)
    chance = (
        1
        / 200
        * sum(
            layer.branches[0].mixer == "window"
            for _ in range(200)
            for layer in space.draw(RandomChooser(rng=rng)).layers
        )
    )
    assert min(windows_found(0), windows_found(1)) > 1.5 * chance


HASHES = """
import sys
from nas.samplers.registry import SAMPLERS, make_sampler
from nas.config import resolve
from nas.plan import make_plan
from nas.samplers.sampler import Aim
from storage.records import Axis
space = make_plan(resolve({"tasks": {"mqar": {}}, "space": {"layers": 4}})).space
aim = Aim(
    axes=(
        Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
        Axis(name="latency_ms", maximise=False, low=1.0, high=400.0, log=True, unit="ms"),
    )
)
for name in SAMPLERS:
    sampler = make_sampler(name, space, aim, seed=0)
    # Past the start of each; a Gaussian process of Optuna takes seconds a proposal over so many questions.
    for number in range(9 if name == "gp" else 13):
        proposal = sampler.ask(number, 0)
        text = str(proposal.layout)
        sampler.tell(proposal.token, (text.count("kda") / 4, float(len(text))))
        print(text)
"""


def test_proposals_do_not_depend_on_how_python_hashes_words() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", HASHES],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and runs[0].count("\n") == 13 * len(SAMPLERS) - 4

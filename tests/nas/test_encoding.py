"""The columns of an encoding, one by one, as its words define them; keys and the layouts that they write."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nas.config import resolve
from nas.plan import make_plan
from nas.samplers.choices import Answers, LayoutChoices
from nas.samplers.encoding import Encoding, Key
from nas.samplers.pool import Costs
from search_space.space import Space

MIXED: dict[str, BaseDistribution] = {
    "a": CategoricalDistribution(("x", "y")),
    "rate": FloatDistribution(1.0, 9.0, log=True),
    "b": CategoricalDistribution(("x", "y")),
    "alone": CategoricalDistribution((1, 2, 3)),
    "heads": IntDistribution(1, 5),
    "one": IntDistribution(2, 2),
}


@pytest.fixture(scope="module", params=["layer", "study"])
def space(request: pytest.FixtureRequest) -> Space:
    settings = {"full": {"kv_heads": [1, 2]}, "window": {"size": [8, 16, 32]}}
    named = {"layers": 4, "settings": settings, "channels": ["swiglu", "none"], "sharing": request.param}
    return make_plan(resolve({"space": named})).space


def by_hand(encoding: Encoding, key: Key) -> list[float]:
    columns: list[float] = []
    answers = dict(zip(encoding.distributions, key, strict=True))
    for name, own in encoding.distributions.items():
        value = answers[name]
        if isinstance(own, CategoricalDistribution):
            places = [*range(len(own.choices)), None]
            columns += [1 / math.sqrt(2) if value == place else 0.0 for place in places]
        elif value is None:
            columns += [0.5, 1.0]
        else:
            assert isinstance(own, (IntDistribution, FloatDistribution))
            turn = math.log if own.log else float
            low, high = turn(own.low), turn(own.high)
            columns += [0.5 if low == high else (turn(value) - low) / (high - low), 0.0]
    for names in encoding.sequences:
        own = encoding.distributions[names[0]]
        assert isinstance(own, CategoricalDistribution)
        options, told = range(len(own.choices)), [answers[name] for name in names]
        columns += [float(told.count(option)) for option in options]
        if encoding.ordered:
            pairs = list(itertools.pairwise(told))
            columns += [float(pairs.count((first, then))) for first in options for then in options]
    return columns


def check(encoding: Encoding, keys: list[Key]) -> None:
    columns = encoding.of_keys(keys)
    np.testing.assert_allclose(columns, [by_hand(encoding, key) for key in keys], atol=1e-12)
    assert columns.shape[1] == len(encoding.groups) and encoding.groups.max() == len(encoding.starts) - 1


@pytest.mark.parametrize("ordered", [False, True])
def test_columns_say_what_was_chosen(ordered: bool) -> None:
    keys: list[Key] = [(0, 2.0, 1, 2, 3, 2), (None, None, 1, None, None, 2), (1, 9.0, 1, 0, 5, None)]
    check(Encoding(MIXED, ordered=ordered), keys)
    check(Encoding({"rate": MIXED["rate"]}, ordered=ordered), [(1.0,), (None,)])
    assert Encoding(MIXED, ordered=ordered).of_keys([]).shape[0] == 0


def test_columns_of_layouts_and_what_keys_write(space: Space) -> None:
    choices, rng = LayoutChoices(space), random.Random(0)
    keys = [key for _ in range(40) if (key := choices.sample(rng)) is not None]
    check(choices.encoding, keys)
    for key in keys:
        params = choices.encoding.params(key)
        assert choices.encoding.key(params) == key
        # By one that has not drawn them itself.
        layout = LayoutChoices(space).layout(key)
        assert layout == space.draw(Answers(params)) and space.params_of(layout) == params


def test_known_costs_are_asked_once_and_forgotten_in_time(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def known(key: Key) -> list[float | None]:
        asked.append(key)
        return [None, float(sum(value or 0 for value in key))]

    monkeypatch.setattr("nas.samplers.pool.MOST_KNOWN", 30)
    choices, costs, rng = LayoutChoices(space), Costs(known, (1.0, -1.0)), random.Random(0)
    keys = [key for _ in range(60) if (key := choices.sample(rng)) is not None]
    pools = [costs.of(choices, own) for own in (keys, keys[:5], keys[:5], keys)]
    # All at first, and again once there were too many of them; then just those that are missing.
    assert asked == [*dict.fromkeys(keys), *dict.fromkeys(keys[:5]), *dict.fromkeys(keys[5:])]
    for pool in pools:
        assert pool.known[0] is None and pool.known[1] is not None
        assert pool.known[1].tolist() == [-float(sum(value or 0 for value in key)) for key in pool.keys]

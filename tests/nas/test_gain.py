"""The expected gain of hypervolume, against hypervolumes themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.samplers.gain import Guess, boxes, expected_gain
from storage import pareto

places = st.integers(0, 8).map(lambda number: number / 8)


@given(data=st.data(), width=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_gain_of_what_is_known_is_the_difference_of_hypervolumes(data: st.DataObject, width: int) -> None:
    point = st.lists(places, min_size=width, max_size=width)
    front = np.array(data.draw(st.lists(point, min_size=1, max_size=7)))
    asked = np.array(data.draw(st.lists(point, min_size=1, max_size=5)))
    cut = boxes(front[pareto.front(front)], np.ones(width))
    gains = expected_gain([Guess(column[:, None], np.ones(1)) for column in asked.T], cut)
    before = pareto.hypervolume(front)
    for one, gain in zip(asked, gains, strict=True):
        assert gain == pytest.approx(pareto.hypervolume(np.vstack([front, one])) - before, abs=1e-12)


def test_the_gain_of_a_guess_is_the_mean_over_what_it_may_be() -> None:
    rng = np.random.default_rng(0)
    front = rng.random((6, 3))
    first, second = rng.random((4, 5)), rng.random((4, 3))
    shares = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
    third = rng.random(4)
    cut = boxes(front[pareto.front(front)], np.ones(3))
    guesses = [
        Guess(first, shares),
        Guess(second, np.full(3, 1 / 3)),
        Guess(third[:, None], np.ones(1)),
    ]
    before = pareto.hypervolume(front)
    for place, gain in enumerate(expected_gain(guesses, cut)):
        mean = sum(
            share / 3 * (pareto.hypervolume(np.vstack([front, [a, b, third[place]]])) - before)
            for a, share in zip(first[place], shares, strict=True)
            for b in second[place]
        )
        assert gain == pytest.approx(mean, abs=1e-12)


def test_many_points_are_thinned_out_and_not_forgotten() -> None:
    angle = np.linspace(0.02, 1.55, 60)
    ring = np.stack([1 - np.sin(angle), 1 - np.cos(angle), np.linspace(1, 0, 60)], axis=1)
    wide = np.concatenate([ring, ring[:, [1, 2, 0]], ring[:, [2, 0, 1]]])
    cut = boxes(wide[pareto.front(wide)], np.ones(3))
    assert len(cut) <= 4000
    beaten, best = np.array([[0.99, 0.99, 0.99]]), np.array([[0.0, 0.0, 0.0]])
    gains = [expected_gain([Guess(c[:, None], np.ones(1)) for c in p.T], cut)[0] for p in (beaten, best)]
    assert gains[0] == 0 and gains[1] == pytest.approx(1 - pareto.hypervolume(wide), abs=0.02)

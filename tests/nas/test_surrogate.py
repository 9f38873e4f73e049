"""The Gaussian process against its textbook formulas, and the scores it is told."""

import numpy as np
import pytest

from nas.samplers.surrogate import Asked, Process, Scores, squares, weigh
from nas.samplers.triangle import STEP


def problem(count: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = rng.random((count, 4))
    return columns, np.sin(3 * columns[:, 0]) + columns[:, 1] ** 2


GROUPS = np.array([0, 1, 2, 2])
THETA = np.log(np.array([2.0, 1.0, 0.5, 0.01]))


def test_predictions_are_those_of_the_formula() -> None:
    columns, values = problem()
    asked = np.random.default_rng(1).random((7, 4))
    process = Process(columns, values, GROUPS, THETA)
    root = np.sqrt(np.exp(THETA[:-1]))[GROUPS]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        near: np.ndarray = np.exp(-(((a[:, None] - b[None]) * root) ** 2).sum(-1))
        return near

    known = kernel(columns, columns) + process.noise * np.eye(len(columns))
    towards = kernel(asked, columns)
    mean = values.mean() + towards @ np.linalg.solve(known, values - values.mean())
    left = 1 - np.einsum("ij,ij->i", towards, np.linalg.solve(known, towards.T).T)
    found, deviation = process.predict(asked)
    np.testing.assert_allclose(found, mean, atol=1e-8)
    np.testing.assert_allclose(deviation, np.sqrt(left * process.scale), atol=1e-6)


def test_what_is_believed_is_as_if_it_had_been_seen_as_expected() -> None:
    columns, values = problem()
    rng = np.random.default_rng(2)
    asked, running = rng.random((9, 4)), rng.random((3, 4))
    process = Process(columns, values, GROUPS, THETA)
    told = process.ask(asked)
    others: list[Asked] = []
    for one in running:
        other = process.ask(one[None])
        for earlier in others:
            other.believe(earlier)
        told.believe(other)
        others.append(other)
    means, _ = process.predict(running)
    whole = Process(np.vstack([columns, running]), np.append(values, means), GROUPS, THETA)
    # The mean of all values moves a little with what is added; the deviation's shape does not.
    np.testing.assert_allclose(told.left, whole.ask(asked).left, atol=1e-8)
    np.testing.assert_allclose(told.mean, process.predict(asked)[0])
    assert (told.deviation <= process.predict(asked)[1] + 1e-12).all()


def test_weights_tell_what_matters_from_what_does_not() -> None:
    columns, values = problem(80)
    found = weigh(columns, values, np.arange(4), np.zeros(4))
    assert min(found[0], found[1]) > max(found[2], found[3]) + 1


def test_the_likelihood_is_climbed_along_its_own_slope() -> None:
    columns, values = problem(30)
    groups, starts = np.arange(4), np.zeros(4)
    best = weigh(columns, values, groups, starts)
    again = weigh(columns, values, groups, starts, theta=best)
    np.testing.assert_allclose(best, again, atol=0.15)


def test_squares_are_squared_distances() -> None:
    a, b = np.random.default_rng(0).random((3, 5)), np.random.default_rng(1).random((4, 5))
    np.testing.assert_allclose(squares(a, b), ((a[:, None] - b[None]) ** 2).sum(-1), atol=1e-12)


def test_scores_keep_the_order_and_lead_back() -> None:
    values = np.array([0.3, 5.0, 0.1, 0.3, 1000.0, 0.2])
    scores = Scores(values)
    forward = scores.forward()
    assert forward[0] == forward[3]
    assert (np.argsort(values, kind="stable") == np.argsort(forward, kind="stable")).all()
    np.testing.assert_allclose(scores.back(forward), values)
    assert scores.back(forward.max()[None] + 1)[0] > 1000 and scores.back(forward.min()[None] - 1)[0] < 0.1


def test_values_that_are_all_equal_are_no_trouble() -> None:
    scores = Scores(np.full(5, 2.0))
    assert np.isfinite(scores.forward()).all()
    assert scores.back(np.array([-1.0, 0.0, 1.0])) == pytest.approx([2.0, 2.0, 2.0])


def same(one: Process, other: Process) -> bool:
    """To the last bit: what is proposed after a restart must not differ."""
    asked = np.random.default_rng(1).random((7, 4))
    pairs = zip(one.predict(asked), other.predict(asked), strict=True)
    return np.array_equal(one.factor, other.factor) and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("known", [30, 50, 50 + STEP, 55 + STEP, 60 + 2 * STEP])
def test_a_process_that_grew_is_the_one_made_anew(known: int) -> None:
    columns, values = problem(70 + 3 * STEP)
    before = Process(columns[:known], values[:known], GROUPS, THETA, base=min(50, known))
    anew = Process(columns, values, GROUPS, THETA, base=50)
    assert same(Process(columns, values, GROUPS, THETA, base=50, before=before), anew)


@pytest.mark.parametrize("place", [0, 49, 50, 51 + STEP, 60 + 2 * STEP])
def test_what_changed_among_the_known_is_not_taken_over(place: int) -> None:
    columns, values = problem(70 + 2 * STEP)
    before = Process(columns, values, GROUPS, THETA, base=50)
    other, worse = columns.copy(), values.copy()
    other[place], worse[3] = 0.25, 2.0
    anew = Process(other, worse, GROUPS, THETA, base=50)
    assert same(Process(other, worse, GROUPS, THETA, base=50, before=before), anew)
    assert not same(before, anew)
    # One of them is gone, as where a trial failed after all; and another base, other weights, another noise.
    gone, left = np.delete(columns, place, axis=0), np.delete(values, place)
    for theta in (THETA, THETA + np.eye(4)[0], THETA + np.eye(4)[3]):
        for base in (50, 60):
            anew = Process(gone, left, GROUPS, theta, base=base)
            assert same(Process(gone, left, GROUPS, theta, base=base, before=before), anew)


def test_steps_give_the_factor_of_the_whole() -> None:
    columns, values = problem(40 + 2 * STEP)
    whole = Process(columns, values, GROUPS, THETA)
    np.testing.assert_allclose(
        Process(columns, values, GROUPS, THETA, base=9).factor, whole.factor, atol=1e-7
    )
    np.testing.assert_allclose(np.triu(whole.factor, 1), 0)

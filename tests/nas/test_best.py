"""The front of trials that end one after the other is that of all of them, in whatever order they come and change."""

import random
from dataclasses import replace

import pytest

from nas.best import Best
from nas.front import front, hypervolume
from storage.records import Axis, LayoutRecord, ResultRecord, State, TrialRecord

AXES = (
    Axis(name="kv_bytes", maximise=False, low=1.0, high=16.0, log=True),
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
)


def trial(number: int, quality: float, kv_bytes: float, state: State = "done") -> TrialRecord:
    result = ResultRecord(
        rung=0, quality=quality, scores={}, details={}, steps=1, tokens=1, train_s=1.0, worker_s=1.0, seed=0
    )
    return TrialRecord(
        number=number, state=state, origin="search", params={}, sampler_attrs={}, layer_costs=(), attempts=1,
        layout=LayoutRecord(key=str(number), text=str(number), layers=()), evaluation_key="", why="",
        costs={"kv_bytes": kv_bytes}, results=(result,) if state in ("done", "pruned") else (),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_best_so_far_are_the_front_of_all(seed: int) -> None:
    rng = random.Random(seed)
    best, known = Best(AXES), dict[int, TrialRecord]()
    assert (best.first, best.hypervolume) == (None, 0.0)
    for number in range(40):
        # A coarse grid, so that equal points and ties occur.
        state: State = rng.choice(("done", "done", "done", "pruned", "unfit", "running"))
        known[number] = trial(number, rng.randrange(6) / 5, 2.0 ** rng.randrange(5), state)
        if known[number].state == "done" and rng.random() < 0.3:
            best.see(known[number])
            again = replace(known[number].results[0], quality=rng.random(), seed=1)
            known[number] = replace(known[number], repeats=(again,))
        best.see(known[number])
        if rng.random() < 0.2 and (older := rng.choice(list(known.values()))).state == "done":
            again = replace(older.results[0], quality=rng.random(), seed=2)
            known[older.number] = replace(older, repeats=(*older.repeats, again))
            best.see(known[older.number])
        expected = front(list(known.values()), AXES)
        assert best.on_front == {one.number for one in expected}
        assert best.first == (expected[0].number if expected else None)
        assert best.hypervolume == pytest.approx(hypervolume(list(known.values()), AXES))

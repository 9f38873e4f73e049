"""The front's page of a study that is not read whole says what it says of one that is, and reads few trials for it."""

import io
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from nas import noise
from nas.cli.front_page import front_rows, read_standing, show_front, standing_of
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord, StudyRecord
from storage.store import Store

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1e3, high=1e7, log=True, unit="bytes"),
)
RESULT = ResultRecord(
    rung=1,
    quality=0.5,
    scores={"mqar": 0.5},
    details={},
    steps=9,
    tokens=9,
    train_s=1.0,
    worker_s=1.0,
    seed=0,
)


def fill(store: Store, trials: int, repeated: int, config: dict[str, Any] | None = None) -> StudyRecord:
    """Done trials, the first two of which no search found; the best in quality have further seeds."""
    rng = random.Random(0)
    study = store.create_study(
        name="many",
        config=config or {"rungs": {"shares": []}},
        config_hash="",
        axes=AXES,
        families={"kda": "delta"},
    )
    made: list[tuple[float, int]] = []
    for index in range(trials):
        costs = {"kv_bytes": 10 ** rng.uniform(3, 7), "latency_ms": 1.0 + index, "params": 7.0}
        layers = ({"branches": [{"mixer": "kda"}]},)
        new = NewTrial(
            layout=LayoutRecord(key=f"key{index}", text=f"{index + 1}*kda", layers=layers),
            origin="uniform" if index < 2 else "search", params={}, sampler_attrs={}, costs=costs,
            layer_costs=(), evaluation_key=f"key{index}",
        )  # fmt: skip
        number = store.add_trial(study, new).number
        quality = rng.random() if index > 1 else 0.01
        made.append((quality, number))
        store.finish_trial(
            study,
            number,
            store.start_trial(study, number),
            replace(RESULT, quality=quality, scores={"mqar": quality}),
        )
    for quality, number in sorted(made)[len(made) - repeated :]:
        again = min(1.0, max(0.0, quality + rng.gauss(0, 0.01)))
        store.add_repeat(
            study, number, f"{number}", replace(RESULT, quality=again, scores={"mqar": again}, seed=1)
        )
    return study


def page(found: Any) -> str:
    written = io.StringIO()
    show_front(found, Console(file=written, width=200, force_terminal=False))
    return written.getvalue()


@pytest.mark.parametrize("repeated", [0, 4])
def test_what_is_read_in_part_says_what_all_of_it_says(url: str, repeated: int) -> None:
    with Store.open(url) as store:
        study = fill(store, 120, repeated)
        whole = standing_of(study, store.trials(study), study.axes)
        part = read_standing(store, study)
    assert front_rows(part.trials, part.axes) == front_rows(whole.trials, whole.axes)
    assert page(part) == page(whole) and "Beaten:" in page(part)
    assert len(part.trials) < len(whole.trials) / 2
    assert ("may stand on the front" in page(part) or "on front" in page(part)) is bool(repeated)


def test_candidates_are_few_however_unsure_they_are(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(url) as store:
        study = fill(store, 150, 3)
        points, trials = store.points(study), store.trials(study)
        repeated = [trial for trial in trials if trial.repeats]
        monkeypatch.setattr(noise, "FAR", 400.0)
        assert len(noise.candidates(points, repeated)) == len(trials)
        monkeypatch.setattr(noise, "MOST_NEAR", 60)
        few = noise.candidates(points, repeated)
    assert set(points.front.tolist()) < set(few) and len(few) <= 60
    assert set(noise.chances(trials, study.axes)) == {trial.number for trial in trials}


def test_rungs_of_a_large_study_are_judged_by_its_last_trials(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.cli.front_page.MOST_RECENT", 10)
    with Store.open(url) as store:
        found = read_standing(store, fill(store, 25, 0, config={"rungs": {"shares": [0.5]}}))
    assert [trial.number for trial in found.recent] == list(range(15, 25))
    assert "of the last 10 layouts were stopped early" in page(found)


def test_trials_come_in_pages(url: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.cli.trials.PAGE_ROWS", 10)
    with Store.open(url) as store:
        fill(store, 25, 0)
    where = ("--study", "many", "--storage", url, "--json")
    pages = [run("trials", *where, "--page", number).json for number in (1, 2, 3, 4)]
    assert [[row["trial"] for row in rows] for rows in pages] == [
        list(range(10)), list(range(10, 20)), list(range(20, 25)), []
    ]  # fmt: skip
    assert [row for rows in pages for row in rows] == run("trials", *where).json
    assert run("trials", *where, "--page", 0).code == 2

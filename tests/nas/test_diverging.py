"""A mixer whose numbers leave the finite range, trained for real: its trials are unfit, named with the step, and no others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.mixers.kda import KDAMixer
from storage.store import Store

STEPS = 6
Run = Callable[..., Any]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every KDA layer answer NaN from a step of its training on."""

    def spoil(step: int) -> None:
        real = KDAMixer.forward
        calls: dict[int, int] = {}

        def forward(mixer: KDAMixer, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            y, state = real(mixer, x, state)
            calls[id(mixer)] = calls.get(id(mixer), -1) + mixer.training
            return (y * torch.nan if calls[id(mixer)] >= step else y), state

        monkeypatch.setattr(KDAMixer, "forward", forward)

    return spoil


@pytest.mark.parametrize("step", [0, 4])
def test_fault_11_nan_loss_is_unfit_at_its_step(
    run: Run,
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
    poison: Callable[[int], None],
    step: int,
) -> None:
    poison(step)
    tasks = {"mqar": {"steps": STEPS, "batch": 4, "learning_rates": [0.01]}}
    said = run("search", "--config", config_file({"tasks": tasks}), "--storage", url, "--trials", 8, "--json")
    assert said.code == 0 and "internal error" not in said.err
    assert said.json["trials"]["unfit"] > 0 and said.json["trials"]["done"] > 0
    with Store.open(url, read_only=True) as store:
        study = store.studies()[0]
        trials = store.trials(study)
    for trial in trials:
        broken = "kda" in trial.layout.text
        assert trial.state == ("unfit" if broken else "done") and trial.attempts == 1
        if broken:
            assert trial.why == f"mqar, learning rate 0.01: the loss is nan at step {step}"
            assert trial.results == ()
    assert not any("kda" in row["layout"] for row in said.json["front"])
    log = map(json.loads, (tmp_path / "nas.db.tiny.log.jsonl").read_text().splitlines())
    whys = [line["why"] for line in log if line["event"] == "trial_ended" and line["state"] == "unfit"]
    assert whys == [trial.why for trial in trials if trial.state == "unfit"]


def test_a_search_all_of_whose_layouts_diverge_ends_with_4_and_says_where_to_look(
    run: Run, config_file: Callable[..., str], url: str, poison: Callable[[int], None]
) -> None:
    poison(0)
    space = {"layers": 2, "mixers": ["kda"], "settings": {"kda": {"head_dim": [16]}}}
    said = run("search", "--config", config_file({"space": space}), "--storage", url, "--trials", 1)
    assert said.code == 4 and "no trial ended well" in said.err
    assert "how long it takes is not known" in said.err

"""The comparison of samplers: its problems have the fronts they claim, and its runs are what they say."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import asking, common
from benchmarks.search_efficiency import (
    BUDGETS,
    Run,
    Task,
    code_of,
    current,
    interval,
    main,
    read_runs,
    replay,
    show,
    summarise,
)
from benchmarks.search_peers import ABOUT, ALL, OURS, OptunaDriver, why_not
from benchmarks.search_problems import Problem, layout_table, make_table, orders, problem_of, why_no_problem

pytestmark = pytest.mark.filterwarnings("default")

LETTERS = ("full", "window[size=256]", "kda[head_dim=64]")


def everything(problem: Problem) -> list[tuple[float, ...]]:
    names = list(problem.options)
    sets = itertools.product(*problem.options.values())
    return [problem.values(dict(zip(names, each, strict=True))) for each in sets]


def write(path: Path, rows: list[tuple[str, float, float, float]]) -> Path:
    lines = ["layout,quality,latency_ms,kv_bytes,remark"]
    lines += [f'"{text}",{quality},{latency},{size},' for text, quality, latency, size in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def made_up(layers: int = 2) -> list[tuple[str, float, float, float]]:
    """A small table: the order counts, and what is dear is good."""
    found = []
    for pattern in itertools.product(range(len(LETTERS)), repeat=layers):
        quality = sum((place + 1) * (2 - letter) for place, letter in enumerate(pattern)) / 10
        text = " ".join(LETTERS[letter] for letter in pattern)
        found.append((text, quality, float(sum(3 - letter for letter in pattern)), 100.0 * pattern.count(0)))
    return found


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_front_that_is_counted_over_is_the_front_of_all_layouts(layers: int) -> None:
    problem = orders(layers)
    values = everything(problem)
    assert len(values) == problem.size == 6**layers
    assert problem.share(values) == pytest.approx(1.0, abs=1e-12)
    assert np.min(values, axis=0) == pytest.approx(problem.low, abs=1e-12)
    assert np.max(values, axis=0) == pytest.approx(problem.high, abs=1e-12)


def test_order_and_neighbours_matter() -> None:
    problem = orders(4)
    names = list(problem.options)

    def error(*pattern: str) -> float:
        return problem.values(dict(zip(names, pattern, strict=True)))[0]

    assert error("mamba2", "kda", "kda", "full") < error("full", "kda", "kda", "mamba2")
    # Not a sum over the layers: what one change brings hangs on the layer beside it.
    first = error("kda", "mla", "kda", "kda") - error("kda", "window", "kda", "kda")
    second = error("full", "mla", "kda", "kda") - error("full", "window", "kda", "kda")
    assert first != pytest.approx(second)


def test_a_table_is_read_as_its_format_says(tmp_path: Path) -> None:
    path = write(tmp_path / "small.csv", made_up())
    problem = layout_table(path)
    assert problem.objectives == ("error", "latency_ms") and problem.costs == (False, True)
    assert problem.options == {"0.mixer": LETTERS, "1.mixer": LETTERS}
    assert problem.space is not None and problem.space.size().count == 9
    params = {"0.mixer": "kda[head_dim=64]", "1.mixer": "full"}
    assert problem.values(params) == pytest.approx((1 - 0.4, 4.0))
    assert problem.known(params) == (None, 4.0)
    assert problem.share(everything(problem)) == pytest.approx(1.0)
    three = problem_of(f"{path}:latency_ms,kv_bytes")
    assert three.values(params) == pytest.approx((0.6, 4.0, 100.0))


def test_the_share_is_that_of_the_normalised_values() -> None:
    rows = {("a",): (0.0, 10.0), ("b",): (4.0, 20.0), ("c",): (1.0, 12.0)}
    options = {"x": ("a", "b", "c")}
    problem = make_table("toy", options, rows, objectives=("error", "cost"), costs=(False, True))
    # Everything is behind (0, 0); (0.25, 0.2) beats 0.85 × 0.9 of the 1.21 that it beats.
    assert problem.whole == pytest.approx(1.21)
    assert problem.share([rows["c",]]) == pytest.approx(0.85 * 0.9 / 1.21)
    assert problem.share([rows["b",]]) == pytest.approx(0.01 / 1.21)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "1 sets of choices have no row"),
        (lambda rows: [*rows, rows[0]], "stands in two rows"),
        (lambda rows: [*rows, ("full", 0.1, 1.0, 0.0)], r"patterns are of \[1, 2\] layers"),
        (lambda rows: [(rows[0][0], math.nan, 1.0, 0.0), *rows[1:]], "not finite"),
        (lambda rows: [(text, quality, 1.0, size) for text, quality, _, size in rows], "the same|everywhere"),
    ],
)
def test_a_table_that_is_not_complete_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = write(tmp_path / "bad.csv", change(made_up()))
    with pytest.raises(ValueError, match=said):
        layout_table(path)


def test_an_unknown_column_or_problem_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "small.csv", made_up())
    with pytest.raises(ValueError, match="no column energy"):
        layout_table(path, costs=("energy",))
    with pytest.raises(ValueError, match="no problem 'order'"):
        problem_of("order")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 5])
def test_every_sampler_can_be_driven_in_batches(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := why_not(name):
        pytest.skip(f"{name}: {why}")
    problem = orders(3)
    running, most = 0, 0
    make = ALL[name]

    def watched(problem: Problem, seed: int, batch: int) -> Any:
        driver = make(problem, seed, batch)
        ask, tell = driver.ask, driver.tell

        def asked() -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            return ask()

        def told(token: Any, values: tuple[float, ...]) -> None:
            nonlocal running
            running -= 1
            tell(token, values)

        driver.ask, driver.tell = asked, told  # type: ignore[method-assign]
        return driver

    monkeypatch.setitem(ALL, name, watched)
    # The slow ones are asked as often as takes them past their random starts.
    evaluations = 12 if name in ("gp", "botorch") else 27
    run = replay(
        Task(problem=problem.name, sampler=name, seed=0, batch=batch, evaluations=evaluations), problem
    )
    assert (most, running) == (batch, 0)
    if evaluations < 25:
        return
    assert set(run.shares) == {"25"} and 0 < run.shares["25"] <= 1
    assert run.different["25"] == 25 if name in OURS else run.different["25"] <= 25


def test_a_run_is_its_seed() -> None:
    problem = orders(3)
    task = Task(problem=problem.name, sampler="nsga2", seed=3, batch=1, evaluations=50)
    first, again = replay(task, problem), replay(task, problem)
    assert (first.shares, first.different) == (again.shares, again.different)
    assert first.shares != replay(replace(task, seed=4), problem).shares
    assert first.shares["25"] <= first.shares["50"]


def test_ours_knows_the_costs_unless_it_is_said_not_to() -> None:
    problem = orders(3)
    knows = {}
    for name in OURS:
        driver = ALL[name](problem, 0, 1)
        assert isinstance(driver, OptunaDriver)
        knows[name] = getattr(driver.study.sampler, "known", None) is not None
    assert knows == {name: name != "ours_unknown" for name in OURS}


def run_of(sampler: str, seed: int, share: float, **changes: Any) -> Run:
    made = Run(
        problem="orders_4", sampler=sampler, seed=seed, batch=1, evaluations=25, code="",
        shares={"25": share}, different={"25": 25}, ask_ms=1.0,
    )  # fmt: skip
    return replace(made, **changes)


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    # Standard error sqrt(5/3)/2, times the quantile of three degrees of freedom, 3.1824.
    assert (mean, half) == (2.5, pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, rel=1e-4))
    assert math.isnan(interval([1.0])[1])


def test_the_lead_is_over_the_best_peer_seed_by_seed() -> None:
    runs = [run_of("ours", seed, 0.9 + seed / 100) for seed in range(3)]
    runs += [run_of("random", seed, 0.5) for seed in range(3)]
    # One more seed of a peer is of no use where ours has none.
    runs += [run_of("tpe", seed, 0.8 + seed / 100) for seed in range(4)]
    rows = {
        row["sampler"]: row
        for row in summarise({("orders_4", 1, run.sampler, run.seed): run for run in runs})
    }
    assert list(rows) == ["ours", "random", "tpe"]
    cell = rows["ours"]["evaluations"]["25"]
    assert (cell["share"], cell["seeds"], cell["best_peer"]) == (0.91, 3, "tpe")
    assert (cell["lead"], cell["lead_plus_minus"]) == (0.1, 0.0)
    assert "best_peer" not in rows["tpe"]["evaluations"]["25"]
    text = show(list(rows.values()))
    assert "ours at 25: +0.1000 ± 0.0000 ahead of tpe" in text and "0.9100 ± 0.0248 (3)" in text


def test_only_runs_of_the_code_of_today_count() -> None:
    problem = orders(4)
    problems = {problem.name: problem}
    code = code_of("random", problem)
    runs = [
        run_of("random", 0, 0.1, code=code),
        run_of("random", 0, 0.2, code=code, evaluations=100),
        run_of("random", 1, 0.3, code="another"),
        run_of("nobody", 0, 0.4),
        run_of("random", 2, 0.5, problem="elsewhere"),
    ]
    assert [run.shares["25"] for run in current(runs, problems).values()] == [0.2]
    assert code != code_of("random", orders(3)) and code != code_of("ours", problem)


def test_the_command_goes_on_from_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    runs = tmp_path / "runs.jsonl"
    table = write(tmp_path / "small.csv", made_up(layers=4))
    options = [
        "--problems",
        str(table),
        "--samplers",
        "random",
        "nsga2",
        "--batches",
        "1",
        "--evaluations",
        "25",
    ]
    main([*options, "--seeds", "1", "--runs", str(runs)])
    assert len(read_runs(runs)) == 2
    with runs.open("a", encoding="utf-8") as file:
        file.write('{"problem": "sma')
        file.write("\n")
    main([*options, "--seeds", "1", "--runs", str(runs)])
    assert len(read_runs(runs)) == 2
    main([*options, "--seeds", "2", "--runs", str(runs)])
    assert [run.seed for run in read_runs(runs)] == [0, 0, 1, 1]
    main([*options, "--seeds", "9", "--runs", str(runs), "--report"])
    assert len(read_runs(runs)) == 4
    saved = json.loads((tmp_path / "search_efficiency.json").read_text())
    assert [(row["sampler"], row["evaluations"]["25"]["seeds"]) for row in saved["rows"]] == [
        ("random", 2),
        ("nsga2", 2),
    ]
    assert saved["versions"]["optuna"]


def test_what_cannot_be_run_is_named() -> None:
    for name in ALL:
        why = why_not(name)
        assert why is None or name in ("botorch", "evolution"), f"{name}: {why}"
    assert why_no_problem("orders_12") is None
    assert set(ABOUT) == set(ALL) and list(BUDGETS) == sorted(BUDGETS)


@pytest.mark.parametrize("name", asking.CASES)
def test_asking_is_measured_in_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    propose = asking.LayoutSampler.sample_relative

    def counted(self: Any, study: Any, trial: Any, space: Any) -> Any:
        asked.append(sum(other.state.is_finished() for other in study.get_trials(deepcopy=False)))
        return propose(self, study, trial, space)

    monkeypatch.setattr(asking.LayoutSampler, "sample_relative", counted)
    measured = asking.measure(asking.CASES[name](), trials=20, batches=2)
    assert asked == [20, *[21] * 8, *[29] * 8]
    assert 0 < measured["batch_median_ms"] <= measured["worst_ms"]

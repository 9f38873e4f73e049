"""Bounds: nothing that breaks one is trained, what nothing satisfies is said at once, and widths meet a parameter count."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nas.aim import make_aim
from nas.cli.output import console
from nas.cli.progress import ProgressWatcher
from nas.config import resolve
from nas.plan import Plan, make_plan
from nas.prices import LatencyBook
from nas.reach import Reach
from nas.rules import read_rules
from nas.samplers.registry import SAMPLERS, make_sampler
from nas.search import Search
from search_space.cost import at_depth, layout_cost
from search_space.frame import Frame
from search_space.layout import Layout, from_json
from search_space.vocabulary import check, read
from storage.records import Axis, TrialRecord
from storage.store import Store
from trainers.evaluate import Job
from trainers.outcome import Measured, Outcome

AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1e3, high=1e6, log=True, unit="bytes"),
)
SPACE = {
    "layers": 3,
    "mixers": ["full", "window", "kda", "cross_layer"],
    "settings": {"full": {"kv_heads": [1, 2]}, "window": {"size": [8, 16]}, "kda": {"head_dim": [16, 32]}},
}
Tiny = Callable[..., dict[str, Any]]


class Noting:
    """A pool that trains nothing, and notes what it was given."""

    capacity = 1

    def __init__(self) -> None:
        self.jobs: list[tuple[int, Job]] = []
        self.waiting: list[int] = []

    def submit(self, number: int, job: Job) -> None:
        self.jobs.append((number, job))
        self.waiting.append(number)

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        del timeout_s
        if not self.waiting:
            return None
        number = self.waiting.pop()
        return number, Measured(
            quality=0.1 + number / 100, scores={"mqar": 0.1}, metrics={}, steps=2, tokens=8, train_s=0.9, worker_s=1.0
        )  # fmt: skip

    def stop(self) -> None:
        self.waiting.clear()


def search(plan: Plan, store: Store, sampler: str) -> tuple[Noting, list[TrialRecord]]:
    study = store.create_study(name="s", config={}, config_hash="", axes=AXES, families={})
    pool, book = Noting(), LatencyBook(store=store, machine=None, device="cpu")
    bounds = plan.bounds(book.milliseconds)
    with ProgressWatcher(console(to_stderr=True), total=plan.config.trials, done=0) as watcher:
        Search(
            plan=plan,
            store=store,
            study=study,
            pool=pool,
            sampler=make_sampler(sampler, plan.space, make_aim(plan, AXES, book, bounds), seed=0),
            book=book,
            watcher=watcher,
            given_bounds=bounds,
        ).run()
    return pool, store.trials(study)


def true_costs(plan: Plan, layout: Layout, width: int, latencies: Any) -> dict[str, float]:
    """Costs by their definitions, and by nothing that the search uses."""
    frame = replace(plan.target, width=width)
    network = at_depth(layout, frame, plan.config.target.fill)
    cost = layout_cost(network, frame)
    ms = sum(latencies.layer(layer, frame, "decode", device="cpu").latency_ms for layer in network.layers)
    return {
        "kv_bytes": cost.stored_bytes,
        "kv_bytes@128": layout_cost(network, replace(frame, context=128)).stored_bytes,
        "params": cost.params,
        "flops_decode": cost.flops_decode,
        "latency_ms": ms,
        "tokens_per_s": 1000 * frame.batch / ms,
    }


SIGNS = {
    "kv_bytes": "<=", "kv_bytes@128": "<=", "params": ">=", "flops_decode": "<=", "latency_ms": "<=",
    "tokens_per_s": ">=",
}  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(sorted(SIGNS)), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**32),
    sharing=st.sampled_from(["layer", "study"]),
    fitted=st.booleans(),
)
def test_no_trained_layout_breaks_a_bound(
    tiny: Tiny, latencies: Any, sampler: str, names: list[str], seed: int, sharing: str, fitted: bool
) -> None:
    """Bounds that just one random layout keeps are the tightest that can be kept."""
    # Ours spreads its first ten.
    changes = {
        "trials": 14 if sampler == "layout" else 6,
        "sampler": sampler,
        "space": {**SPACE, "sharing": sharing},
    }
    rules = ["params=180k+-10%"] if fitted else []
    free = make_plan(resolve(tiny(changes | {"space": {**SPACE, "sharing": sharing, "constraints": rules}})))
    rng = random.Random(seed)
    drawn = [free.space.sample(rng) for _ in range(200)]
    kept = next((one for one in drawn if free.bounds().why_not(one) is None), None)
    if kept is None:
        return
    told = true_costs(free, kept, free.target_of(kept).width, latencies)
    texts = [f"{name}{SIGNS[name]}{told[name]!r}" for name in names]
    plan = make_plan(
        resolve(tiny(changes | {"space": {**SPACE, "sharing": sharing, "constraints": [*rules, *texts]}}))
    )
    with Store.open("sqlite://") as store:
        pool, trials = search(plan, store, sampler)
    assert pool.jobs and len({trial.layout.key for trial in trials}) == len(trials)
    layouts = {trial.number: from_json(trial.layout.layers) for trial in trials}
    for number, job in pool.jobs:
        layout = layouts[number]
        width = plan.target_of(layout).width
        costs = true_costs(plan, layout, width, latencies)
        for name in names:
            least, most = (told[name], float("inf")) if SIGNS[name] == ">=" else (0.0, told[name])
            assert least <= costs[name] <= most
            assert trials[number].value(name) == costs[name]
        if fitted:
            assert abs(costs["params"] / 180_000 - 1) <= 0.1
            assert trials[number].costs["width"] == width
        assert job.frame == plan.proxy


@st.composite
def reaches(draw: st.DrawFn) -> tuple[Reach, list[Layout], Any]:
    """A reach, every pattern that keeps its structure, and the sums of each."""
    texts = draw(st.lists(st.sampled_from(["full>=1", "kda<=1", "full not last", "attention>=2"]), max_size=2, unique=True))  # fmt: skip
    letters = list(read("full kda window mla").layers)
    columns, layers = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    number = st.integers(-20, 20)
    prices = np.array(draw(st.lists(st.lists(number, min_size=columns, max_size=columns), min_size=4, max_size=4)), float)  # fmt: skip
    weights = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    most = draw(st.lists(st.integers(-40, 60), min_size=columns, max_size=columns))
    structure = read_rules(texts, (), Frame(width=64)).structure
    reach = Reach(
        letters, owners=range(4), variants=[()] * 4, shared=False, structure=structure, prices=prices,
        most=[float(one) for one in most], weights=weights,
    )  # fmt: skip
    patterns, sums = [], []
    for indices in itertools.product(range(4), repeat=layers):
        layout = Layout(tuple(letters[index] for index in indices))
        if all(rule.broken_by(layout) is None for rule in structure):  # type: ignore[union-attr]
            patterns.append(layout)
            sums.append(sum(weight * prices[index] for weight, index in zip(weights, indices, strict=True)))
    return reach, patterns, np.array(sums, float).reshape(len(patterns), columns)


@settings(max_examples=200, deadline=None)
@given(reaches())
def test_what_can_be_reached_is_what_all_patterns_show(made: tuple[Reach, list[Layout], Any]) -> None:
    reach, patterns, sums = made
    most = np.round(reach.most)
    keeps = (sums <= most).all(axis=1)
    assert reach.exact and reach.keeps() == bool(keeps.any())
    for column in range(sums.shape[1]):
        others = np.delete(sums <= most, column, axis=1).all(axis=1)
        for heeding, chosen in ((False, sums), (True, sums[others])):
            least = reach.least(column, heeding=heeding)
            assert least == (pytest.approx(chosen[:, column].min()) if len(chosen) else None)
    rng = random.Random(0)
    drawn = {reach.sample(rng) for _ in range(60)}
    allowed = {one for one, good in zip(patterns, keeps, strict=True) if good}
    assert drawn <= (allowed or {None})
    if len(allowed) <= 4:
        assert drawn == (allowed or {None})


def test_many_sums_keep_the_nearest_of_each_column() -> None:
    rng = np.random.default_rng(0)
    letters = [read(f"window[size={4 * size}]").layers[0] for size in range(1, 31)]
    prices = rng.random((30, 3))
    reach = Reach(
        letters, owners=range(30), variants=[()] * 30, shared=False, structure=(), prices=prices,
        most=[1.0] * 3, weights=[1] * 8,
    )  # fmt: skip
    for column in range(3):
        assert reach.least(column, heeding=False) == pytest.approx(8 * prices[:, column].min())
    assert not reach.exact and len(reach.sums()) <= 400


@pytest.fixture
def refusing(refused: Callable[..., str], config_file: Callable[..., str], url: str) -> Callable[..., str]:
    path = config_file({"trials": 3})

    def call(*constraints: str) -> str:
        given = [part for text in constraints for part in ("--constraint", text)]
        return refused("search", "--config", path, "--storage", url, *given)

    return call


@pytest.mark.parametrize(
    ("name", "sign", "amount", "way"),
    [
        ("kv_bytes", "<=", "1", "below"),
        ("kv_bytes@128k", "<=", "1KiB", "below"),
        ("kv_bytes", ">=", "1GiB", "above"),
        ("params", "<=", "5k", "below"),
        ("latency_ms", "<=", "0.001", "below"),
        ("latency_ms[phase=prefill,batch=2]", "<=", "1us", "below"),
        ("tokens_per_s", ">=", "99k", "above"),
        ("tokens_per_s", "<=", "0.001", "below"),
    ],
)
def test_what_nothing_satisfies_is_answered_at_once_with_the_nearest_value(
    run: Any, config_file: Any, url: str, name: str, sign: str, amount: str, way: str
) -> None:
    path = config_file({"trials": 3})
    refused = run("search", "--config", path, "--storage", url, "--constraint", f"{name}{sign}{amount}")
    err = refused.err
    assert refused.code == 2 and refused.out == "" and "trial" not in err
    assert f"nas: {name}{sign}{amount}: no layout of the space comes {way} " in err
    with Store.open(url) as store:
        assert store.studies() == []
    # The value that it names is kept by a layout, and trained.
    nearest = err.partition(f" comes {way} ")[2].split(":")[0].split(" ")[0]
    said = run("search", "--config", config_file({"trials": 3}), "--storage", url, "--json", "--constraint", f"{name}{sign}{nearest}")  # fmt: skip
    assert said.code == 0 and said.json["trials"]["done"] >= 1


def test_bounds_that_fight_each_other_are_named_with_how_near_each_comes(
    refusing: Callable[..., str], run: Any, config_file: Any, url: str
) -> None:
    bounds = ("kv_bytes<=14KiB", "params>=190k", "full>=1")
    err = refusing(*bounds)
    assert "kv_bytes<=14KiB and params>=190k together with full>=1" in err
    cache = err.partition("kv_bytes comes down to ")[2].split(",")[0]
    more = err.partition("params comes up to ")[2].split(":")[0]
    path = config_file({"trials": 2})
    for looser in ((f"kv_bytes<={cache}", *bounds[1:]), (bounds[0], f"params>={more}", bounds[2])):
        given = [part for text in looser for part in ("--constraint", text)]
        assert run("search", "--config", path, "--storage", url, "--study", looser[0], *given).code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quality>=0.5", "told by training"),
        ("mqar>=0.5", "told by training"),
        ("latncy_ms<=3", "did you mean latency_ms"),
        ("latency_ms<=3MiB", "not an amount of latency_ms"),
        ("latency_ms[phase=prefil]<=3", "did you mean prefill"),
        ("params=1.3B", "say how near"),
        ("params=1.3B+-90%", "at most 50"),
        ("params=much+-5%", "not an amount of params"),
    ],
)
def test_a_bound_that_is_none_is_refused(refusing: Callable[..., str], text: str, said: str) -> None:
    assert said in refusing(text)


def test_starts_that_break_a_bound_are_left_out_with_a_line(run: Any, config_file: Any, url: str) -> None:
    said = run("search", "--config", config_file(), "--storage", url, "--constraint", "kv_bytes<=16KiB", "--constraint", "params>=200k", "--json")  # fmt: skip
    assert said.code == 0 and "not tried: 2*window (uniform), whose params is" in said.err
    trials = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert "2*window" not in [trial["layout"] for trial in trials]
    assert "no further layout that keeps the bounds was found" in said.err
    assert all(trial["params"] >= 200_000 and trial["kv_bytes"] <= 16 * 1024 for trial in trials)


def test_what_is_cheaper_after_another_layer_is_not_refused(tiny: Tiny) -> None:
    """A gmu that gates an earlier scan has a matrix less than one that has to make its own."""
    settings = {"mamba": {"expand": [1.0]}, "gmu": {"expand": [2.0]}}
    space = {"layers": 2, "mixers": ["mamba", "gmu"], "settings": settings}
    layout = read("mamba[expand=1.0] gmu")
    frame = replace(make_plan(resolve(tiny({"space": space}))).target, context=32)
    flops = layout_cost(at_depth(layout, frame), frame).flops_decode
    for rule, kept in ((f"flops_decode@32<={flops!r}", True), (f"flops_decode@32<={0.999 * flops!r}", False)):
        plan = make_plan(resolve(tiny({"space": {**space, "constraints": [rule]}})))
        assert (plan.bounds().why_not(layout) is None) == kept


@pytest.fixture
def fitted(tiny: Tiny) -> Callable[..., Plan]:
    def make(*rules: str, **space: Any) -> Plan:
        return make_plan(resolve(tiny({"space": {**SPACE, **space, "constraints": list(rules)}})))

    return make


@pytest.mark.parametrize("text", ["params=200k+-8%", "params = 350000 ± 3 %", "params=0.4M+/-20%"])
def test_a_width_is_the_valid_one_that_comes_nearest(fitted: Callable[..., Plan], text: str) -> None:
    plan = fitted(text)
    assert plan.widths is not None
    wanted, step = plan.widths.rule.count, plan.widths.step
    rng = random.Random(3)
    for _ in range(40):
        layout = plan.space.sample(rng)

        def params(width: int, layout: Layout = layout) -> float:
            frame = replace(plan.target, width=width)
            try:
                check(layout, frame)
            except ValueError:
                return float("inf")
            return layout_cost(at_depth(layout, frame), frame).params

        nearest = min(range(step, 400, step), key=lambda width: (abs(params(width) - wanted), width))
        assert plan.widths.width_of(layout) == nearest
        near = abs(params(nearest) - wanted) <= plan.widths.rule.tolerance * wanted
        assert (plan.bounds().why_not(layout) is None) == near


def test_wide_networks_take_wide_steps() -> None:
    steps = []
    for share in (5, 3, 1):
        space = {"constraints": [f"params=1.3B+-{share}%"]}
        given = {"target": {"width": 2048, "depth": 24}, "space": space, "tasks": {"parity": {}}}
        plan = make_plan(resolve(given))
        assert plan.widths is not None
        steps.append(plan.widths.step)
    assert steps == [64, 32, 16]


def test_everything_is_taken_at_the_layouts_own_width(
    run: Any, config_file: Any, url: str, latencies: Any, fitted: Callable[..., Plan]
) -> None:
    said = run("search", "--config", config_file({"space": SPACE, "trials": 9}), "--storage", url, "--json", "--constraint", "params=350k+-4%")  # fmt: skip
    assert said.code == 0 and "each layout at its own width" in said.err
    plan = fitted("params=350k+-4%")
    trials = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert len({trial["width"] for trial in trials}) > 1
    for trial in trials:
        layout = read(trial["layout"])
        assert trial["width"] == plan.target_of(layout).width and abs(trial["params"] / 3.5e5 - 1) <= 0.04
        costs = run("show", trial["trial"], "--study", "tiny", "--storage", url, "--json").json["costs"]
        told = true_costs(plan, layout, trial["width"], latencies)
        assert {name: costs[name] for name in ("kv_bytes", "kv_bytes@128", "params")} == {
            name: told[name] for name in ("kv_bytes", "kv_bytes@128", "params")
        }
    assert all("width" in row for row in said.json["front"])
    assert "width" in run("front", "--study", "tiny", "--storage", url).out
    assert f"of width {trials[0]['width']}" in run("show", 0, "--study", "tiny", "--storage", url).out


def test_a_number_that_no_width_reaches_names_the_nearest(refusing: Callable[..., str]) -> None:
    err = refusing("params=1.3M+-0.01%")
    assert "no layout of the space comes nearer than 1.3 M, at width" in err and "allow 0." in err


@pytest.fixture
def old(run: Any, config_file: Any, url: str) -> None:
    """A study as it was made before there were names: no speed among its costs."""
    import json

    from sqlalchemy import create_engine
    from sqlalchemy import text as sql

    path = config_file({"space": {"constraints": ["kv_bytes<=100KiB"]}})
    assert run("search", "--config", path, "--storage", url).code == 0
    engine = create_engine(url)
    with engine.begin() as connection:
        for number, costs in connection.execute(sql("SELECT id, costs FROM nas_trials")).all():
            kept = json.loads(costs)
            del kept["tokens_per_s"]
            connection.execute(sql("UPDATE nas_trials SET costs = :c WHERE id = :n"), {"c": json.dumps(kept), "n": number})  # fmt: skip
    engine.dispose()


@pytest.mark.usefixtures("old")
def test_a_study_from_before_opens_and_goes_on(run: Any, url: str, refused: Any) -> None:
    place = ("--study", "tiny", "--storage", url)
    for command in (("front",), ("trials",), ("show", 0)):
        assert run(*command, *place).code == 0
    assert "hold no tokens_per_s" in refused("front", *place, "--objectives", "quality,tokens_per_s")
    assert run("search", *place, "--workers", 1, "--trials", 8).code == 0
    assert len(run("trials", *place, "--json").json) == 8

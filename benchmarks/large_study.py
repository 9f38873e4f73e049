"""A study of many trials, written in bulk: what a search of weeks leaves behind, in a minute and without any training."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from sqlalchemy import Connection, func, insert, select

from nas.axes import make_axes
from nas.config import Config, hash_of, meaning, resolve
from nas.plan import Plan, families, make_plan
from nas.prices import LatencyBook, Price, price
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from storage import points
from storage.records import LayoutRecord, NewTrial, ResultRecord, StudyRecord
from storage.results import result_values
from storage.store import Store
from storage.tables import EventRow, LayoutRow, PointRow, RepeatRow, ResultRow, TrialRow, epoch_now
from storage.trials import layout_values, trial_values
from trainers.measure import Latency, Phase

PORTION = 2500
PRICED = 50
"""Layouts that are truly priced; the others have their costs, moved a little."""
STOPPED, REPEATED, UNFIT = 0.1, 0.001, 0.01
"""Shares of the trials that rest at the rung, that were trained with a second seed, and that gave nothing."""
CONFIG: dict[str, Any] = {
    "study": "large",
    "sampler": "random",
    "repeats": 0,
    "latency_cache": None,
    "space": {"layers": 12},
}


class MadeUp:
    """Latencies from nowhere; implements nas.prices.Meter. Nothing of this is about how fast a layer is."""

    name = "made up"

    def layer(self, layer: Layer, frame: Frame, phase: Phase) -> Latency:
        """One that the layer's name gives."""
        del frame, phase
        return Latency(latency_ms=1 + random.Random(str(layer)).random(), spread_ms=0.1, repetitions=9)

    def network(self, network: Layout, frame: Frame, phase: Phase) -> Latency:
        """The sum of its layers."""
        parts = [self.layer(layer, frame, phase).latency_ms for layer in network.layers]
        return Latency(latency_ms=sum(parts), spread_ms=0.1, repetitions=9)


def book_of(store: Store) -> LatencyBook:
    """Latencies without a measurement."""
    return LatencyBook(store=store, machine=None, device="cpu", meter=MadeUp())


def new_study(store: Store, config: Config, plan: Plan) -> StudyRecord:
    """A study as a search makes it."""
    stored = meaning(config) | {"data_sha256": plan.data.get("sha256")}
    axes = make_axes(plan, book_of(store), lambda _: None)
    return store.create_study(
        name=config.study, config=stored, config_hash=hash_of(stored), axes=axes, families=families()
    )


def fill(store: Store, trials: int, seed: int = 0) -> StudyRecord:
    """Makes the study and all its trials, their results and events."""
    rng = random.Random(seed)
    config = resolve(CONFIG, {"trials": max(1, trials)})
    plan = make_plan(config)
    study = new_study(store, config, plan)
    rows = _rows(plan, store, trials, rng)
    while portion := list(islice(rows, PORTION)):
        # The bulk has a door of its own: through the store's, a hundred thousand trials are half an hour.
        with store._database.writing() as connection:
            _insert(connection, study, portion)
    return study


Made = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]
"""The values of a layout, of its trial, of its results and of its further seeds."""


def _rows(plan: Plan, store: Store, trials: int, rng: random.Random) -> Iterator[Made]:
    book, known = book_of(store), set[str]()
    prices = [price(plan, plan.space.sample(rng), book) for _ in range(min(PRICED, max(1, trials)))]
    top = len(plan.budget.rungs)
    for number in range(trials):
        layout = next(one for one in iter(lambda: plan.space.sample(rng), None) if one.key not in known)
        known.add(layout.key)
        new = _trial(plan, layout, rng.choice(prices), rng, number)
        stopped, unfit = rng.random() < STOPPED, rng.random() < UNFIT
        state = "pruned" if stopped else "unfit" if unfit else "done"
        quality = min(0.99, max(0.01, rng.gauss(0.5, 0.1)))
        at = [0] if stopped else [] if unfit else [0, top]
        results = [result_values(_result(quality, rung, rng, 0)) for rung in dict.fromkeys(at)]
        again = result_values(_result(quality, top, rng, 1))
        repeats = [again] if state == "done" and rng.random() < REPEATED else []
        trial = {
            **trial_values(new),
            "number": number,
            "state": state,
            "layout_key": layout.key,
            "attempts": max(1, len(results)),
            "why": "nan in step 3" if state == "unfit" else "",
        }
        yield layout_values(new.layout), trial, results, repeats


def _trial(plan: Plan, layout: Layout, like: Price, rng: random.Random, number: int) -> NewTrial:
    factor = rng.uniform(0.8, 1.25)
    return NewTrial(
        layout=LayoutRecord(key=layout.key, text=layout.text, layers=tuple(layout.to_json())),
        origin="uniform" if number < len(plan.space.entries) else "search",
        params=plan.space.params_of(layout) or {},
        sampler_attrs={},
        costs={name: value * factor for name, value in like.costs.items()},
        layer_costs=like.layer_costs,
        evaluation_key=f"large {layout.key}",  # the true one takes ten times as long as all the rest
    )


def _result(quality: float, rung: int, rng: random.Random, seed: int) -> ResultRecord:
    scores = {"mqar": min(1.0, max(0.0, quality + rng.gauss(0, 0.02))), "bytes": rng.uniform(0.1, 0.4)}
    losses = [round(rng.uniform(0.5, 4.0), 4) for _ in range(24)]
    details = {"curves": dict.fromkeys(scores, losses), "learning_rates": dict.fromkeys(scores, 0.01)}
    return ResultRecord(
        rung=rung,
        quality=sum(scores.values()) / 2,
        scores=scores,
        details={**details, "new_steps": 250},
        steps=250,
        tokens=256_000,
        train_s=8.3,
        worker_s=8.9,
        seed=seed,
    )


def _insert(connection: Connection, study: StudyRecord, portion: Sequence[Made]) -> None:
    now = connection.execute(select(epoch_now())).scalar_one()
    times = {"created_at": now, "started_at": now, "ended_at": now}
    connection.execute(insert(LayoutRow), [layout for layout, _, _, _ in portion])
    first = (connection.execute(select(func.max(TrialRow.id))).scalar() or 0) + 1
    keyed = list(enumerate(portion, first))
    rows = [{**trial, **times, "id": key, "study_id": study.id} for key, (_, trial, _, _) in keyed]
    connection.execute(insert(TrialRow), rows)
    results = [{**own, "trial_id": key} for key, (_, _, found, _) in keyed for own in found]
    connection.execute(insert(ResultRow), results)
    repeats = [
        {**own, "trial_id": key, "evaluation_key": f"repeat of {key}"}
        for key, (_, _, _, found) in keyed
        for own in found
    ]
    if repeats:
        connection.execute(insert(RepeatRow), repeats)
    found = []
    for _, trial, own, again in portion:
        if trial["state"] == "done":
            seeds = [(result["quality"], result["scores"]) for result in (own[-1], *again)]
            packed = points.packed_of(study.axes, trial["number"], trial["costs"], seeds)
            found.append({"study_id": study.id, "number": trial["number"], "packed": packed})
    connection.execute(insert(PointRow), found)
    events = [
        {"at": now, "study_id": study.id, "kind": f"trial_{kind}", "payload": {"trial": trial["number"]}}
        for _, trial, _, _ in portion
        for kind in ("waiting", "running", trial["state"])
    ]
    connection.execute(insert(EventRow), events)


def trials_to_open(store: Store, count: int, driver: int) -> Iterator[tuple[NewTrial, ResultRecord]]:
    """Trials that no other driver opens, each with what a training would bring."""
    rng = random.Random(driver)
    plan = make_plan(resolve(CONFIG))
    like = price(plan, plan.space.sample(rng), book_of(store))
    known: set[str] = set()
    while len(known) < count:
        layout = plan.space.sample(rng)
        if layout.key not in known:
            known.add(layout.key)
            new = _trial(plan, layout, like, rng, len(known))
            alone = replace(new.layout, key=f"{driver} {layout.key}", text=f"{driver} {layout.text}")
            yield replace(new, layout=alone), _result(0.5, 1, rng, 0)

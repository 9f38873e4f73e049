"""The driver's own work a trial: asking a sampler that knows many trials, pricing, and the transactions of one trial."""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import save
from nas.config import resolve
from nas.plan import families, make_plan
from nas.prices import LatencyBook, price
from nas.samplers.registry import SAMPLERS, make_sampler
from nas.samplers.sampler import Aim, Known
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord
from storage.store import Store

KNOWN = (100, 1000)
ASKS = 10
SLOW_MS = 200.0
"""A sampler that takes longer to ask is not asked with ten times the trials: Optuna's GP would take minutes a proposal."""
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=100.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=1e5, high=1e10, log=True, unit="bytes"),
)


def main() -> None:
    """Measure and save."""
    plan, rng = make_plan(resolve()), random.Random(0)
    asks: dict[str, dict[str, float | None]] = {}
    for name in SAMPLERS:
        try:
            sampler = make_sampler(name, plan.space, Aim(axes=AXES), seed=0)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        asks[name], told = {}, 0
        for target in KNOWN:
            if any(spent is None or spent > SLOW_MS for spent in asks[name].values()):
                asks[name][str(target)] = None
                continue
            while told < target:
                params = plan.space.params_of(plan.space.sample(rng))
                assert params is not None
                values = [rng.random(), 10 ** rng.uniform(0, 2), 10 ** rng.uniform(5, 10)]
                sampler.learn(Known(params=params, attrs={}, values=values))
                told += 1
            times = []
            for attempt in range(ASKS):
                began = time.perf_counter()
                proposal = sampler.ask(told, attempt)
                times.append((time.perf_counter() - began) * 1e3)
                sampler.tell(proposal.token, None)
            asks[name][str(target)] = round(statistics.median(times), 2)
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(f"sqlite:///{Path(folder) / 'bench.db'}") as store,
    ):
        save("driver", {"ask_ms_by_known_trials": asks, **_transactions(store)})


def _transactions(store: Store) -> dict[str, float]:
    """Milliseconds of writing one trial, waiting to done, and of pricing its layout once latencies are known."""
    plan, rng = make_plan(resolve()), random.Random(1)
    study = store.create_study(name="bench", config={}, config_hash="", axes=AXES, families=families())
    book = LatencyBook(store=store, machine=None, device="cpu")
    layouts = list(dict.fromkeys(plan.space.sample(rng) for _ in range(40)))
    for layout in layouts:
        for layer in layout.layers:
            book.layer(layer, plan.target)
    prices, writes = [], []
    with store.writer(study) as lease:
        for layout in layouts:
            began = time.perf_counter()
            priced = price(plan, layout, book)
            prices.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            new = NewTrial(
                layout=LayoutRecord(key=layout.key, text=layout.text, layers=tuple(layout.to_json())),
                origin="search",
                params=plan.space.params_of(layout) or {},
                sampler_attrs={},
                costs=priced.costs,
                layer_costs=priced.layer_costs,
                evaluation_key=plan.evaluation_key(layout),
            )
            opened = store.open_trial(study, new, lease, most=len(layouts))
            assert opened is not None
            trial, attempt = opened
            result = ResultRecord(
                rung=0,
                quality=0.5,
                scores={},
                details={},
                steps=1,
                tokens=1,
                train_s=1.0,
                worker_s=1.0,
                seed=0,
            )
            store.finish_trial(study, trial.number, attempt, result)
            writes.append((time.perf_counter() - began) * 1e3)
    return {
        "price_ms": round(statistics.median(prices), 2),
        "write_trial_ms": round(statistics.median(writes), 2),
    }


if __name__ == "__main__":
    main()

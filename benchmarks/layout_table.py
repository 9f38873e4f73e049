"""A study that tried every layout of its space, as a CSV that searches and stopping rules are replayed on.

`python -m benchmarks.layout_table sqlite:///hybrids.db --study hybrids --output benchmarks/data/hybrids.csv`. One row a
layout of the space, presets outside of it left out; the columns are those of `benchmarks/data/README.md`. Beside the
table stands FILE.json: the configuration, the versions and the machine that made it.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nas.config import of_study, resolve
from nas.plan import Plan, make_plan
from search_space.layout import from_json
from storage.records import StudyRecord, TrialRecord
from storage.store import Store

PACKAGES = ("nas-hybrid-layouts", "torch", "numpy")
DIGITS = 6
COSTS = ("latency_ms", "kv_bytes", "params")


def columns(plan: Plan) -> list[str]:
    """Names, in order: the layout, scores by share of the steps and at the end, costs."""
    scores = ("quality", *plan.config.tasks)
    shares = [f"@{share:g}" for share in plan.budget.rungs]
    return ["layout", *(f"{score}{share}" for score in scores for share in (*shares, "")), *COSTS]


def rows(plan: Plan, trials: Sequence[TrialRecord]) -> list[dict[str, str]]:
    """Of finished trials in the space, in the order of their layouts' text."""
    found = {}
    for trial in trials:
        layout = from_json(trial.layout.layers)
        if trial.state != "done" or plan.space.params_of(layout) is None:
            continue
        row = {"layout": str(layout)}
        for result in trial.results:
            share = f"@{plan.budget.rungs[result.rung]:g}" if result.rung < len(plan.budget.rungs) else ""
            row |= {
                f"{name}{share}": f"{value:.{DIGITS}g}"
                for name, value in {"quality": result.quality, **result.scores}.items()
            }
        row |= {name: f"{trial.costs[name]:.{DIGITS}g}" for name in COSTS[:1]}
        row |= {name: str(int(trial.costs[name])) for name in COSTS[1:]}
        found[row["layout"]] = row
    return [found[text] for text in sorted(found)]


def about(study: StudyRecord, trials: Sequence[TrialRecord], count: int) -> dict[str, Any]:
    """What the table was made with."""
    results = [trial.result for trial in trials if trial.result]
    return {
        "layouts": count,
        "seed": study.config["seed"],
        "worker_s": round(sum(result.worker_s for result in results)),
        "steps": sum(result.steps for result in results),
        "versions": {name: version(name) for name in PACKAGES},
        "configuration": study.config,
    }


def main() -> None:
    """Write the table and what it was made with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("storage", help="the database's URL")
    parser.add_argument("--study", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(sys.argv[1:])
    with Store.open(options.storage, read_only=True) as store:
        study = store.study(options.study)
        if study is None:
            sys.exit(f"no study {options.study!r} in {store.shown_url}")
        trials = store.trials(study)
    plan = make_plan(resolve(of_study(study.config)))
    table = rows(plan, trials)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(plan), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    options.output.with_suffix(".json").write_text(
        json.dumps(about(study, trials, len(table)), indent=2) + "\n", encoding="utf-8"
    )
    print(f"{options.output}: {len(table)} of {plan.size.count} layouts", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The default search against TPE, NSGA-II and random draws with as many training steps: hypervolume, true trainings.

`python -m benchmarks.default_search [--database FILE] [--set KEY=VALUE …]`. `nas search` runs as it is, rungs and all;
then each peer gets the same configuration with its own name and every layout trained to the end, for as many trials as
the steps of the first search pay, rounded up. All begin with the same uniform layouts and presets, and train from the
same seed; a layout that two peers train is trained once, and its steps count for both. With a database of one's own it goes
on where it stopped.
"""

import argparse
import contextlib
import io
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.search_efficiency import interval
from nas.cli.session import run_search
from nas.config import assign, merge, resolve
from nas.front import hypervolume
from storage.records import StudyRecord, TrialRecord
from storage.store import Store

PEERS = ("tpe", "nsga2", "random")
SEEDS = 5


def curve(trials: Sequence[TrialRecord], study: StudyRecord) -> list[float]:
    """The hypervolume after each trial, in the order of their numbers; one that is not done adds nothing."""
    return [hypervolume(trials[: place + 1], study.axes) for place in range(len(trials))]


def search(url: str, study: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """One search to its end, or what is stored of it: what its front dominates, and its steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_search({**given, "study": study, "storage": url, "repeats": 0}, json_output=True)
    if code:
        sys.exit(code)
    with Store.open(url, read_only=True) as store:
        record = store.study(study)
        assert record is not None
        trials = store.trials(record)
    return {
        "hypervolume": [round(value, 5) for value in curve(trials, record)],
        "steps": sum(trial.result.steps for trial in trials if trial.result),
        "tried_first": sum(trial.origin != "search" for trial in trials),
        "states": dict(Counter(trial.state for trial in trials)),
    }


def compare(url: str, seed: int, changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The default search of one seed, and its peers with at least as many steps."""
    given = assign({"seed": seed}, changes)
    runs = {"layout": search(url, f"layout-{seed}", given)}
    tasks = resolve(given).tasks.values()
    whole = sum(task.steps * len(task.learning_rates) for task in tasks)
    trials = math.ceil(runs["layout"]["steps"] / whole)
    for name in PEERS:
        own = merge(given, {"sampler": name, "trials": trials, "rungs": {"shares": []}})
        runs[name] = search(url, f"{name}-{seed}", own)
    return runs


def main() -> None:
    """Search with each sampler and seed, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, help="a SQLite file that keeps the studies")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in nas search")
    options = parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in ("layout", *PEERS)}
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{(options.database or Path(folder) / 'searches.db').resolve()}"
        for seed in range(options.seeds):
            for name, run in compare(url, seed, options.set).items():
                runs[name][seed] = run
                said = f"{run['hypervolume'][-1]:.4f} for {run['steps']} steps, {run['states']}"
                print(f"seed {seed}, {name}: {said}", file=sys.stderr, flush=True)
    ends = {name: [own[seed]["hypervolume"][-1] for seed in own] for name, own in runs.items()}
    save(
        "default_search",
        {
            "changes": options.set,
            "hypervolume": {
                name: [round(part, 4) for part in interval(values)] for name, values in ends.items()
            },
            "lead_of_layout": {
                name: [
                    round(part, 4)
                    for part in interval([a - b for a, b in zip(ends["layout"], values, strict=True)])
                ]
                for name, values in ends.items()
                if name != "layout"
            },
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()

"""The default search against TPE and NSGA-II with as many training steps: hypervolume of the front, true trainings.

`python -m benchmarks.default_search [--database FILE] [--set KEY=VALUE …]`. Every sampler gets the configuration of
`nas search` as it is and only its own name, so that all are given the same uniform layouts and presets first, the same
seeds and the same steps. A layout that two of them train is trained once; its steps count for both. With a database
of one's own it goes on where it stopped.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.search_efficiency import interval
from nas.cli.session import run_search
from nas.config import assign
from nas.front import hypervolume
from storage.records import StudyRecord, TrialRecord
from storage.store import Store

SAMPLERS = ("layout", "tpe", "nsga2", "random")
SEEDS = 5


def curve(trials: Sequence[TrialRecord], study: StudyRecord) -> list[float]:
    """The hypervolume after each trial, in the order of their numbers; one that is not done adds nothing."""
    return [hypervolume(trials[: place + 1], study.axes) for place in range(len(trials))]


def search(url: str, sampler: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """One search to its end, or what is stored of it, and what its front dominates."""
    study = f"{sampler}-{seed}"
    given = assign({"sampler": sampler, "seed": seed, "study": study, "storage": url, "repeats": 0}, changes)
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_search(given, json_output=True)
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
        "states": sorted({trial.state for trial in trials}),
    }


def main() -> None:
    """Search with each sampler and seed, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, help="a SQLite file that keeps the studies")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in nas search")
    options = parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in SAMPLERS}
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{(options.database or Path(folder) / 'searches.db').resolve()}"
        for seed in range(options.seeds):
            for name in SAMPLERS:
                runs[name][seed] = search(url, name, seed, options.set)
                last = runs[name][seed]["hypervolume"][-1]
                print(f"seed {seed}, {name}: {last:.4f}", file=sys.stderr, flush=True)
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

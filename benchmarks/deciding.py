"""How long the rungs take to decide who goes on, after each result of a large study: one thread, processor time.

Made-up trials of one rung at a third: quality follows from the costs but for luck, two fifths have been trained to the
end. `first_ms` is of a search that goes on after a stop and knows nothing; then one trial after the other ends.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.common import save
from nas.prospects import Prospects
from nas.rungs import Ladder, Rules, Standing
from storage.records import Axis

TRIALS = (100, 1000, 10_000)
DECISIONS = 40
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=400.0, log=True),
    Axis(name="kv_bytes", maximise=False, low=1e6, high=1e9, log=True),
)
RULES = Rules(rungs=1, keep=1 / 3, chance=0.1, trust=0.3, seed=0)


def study(trials: int) -> list[Standing]:
    """Trials at the rung, some of which went on."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(trials):
        latency_ms = float(rng.uniform(20, 400))
        kv_bytes = latency_ms * 2e6 * float(rng.uniform(0.9, 1.1))
        end = (latency_ms / 500) ** 0.5 * float(rng.uniform(0.4, 1.1))
        values = {0: (0.5 * end + float(rng.normal(0, 0.03)), latency_ms, kv_bytes)}
        if rng.random() < 0.4:
            values[1] = (end, latency_ms, kv_bytes)
        made.append(Standing(number=number, values=values))
    return made


def measure(trials: int) -> dict[str, float]:
    """Milliseconds of the first decision, and of those after one more result each."""
    standings = study(trials)
    rng = np.random.default_rng(1)
    known = Prospects(axes=AXES, learnt=(0,))
    spent = []
    for _ in range(DECISIONS + 1):
        began = time.process_time()
        ladder = Ladder(RULES, AXES, [0], standings, known)
        going = ladder.promotable() or ladder.protected()
        ladder.protected()
        spent.append((time.process_time() - began) * 1e3)
        resting = [standing.number for standing in standings if standing.rung == 0]
        number = going[0] if going else resting[0]
        at = standings[number].values[0]
        end = (min(1.0, max(0.0, 2 * at[0] + float(rng.normal(0, 0.06)))), *at[1:])
        standings[number] = replace(standings[number], values={0: at, 1: end})
    return {
        "trials": trials,
        "on_the_front": len(ladder._front.points),
        "first_ms": round(spent[0], 1),
        "median_ms": round(statistics.median(spent[1:]), 1),
        "mean_ms": round(statistics.mean(spent[1:]), 1),
        "worst_ms": round(max(spent[1:]), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deciding", description=__doc__)
    parser.add_argument("--trials", nargs="+", type=int, default=list(TRIALS))
    chosen = parser.parse_args(arguments)
    save("deciding", {"rows": [measure(trials) for trials in chosen.trials]})


if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    main()

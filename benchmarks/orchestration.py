"""What a driver costs where trials cost nothing: overhead a trial, claims and commits a second, a front of 100,000 trials.

`python -m benchmarks.orchestration [--parts drive ray claims pages] [--only sqlite|postgresql] [--trials 10000]`. The
search is the true one with its database, log and front; its workers sleep 0 to 50 ms a trial instead of training. What is
the driver's own is the time in which it does not wait for a worker. About twenty minutes in all, on two cores.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.large_study import CONFIG, book_of, fill, new_study, trials_to_open
from benchmarks.postgres import Server, server_binaries
from benchmarks.sleeping import SleepingPool, WaitedFor, ray_pool
from nas.aim import make_aim
from nas.climb import climb_of
from nas.config import resolve
from nas.logged import logged
from nas.plan import make_plan
from nas.samplers.registry import make_sampler
from nas.search import Search
from search_space.layout import Layout
from storage.records import ResultRecord, TrialRecord
from storage.store import Store

PARTS = ("drive", "ray", "claims", "pages")
KINDS = ("sqlite", "postgresql")
WORKERS = (2, 8, 32)
TRIAL_S = 10.0
"""The trial that the overhead is told as a share of."""
EDGE = 500
"""First and last trials whose overhead is told apart."""
PART = 10
"""All trials are run with the most workers, and one in so many with fewer."""
RAY_TRIALS = 500
RAY_WORKERS = (2, 8)
CLAIMED = 1000
LARGE = 100_000
PAGES = 40


class Quiet:
    """Looks on, notes when each trial ended and what the driver had waited until then; implements nas.watcher.Watcher."""

    def __init__(self, pool: SleepingPool | WaitedFor) -> None:
        self.pool = pool
        self.ends: list[tuple[float, float]] = []

    def started(self, trial: TrialRecord) -> None:
        """Nothing."""

    def ended(
        self, trial: TrialRecord, *, hypervolume: float, best: TrialRecord | None, reused: bool
    ) -> None:
        """One more."""
        del trial, hypervolume, best, reused
        self.ends.append((time.perf_counter(), self.pool.waited_s))

    def followed(self, trial: TrialRecord, *, hypervolume: float) -> None:
        """Nothing."""

    def repeated(self, trial: TrialRecord, result: ResultRecord) -> None:
        """Nothing."""

    def skipped(self, layout: Layout, why: str) -> None:
        """Nothing."""

    def stopping(self, running: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def tick(self, running: int) -> None:
        """Nothing."""

    def own_ms(self, first: int, last: int) -> float:
        """Milliseconds a trial that were the driver's own, between two endings."""
        (began, waited), (ended, waited_then) = self.ends[first], self.ends[last]
        return (ended - began - (waited_then - waited)) / (last - first) * 1e3


def drive(url: str, workers: int, trials: int, *, rungs: bool, ray: bool, folder: Path) -> dict[str, Any]:
    """One search, in this process."""
    given = {"trials": trials, "workers": workers, "storage": url, "log_file": str(folder / "log.jsonl")}
    config = resolve(CONFIG, {} if rungs else {"rungs": {"shares": []}}, given)
    plan = make_plan(config)
    pool = ray_pool(workers) if ray else SleepingPool(capacity=workers)
    with Store.open(url) as store:
        study, book, quiet = new_study(store, config, plan), book_of(store), Quiet(pool)
        begin_mb = _resident_mb()
        with logged(config, store, quiet) as watcher:
            aim = make_aim(plan, study.axes, book, plan.bounds(book.milliseconds))
            search = Search(
                plan=plan,
                store=store,
                study=study,
                pool=pool,
                sampler=make_sampler(config.sampler, plan.space, aim, seed=config.seed),
                book=book,
                watcher=watcher,
                climb=climb_of(plan, study),
            )
            processor, began = time.process_time(), time.perf_counter()
            search.run()
            took_s, processor_s = time.perf_counter() - began, time.process_time() - processor
        pool.stop()
    ended = len(quiet.ends)
    own_ms = (took_s - pool.waited_s) / ended * 1e3
    edge = min(EDGE, ended // 2)
    return {
        "workers": workers,
        "trials": ended,
        "seconds": round(took_s, 1),
        "trials_per_s": round(ended / took_s, 1),
        "own_ms": round(own_ms, 2),
        "own_ms_first": round(quiet.own_ms(0, edge), 2),
        "own_ms_last": round(quiet.own_ms(ended - 1 - edge, ended - 1), 2),
        "processor_ms": round(processor_s / ended * 1e3, 2),
        "share_of_10_s": round(own_ms / 1e3 / TRIAL_S, 5),
        "memory_mb": [begin_mb, _resident_mb()],
        "load": round(os.getloadavg()[0], 1),
    }


def _resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20)


def claims(url: str, number: int, claimed: int) -> dict[str, float]:
    """Trials that are opened, which claims them, and finished by one driver; what other drivers do meanwhile slows it."""
    spent = {"claim": 0.0, "commit": 0.0}
    with Store.open(url) as store:
        study = store.studies()[0]
        new = trials_to_open(store, claimed, number)
        with store.writer(study) as lease:
            for one, result in new:
                began = time.perf_counter()
                opened = store.open_trial(study, one, lease, most=10**9)
                claimed_at = time.perf_counter()
                assert opened is not None
                assert store.finish_trial(study, opened[0].number, opened[1], result)
                spent["claim"] += claimed_at - began
                spent["commit"] += time.perf_counter() - claimed_at
    return {f"{name}s_per_s": claimed / seconds for name, seconds in spent.items()}


def pages(url: str) -> dict[str, Any]:
    """What is asked for `nas front` and for pages of `nas trials`, each with a store of its own as a command has."""
    fronts, processor, listed = [], [], []
    rng = random.Random(0)
    with Store.open(url, read_only=True) as store:
        study = store.studies()[0]
        total = sum(store.counts(study).values())
    for _ in range(PAGES):
        with Store.open(url, read_only=True) as store:
            store.study(study.name)
            began, spent = time.perf_counter(), time.process_time()
            points = store.points(study)
            best = store.trials(study, numbers=points.front.tolist())
            fronts.append((time.perf_counter() - began) * 1e3)
            processor.append((time.process_time() - spent) * 1e3)
            began = time.perf_counter()
            store.trials(study, offset=rng.randrange(total - 100), limit=100)
            listed.append((time.perf_counter() - began) * 1e3)
    told = {"trials": total, "done": len(points), "front": len(best)}
    times = {"front_ms": fronts, "front_processor_ms": processor, "page_of_100_ms": listed}
    return told | {name: _spread(own) for name, own in times.items()} | {"load": round(os.getloadavg()[0], 1)}


def _spread(times_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 1),
        "first": round(times_ms[0], 1),
    }


def _alone(*arguments: object) -> subprocess.Popen[str]:
    """A measurement in a process of its own, so that memory and threads are those of one search."""
    command = [sys.executable, "-m", "benchmarks.orchestration", "--alone", json.dumps(arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def _run_alone(arguments: Sequence[Any]) -> dict[str, Any]:
    match arguments:
        case ["drive", url, workers, trials, rungs, ray]:
            with tempfile.TemporaryDirectory() as folder:
                return drive(url, workers, trials, rungs=rungs, ray=ray, folder=Path(folder))
        case ["claims", url, number, claimed]:
            return claims(url, number, claimed)
        case ["fill", url, trials]:
            began = time.perf_counter()
            with Store.open(url) as store:
                fill(store, trials)
            return {"seconds": round(time.perf_counter() - began)}
        case ["pages", url]:
            return pages(url)
    raise AssertionError(arguments)


@contextmanager
def _databases(kind: str) -> Iterator[Callable[[], str]]:
    """Makes empty databases, which write through to the disk."""
    with tempfile.TemporaryDirectory(prefix="nas-orchestration-") as name:
        folder = Path(name)
        if kind == "sqlite":
            numbers = iter(range(1000))
            yield lambda: f"sqlite:///{folder}/{next(numbers)}.db"
            return
        binaries = server_binaries()
        if binaries is None:
            sys.exit(
                "no PostgreSQL server (initdb, postgres) on this machine: install one, or give --only sqlite"
            )
        home = Path(tempfile.mkdtemp(prefix="nas-pg-"))
        server = Server(binaries, home, durable=True)
        try:
            yield server.new_database
        finally:
            server.stop()
            shutil.rmtree(home)


def _measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with _databases(kind) as new_url:
        if "drive" in options.parts:
            *fewer, most = options.workers
            runs = [(workers, options.trials // PART, False) for workers in fewer]
            runs.append((most, options.trials, False))
            runs.append((options.workers[-1], min(RAY_TRIALS, options.trials), True))
            found["drive"] = []
            for workers, trials, rungs in runs:
                told = _answer(_alone("drive", new_url(), workers, trials, rungs, False))
                found["drive"].append({"rungs": rungs, **told})
                _say(kind, "drive", found["drive"][-1])
        if "ray" in options.parts:
            found["ray"] = []
            for workers in RAY_WORKERS:
                trials = min(RAY_TRIALS, options.trials)
                found["ray"].append(_answer(_alone("drive", new_url(), workers, trials, False, True)))
                _say(kind, "ray", found["ray"][-1])
        if "claims" in options.parts:
            found["claims"] = []
            for drivers in (1,) if kind == "sqlite" else (1, 2, 4):
                url = new_url()
                _answer(_alone("fill", url, 0))
                running = [_alone("claims", url, number, CLAIMED) for number in range(drivers)]
                answers = [_answer(process) for process in running]
                sums = {name: round(sum(own[name] for own in answers), 1) for name in answers[0]}
                found["claims"].append({"drivers": drivers, **sums})
                _say(kind, "claims", found["claims"][-1])
        if "pages" in options.parts:
            url = new_url()
            filled = _answer(_alone("fill", url, options.large))
            found["pages"] = {"filled_in_s": filled["seconds"], **_answer(_alone("pages", url))}
            _say(kind, "pages", found["pages"])
    return found


def _say(kind: str, part: str, told: Mapping[str, Any]) -> None:
    words = "  ".join(f"{name} {value}" for name, value in told.items())
    print(f"{kind:<10}  {part:<6}  {words}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure each database, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--large", type=int, default=LARGE, help="trials of the study that is read")
    parser.add_argument("--name", default="orchestration", help="of the file in benchmarks/results")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])
    if options.alone:
        print(json.dumps(_run_alone(json.loads(options.alone))))
        return
    kinds = [kind for kind in KINDS if options.only in (None, kind)]
    save(options.name, {kind: _measure(kind, options) for kind in kinds})


if __name__ == "__main__":
    main()

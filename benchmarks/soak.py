"""A search of many short trials whose driver and workers are killed every few seconds: nothing may be lost or doubled.

`python -m benchmarks.soak [--trials 2000] [--seconds 4] [--only sqlite|postgresql]`. A clean run first; then the same
search again and again, as Ray's two workers train and SIGKILL hits the driver or one of them at random, until it has
ended by itself. Compared are the committed results, trial by trial; the database is checked, and no process may be left.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import save
from benchmarks.postgres import Server, server_binaries
from nas.cli.db import key_and_text
from storage.check import check
from storage.errors import StorageError
from storage.store import Store

MARK = "NAS_SOAK_RUN"
"""A variable that all processes of one run inherit, by which those that are left behind are found."""
LEASE_S = 2.0
DRIVER_SHARE = 0.4
"""How often it is the driver that is hit; else one of the workers."""
MOST_EXITS = 20
QUIET_S = 60.0
"""How long the processes of a killed driver may take to notice."""
CONFIG: dict[str, Any] = {
    "study": "soak",
    "workers": 2,
    "repeats": 0,
    "rungs": {"shares": []},
    "sampler": "random",
    "latency_cache": None,
    "attempts": 1000,  # whoever is hit is no more to blame the tenth time than the first
    "lease_s": LEASE_S,
    "objectives": ["quality", "kv_bytes"],
    "target": {"width": 64, "depth": 6, "train_length": 64, "context": 64, "vocabulary": 64},
    "proxy": {"width": 16, "length": 16},
    "space": {
        "layers": 6,
        "mixers": ["full", "window", "linear", "shortconv"],
        "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8, 16]}, "linear": {"head_dim": [16]}},
        "channels": ["none"],
    },
    "tasks": {"mqar": {"steps": 1, "batch": 2, "learning_rates": [0.01]}},
}


def facts(url: str) -> dict[int, tuple[Any, ...]]:
    """By trial: its layout, how it ended and what it gave."""
    with Store.open(url, read_only=True) as store:
        study = store.study("soak")
        assert study is not None
        return {
            trial.number: (
                trial.layout.text,
                trial.state,
                [(r.rung, r.quality, r.steps) for r in trial.results],
            )
            for trial in store.trials(study)
        }


def events(url: str) -> Counter[str]:
    """How often each thing happened."""
    kinds: Counter[str] = Counter()
    with Store.open(url, read_only=True) as store:
        after = 0
        while page := store.events(after=after, limit=5000):
            kinds.update(event.kind for event in page)
            after = page[-1].seq
    return kinds


def _begun(url: str) -> int:
    """How many attempts at trials there were."""
    try:
        return events(url)["trial_running"]
    except StorageError:  # not made yet
        return 0


def begin(config: Path, url: str, mark: str, log: Path) -> subprocess.Popen[bytes]:
    """The search, in a process of its own."""
    command = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-c", command, "search", "--config", str(config), "--storage", url],
            stdout=said,
            stderr=said,
            env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        )


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Processes of a run that live: their numbers and command lines."""
    wanted = f"{MARK}={mark}".encode()
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if wanted in (place / "environ").read_bytes().split(b"\0"):
                    text = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    if text:  # one that has ended and was not waited for has none
                        yield int(place.name), text
            except OSError:
                continue


def kill_at_random(driver: subprocess.Popen[bytes], mark: str, rng: random.Random) -> str:
    """Hits the driver or a worker; says which."""
    workers = [pid for pid, text in marked(mark) if text.startswith("ray::")]
    if workers and rng.random() > DRIVER_SHARE:
        os.kill(rng.choice(workers), signal.SIGKILL)
        return "worker"
    driver.kill()
    driver.wait()
    return "driver"


def soak(config: Path, url: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Kills until the search has ended by itself; what it took, and who is left."""
    rng, mark, kills = random.Random(0), uuid.uuid4().hex, Counter[str]()
    began = time.monotonic()
    driver = begin(config, url, mark, folder / "log")
    there = 0
    while True:
        # A driver is spared until it has begun a trial, or a slow machine would never come to one.
        spared = there == _begun(url)
        try:
            code = driver.wait(0.2 if spared else rng.uniform(0.0, 2 * seconds))
        except subprocess.TimeoutExpired:
            if spared:
                continue
            hit = kill_at_random(driver, mark, rng)
            kills[hit] += 1
            if hit == "driver":
                there = _begun(url)
                driver = begin(config, url, mark, folder / "log")
            continue
        if code == 0:
            break
        kills[f"exit code {code}"] += 1  # such as Ray that could not start beside the remains of the last one
        if kills[f"exit code {code}"] > MOST_EXITS:
            sys.exit(f"the search ends by itself again and again:\n{(folder / 'log').read_text()[-2000:]}")
        there = _begun(url)
        driver = begin(config, url, mark, folder / "log")
    took_s = time.monotonic() - began
    until = time.monotonic() + QUIET_S
    while (left := [text for _, text in marked(mark)]) and time.monotonic() < until:
        time.sleep(1)
    return {"seconds": round(took_s), "kills": dict(kills), "processes_left": left}


def compare(clean: dict[int, tuple[Any, ...]], soaked: dict[int, tuple[Any, ...]]) -> dict[str, int]:
    """What differs between the two runs; zeros everywhere is what must be shown."""
    shared = clean.keys() & soaked.keys()
    return {
        "missing": len(clean.keys() - soaked.keys()),
        "too_many": len(soaked.keys() - clean.keys()),
        "lost": sum(not soaked[number][2] for number in shared),
        "doubled": sum(len(soaked[number][2]) > 1 for number in shared),
        "other": sum(clean[number] != soaked[number] for number in shared),
    }


@contextmanager
def _server(folder: Path) -> Iterator[Callable[[], str]]:
    binaries = server_binaries()
    if binaries is None:
        sys.exit(
            "no PostgreSQL server (initdb, postgres) on this machine: install one, or give --only sqlite"
        )
    home = Path(tempfile.mkdtemp(prefix="nas-pg-", dir=folder.parent))
    running = Server(binaries, home)
    try:
        yield running.new_database
    finally:
        running.stop()
        shutil.rmtree(home)


def main() -> None:
    """Soak each database, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=4.0, help="between two kills, in the mean")
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--name", default="soak", help="of the file in benchmarks/results")
    options = parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nas-soak-") as name:
        folder = Path(name)
        config = folder / "soak.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "trials": options.trials}))
        clean_url = f"sqlite:///{folder}/clean.db"
        began = time.monotonic()
        if begin(config, clean_url, "clean", folder / "clean.log").wait():
            sys.exit((folder / "clean.log").read_text())
        clean, clean_s = facts(clean_url), time.monotonic() - began
        print(f"clean: {len(clean)} trials in {clean_s:.0f} s", file=sys.stderr, flush=True)
        for kind in ("sqlite", "postgresql"):
            if options.only in (None, kind):
                with _server(folder) if kind == "postgresql" else _file(folder) as new_url:
                    url = new_url()
                    told = soak(config, url, folder, options.seconds)
                    told |= compare(clean, facts(url))
                    told["check"] = [finding.said for finding in check(url, key_and_text).findings]
                    told["events"] = dict(sorted(events(url).items()))
                    found[kind] = told
                    print(f"{kind}: {told}", file=sys.stderr, flush=True)
    save(options.name, {"trials": options.trials, "clean_seconds": round(clean_s), **found})
    bad = ("missing", "too_many", "lost", "doubled", "other", "processes_left", "check")
    if any(own[name] for own in found.values() for name in bad):
        sys.exit("something was lost, doubled, damaged or left behind: see above")


@contextmanager
def _file(folder: Path) -> Iterator[Callable[[], str]]:
    yield lambda: f"sqlite:///{folder}/soak.db"


if __name__ == "__main__":
    main()

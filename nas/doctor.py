"""The checks behind `nas doctor`: each one tries the real thing and says what it saw."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backend import architecture, has_triton
from kernels.configurations import ANY, table
from kernels.probes import PROBES
from nas.config import resolve
from nas.plan import make_budget, proxy_frame
from nas.workers.pool import run_job
from search_space.vocabulary import read, shrink_layout
from storage.errors import StorageError
from storage.upkeep import status
from trainers.evaluate import Job
from trainers.measure import device_name
from trainers.outcome import Measured

PACKAGES = ("torch", "triton", "optuna", "ray", "sqlalchemy", "plotly", "typer", "fastapi", "moocore")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check, whether it went well, and what it saw."""

    check: str
    ok: bool
    said: str


def examine(url: str, *, with_ray: bool) -> list[Finding]:
    """Run every check."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("device", _device),
        ("kernels", _kernels),
        ("storage", lambda: _storage(url)),
        ("trial", _trial),
    ]
    if with_ray:
        checks.append(("ray", _ray))
    findings = []
    for name, check in checks:
        ok, said = check()
        findings.append(Finding(check=name, ok=ok, said=said))
    return findings


def _python() -> tuple[bool, str]:
    version = sys.version_info
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return version >= (
        3,
        11,
    ), f"{version.major}.{version.minor}.{version.micro} (3.11 or later is needed), {cores} cores"


def _packages() -> tuple[bool, str]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return not missing, ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")


def _device() -> tuple[bool, str]:
    names = [device_name("cpu")]
    if torch.cuda.is_available():
        names += [device_name(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    else:
        names.append("no GPU that torch sees: trials run on the CPU")
    return True, "; ".join(names)


def _kernels() -> tuple[bool, str]:
    """What `backend="auto"` will pick, and why."""
    operators = sorted({probe.operator for probe in PROBES})
    if not has_triton():
        return True, "chunked PyTorch: the package triton is not installed (it exists for Linux alone)"
    if not torch.cuda.is_available():
        return (
            True,
            f"chunked PyTorch: torch sees no GPU; {len(operators)} operators have Triton kernels for one",
        )
    said = []
    for index in range(torch.cuda.device_count()):
        place = architecture(torch.device("cuda", index)) or ""
        served = [name for name in operators if any(row.architecture in (ANY, place) for row in table(name))]
        tuned = [name for name in served if any(row.architecture == place for row in table(name))]
        kind = (
            f"tuned for {place}: {', '.join(tuned)}"
            if tuned
            else f"with safe settings, none tuned for {place}"
        )
        said.append(f"cuda:{index}: Triton for {len(served)} of {len(operators)} operators, {kind}")
    return True, "; ".join(said) + "; chunked PyTorch for the rest, for float64 and for wider heads"


def _storage(url: str) -> tuple[bool, str]:
    try:
        found = status(url)
    except StorageError as error:
        return True, f"not there yet, or not readable: {error}"
    said = f"{found.storage} holds {len(found.studies)} studies"
    if found.to_do:
        return False, f"{said} in schema {found.version}, which is read but not written: {found.to_do}"
    return True, said


def _trial() -> tuple[bool, str]:
    """A few steps of a hybrid of every mixer, from the notation to the score."""
    config = resolve({"tasks": {"mqar": {"steps": 3, "batch": 8}}})
    target, proxy = config.target.frame(), proxy_frame(config)
    layout = shrink_layout(read("full window linear mamba2 kda mla"), target, proxy)
    job = Job(layers=tuple(layout.to_json()), frame=proxy, budget=make_budget(config), seed=0)
    outcome = run_job(job)
    if isinstance(outcome, Measured):
        return True, f"a layout of all six mixers trained {outcome.steps} steps in {outcome.train_s:.2f} s"
    return False, outcome.why


def _ray() -> tuple[bool, str]:
    import time

    from nas.errors import Refused
    from nas.workers.ray_pool import RayPool

    began = time.perf_counter()
    try:
        pool = RayPool(1, None)
    except Refused as error:
        return False, str(error)
    pool.stop()
    return True, f"a local cluster started and stopped in {time.perf_counter() - began:.1f} s"

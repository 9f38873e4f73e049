"""The kernels that a search space needs, compiled side by side before the first trial."""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context

import torch

from kernels.backend import architecture, has_triton, interprets
from nas.plan import Plan
from search_space.layout import Layer, Layout
from trainers.evaluate import Job
from trainers.warm import Warmed, warm

MOST_LAYERS = 1024
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
"""Those of A100, A40, L40S and H100; for the present GPU none need be named."""


def chosen_architecture(named: str | None) -> str:
    """What to compile for: as named, else the GPU that is here.

    Raises:
        ValueError: nothing can be compiled, or nothing says for what.
    """
    if not has_triton():
        raise ValueError(
            "the package triton is not installed, which compiles the kernels; it exists for Linux alone"
        )
    if interprets():
        raise ValueError(
            "TRITON_INTERPRET is set, so that kernels are interpreted and not compiled; unset it"
        )
    if named is not None and named not in ARCHITECTURES:
        raise ValueError(f"--architecture {named!r} is not one of {', '.join(ARCHITECTURES)}")
    here = architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    if named is None and here is None:
        raise ValueError(
            "torch sees no GPU here, and without one the trials need no kernels; name the --architecture of another "
            "machine that shares this cache, such as sm_90"
        )
    return named or str(here)


def distinct_jobs(plan: Plan) -> list[Job]:
    """One training for every layer of the space, as its proxy is; layers whose proxies are alike count once."""
    letters: Iterable[Layer] = dict.fromkeys(
        [*(layer for start in plan.starts for layer in start.layout.layers), *plan.space.alphabet]
    )
    jobs = {}
    for layer in islice(letters, MOST_LAYERS):
        job = plan.job(Layout((layer,) * 2))
        jobs[str(job.layers)] = job
    return list(jobs.values())


def warm_all(
    jobs: list[Job], architecture: str, processes: int, say: Callable[[Warmed], None]
) -> list[Warmed]:
    """Compile for all of them, in processes of their own; `say` hears of each as it is done."""
    found = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(warm, job, architecture) for job in jobs]:
            found.append(future.result())
            say(found[-1])
    return found

"""Triangular factors that grow by rows: always in the same steps, so that what was kept is what would be worked out anew.

Letters: N rows, M right-hand sides.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

Numbers = NDArray[np.float64]
STEP = 64
"""Rows that are added at once; only whole steps are kept."""


def kept_rows(same: int, base: int) -> int:
    """Of so many rows that are the same as before, those whose factor is too: the base and whole steps beyond it."""
    return 0 if same < base else same - (same - base) % STEP


def factor(
    kernel: Callable[[int, int], Numbers], count: int, base: int, kept: Numbers | None = None
) -> Numbers:
    """[N, N] lower triangular, times its own transpose the kernel.

    kernel(start, end) gives the kernel's rows from `start` up to `end`, and of them the columns up to `end`. The first
    `base` rows are worked out at once and the others in steps. `kept` is the factor of the first `kept_rows`.
    """
    lower = np.zeros((count, count))
    first = base
    if kept is not None and len(kept):
        first = len(kept)
        lower[:first, :first] = kept
    else:
        lower[:base, :base] = np.linalg.cholesky(kernel(0, base))
    for start in range(first, count, STEP):
        end = min(start + STEP, count)
        rows = kernel(start, end)
        reach = forward(np.ascontiguousarray(lower[:start, :start]), rows[:, :start].T)
        lower[start:end, :start] = reach.T
        lower[start:end, start:end] = np.linalg.cholesky(rows[:, start:] - reach.T @ reach)
    return lower


def forward(lower: Numbers, right: Numbers) -> Numbers:
    """[N, M] what the lower triangle [N, N] turns into the right-hand sides [N, M]."""
    solved: Numbers = solve_triangular(lower, right, lower=True, check_finite=False)
    return solved

"""How this operator is tried.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value.
"""

from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, normal
from kernels.window_mass.ops import window_mass, window_mass_step

PAST, CACHED = 30, 280
"""Keys before the first query; slots before the first query's, which are more than one part of a step's cache."""


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, keys, groups = sizes.batch, CACHED + sizes.time, sizes.groups
    return {
        "q": normal(generator, batch, sizes.time, sizes.heads, sizes.key),
        "k": normal(generator, batch, keys, groups, sizes.key),
        "v": normal(generator, batch, keys, groups, sizes.value),
    }


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    """The window holds whole tiles and ends within one."""
    k, v = x["k"][:, CACHED - PAST :], x["v"][:, CACHED - PAST :]
    return window_mass(x["q"], k, v, window=70, backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return window_mass_step(x["q"], x["k"], x["v"], visible=x["k"].shape[1] - 1, backend=backend)


PROBES = (
    Probe(
        operator="window_mass",
        name="window",
        draw=_draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        timed=("q",),
        step=_step,
    ),
)

"""How this operator is tried.

Letters: B batch, T time, H heads, K width of a head.
"""

from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.norm.ops import rms_norm, unit_norm
from kernels.probe import Inputs, Probe, Sizes, normal


def _draw_heads(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Heads, each normalised and then gated, as a delta rule's output is."""
    shape = (sizes.batch, sizes.time, sizes.heads, sizes.key)
    return {
        "x": 3 * normal(generator, *shape),
        "weight": 1 + normal(generator, sizes.key),
        "gate": normal(generator, *shape),
    }


def _draw_groups(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Two groups, gated and then normalised, with a weight for each entry of the batch."""
    shape = (sizes.batch, sizes.time, 2 * sizes.key)
    return {
        "x": normal(generator, *shape),
        "weight": 1 + normal(generator, sizes.batch, 2 * sizes.key),
        "gate": 3 * normal(generator, *shape),
    }


def _draw_vectors(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    return {"x": normal(generator, sizes.batch, sizes.time, sizes.heads, sizes.key)}


def _after(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return (rms_norm(x["x"], x["weight"], eps=1e-5, gate=x["gate"], backend=backend),)


def _before(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    gate = x["gate"]
    return (
        rms_norm(
            x["x"],
            x["weight"],
            eps=1e-5,
            gate=gate,
            activation="sigmoid",
            before=True,
            groups=2,
            backend=backend,
        ),
    )


def _unit(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return (unit_norm(x["x"], scale=0.5, backend=backend),)


PROBES = tuple(
    Probe(
        operator="norm",
        name=name,
        draw=draw,
        call=call,
        widths=lambda sizes: (sizes.key,),
        wide=("weight",),
    )
    for name, draw, call in (
        ("gated", _draw_heads, _after),
        ("gated before, by group and entry", _draw_groups, _before),
        ("to length", _draw_vectors, _unit),
    )
)

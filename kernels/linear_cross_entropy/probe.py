"""How this operator is tried.

Letters: M models trained side by side, N tokens, D width, V vocabulary.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.linear_cross_entropy.ops import linear_cross_entropy
from kernels.probe import Inputs, Probe, Sizes, normal

IGNORED = -100


def _draw_stacked(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Several models, of whose tokens a third is not asked, but at least one is."""
    models, tokens = 1 + sizes.heads, sizes.batch * sizes.time
    targets = torch.randint(sizes.value, (models, tokens), generator=generator)
    silent = torch.rand(models, tokens, generator=generator) < 1 / 3
    silent[:, 0] = False
    return {
        "x": normal(generator, models, tokens, sizes.key),
        "weight": 2 * normal(generator, models, sizes.value, sizes.key) * sizes.key**-0.5,
        "targets": targets.masked_fill(silent, IGNORED),
    }


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    return {name: x[0] for name, x in _draw_stacked(sizes, generator).items()}


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    loss = linear_cross_entropy(x["x"], x["weight"], x["targets"], ignore_index=IGNORED, backend=backend)
    return (loss,)


PROBES = tuple(
    Probe(
        operator="linear_cross_entropy",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.value,),
    )
    for name, draw in (("one model", _draw), ("stacked", _draw_stacked))
)

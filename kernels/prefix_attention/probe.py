"""How this operator is tried.

Letters: B batch, T queries, N keys, H heads, G groups that share k and v, K key, V value.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.prefix_attention.ops import prefix_attention
from kernels.probe import Inputs, Probe, Sizes, normal


def _draw(sizes: Sizes, generator: Generator, keys: int) -> dict[str, Tensor]:
    return {
        "q": normal(generator, sizes.batch, sizes.time, sizes.heads, sizes.key),
        "k": normal(generator, sizes.batch, keys, sizes.groups, sizes.key),
        "v": normal(generator, sizes.batch, keys, sizes.groups, sizes.value),
    }


def _draw_growing(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """A key for every third query, and at first none."""
    inputs = _draw(sizes, generator, sizes.time // 3 + 1)
    return {**inputs, "visible": torch.arange(sizes.time) // 3}


def _draw_random(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """As many keys as each query likes."""
    visible = torch.randint(0, 101, (sizes.time,), generator=generator)
    return {**_draw(sizes, generator, 100), "visible": visible}


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return prefix_attention(x["q"], x["k"], x["v"], x["visible"], backend=backend)


PROBES = tuple(
    Probe(
        operator="prefix_attention",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
    )
    for name, draw in (("growing", _draw_growing), ("any number", _draw_random))
)

"""How this operator is tried.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, C groups of heads that choose together, M
blocks that a query names, K key, V value.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, normal
from kernels.routed_attention.ops import routed_attention, routed_attention_step


def _draw(
    sizes: Sizes, generator: Generator, block: int, choosers: int, more: int, named: int
) -> dict[str, Tensor]:
    """More keys than queries, and random blocks for each query, some of them ahead of it and some left out."""
    batch, time, groups = sizes.batch, sizes.time, sizes.groups
    keys = time + more
    order = torch.rand(batch, time, choosers, -(-keys // block), generator=generator).argsort(-1)[..., :named]
    return {
        "q": normal(generator, batch, time, sizes.heads, sizes.key),
        "k": normal(generator, batch, keys, groups, sizes.key),
        "v": normal(generator, batch, keys, groups, sizes.value),
        "blocks": order.masked_fill(torch.rand(order.shape, generator=generator) < 0.25, -1),
    }


def _draw_by_group(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """The heads of a group choose together, among blocks as large as a tile: more tokens for a step than a program reads."""
    return _draw(sizes, generator, 64, sizes.groups, 90, 4)


def _draw_by_head(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Every head chooses for itself, among blocks smaller than a tile."""
    return _draw(sizes, generator, 20, sizes.heads, 3, 2)


def _finite(answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of nothing by a number: a comparison cannot take an infinity."""
    output, sums = answer
    return output, sums.masked_fill(sums == -torch.inf, -1.0)


def _call(block: int) -> Callable[[Backend, Inputs], tuple[Tensor, Tensor]]:
    def call(backend: Backend, x: Inputs) -> tuple[Tensor, Tensor]:
        return _finite(routed_attention(x["q"], x["k"], x["v"], x["blocks"], block=block, backend=backend))

    return call


def _step(block: int) -> Callable[[Backend, Inputs], tuple[Tensor, Tensor]]:
    def step(backend: Backend, x: Inputs) -> tuple[Tensor, Tensor]:
        length = x["k"].shape[1]
        return _finite(
            routed_attention_step(
                x["q"], x["k"], x["v"], x["blocks"], block=block, length=length, backend=backend
            )
        )

    return step


PROBES = tuple(
    Probe(
        operator="routed_attention",
        name=name,
        draw=draw,
        call=_call(block),
        widths=lambda sizes: (sizes.key, sizes.value),
        timed=("q", "blocks"),
        step=_step(block),
    )
    for name, draw, block in (("by group", _draw_by_group, 64), ("by head", _draw_by_head, 20))
)

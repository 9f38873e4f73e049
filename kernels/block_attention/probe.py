"""How this operator is tried.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value, N query blocks, M key
blocks listed for each, I lists, L listed slots.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.block_attention.ops import block_attention, block_attention_step
from kernels.probe import Inputs, Probe, Sizes, normal


def _draw(
    sizes: Sizes, generator: Generator, block: int, key_block: int, lists: int, more: int
) -> dict[str, Tensor]:
    """Queries from position 5 on, more keys than queries, random lists of at most four blocks, and slots for a step."""
    batch, time, groups = sizes.batch, sizes.time, sizes.groups
    keys = time + more
    blocks, rows = -(-keys // key_block), (4 + time) // block + 1

    def some(rows: int, count: int) -> Tensor:
        order = torch.rand(lists, rows, count, generator=generator).argsort(-1)
        return order.masked_fill(torch.rand(order.shape, generator=generator) < 0.25, -1)

    return {
        "q": normal(generator, batch, time, sizes.heads, sizes.key),
        "k": normal(generator, batch, keys, groups, sizes.key),
        "v": normal(generator, batch, keys, groups, sizes.value),
        "index": some(rows, blocks)[..., :4],
        "slots": some(1, keys)[:, 0],
    }


def _draw_shared(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """One list for all heads, blocks as large as a tile, and more slots for a step than one program reads."""
    return _draw(sizes, generator, 64, 64, 1, 90)


def _draw_own(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """A list for each head, odd blocks smaller than a tile, and keys that stand elsewhere than where they lie."""
    inputs = _draw(sizes, generator, 20, 12, sizes.heads, 6)
    keys = inputs["k"].shape[1]
    inputs["positions"] = torch.randperm(keys, generator=generator)
    return inputs


def _finite(answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of nothing by a number: a comparison cannot take an infinity."""
    output, sums = answer
    return output, sums.masked_fill(sums == -torch.inf, -1.0)


def _call(
    block: int, key_block: int, window: int | None
) -> Callable[[Backend, Inputs], tuple[Tensor, Tensor]]:
    def call(backend: Backend, x: Inputs) -> tuple[Tensor, Tensor]:
        answer = block_attention(
            *(x["q"], x["k"], x["v"], x["index"]),
            block=block,
            key_block=key_block,
            first=5,
            positions=x.get("positions"),
            window=window,
            backend=backend,
        )
        return _finite(answer)

    return call


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, Tensor]:
    return _finite(block_attention_step(x["q"], x["k"], x["v"], x["slots"], backend=backend))


PROBES = tuple(
    Probe(
        operator="block_attention",
        name=name,
        draw=draw,
        call=_call(*sizes),
        widths=lambda sizes: (sizes.key, sizes.value),
        timed=("q",),
        step=_step,
    )
    for name, draw, sizes in (
        ("shared lists", _draw_shared, (64, 64, None)),
        ("lists, positions, window", _draw_own, (20, 12, 70)),
    )
)

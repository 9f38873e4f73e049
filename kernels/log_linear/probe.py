"""How this operator is tried.

Letters: B batch, T time, H heads, G groups that share q and k, L levels, K key, V value.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.log_linear.ops import log_linear, log_linear_step
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard

SEEN = 192
"""Tokens before a text that goes on: three chunks, of which two are one block."""
TIMED = ("q", "k", "v", "log_decay", "weights")


def _draw_first(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """The beginning of a text, with fewer levels than a chunk tells apart, and hard gates."""
    batch, time, heads = sizes.batch, sizes.time, sizes.heads
    return {
        "q": normal(generator, batch, time, sizes.groups, sizes.key) * sizes.key**-0.5,
        "k": normal(generator, batch, time, sizes.groups, sizes.key),
        "v": normal(generator, batch, time, heads, sizes.value),
        "log_decay": some_hard(generator, batch, time, heads),
        "weights": torch.rand(batch, time, heads, 4, generator=generator),
    }


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """A text that goes on, in which blocks of one and of two chunks lie in the last level."""
    batch, time, heads = sizes.batch, sizes.time, sizes.heads
    return {
        **_draw_first(sizes, generator),
        "log_decay": gates(generator, batch, time, heads),
        "weights": torch.rand(batch, time, heads, 8, generator=generator),
        "levels": normal(generator, batch, heads, 8, sizes.key, sizes.value),
        "length": torch.tensor(SEEN),
    }


def _length(x: Inputs) -> int:
    return int(x["length"]) if "length" in x else 0


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    """The tokens seen go with the levels, to the next call."""
    q, k, v, log_decay, weights = (x[name] for name in TIMED)
    length = _length(x)
    output, last = log_linear(q, k, v, log_decay, weights, None, x.get("levels"), length, backend=backend)
    return output, last, torch.tensor(length + output.shape[1])


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    q, k, v, log_decay, weights = (x[name] for name in TIMED)
    return log_linear_step(q, k, v, log_decay, weights, None, x["levels"], _length(x), backend=backend)


PROBES = tuple(
    Probe(
        operator="log_linear",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        wide=("log_decay", "weights", "levels"),
        timed=TIMED,
        carried={"levels": 1, "length": 2},
        step=step,
        loose=("log_decay", "weights"),
    )
    for name, draw, step in (("going on", _draw, _step), ("few levels", _draw_first, None))
)

"""How this operator is tried.

Letters: B batch, T time, H heads, G groups that share q and k, L levels, K key, V value.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from kernels.backend import Backend
from kernels.log_linear.ops import log_linear, log_linear_step
from kernels.probe import Draw, Inputs, Probe, Sizes, gates, normal, some_hard

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


def _erasing(draw: Draw) -> Draw:
    """The same text with keys and queries of unit length, and strengths of which some turn what a key holds around."""

    def drawn(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
        inputs = draw(sizes, generator)
        shape = inputs["log_decay"].shape
        unit = {name: normalize(inputs[name], dim=-1) for name in ("q", "k")}
        return {**inputs, **unit, "beta": 1.8 * torch.rand(shape, generator=generator)}

    return drawn


def _length(x: Inputs) -> int:
    return int(x["length"]) if "length" in x else 0


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    """The tokens seen go with the levels, to the next call."""
    q, k, v, log_decay, weights = (x[name] for name in TIMED)
    beta, levels, length = x.get("beta"), x.get("levels"), _length(x)
    output, last = log_linear(q, k, v, log_decay, weights, beta, levels, length, backend=backend)
    return output, last, torch.tensor(length + output.shape[1])


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    q, k, v, log_decay, weights = (x[name] for name in TIMED)
    beta, length = x.get("beta"), _length(x)
    return log_linear_step(q, k, v, log_decay, weights, beta, x["levels"], length, backend=backend)


_GOING_ON = Probe(
    operator="log_linear",
    name="going on",
    draw=_draw,
    call=_call,
    widths=lambda sizes: (sizes.key, sizes.value),
    kernels=("forward", "backward", "step", "walk"),
    wide=("log_decay", "weights", "beta", "levels"),
    timed=(*TIMED, "beta"),
    carried={"levels": 1, "length": 2},
    step=_step,
    loose=("log_decay", "weights", "beta"),
)
_ERASING = replace(
    _GOING_ON,
    name="erasing, going on",
    measured=True,
    draw=_erasing(_draw),
    kernels=tuple(
        f"{name}_delta" for name in ("forward", "prepare", "backward", "gradients", "read", "backward_read")
    ),
)
PROBES = (
    _GOING_ON,
    replace(_GOING_ON, name="few levels", draw=_draw_first, step=None),
    _ERASING,
    replace(_ERASING, name="erasing, few levels", draw=_erasing(_draw_first), step=None, measured=False),
)

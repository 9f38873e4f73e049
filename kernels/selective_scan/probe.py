"""How this operator is tried.

Letters: B batch, T time, C channels, N numbers a channel keeps.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard
from kernels.selective_scan.ops import selective_scan, selective_scan_step


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, time, channels, size = sizes.batch, sizes.time, sizes.heads * sizes.value, sizes.key
    return {
        "x": normal(generator, batch, time, channels),
        "delta": -gates(generator, batch, time, channels),
        "rate": -0.5 - torch.rand(channels, size, generator=generator),
        "write": normal(generator, batch, time, size),
        "read": normal(generator, batch, time, size) * size**-0.5,
        "skip": normal(generator, channels),
        "state": normal(generator, batch, channels, size),
    }


def _draw_hard_from_nothing(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """With rates and a skip for each entry of the batch."""
    inputs = _draw(sizes, generator)
    del inputs["state"]
    # Longer steps than 50 would give x gradients that half precision does not hold.
    inputs["delta"] = -some_hard(generator, *inputs["delta"].shape).clamp(min=-50.0)
    # As a long step forgets it writes much: lest those writes drown the rest, what they write is little.
    inputs["x"] = inputs["x"] / (1 + inputs["delta"])
    entries = 1 + torch.rand(sizes.batch, generator=generator)
    inputs["rate"] = inputs["rate"] * entries[:, None, None]
    inputs["skip"] = inputs["skip"] * entries[:, None]
    return inputs


def _arguments(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x["x"], x["delta"], x["rate"], x["write"], x["read"], x["skip"]


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return selective_scan(*_arguments(x), x.get("state"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return selective_scan_step(*_arguments(x), x["state"], backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return selective_scan(*_arguments(x), x.get("state"), cu_seqlens=cu_seqlens, backend=backend)


PROBES = tuple(
    Probe(
        operator="selective_scan",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key,),
        wide=("delta", "rate", "skip", "state"),
        timed=("x", "delta", "write", "read"),
        carried={"state": 1},
        step=step,
        packed=_packed,
        loose=("delta", "rate"),
    )
    for name, draw, step in (
        ("mild", _draw, _step),
        ("hard, from nothing, by entry", _draw_hard_from_nothing, None),
    )
)

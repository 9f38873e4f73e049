"""How this operator is tried.

Letters: B batch, T time, C channels.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    channels = sizes.heads * sizes.value
    return {
        "log_decay": gates(generator, sizes.batch, sizes.time, channels),
        "x": normal(generator, sizes.batch, sizes.time, channels),
        "state": normal(generator, sizes.batch, channels),
    }


def _draw_hard_from_nothing(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw(sizes, generator)
    return {"log_decay": some_hard(generator, *inputs["x"].shape), "x": inputs["x"]}


def _draw_complex(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Some decays are hard; angles reach several circles."""
    inputs = _draw(sizes, generator)
    inputs["log_decay"] = some_hard(generator, *inputs["x"].shape)
    turned = {"log_decay": 10.0, "x": 1.0, "state": 1.0}
    return {name: torch.complex(x, turned[name] * normal(generator, *x.shape)) for name, x in inputs.items()}


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return diagonal_scan(x["log_decay"], x["x"], x.get("state"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return (diagonal_scan_step(x["log_decay"], x["x"], x["state"], backend=backend),)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return diagonal_scan(x["log_decay"], x["x"], x.get("state"), cu_seqlens=cu_seqlens, backend=backend)


PROBES = tuple(
    Probe(
        operator="diagonal_scan",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda _: (),
        wide=("log_decay", "state"),
        timed=("log_decay", "x"),
        carried={"state": 1},
        step=step,
        packed=_packed,
        loose=("log_decay",),
    )
    for name, draw, step in (
        ("mild", _draw, _step),
        ("hard, from nothing", _draw_hard_from_nothing, None),
        ("complex", _draw_complex, _step),
    )
)

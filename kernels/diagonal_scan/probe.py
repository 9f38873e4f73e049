"""How this operator is tried.

Letters: B batch, T time, C channels, N modes of a channel.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.diagonal_scan.ops import diagonal_scan, diagonal_scan_step, mode_scan, mode_scan_step
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


def _draw_modes(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Real modes, those of every third channel hard."""
    channels, modes = sizes.heads * sizes.value, sizes.key
    log_pole = gates(generator, channels, modes)
    log_pole[::3] *= 250
    return {
        "log_pole": log_pole,
        "weight": normal(generator, channels, modes) * modes**-0.5,
        "u": normal(generator, sizes.batch, sizes.time, channels),
        "state": normal(generator, sizes.batch, channels, modes),
    }


def _draw_pairs_from_nothing(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Complex modes, others for each entry of the batch."""
    inputs = _draw_modes(sizes, generator)
    del inputs["state"]
    entries = 1 + torch.rand(sizes.batch, 1, 1, generator=generator)
    poles, weights = entries * inputs["log_pole"], entries * inputs["weight"]
    inputs["log_pole"] = torch.complex(poles, 3 * normal(generator, *poles.shape))
    inputs["weight"] = torch.complex(weights, normal(generator, *weights.shape) * sizes.key**-0.5)
    return inputs


def _draw_pairs(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw_modes(sizes, generator)
    turned = {"log_pole": 3.0, "weight": sizes.key**-0.5, "state": 1.0}
    return {
        name: torch.complex(x, turned[name] * normal(generator, *x.shape)) if name in turned else x
        for name, x in inputs.items()
    }


def _call_modes(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return mode_scan(x["log_pole"], x["weight"], x["u"], x.get("state"), backend=backend)


def _step_modes(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return mode_scan_step(x["log_pole"].exp(), x["weight"], x["u"], x["state"], backend=backend)


def _packed_modes(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return mode_scan(
        x["log_pole"], x["weight"], x["u"], x.get("state"), cu_seqlens=cu_seqlens, backend=backend
    )


SCANS = tuple(
    Probe(
        operator="diagonal_scan",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda _: (),
        kernels=("forward", "backward", "step"),
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
MODES = tuple(
    Probe(
        operator="diagonal_scan",
        name=name,
        draw=draw,
        call=_call_modes,
        widths=lambda sizes: (sizes.key,),
        kernels=("modes_forward", "modes_backward", "modes_step"),
        wide=("log_pole", "weight", "state"),
        timed=("u",),
        carried={"state": 1},
        step=step,
        packed=_packed_modes,
        loose=("log_pole",),
    )
    for name, draw, step in (
        ("real modes", _draw_modes, _step_modes),
        ("complex modes", _draw_pairs, _step_modes),
        ("complex modes by entry, from nothing", _draw_pairs_from_nothing, None),
    )
)
PROBES = (*SCANS, *MODES)

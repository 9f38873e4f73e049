"""How this operator is tried.

Letters: B batch, T time, H heads, K key, V value.
"""

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from kernels.backend import Backend
from kernels.channel_delta.ops import channel_delta, channel_delta_step
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, time, heads = sizes.batch, sizes.time, sizes.heads
    return {
        "q": normalize(normal(generator, batch, time, heads, sizes.key), dim=-1),
        "k": normalize(normal(generator, batch, time, heads, sizes.key), dim=-1),
        "v": normal(generator, batch, time, heads, sizes.value),
        "log_decay": gates(generator, batch, time, heads, sizes.key),
        "beta": torch.rand(batch, time, heads, generator=generator),
        "state": normal(generator, batch, heads, sizes.key, sizes.value),
    }


def _draw_some_hard(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Mild decays in the first half of the channels, hard ones among mild ones in the others."""
    inputs = _draw(sizes, generator)
    half = sizes.key // 2
    inputs["log_decay"][..., half:] = some_hard(
        generator, sizes.batch, sizes.time, sizes.heads, sizes.key - half
    )
    return inputs


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return channel_delta(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], x.get("state"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return channel_delta_step(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], x["state"], backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    state = x.get("state")
    return channel_delta(
        x["q"], x["k"], x["v"], x["log_decay"], x["beta"], state, cu_seqlens=cu_seqlens, backend=backend
    )


PROBES = (
    Probe(
        operator="channel_delta",
        name="mild and hard decays",
        draw=_draw_some_hard,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        wide=("log_decay", "beta", "state"),
        timed=("q", "k", "v", "log_decay", "beta"),
        carried={"state": 1},
        step=_step,
        packed=_packed,
        loose=("log_decay", "beta"),
    ),
)

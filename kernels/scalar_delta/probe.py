"""How this operator is tried.

Letters: B batch, T time, H heads, G groups that share q and k, K key, V value.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard
from kernels.scalar_delta.ops import scalar_delta, scalar_delta_step


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, time, heads, groups = sizes.batch, sizes.time, sizes.heads, sizes.groups
    return {
        "q": normalize(normal(generator, batch, time, groups, sizes.key), dim=-1),
        "k": normalize(normal(generator, batch, time, groups, sizes.key), dim=-1),
        "v": normal(generator, batch, time, heads, sizes.value),
        "log_decay": gates(generator, batch, time, heads),
        "beta": torch.rand(batch, time, heads, generator=generator),
        "state": normal(generator, batch, heads, sizes.key, sizes.value),
    }


def _draw_some_hard(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Mild decays in the first head, hard ones among mild ones in the others: what they hide, it still shows."""
    inputs = _draw(sizes, generator)
    shape = (sizes.batch, sizes.time, sizes.heads - 1)
    inputs["log_decay"][..., 1:] = some_hard(generator, *shape)
    return inputs


def _draw_strong(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Writes that turn what a key holds around, and no decay."""
    inputs = _draw(sizes, generator)
    inputs["beta"] = 2.0 - 0.2 * inputs["beta"]
    del inputs["log_decay"]
    return inputs


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    gate, state = x.get("log_decay"), x.get("state")
    return scalar_delta(x["q"], x["k"], x["v"], gate, x["beta"], state, backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    gate = x.get("log_decay")
    return scalar_delta_step(x["q"], x["k"], x["v"], gate, x["beta"], x["state"], backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    gate, state = x.get("log_decay"), x.get("state")
    return scalar_delta(
        x["q"], x["k"], x["v"], gate, x["beta"], state, cu_seqlens=cu_seqlens, backend=backend
    )


_MILD_AND_HARD = Probe(
    operator="scalar_delta",
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
)
PROBES = (
    _MILD_AND_HARD,
    # Documents are told apart where decays are, and cost as much again to try.
    replace(_MILD_AND_HARD, name="strong without decay", draw=_draw_strong, packed=None),
)

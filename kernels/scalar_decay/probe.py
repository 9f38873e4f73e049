"""How this operator is tried.

Letters: B batch, T time, H heads, G groups that share q and k, K key, V value.
"""

from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard
from kernels.scalar_decay.ops import scalar_decay, scalar_decay_step


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, time, heads, groups = sizes.batch, sizes.time, sizes.heads, sizes.groups
    scale = sizes.key**-0.5
    return {
        "q": normal(generator, batch, time, groups, sizes.key) * scale,
        "k": normal(generator, batch, time, groups, sizes.key),
        "v": normal(generator, batch, time, heads, sizes.value),
        "log_decay": gates(generator, batch, time, heads),
        "state": normal(generator, batch, heads, sizes.key, sizes.value),
    }


def _draw_hard(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    shape = (sizes.batch, sizes.time, sizes.heads)
    return {**_draw(sizes, generator), "log_decay": some_hard(generator, *shape)}


def _draw_undecayed(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw(sizes, generator)
    del inputs["log_decay"]
    return inputs


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return scalar_decay(x["q"], x["k"], x["v"], x.get("log_decay"), x.get("state"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return scalar_decay_step(x["q"], x["k"], x["v"], x.get("log_decay"), x["state"], backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    log_decay, state = x.get("log_decay"), x.get("state")
    return scalar_decay(x["q"], x["k"], x["v"], log_decay, state, cu_seqlens=cu_seqlens, backend=backend)


PROBES = tuple(
    Probe(
        operator="scalar_decay",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        wide=("log_decay", "state"),
        timed=("q", "k", "v", "log_decay"),
        carried={"state": 1},
        step=_step,
        packed=_packed,
        loose=("log_decay",),
    )
    for name, draw in (("mild", _draw), ("hard", _draw_hard), ("no decay", _draw_undecayed))
)

"""How this operator is tried.

Letters: B batch, T time, H heads, K key, V value.
"""

from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.channel_decay.ops import channel_decay, channel_decay_step
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    shape = (sizes.batch, sizes.time, sizes.heads, sizes.key)
    return {
        "q": normal(generator, *shape) * sizes.key**-0.5,
        "k": normal(generator, *shape),
        "v": normal(generator, *shape[:3], sizes.value),
        "log_decay": gates(generator, *shape),
        "state": normal(generator, sizes.batch, sizes.heads, sizes.key, sizes.value),
    }


def _draw_hard(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw(sizes, generator)
    return {**inputs, "log_decay": some_hard(generator, *inputs["log_decay"].shape)}


def _draw_bonus(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    return {**_draw(sizes, generator), "bonus": normal(generator, sizes.heads, sizes.key)}


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    inputs = (x["q"], x["k"], x["v"], x["log_decay"], x.get("state"))
    return channel_decay(*inputs, bonus=x.get("bonus"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    inputs = (x["q"], x["k"], x["v"], x["log_decay"], x["state"])
    return channel_decay_step(*inputs, bonus=x.get("bonus"), backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    inputs = (x["q"], x["k"], x["v"], x["log_decay"], x.get("state"))
    return channel_decay(*inputs, bonus=x.get("bonus"), cu_seqlens=cu_seqlens, backend=backend)


PROBES = tuple(
    Probe(
        operator="channel_decay",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        kernels=kernels,
        wide=("log_decay", "bonus", "state"),
        timed=("q", "k", "v", "log_decay"),
        carried={"state": 1},
        step=_step,
        packed=_packed if name == "hard" else None,
        loose=("log_decay", "bonus"),
    )
    for name, draw, kernels in (
        ("hard", _draw_hard, ()),
        # The kernels that walk the chunks know of no bonus.
        ("bonus", _draw_bonus, ("pairs", "pairs_backward", "step")),
    )
)

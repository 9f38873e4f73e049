"""How this operator is tried.

Letters: B batch, T time, R ranks (rows that a token writes and reads), H heads, K key, V value.
"""

from functools import partial

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard
from kernels.trapezoid.ops import trapezoid, trapezoid_step

TIMED = ("q", "k", "v", "log_decay", "late", "fresh")
CARRIED = {"state": 1, "previous_k": 2, "previous_v": 3}


def _draw(sizes: Sizes, generator: Generator, *, ranks: int, hard: bool) -> dict[str, Tensor]:
    batch, time, heads = sizes.batch, sizes.time, sizes.heads
    strengths = torch.rand(2, batch, time, heads, generator=generator)
    return {
        "q": normal(generator, batch, time, ranks, heads, sizes.key) * sizes.key**-0.5,
        "k": normal(generator, batch, time, ranks, heads, sizes.key),
        "v": normal(generator, batch, time, ranks, heads, sizes.value),
        "log_decay": (some_hard if hard else gates)(generator, batch, time, heads),
        "late": strengths[0],
        "fresh": strengths[1],
        "state": normal(generator, batch, heads, sizes.key, sizes.value),
        "previous_k": normal(generator, batch, ranks, heads, sizes.key),
        "previous_v": normal(generator, batch, ranks, heads, sizes.value),
    }


def _draw_hard(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """The beginning of a text: no state, and no token before."""
    inputs = _draw(sizes, generator, ranks=1, hard=True)
    for name in CARRIED:
        del inputs[name]
    return inputs


def _previous(x: Inputs) -> tuple[Tensor, Tensor] | None:
    return (x["previous_k"], x["previous_v"]) if "previous_k" in x else None


def _call(backend: Backend, x: Inputs, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """The last token's keys and values go with the state: the next call writes them late."""
    q, k, v, log_decay, late, fresh = (x[name] for name in TIMED)
    output, last = trapezoid(
        q,
        k,
        v,
        log_decay,
        late,
        fresh,
        x.get("state"),
        _previous(x),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return output, last, x["k"][:, -1].clone(), x["v"][:, -1].clone()


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return _call(backend, x, cu_seqlens)[:2]


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    q, k, v, log_decay, late, fresh = (x[name] for name in TIMED)
    previous = x["previous_k"], x["previous_v"]
    return trapezoid_step(q, k, v, log_decay, late, fresh, x["state"], previous, backend=backend)


PROBES = tuple(
    Probe(
        operator="trapezoid",
        name=name,
        draw=draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        wide=("log_decay", "late", "fresh", "state"),
        timed=TIMED,
        carried=CARRIED,
        step=step,
        packed=_packed,
        loose=("log_decay", "late", "fresh"),
    )
    for name, draw, step in (
        ("three ranks", partial(_draw, ranks=3, hard=False), _step),
        ("hard", _draw_hard, None),
    )
)

"""How this operator is tried.

Letters: B batch, T time, H heads, K key, V value.
"""

from torch import Generator, Tensor
from torch.nn.functional import normalize

from kernels.backend import Backend
from kernels.low_rank_delta.ops import low_rank_delta, low_rank_delta_step
from kernels.probe import Inputs, Probe, Sizes, gates, normal, some_hard


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """As in the layer: a is −κ and b is κ ⊙ η, κ of unit length; but every other channel has hard decays among mild ones."""
    shape = (sizes.batch, sizes.time, sizes.heads, sizes.key)
    scale = sizes.key**-0.5
    unit = normalize(normal(generator, *shape), dim=-1)
    log_decay = gates(generator, *shape, hardest=-0.6)
    log_decay[..., ::2] = some_hard(generator, *shape)[..., ::2]
    return {
        "q": normal(generator, *shape) * scale,
        "k": normal(generator, *shape) * scale,
        "v": normal(generator, *shape[:3], sizes.value),
        "log_decay": log_decay,
        "a": -unit,
        "b": unit * gates(generator, *shape, hardest=1.0),
        "state": normal(generator, sizes.batch, sizes.heads, sizes.key, sizes.value),
    }


def _timed(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x["q"], x["k"], x["v"], x["log_decay"], x["a"], x["b"]


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return low_rank_delta(*_timed(x), x.get("state"), backend=backend)


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return low_rank_delta_step(*_timed(x), x["state"], backend=backend)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return low_rank_delta(*_timed(x), x.get("state"), cu_seqlens=cu_seqlens, backend=backend)


PROBES = (
    Probe(
        operator="low_rank_delta",
        name="mild and hard",
        draw=_draw,
        call=_call,
        widths=lambda sizes: (sizes.key, sizes.value),
        wide=("log_decay", "state"),
        timed=("q", "k", "v", "log_decay", "a", "b"),
        carried={"state": 1},
        step=_step,
        packed=_packed,
        loose=("log_decay",),
    ),
)

"""How this operator is tried.

Letters: B batch, T time, C channels, W taps.
"""

from collections.abc import Callable

from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Call, Inputs, Probe, Sizes, normal
from kernels.short_convolution.ops import Activation, short_convolution, short_convolution_step


def _taps(sizes: Sizes) -> int:
    """Four at most sizes, as in most models; more where keys are wide."""
    return max(4, sizes.key // 16)


def _draw(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, channels, taps = sizes.batch, sizes.heads * sizes.value, _taps(sizes)
    return {
        "x": normal(generator, batch, sizes.time, channels),
        "weight": normal(generator, channels, taps),
        "bias": normal(generator, channels),
        "tail": normal(generator, batch, taps - 1, channels),
    }


def _draw_plain(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """With a weight for each entry of the batch, and nothing before the text."""
    inputs = _draw(sizes, generator)
    return {"x": inputs["x"], "weight": normal(generator, sizes.batch, *inputs["weight"].shape)}


def _call(activation: Activation | None) -> Call:
    def call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
        return short_convolution(
            x["x"], x["weight"], x.get("bias"), x.get("tail"), activation=activation, backend=backend
        )

    return call


def _packed(activation: Activation | None) -> Callable[[Backend, Inputs, Tensor], tuple[Tensor, ...]]:
    def call(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        return short_convolution(
            *(x["x"], x["weight"], x.get("bias"), x.get("tail")),
            activation=activation,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    return call


def _step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return short_convolution_step(
        x["x"], x["weight"], x["bias"], x["tail"], activation="silu", backend=backend
    )


def _probe(
    name: str, draw: Callable[[Sizes, Generator], dict[str, Tensor]], activation: Activation | None
) -> Probe:
    return Probe(
        operator="short_convolution",
        name=name,
        draw=draw,
        call=_call(activation),
        widths=lambda sizes: (_taps(sizes),),
        wide=("weight", "bias"),
        timed=("x",),
        carried={"tail": 1},
        step=_step if activation else None,
        packed=_packed(activation),
    )


PROBES = (
    _probe("activated", _draw, "silu"),
    _probe("plain, by entry", _draw_plain, None),
)

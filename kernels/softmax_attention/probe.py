"""How this operator is tried.

Letters: B batch, T queries, S keys, H heads, G groups that share k and v, K key, V value.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, normal
from kernels.softmax_attention.ops import (
    OPERATOR,
    softmax_attention,
    softmax_attention_step,
    softmax_attention_with_sums,
)

PAST, CACHED = 37, 300
"""Keys before the first query; slots besides those of the queries, which are more than one part of a step's cache."""

SPANS = (20, 70, 300)
TRAINING = ("forward", "backward_queries", "backward_keys")
STEP = ("step", "join")


def _widths(sizes: Sizes) -> tuple[int, ...]:
    return sizes.key, sizes.value


def _draw(sizes: Sizes, generator: Generator, past: int = 0) -> dict[str, Tensor]:
    batch, keys, groups = sizes.batch, past + sizes.time, sizes.groups
    return {
        "q": normal(generator, batch, sizes.time, sizes.heads, sizes.key),
        "k": normal(generator, batch, keys, groups, sizes.key),
        "v": normal(generator, batch, keys, groups, sizes.value),
    }


def _draw_sinks(sizes: Sizes, generator: Generator) -> Tensor:
    """By batch entry where there are several, else for all."""
    lead = (sizes.batch,) if sizes.batch > 1 else ()
    return normal(generator, *lead, sizes.heads)


def _draw_all(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    return {
        **_draw(sizes, generator, PAST),
        "slopes": 0.5 ** torch.arange(1.0, sizes.heads + 1),
        "sink_logits": _draw_sinks(sizes, generator),
    }


def _draw_cache(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw(sizes, generator, CACHED)
    return {**inputs, "q": inputs["q"][:, 0]}


def _draw_cache_all(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    inputs = _draw_cache(sizes, generator)
    return {
        **inputs,
        "slopes": 0.1 ** torch.arange(1.0, sizes.heads + 1),
        "sink_logits": _draw_sinks(sizes, generator),
        "distance": torch.randperm(inputs["k"].shape[1], generator=generator),
    }


def _draw_latents(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """So many heads that they take two blocks, over latents whose first columns are the values."""
    keys, heads = CACHED + sizes.time, 33 * sizes.heads
    return {
        "q": normal(generator, sizes.batch, heads, sizes.key),
        "latents": normal(generator, sizes.batch, keys, 1, sizes.key),
        "columns": torch.arange(min(sizes.key, sizes.value)),
    }


def _spans(x: Inputs) -> tuple[int, ...]:
    """Windows of the heads: narrow, wider than a tile, wider than the text."""
    heads = x["q"].shape[-2]
    return (SPANS * heads)[:heads]


def _call(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return (softmax_attention(x["q"], x["k"], x["v"], backend=backend),)


def _packed(backend: Backend, x: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return (softmax_attention(x["q"], x["k"], x["v"], cu_seqlens=cu_seqlens, backend=backend),)


def _call_all(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return softmax_attention_with_sums(
        x["q"],
        x["k"],
        x["v"],
        spans=_spans(x),
        soft_cap=3.0,
        slopes=x["slopes"],
        sinks=5,
        skipped=11,
        sink_logits=x["sink_logits"],
        backend=backend,
    )


def _read(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    visible = x["k"].shape[1] - 2
    return (softmax_attention_step(x["q"], x["k"], x["v"], visible=visible, backend=backend),)


def _read_all(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    output = softmax_attention_step(
        x["q"],
        x["k"],
        x["v"],
        visible=x["k"].shape[1] - 2,
        soft_cap=3.0,
        slopes=x["slopes"],
        sink_logits=x["sink_logits"],
        spans=_spans(x),
        sinks=3,
        distance=x["distance"],
        backend=backend,
    )
    return (output,)


def _read_latents(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    latents = x["latents"]
    values = latents[..., : len(x["columns"])]
    visible = latents.shape[1] - 2
    return (softmax_attention_step(x["q"], latents, values, visible=visible, backend=backend),)


PROBES = (
    Probe(
        operator=OPERATOR,
        name="causal",
        draw=_draw,
        call=_call,
        widths=_widths,
        kernels=TRAINING,
        timed=("q", "k", "v"),
        packed=_packed,
    ),
    Probe(
        operator=OPERATOR,
        name="all options",
        draw=_draw_all,
        call=_call_all,
        widths=_widths,
        wide=("slopes", "sink_logits"),
        timed=("q",),
        kernels=TRAINING,
        loose=("slopes", "sink_logits"),
    ),
    Probe(
        operator=OPERATOR,
        name="cache",
        draw=_draw_cache,
        call=_read,
        widths=_widths,
        kernels=STEP,
        backward=False,
    ),
    Probe(
        operator=OPERATOR,
        name="cache, all options",
        draw=_draw_cache_all,
        call=_read_all,
        widths=_widths,
        kernels=STEP,
        wide=("slopes", "sink_logits"),
        backward=False,
    ),
    Probe(
        operator=OPERATOR,
        name="latents",
        draw=_draw_latents,
        call=_read_latents,
        widths=lambda sizes: (sizes.key, min(sizes.key, sizes.value)),
        kernels=STEP,
        backward=False,
    ),
)

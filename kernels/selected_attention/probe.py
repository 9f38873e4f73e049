"""How this operator is tried.

Letters: B batch, T queries, S keys, J index heads, I index width, N chosen keys, H heads, K key, V value.
"""

import torch
from torch import Generator, Tensor

from kernels.backend import Backend
from kernels.probe import Call, Draw, Inputs, Probe, Sizes, normal
from kernels.selected_attention.ops import index_divergence, index_scores, select_keys, selected_attention

MORE = 20
"""Keys in front of the first query."""


def _index(sizes: Sizes, generator: Generator, heads: int, queries: int | None = None) -> dict[str, Tensor]:
    batch, time, width = sizes.batch, queries or sizes.time, sizes.key
    return {
        "q": normal(generator, batch, time, heads, width) * width**-0.5,
        "k": normal(generator, batch, sizes.time + MORE, width),
        "weights": normal(generator, batch, time, heads) * heads**-0.5,
    }


def _few(time: int) -> int:
    """So many queries of a short text, where each is a program of its own and a few tell as much as all."""
    return time if time >= 256 else max(min(2, time), time // 16)


def _chosen(sizes: Sizes, generator: Generator) -> Tensor:
    """Up to 40 places [B, T, N] of those that a query sees, ascending, some of them none and all of the last of several queries'."""
    batch, time, keys = sizes.batch, _few(sizes.time), sizes.time + MORE
    ranks = torch.rand(batch, time, keys, generator=generator)
    ranks.masked_fill_(torch.arange(keys) > torch.arange(keys - time, keys)[:, None], -1)
    best = ranks.topk(min(40, keys), dim=-1)
    chosen = best.indices.masked_fill(best.values < 0.2, -1)
    if time > 1:
        chosen[:, -1] = -1
    return chosen.sort(-1).values


def _draw_choice(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    """Small whole numbers and quarters, so that every score is exact and many are equal."""
    drawn = _index(sizes, generator, 3 * sizes.heads)
    return {
        "q": (drawn["q"] * sizes.key**0.5).round().clamp(-2, 2),
        "k": drawn["k"].round().clamp(-2, 2),
        "weights": (4 * drawn["weights"]).round() / 4,
    }


def _draw_places(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    index = _index(sizes, generator, 40 + sizes.heads, _few(sizes.time))
    return {**index, "chosen": _chosen(sizes, generator)}


def _draw_all(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    return _index(sizes, generator, sizes.heads)


def _draw_divergence(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    shape = (sizes.heads + 1, sizes.value)
    return {
        **_index(sizes, generator, sizes.heads),
        "queries": 2 * normal(generator, sizes.batch, sizes.time, *shape),
        "keys": normal(generator, sizes.batch, sizes.time + MORE, *shape),
    }


def _draw_attention(sizes: Sizes, generator: Generator) -> dict[str, Tensor]:
    batch, key = sizes.batch, sizes.key + sizes.value
    return {
        "q": normal(generator, batch, _few(sizes.time), 32 + sizes.heads, key),
        "k": normal(generator, batch, sizes.time + MORE, key),
        "chosen": _chosen(sizes, generator),
        "columns": torch.arange(sizes.value),
    }


def _select(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    # The first queries see fewer keys than that.
    return (select_keys(x["q"], x["k"], x["weights"], keep=MORE + 6, backend=backend),)


def _select_step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return _select(backend, {"q": x["q"][:, None], "k": x["k"], "weights": x["weights"][:, None]})


def _places(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    scores = index_scores(x["q"], x["k"], x["weights"], x["chosen"], backend=backend)
    return (scores.masked_fill(x["chosen"] < 0, 0),)


def _all(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    scores = index_scores(x["q"], x["k"], x["weights"], None, backend=backend)
    seen = torch.arange(scores.shape[2], device=scores.device) <= torch.arange(
        MORE, scores.shape[2], device=scores.device
    ).unsqueeze(1)
    return (scores.masked_fill(~seen, 0),)


def _divergence(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    return (index_divergence(x["q"], x["k"], x["weights"], x["queries"], x["keys"], backend=backend),)


def _attention(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    value = len(x["columns"])
    output, shares = selected_attention(x["q"], x["k"], x["chosen"], value=value, backend=backend)
    assert shares is not None
    return output, shares


def _attention_step(backend: Backend, x: Inputs) -> tuple[Tensor, ...]:
    # So many that they are dealt out to several programs; a key that is chosen again counts again.
    chosen = x["chosen"].repeat(1, 8)
    return _attention(backend, {**x, "q": x["q"][:, None], "chosen": chosen[:, None]})


INDEX = (
    "scores",
    "scores_step",
    "select",
    "select_step",
    "places",
    "places_backward",
    "queries_backward",
    "keys_backward",
)
DENSE = ("masses", "index_masses", "difference")
ATTENTION = ("attend", "attend_step", "merge", "shares", "attend_backward", "choices_backward")


def _index_probe(
    name: str, draw: Draw, call: Call, *, step: Call | None = None, backward: bool = True
) -> Probe:
    return Probe(
        operator="selected_attention",
        name=name,
        draw=draw,
        call=call,
        widths=lambda sizes: (sizes.key,),
        kernels=INDEX,
        timed=("q", "weights"),
        step=step,
        backward=backward,
        loose=("weights",),
    )


PROBES = (
    _index_probe("choice", _draw_choice, _select, step=_select_step, backward=False),
    _index_probe("scores at places", _draw_places, _places),
    _index_probe("all scores", _draw_all, _all),
    Probe(
        operator="selected_attention",
        name="divergence",
        draw=_draw_divergence,
        call=_divergence,
        widths=lambda sizes: (sizes.key, sizes.value),
        kernels=DENSE,
        timed=("q", "weights", "queries"),
        loose=("weights",),
    ),
    Probe(
        operator="selected_attention",
        name="attention",
        draw=_draw_attention,
        call=_attention,
        widths=lambda sizes: (sizes.value, sizes.key),
        kernels=ATTENTION,
        timed=("q", "chosen"),
        step=_attention_step,
    ),
)

"""Causal softmax attention, one query after another: the meaning of this operator.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825; the rest as `options` says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import working_dtype
from kernels.softmax_attention.options import Options


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    options: Options,
    distance: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query q [B, H, K] over k [B, S, G, K] and v [B, S, G, V], which lie `distance` [S] tokens back.

    What is `hidden` [H, S] from a head adds nothing. Returns [B, H, V] and the logarithm of the denominator [B, H].
    """
    dtype = working_dtype(q, k, v)
    groups = k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (groups, -1))
        scores = torch.einsum("bgrk,bsgk->bgrs", grouped, k.to(dtype)) * scale
        if options.soft_cap is not None:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        if options.slopes is not None:
            assert distance is not None
            scores = scores - options.slopes.to(dtype).view(groups, -1, 1) * distance
        if hidden is not None:
            # The least number and not -inf, so that a head that sees nothing answers nought and not NaN.
            nowhere = hidden.view(groups, -1, hidden.shape[-1])
            scores = scores.masked_fill(nowhere, torch.finfo(dtype).min)
        logits = scores
        if options.sink_logits is not None:
            sink = options.sink_logits.to(dtype).unflatten(-1, (groups, -1)).unsqueeze(-1)
            logits = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = logits.softmax(-1)[..., : k.shape[1]]
        if hidden is not None:
            weights = weights.masked_fill(nowhere, 0.0)
        output = torch.einsum("bgrs,bsgv->bgrv", weights, v.to(dtype))
        return output.flatten(1, 2).to(v.dtype), logits.logsumexp(-1).flatten(1, 2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, options: Options
) -> tuple[Tensor, Tensor]:
    """Each query over the keys that it sees: [B, T, H, V], and the logarithms of the denominators [B, T, H]."""
    skipped, results = options.skipped, []
    position = torch.arange(k.shape[1], device=k.device)
    position = torch.where(position < options.sinks, position, position + skipped)
    for t in range(q.shape[1]):
        here = position[k.shape[1] - q.shape[1] + t]
        seen = position <= here
        if window is not None:
            seen = seen & ((position > here - window) | (position < options.sinks))
        distance = here - position[seen]
        results.append(step(q[:, t], k[:, seen], v[:, seen], scale, options, distance))
    outputs, sums = zip(*results, strict=True)
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)


def spanned(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], scale: float, options: Options
) -> tuple[Tensor, Tensor]:
    """`softmax_attention`, each head with a window of its own."""
    shared, results = q.shape[2] // k.shape[2], []
    for head, window in enumerate(spans):
        own, group = slice(head, head + 1), slice(head // shared, head // shared + 1)
        results.append(
            softmax_attention(q[:, :, own], k[:, :, group], v[:, :, group], window, scale, options.of(own))
        )
    outputs, sums = zip(*results, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)

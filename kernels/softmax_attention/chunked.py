"""Causal softmax attention in large operations, the window in blocks of queries.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value,
n blocks of c queries, each over a span of c + w - 1 keys.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825; the rest as `options` says.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.backend import working_dtype
from kernels.softmax_attention.banded import banded
from kernels.softmax_attention.options import Options

EXPLICIT_SCORES = 2**16
"""Up to so many scores a head, plain products beat SDPA where the fused CPU kernel refuses (K ≠ V)."""

DENSE_KEYS = 128
"""Up to so many keys a mask over the whole square costs less than cutting it into blocks."""

SMALLEST_BLOCK = 32
"""A narrow window would make blocks too small to keep a matrix product busy."""

QUERY_BLOCK = 128
"""Queries whose scores are held at once where the fused kernel cannot serve."""

TILE_ELEMENTS = 2**19
"""Elements of the cache that a step widens to float32 at once: they must stay in a core's cache."""


def _explicit(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    dtype = working_dtype(q, k, v)
    batch, heads, time, key = q.shape
    groups, shared = k.shape[1], heads // k.shape[1]
    hidden = torch.zeros(visible.shape, dtype=dtype, device=q.device).masked_fill(~visible, -torch.inf)
    queries = q.to(dtype).reshape(batch, groups, shared * time, key)
    scores = (queries @ k.to(dtype).mT).unflatten(2, (shared, time))
    weights = scores.mul(scale).add(hidden.unsqueeze(-3)).softmax(-1)
    output: Tensor = weights.flatten(2, 3) @ v.to(dtype)
    return output.view(batch, heads, time, -1).to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """q [B, H, T, K], k [B, G, S, K], v [B, G, S, V], visible [B or 1, 1, T, S], None for the causal square."""
    heads, time, key = q.shape[1:]
    value = v.shape[-1]
    if key != value and q.device.type == "cpu" and time * k.shape[2] <= EXPLICIT_SCORES:
        if visible is None:
            visible = torch.ones(1, 1, time, time, dtype=torch.bool, device=q.device).tril()
        return _explicit(q, k, v, visible, scale)
    # Zero columns change neither score nor value, and the fused kernels ask for equal widths.
    width = max(key, value)
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    output = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=heads != k.shape[1],
    )
    return output[..., :value]


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    time, keys = q.shape[1], k.shape[1]
    visible = None
    if keys != time or window is not None:
        position = torch.arange(keys - time, keys, device=q.device).unsqueeze(1)
        key = torch.arange(keys, device=q.device)
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        visible = visible.view(1, 1, time, keys)
    return _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, scale).transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scale: float) -> Tensor:
    """For fused kernels: blocks stand in the batch axis of `_attend`, batch and heads in its head axis, so that one mask serves all."""
    batch, time, heads, key = q.shape
    groups, keys = k.shape[2:0:-1]
    count = -(-time // block)
    span = block + window - 1
    front = count * block + window - 1
    queries = pad(q, (0, 0, 0, 0, count * block - time, 0)).unflatten(1, (count, block))
    queries = queries.permute(1, 0, 3, 2, 4).reshape(count, batch * heads, block, key)

    def fold(x: Tensor) -> Tensor:
        """[B, S, G, D] → [n, B·G, span, D]: block b's first query sees the first `window` keys of its span."""
        x = x[:, keys - front :] if keys >= front else pad(x, (0, 0, 0, 0, front - keys, 0))
        return x.unfold(1, span, block).permute(1, 0, 2, 4, 3).reshape(count, batch * groups, span, -1)

    query = torch.arange(block, device=q.device).unsqueeze(1)
    slot = torch.arange(span, device=q.device)
    band = (slot >= query) & (slot < query + window)
    real = slot >= (front - keys) - torch.arange(count, device=q.device).unsqueeze(1) * block
    # The queries in front of the first are padding and see nothing; what they see instead is cut off below.
    padding = (query < count * block - time) & (torch.arange(count, device=q.device) == 0)[:, None, None]
    visible = ((band & real.unsqueeze(1)) | padding).unsqueeze(1)
    output = _attend(queries, fold(k), fold(v), visible, scale)
    blocks: Tensor = output.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    return blocks.reshape(batch, count * block, heads, -1)[:, count * block - time :]


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and k.shape[1] > DENSE_KEYS:
        if q.device.type == "cpu":
            return banded(q, k, v, window, scale)[0]
        block = min(max(window, SMALLEST_BLOCK), q.shape[1])
        return _windowed(q, k, v, window, block, scale)
    return _causal(q, k, v, window, scale)


def _bias(
    query: Tensor, key: Tensor, pinned: int, window: int | None, groups: int, options: Options
) -> Tensor:
    """What is added to scores, [c, s] or [G, R, c, s]: -inf where a key is hidden, and what the slopes take.

    query [c] and key [s] are indices among the keys; the first `pinned` of `key` are the sinks.
    """
    band = torch.arange(len(key), device=key.device) >= pinned
    query = query.unsqueeze(1)
    hidden = (key > query) | (band & (key < pinned))
    if window is not None:
        hidden |= band & (key <= query - window)
    dtype = torch.float32 if options.slopes is None else working_dtype(options.slopes)
    bias = torch.zeros(hidden.shape, device=key.device, dtype=dtype).masked_fill(hidden, -torch.inf)
    if options.slopes is None:
        return bias
    distance = (query - key + ~band * options.skipped).clamp(min=0)
    return bias - options.slopes.to(dtype).view(groups, -1, 1, 1) * distance


class _SoftmaxWithSum(torch.autograd.Function):
    """Weights and the logarithm of their denominator. By hand, because autograd would keep the scores beside the weights
    and raise them to their exponentials twice more."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights, scores.amax(-1) - weights.amax(-1).log()

    @staticmethod
    def backward(ctx: Any, weights_gradient: Tensor, sum_gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        taken = torch.linalg.vecdot(weights, weights_gradient) - sum_gradient
        gradient: Tensor = (weights_gradient - taken.unsqueeze(-1)).mul_(weights)
        return gradient


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, options: Options, *, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Explicit products of one block of queries after another with the keys that it may see, a piece each block.

    The keys are cut once and joined for each block, so that their gradient is joined once too.
    """
    dtype = working_dtype(q, k, v)
    time, (keys, groups) = q.shape[1], k.shape[1:3]
    past = keys - time
    pinned = min(options.sinks, keys) if window is not None or options.skipped else 0
    first = 0 if window is None else max(0, past - window + 1)
    if options.skipped:
        first = max(first, pinned)
    sizes = [past - first] * (past > first) + [
        min(QUERY_BLOCK, time - at) for at in range(0, time, QUERY_BLOCK)
    ]
    starts = list(accumulate(sizes, initial=first))
    k, v = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    own_k, own_v = k[:, :, first:].split(sizes, dim=2), v[:, :, first:].split(sizes, dim=2)
    grouped = (q.to(dtype) * scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    outputs, sums = [], []
    biases: dict[tuple[int, int, int | None], Tensor] = {}
    for number, queries in enumerate(grouped.split(QUERY_BLOCK, dim=3)):
        begin = past + number * QUERY_BLOCK
        end = begin + queries.shape[3]
        start = first if window is None else max(first, begin - window + 1)
        pieces = [at for at in range(len(sizes)) if starts[at + 1] > start and starts[at] < end]
        # Of the first piece only what the first query reaches.
        front, *others = pieces
        reach = slice(start - starts[front], None)
        seen_k = [k[:, :, :pinned], own_k[front][:, :, reach], *(own_k[at] for at in others)]
        seen_v = [v[:, :, :pinned], own_v[front][:, :, reach], *(own_v[at] for at in others)]
        # Blocks within the text see their own keys alike; the sinks lie elsewhere for each, if that is counted.
        alike = pinned == 0 or (options.slopes is None and start >= pinned)
        place = (begin - start, end - start, None if alike else begin)
        if place not in biases:
            key = torch.arange(start, end, device=q.device)
            key = torch.cat([torch.arange(pinned, device=q.device), key])
            query = torch.arange(begin, end, device=q.device)
            biases[place] = _bias(query, key, pinned, window, groups, options).to(dtype)
        scores = (queries.flatten(2, 3) @ torch.cat(seen_k, dim=2).mT).unflatten(2, queries.shape[2:4])
        if options.soft_cap is not None:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        scores = scores.add_(biases[place])
        if with_sums:
            weights, total = _SoftmaxWithSum.apply(scores)  # type: ignore[no-untyped-call]
            sums.append(total)
        else:
            weights = scores.softmax(-1)
        outputs.append((weights.flatten(2, 3) @ torch.cat(seen_v, dim=2)).unflatten(2, queries.shape[2:4]))
    output = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)
    if not with_sums:
        return output, None
    total = torch.cat(sums, dim=3).flatten(1, 2).transpose(1, 2)
    if options.sink_logits is None:
        return output, total
    sink = options.sink_logits.to(dtype)
    if sink.dim() == 2:
        sink = sink.unsqueeze(1)
    # The share of the denominator that is not the sink's.
    return output * torch.sigmoid(total - sink).unsqueeze(-1), torch.logaddexp(total, sink.expand_as(total))


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    spans: Sequence[int] | None,
    scale: float,
    options: Options,
    *,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output with whatever the options ask and, if asked for, the logarithms of the denominators [B, T, H]."""
    with torch.autocast(q.device.type, enabled=False):
        if spans is not None:
            return _spanned(q, k, v, spans, scale, options, with_sums=with_sums)
        window = None if window is None or window >= k.shape[1] else window
        if options.plain and not with_sums:
            return _plain(q, k, v, window, scale).to(v.dtype).contiguous(), None
        keys, sinks = k.shape[1], options.sinks if window else 0
        if (
            replace(options, sinks=0).plain
            and q.device.type == "cpu"
            and (window is not None or keys <= DENSE_KEYS)
            and keys - q.shape[1] >= sinks
        ):
            output, total = banded(q, k, v, window or keys, scale, pinned=sinks)
            return output.to(v.dtype).contiguous(), total.contiguous() if with_sums else None
        wanted = with_sums or options.sink_logits is not None
        output, sums = _blocks(q, k, v, window, scale, options, with_sums=wanted)
        return output.to(v.dtype).contiguous(), sums if sums is None else sums.contiguous()


def _spanned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[int],
    scale: float,
    options: Options,
    *,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Each head with a window of its own; heads of one window are taken together."""
    shared = q.shape[2] // k.shape[2]
    outputs, sums, order = [], [], []
    for window in dict.fromkeys(spans):
        heads = [head for head, span in enumerate(spans) if span == window]
        groups = [head // shared for head in heads]
        if heads == [group * shared + own for group in dict.fromkeys(groups) for own in range(shared)]:
            groups = list(dict.fromkeys(groups))
        own_q, own_k, own_v = q[:, :, heads], k[:, :, groups], v[:, :, groups]
        output, total = softmax_attention(
            own_q, own_k, own_v, window, None, scale, options.of(heads), with_sums=with_sums
        )
        outputs.append(output)
        sums += [] if total is None else [total]
        order += heads
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outputs, dim=2)[:, :, back], torch.cat(sums, dim=2)[:, :, back] if with_sums else None


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """q [B, G, R, K] against k [B, S, G, K] → [B, G, R, S] without a copy of k."""
    if k.shape[2] == 1:
        return torch.bmm(q[:, 0], k[:, :, 0].mT).unsqueeze(1)
    return torch.stack([torch.bmm(one, keys.permute(1, 2, 0)) for one, keys in zip(q, k, strict=True)])


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, G, R, S] over v [B, S, G, V] → [B, G, R, V] without a copy of v."""
    if v.shape[2] == 1:
        return torch.bmm(weights[:, 0], v[:, :, 0]).unsqueeze(1)
    return torch.stack(
        [torch.bmm(one, values.transpose(0, 1)) for one, values in zip(weights, v, strict=True)]
    )


def _weights(scores: Tensor, options: Options, distance: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Scores [B, G, R, S] of one query, already scaled, to what each value counts."""
    groups, dtype = scores.shape[1], scores.dtype
    if options.plain and hidden is None:
        return scores.softmax(-1)
    if options.soft_cap is not None:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    if options.slopes is not None:
        assert distance is not None
        scores = scores - options.slopes.to(dtype).view(groups, -1, 1) * distance
    if hidden is not None:
        hidden = hidden.view(groups, -1, hidden.shape[-1])
        # The least number and not -inf, so that a head that sees nothing answers nought and not NaN.
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    weights = scores.softmax(-1)
    if options.sink_logits is not None:
        sink = options.sink_logits.to(dtype).unflatten(-1, (groups, -1))
        weights = weights * torch.sigmoid(scores.logsumexp(-1) - sink).unsqueeze(-1)
    return weights if hidden is None else weights.masked_fill(hidden, 0.0)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    options: Options,
    distance: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """One query q [B, H, K] over k [B, S, G, K] and v [B, S, G, V], S ≥ 1, as `reference.step`."""
    dtype = working_dtype(q, k, v)
    batch, _, groups, key = k.shape
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.unflatten(1, (groups, -1))
        if k.dtype == v.dtype == dtype or q.device.type != "cpu":
            scores = _rows(grouped.to(k.dtype), k).to(dtype) * scale
            return _mix(_weights(scores, options, distance, hidden).to(v.dtype), v).flatten(1, 2)
        # A CPU's products in half types are several times slower than widening the cache tile by tile.
        tile = max(16, TILE_ELEMENTS // (batch * groups * max(key, v.shape[-1])))
        grouped = grouped.to(dtype) * scale
        scores = torch.cat([_rows(grouped, part.to(dtype)) for part in k.split(tile, dim=1)], dim=-1)
        shares = _weights(scores, options, distance, hidden).split(tile, dim=-1)
        output = torch.zeros((), dtype=dtype)
        for weights, part in zip(shares, v.split(tile, dim=1), strict=True):
            output = output + _mix(weights, part.to(dtype))
        return output.flatten(1, 2).to(v.dtype)

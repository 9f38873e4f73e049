"""Causal softmax attention in large operations, the window in blocks of queries.

Letters: B batch, T queries, S keys (S ≥ T), H heads, G groups that share k and v, R = H/G, K key, V value,
n blocks of c queries, each over a span of c + w - 1 keys.
After arXiv:1706.03762; grouped keys arXiv:2305.13245; window arXiv:2310.06825.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.backend import working_dtype

EXPLICIT_SCORES = 2**16
"""Up to so many scores a head, plain products beat SDPA where the fused CPU kernel refuses (K ≠ V)."""

DENSE_KEYS = 128
"""Up to so many keys a mask over the whole square costs less than cutting it into blocks."""

SMALLEST_BLOCK = 32
"""A narrow window would make blocks too small to keep a matrix product busy."""

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
    """Blocks stand in the batch axis of `_attend`, batch and heads in its head axis, so that one mask serves all."""
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


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """All queries at once; shapes as in `ops.softmax_attention`."""
    out_dtype = v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    time, keys = q.shape[1], k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if window is not None and window >= keys:
            window = None
        if window is not None and keys > DENSE_KEYS:
            block = min(max(window, SMALLEST_BLOCK), time)
            return _windowed(q, k, v, window, block, scale).to(out_dtype).contiguous()
        return _causal(q, k, v, window, scale).to(out_dtype).contiguous()


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


def step(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query q [B, H, K] over all of k [B, S, G, K] and v [B, S, G, V], S ≥ 1."""
    dtype = working_dtype(q, k, v)
    batch, _, groups, key = k.shape
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.unflatten(1, (groups, -1))
        if k.dtype == v.dtype == dtype or q.device.type != "cpu":
            scores = _rows(grouped.to(k.dtype), k).to(dtype) * scale
            return _mix(scores.softmax(-1).to(v.dtype), v).flatten(1, 2)
        # A CPU's products in half types are several times slower than widening the cache tile by tile.
        tile = max(16, TILE_ELEMENTS // (batch * groups * max(key, v.shape[-1])))
        grouped = grouped.to(dtype) * scale
        scores = torch.cat([_rows(grouped, part.to(dtype)) for part in k.split(tile, dim=1)], dim=-1)
        output = torch.zeros((), dtype=dtype)
        for weights, part in zip(scores.softmax(-1).split(tile, dim=-1), v.split(tile, dim=1), strict=True):
            output = output + _mix(weights, part.to(dtype))
        return output.flatten(1, 2).to(v.dtype)

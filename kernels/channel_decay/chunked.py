"""Linear recurrence with a decay a key channel, a chunk at a time, with its backward pass written out.

Letters: B batch, T time, H heads, K key, V value, C tokens of a chunk, n chunks, N = B·H rows, M = N·n,
m pairs of blocks.  After arXiv:2312.06635.

Within a chunk, with G the running sum of the log-decays:
    scores   A[i, j] = Σ_d q[i, d] k[j, d] exp(G[i, d] − G[j, d])   for j ≤ i
    values   o = A v + (q exp G) S,   S ← exp(G_C) S + (k exp(G_C − G))ᵀ v

exp(G[i]) · exp(−G[j]) overflows, so the chunk is halved again and again. Of two neighbouring blocks the first holds
the columns j and the second the rows i; what lies between a pair is the decay from j to the end of its block and
from the start of the other to i. All pairs j < i fall into exactly one split, and the pair j = i has no decay.
Decays of a block are products of those of its halves: one exponential a token serves all splits, none is above one,
and no sum grows so large that a mild gate drowns in it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import working_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[M, C, D] → first and second block of each pair [M, m, half, D], views."""
    first, second = x.unflatten(1, (-1, 2, half)).unbind(2)
    return first, second


def _corner(x: Tensor, half: int) -> Tensor:
    """[M, C, C] → rows against columns of each pair [M, m, half, half], a view."""
    pairs = x.shape[1] // (2 * half)
    blocks = x.view(-1, pairs, 2, half, pairs, 2, half)[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _splits(since_start: Tensor, until_end: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every split: its half, and the decays [M, m, half, K] of its rows and columns, valid until the next is asked for.

    since_start [M, C, K] holds each token's own decay, until_end ones. Both are lengthened in place, in the end
    to the whole chunk: what is left at a token of the state before the chunk, and of the token at the chunk's end.
    """
    half = 1
    while half < since_start.shape[1]:
        earlier, rows = _halves(since_start, half)
        columns, _ = _halves(until_end, half)
        yield half, rows, columns
        columns.mul_(rows[:, :, -1:])
        rows.mul_(earlier[:, :, -1:])
        half *= 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for thousands of tiny matrices; bmm takes several times as long over an inner axis of one or two."""
    inner = a.shape[-1]
    if inner > 2:
        return torch.bmm(a, b)
    result = a[..., :1] * b[:, :1]
    return result if inner == 1 else result.addcmul_(a[..., 1:], b[:, 1:])


class _Chunks(torch.autograd.Function):
    """Rows and chunks [N, n, C, *] of one type; written out by hand: autograd would keep the factors of all splits."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows, count, size, _ = k.shape
        queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        since_start = gate.flatten(0, 1).exp()
        until_end = torch.ones_like(since_start)
        scores = since_start.new_zeros(rows * count, size, size)
        for half, high, low in _splits(since_start, until_end):
            left = (_halves(queries, half)[1] * high).flatten(0, 1)
            right = (_halves(keys, half)[0] * low).flatten(0, 1)
            corner = _corner(scores, half)
            corner.copy_(torch.bmm(left, right.mT).view(corner.shape))
        scores.diagonal(dim1=1, dim2=2).copy_((queries * keys).sum(-1))

        output = torch.bmm(scores, values)
        written = torch.bmm((keys * until_end).mT, values).unflatten(0, (rows, count))
        fade = since_start.view(k.shape)[:, :, -1].unsqueeze(-1)
        before = None
        if state is None and count == 1:
            last = written[:, 0]
        else:
            before = torch.empty_like(written)
            last = torch.zeros_like(written[:, 0]) if state is None else state
            for c in range(count):
                before[:, c] = last
                last = torch.addcmul(written[:, c], last, fade[:, c])
            output.baddbmm_(queries * since_start, before.flatten(0, 1))
        ctx.save_for_backward(q, k, v, gate, since_start, until_end, scores, before)
        ctx.has_state = state is not None
        return output.view(v.shape), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_last: Tensor | None) -> Gradients:
        q, k, v, gate, since_start, until_end, scores, before = ctx.saved_tensors
        queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        d_out = torch.zeros_like(values) if d_output is None else d_output.contiguous().view(values.shape)
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        d_values = torch.bmm(scores.mT, d_out)
        d_gate, d_kept, d_first = None, None, None
        if before is not None:
            torch.bmm(d_out, before.flatten(0, 1).mT, out=d_queries).mul_(since_start)
        if d_last is not None or before is not None:
            d_after, d_first = _carry_back(queries * since_start, d_out, since_start, d_last, k.shape)
            d_values.baddbmm_(keys * until_end, d_after)
            d_kept = torch.bmm(values, d_after.mT).mul_(until_end)
            d_gate = (d_kept * keys).cumsum(1).roll(1, 1)
            d_gate[:, 0] = 0.0
            if before is not None:
                d_gate += (d_after * before.flatten(0, 1)).sum(-1).mul_(since_start[:, -1]).unsqueeze(1)

        d_scores = torch.bmm(d_out, values.mT)
        decay = gate.flatten(0, 1).exp()
        for half, high, low in _splits(decay, torch.ones_like(decay)):
            left = (_halves(queries, half)[1] * high).flatten(0, 1)
            right = (_halves(keys, half)[0] * low).flatten(0, 1)
            corner = _corner(d_scores, half).reshape(-1, half, half)
            _halves(d_queries, half)[1].addcmul_(_product(corner, right).view(high.shape), high)
            _halves(d_keys, half)[0].addcmul_(_product(corner.mT, left).view(low.shape), low)

        # Each q[i] stands beside exp(G[i]), each k[j] beside exp(−G[j]). Where nothing lies between them, as in the
        # pair j = i and at the chunk's end, the two parts cancel, but not to the last bit, and what is left would
        # drown the gradient of a hard gate: such pairs are kept out.
        own = (d_queries * queries).addcmul_(d_keys, keys, value=-1)
        own = own.flip(1).cumsum_(1).flip(1)
        d_gate = own if d_gate is None else d_gate.add_(own)
        if d_kept is not None:
            d_keys += d_kept
        same = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_queries.addcmul_(same, keys)
        d_keys.addcmul_(same, queries)
        return (
            d_queries.view(q.shape),
            d_keys.view(k.shape),
            d_values.view(v.shape),
            d_gate.view(gate.shape),
            d_first if ctx.has_state else None,
        )


def _carry_back(
    reading: Tensor, d_out: Tensor, since_start: Tensor, d_last: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk [M, K, V] and of the first one [N, K, V]; reading is q exp G."""
    d_after = torch.bmm(reading.mT, d_out).unflatten(0, shape[:2])
    fade = since_start.view(shape)[:, :, -1].unsqueeze(-1)
    carried = torch.zeros_like(d_after[:, 0]) if d_last is None else d_last
    for c in reversed(range(shape[1])):
        # What reads the state before this chunk gives way to what reaches the state after it.
        before = torch.addcmul(d_after[:, c], carried, fade[:, c])
        d_after[:, c] = carried
        carried = before
    return d_after.flatten(0, 1), carried


def channel_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens or one as long as the text, rounded up to a power of two; shapes as in `ops`."""
    batch, time, heads, key = k.shape
    value = v.shape[-1]
    size = 1 << (min(chunk, time) - 1).bit_length()
    count = -(-time // size)
    dtype = working_dtype(q, k, v, log_decay, bonus, state)

    def fold(x: Tensor) -> Tensor:
        """[B, T, H, D] → [N, n, C, D], zeros behind the end: they write nothing and fade nothing."""
        x = x.to(dtype).transpose(1, 2)
        if count * size != time:
            x = torch.nn.functional.pad(x, (0, 0, 0, count * size - time))
        return x.reshape(batch * heads, count, size, -1)

    with torch.autocast(q.device.type, enabled=False):
        first = None if state is None else state.to(dtype).reshape(-1, key, value)
        reading = q
        if bonus is not None:
            # To read before the update is to read after the one of the token before.
            reading = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
        output, last = _Chunks.apply(fold(reading), fold(k), fold(v), fold(log_decay), first)  # type: ignore[no-untyped-call]
        output = output.view(batch, heads, count * size, value)[:, :, :time].transpose(1, 2)
        if bonus is not None:
            opening = torch.zeros_like(output[:, :1])
            if state is not None:
                opening = torch.einsum("bhk,bhkv->bhv", q[:, 0].to(dtype), state.to(dtype)).unsqueeze(1)
            strength = (q.to(dtype) * k.to(dtype) * bonus.to(dtype).unsqueeze(-3)).sum(-1, keepdim=True)
            output = torch.addcmul(torch.cat([opening, output[:, :-1]], dim=1), strength, v.to(dtype))
        return output.to(v.dtype).contiguous(), last.view(batch, heads, key, value)

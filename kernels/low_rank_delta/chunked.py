"""The generalised delta rule a chunk at a time, with its backward pass written out.

Letters: B batch, T time, H heads, N = B·H rows, K key, V value, C tokens of a chunk (a power of two), n chunks,
M = n·N, m pairs of blocks of h tokens.  After arXiv:2503.14456 (the rule) and arXiv:2312.06635 (decays between blocks).

With G the running sum of the log-decays in a chunk and y_i = Sᵀ_{i−1} a_i what the corrections read:
    y_i = Σ_{j<i} Σ_d a[i] exp(G[i−1] − G[j]) (k[j] v_j + b[j] y_j)  +  (a[i] exp G[i−1]) S
    o_i = Σ_{j≤i} Σ_d q[i] exp(G[i] − G[j]) (k[j] v_j + b[j] y_j)  +  (q[i] exp G[i]) S
    S  ← exp(G_C) S + Σ_j exp(G_C − G[j]) (k[j] v_j + b[j] y_j)
so y = (1 − A_ab)⁻¹ (A_ak V + …) needs the four score matrices of {q, a} against {k, b}. Row i of `a` is kept with
row i − 1 of q: then both fade from j to the same token, pairs j = i have no decay, and all others a common one.

exp(G[i]) · exp(−G[j]) overflows, so the chunk is halved again and again: j lies in the earlier block of a pair, i in
the later one, and the decay from j to the end of its block and from there to i are both sums of log-decays, never
positive. Each pair j < i falls into exactly one split. Where the caller promises a bound on the decays, blocks that it
keeps from overflowing are not split: there the two factors do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, None, None]

SAFE = 20.0
"""Exponents up to here are factored: they are far from overflow, and their own rounding is 2e-6."""


def _halves(block: int, size: int) -> Iterator[int]:
    """Lengths of the blocks that are joined two by two, the smallest first."""
    half = block
    while half < size:
        yield half
        half *= 2


def _tiles(x: Tensor, half: int) -> Tensor:
    """[..., C, K] → [..., m, 2, h, K], a view."""
    tiles: Tensor = x.unflatten(-2, (-1, 2, half))
    return tiles


def _corners(x: Tensor, half: int) -> Tensor:
    """[M, P, C, P, C] → [M, m, P, h, P, h]: rows of the later block, columns of the earlier one, a view."""
    later = x.unflatten(2, (-1, 2, half)).select(3, 1)
    pairs: Tensor = later.unflatten(-1, (-1, 2, half)).select(-2, 0).diagonal(dim1=2, dim2=5)
    return pairs.movedim(-1, 1)


def _inverse(upper: Tensor) -> Tensor:
    """(1 − A)⁻¹ of strictly lower triangles [M, C, C]: diagonal blocks X₁₁, X₂₂ joined by X₂₂ A₂₁ X₁₁."""
    size = upper.shape[-1]
    inverse = torch.eye(size, dtype=upper.dtype, device=upper.device).repeat(len(upper), 1, 1)
    for half in _halves(1, size):
        corner = _corners(upper[:, None, :, None], half)[:, :, 0, :, 0]
        if half > 1:
            cut = inverse.unflatten(1, (-1, half)).unflatten(-1, (-1, half))
            blocks = cut.diagonal(dim1=1, dim2=3).movedim(-1, 1)
            first, second = blocks[:, ::2].flatten(0, 1), blocks[:, 1::2].flatten(0, 1)
            corner = (second @ corner.flatten(0, 1) @ first).view(corner.shape)
        _corners(inverse[:, None, :, None], half)[:, :, 0, :, 0] = corner
    return inverse


def _join(inside: Tensor, behind: Tensor, half: int) -> Tensor:
    """exp of both exponents of a split [M, C, K]; then lengthens the sums to the joined blocks.

    inside[t] holds Σ g over the tokens of t's block up to t, behind[t] those after t.
    Sums over a block, not differences of G: after a run of hard gates G is so large that a mild gate drowns in it.
    """
    fade = torch.empty_like(inside)
    first, last, into = (_tiles(x, half) for x in (inside, behind, fade))
    torch.exp(last[:, :, 0], out=into[:, :, 0])
    torch.exp(first[:, :, 1], out=into[:, :, 1])
    last[:, :, 0] += first[:, :, 1, -1:]
    first[:, :, 1] += first[:, :, 0, -1:]
    return fade


def _factor(x: Tensor, fade: Tensor, half: int, later: int) -> Tensor:
    """The earlier (0) or later (1) block of each pair of both kinds [M, 2, C, K], faded: [M·m, 2 h, K]."""
    block = _tiles(x, half)[:, :, :, later].transpose(1, 2)
    faded = torch.empty(block.shape, dtype=x.dtype, device=x.device)
    torch.mul(block, _tiles(fade, half)[:, :, None, later], out=faded)
    return faded.flatten(2, 3).flatten(0, 1)


def _blocks(x: Tensor, block: int) -> Tensor:
    """Both kinds [M, 2, C, K] as [M·C/block, 2 block, K], a copy."""
    blocks: Tensor = x.unflatten(2, (-1, block)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return blocks


def _diagonal(x: Tensor, block: int) -> Tensor:
    """[M, P, C, P, C] → [M, C/block, P, block, P, block]: rows and columns of the same block, a view."""
    cut = x.unflatten(2, (-1, block)).unflatten(-1, (-1, block))
    pairs: Tensor = cut.diagonal(dim1=2, dim2=5).movedim(-1, 1)
    return pairs


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for thousands of tiny matrices; bmm is several times slower on an inner axis of two."""
    if a.shape[-1] > 2:
        return torch.bmm(a, b)
    return (a[..., :1] * b[:, :1]).addcmul_(a[..., 1:], b[:, 1:])


def _alone(scores: Tensor) -> Tensor:
    """The pairs j = i of [M, 2, C, 2, C] as [M, 2, 2, C, 1], a view."""
    return scores.diagonal(dim1=2, dim2=4).unsqueeze(-1)


@dataclass(frozen=True)
class _Sizes:
    """How a sequence lies in chunks."""

    batch: int
    time: int
    heads: int
    count: int
    size: int

    def fold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] → [M, C, D], a new tensor, zeros behind the end: they write nothing and fade nothing."""
        x = pad(x, (0, 0, 0, 0, 0, self.count * self.size - self.time))
        folded: Tensor = x.unflatten(1, (self.count, self.size)).permute(1, 0, 3, 2, 4)
        copied = folded.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return copied.view(-1, self.size, x.shape[-1])

    def unfold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, C, D] → [B, T, H, D]."""
        x = x.reshape(self.count, self.batch, self.heads, self.size, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(self.batch, self.count * self.size, self.heads, -1)[:, : self.time].to(dtype)

    def chunks(self, *tensors: Tensor) -> list[Tensor]:
        """Each [M, ...] as [n, N, ...]."""
        return [x.unflatten(0, (self.count, -1)) for x in tensors]


class _Chunks(torch.autograd.Function):
    """Written out by hand: autograd would keep and walk several times as many tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None,
        size: int,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = k.shape
        value, count = v.shape[-1], -(-time // size)
        sizes = _Sizes(batch, time, heads, count, size)
        dtype = working_dtype(q, k, v, gate, a, b, state)

        reads, inside, vs = (sizes.fold(x, dtype) for x in (a, gate, v))
        ahead = pad(reads[:, 1:], (0, 0, 0, 1))
        lines = torch.stack([sizes.fold(q, dtype), ahead], dim=1)
        columns = torch.stack([sizes.fold(k, dtype), sizes.fold(b, dtype)], dim=1)
        behind, scores = torch.zeros_like(inside), vs.new_zeros(len(vs), 2, size + 1, 2, size)
        shifted, fades, near = scores[:, :, 1:], [], None
        if block > 1:
            sums = inside.view(-1, block, key)
            torch.cumsum(sums, 1, out=sums)
            torch.sub(sums[:, -1:], sums, out=behind.view(-1, block, key))
            near = inside.exp().unsqueeze(1)
            pairs = torch.bmm(_blocks(lines * near, block), _blocks(columns / near, block).mT)
            pairs = pairs.view(len(vs), -1, 2, block, 2, block)
            future = torch.ones(block, block, dtype=torch.bool, device=v.device).triu()
            _diagonal(shifted, block).copy_(pairs.masked_fill_(future[:, None], 0.0))
        for half in _halves(block, size):
            fades.append(_join(inside, behind, half))
            left, right = (_factor(x, fades[-1], half, later) for later, x in ((1, lines), (0, columns)))
            corners = _corners(shifted, half)
            corners.copy_(torch.bmm(left, right.mT).view(corners.shape))
        _alone(shifted).copy_((lines.unsqueeze(2) * columns.unsqueeze(1)).sum(-1, keepdim=True))
        inverse = _inverse(scores[:, 1, :-1, 1])

        since = pad(inside, (0, 0, 1, 0)).exp_()
        values = torch.stack([vs, torch.empty_like(vs)], dim=1)
        asked = reads * since[:, :-1]
        kept = columns * behind.exp_().unsqueeze(1)
        known = torch.bmm(scores[:, 1, :-1, 0], vs)
        added = torch.bmm(kept[:, 0].mT, vs)
        fade = since[:, -1].unsqueeze(-1)
        solve, ask, know, add, keep, across, read = sizes.chunks(
            inverse, asked, known, added, kept[:, 1], fade, values[:, 1]
        )
        before = vs.new_empty(count, batch * heads, key, value)
        last = torch.zeros_like(before[0]) if state is None else state.to(dtype).reshape(before[0].shape)
        for c in range(count):
            before[c] = last
            read[c] = torch.bmm(solve[c], torch.baddbmm(know[c], ask[c], last))
            last = torch.baddbmm(torch.addcmul(add[c], last, across[c]), keep[c].mT, read[c])
        output = torch.bmm(lines[:, 0] * since[:, 1:], before.flatten(0, 1))
        output.baddbmm_(scores[:, 0, 1:].flatten(2), values.flatten(1, 2))

        ctx.save_for_backward(
            lines, columns, reads, since, behind, scores, inverse, values, before, near, *fades
        )
        ctx.sizes, ctx.block = sizes, block
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, gate, a, b, state)]
        return sizes.unfold(output, v.dtype).contiguous(), last.view(batch, heads, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        lines, columns, reads, since, until, scores, inverse, values, before, near, *fades = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        block: int = ctx.block
        dtype, size, (d_output, d_last) = values.dtype, sizes.size, grads
        vs, states = values[:, 0], before.flatten(0, 1)
        d_out = torch.zeros_like(vs) if d_output is None else sizes.fold(d_output, dtype)
        d_state = torch.zeros_like(before[0]) if d_last is None else d_last.to(dtype).reshape(before[0].shape)

        # What comes from the outputs is known at once, what comes from later chunks only one by one.
        asked, kept = reads * since[:, :-1], columns * until.unsqueeze(1)
        d_values = torch.bmm(scores[:, 0, 1:].flatten(2).mT, d_out).unflatten(1, (2, size))
        d_before = torch.bmm((lines[:, 0] * since[:, 1:]).mT, d_out)
        d_asked = torch.empty_like(vs)
        solve, ask, keep, across, d_known, d_read, d_seen = sizes.chunks(
            inverse, asked, kept[:, 1], since[:, -1].unsqueeze(-1), d_asked, d_values[:, 1], d_before
        )
        d_after = torch.empty_like(before)
        for c in reversed(range(sizes.count)):
            d_after[c] = d_state
            d_known[c] = torch.bmm(solve[c].mT, torch.baddbmm(d_read[c], keep[c], d_state))
            d_state = torch.baddbmm(torch.addcmul(d_seen[c], d_state, across[c]), ask[c].mT, d_known[c])
        d_through = d_after.flatten(0, 1)
        d_value = d_values[:, 0] + torch.bmm(scores[:, 1, :-1, 0].mT, d_asked)
        d_value.baddbmm_(kept[:, 0], d_through)

        d_rows = torch.stack([d_out, pad(d_asked[:, 1:], (0, 0, 0, 1))], dim=1).flatten(1, 2)
        d_scores = torch.bmm(d_rows, values.flatten(1, 2).mT).view(-1, 2, size, 2, size)
        d_lines = torch.bmm(d_rows, states.mT).view(lines.shape) * since[:, None, 1:]
        d_columns = torch.zeros_like(columns)
        if near is not None:
            future = torch.ones(block, block, dtype=torch.bool, device=vs.device).triu()
            d_pairs = (
                _diagonal(d_scores, block).masked_fill(future[:, None], 0.0).view(-1, 2 * block, 2 * block)
            )
            for d_x, d_pair, x, into in (
                (d_lines, d_pairs, columns / near, near),
                (d_columns, d_pairs.mT, lines * near, 1 / near),
            ):
                d_faded = torch.bmm(d_pair, _blocks(x, block)).view(len(vs), -1, 2, block, x.shape[-1])
                d_x += d_faded.transpose(1, 2).flatten(2, 3) * into
        for half, fade in zip(_halves(block, size), fades, strict=True):
            left, right = (_factor(x, fade, half, later) for later, x in ((1, lines), (0, columns)))
            corners = _corners(d_scores, half).reshape(len(left), 2 * half, 2 * half)
            for d_x, d_faded, later in (
                (d_lines, _product(corners, right), 1),
                (d_columns, _product(corners.mT, left), 0),
            ):
                tiles = _tiles(d_x, half)[:, :, :, later].transpose(1, 2)
                tiles.addcmul_(d_faded.view(tiles.shape), _tiles(fade, half)[:, :, None, later])

        # Rows stand beside exp(G[i]), columns beside exp(-G[j]). Pairs without decay are kept out: their two parts
        # cancel, but not to the last bit, and what is left drowns the gradient of a hard gate.
        d_gate = ((d_lines * lines) - (d_columns * columns)).sum(1)
        d_kept = torch.bmm(values.flatten(1, 2), d_through.mT).view(columns.shape) * until.unsqueeze(1)
        d_gate = d_gate.flip(1).cumsum_(1).flip(1)
        d_gate[:, 1:] += (d_kept * columns).sum(1).cumsum(1)[:, :-1]
        d_gate += ((d_through * states).sum(-1) * since[:, -1]).unsqueeze(1)
        d_columns += d_kept
        alone = _alone(d_scores)
        d_lines += (alone * columns.unsqueeze(1)).sum(2)
        d_columns += (alone * lines.unsqueeze(2)).sum(1)
        d_a = torch.cat([torch.bmm(d_asked[:, :1], states.mT), d_lines[:, 1, :-1]], dim=1)
        d_q, d_k, d_v, d_g, d_a, d_b = (
            sizes.unfold(x, to)
            for x, to in zip(
                (d_lines[:, 0], d_columns[:, 0], d_value, d_gate, d_a, d_columns[:, 1]),
                ctx.dtypes[:6],
                strict=True,
            )
        )
        d_first = None
        if ctx.dtypes[6] is not None:
            d_first = d_state.view(sizes.batch, sizes.heads, *d_state.shape[1:]).to(ctx.dtypes[6])
        return d_q, d_k, d_v, d_g, d_a, d_b, d_first, None, None


def low_rank_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    chunk: int,
    bound: float | None,
) -> tuple[Tensor, Tensor]:
    """Chunks of at most `chunk` tokens; shapes as in `ops.low_rank_delta`.

    None is longer than the text, nor much longer than the widths: its scores would cost more than the states spare.
    """
    longest = min(k.shape[1], max(16, k.shape[-1], v.shape[-1]))
    size = min(1 << (longest - 1).bit_length(), 1 << (chunk.bit_length() - 1))
    block = 1
    while bound is not None and block < size and 2 * block * bound <= SAFE:
        block *= 2
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Chunks.apply(q, k, v, log_decay, a, b, state, size, block)  # type: ignore[no-untyped-call]
    return result

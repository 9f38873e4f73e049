"""The delta rule with a decay a key channel, a chunk at a time, with its backward pass written out.

Letters: B batch, T time, H heads, K key, V value, C tokens of a chunk, N = B·H rows, M = N·(number of chunks),
m pairs of a split.  After arXiv:2510.26692 (the form) and arXiv:2312.06635 (decays between two blocks).

Within a chunk, with G the running sum of the log-decays, three things are needed:
    scores   A[i, j] = Σ_d x[i, d] k[j, d] exp(G[i, d] − G[j, d])   for x = q (j ≤ i) and x = k (j < i)
    inverse  X = (1 + Diag(β) A_k)⁻¹
    values   V' = X Diag(β) (V − (k exp G) S),   o = A_q V' + (q exp G) S,   S ← exp(G_C) S + (k exp(G_C − G))ᵀ V'

exp(G[i]) · exp(−G[j]) overflows, so the chunk is halved again and again. A split is a block of `half` tokens
(the columns j) and the block after it (the rows i); the first row r stands between them, and both exponents
G[i] − G[r] and G[r] − G[j] are sums of log-decays, never positive. All pairs j < i fall into exactly one split,
log2(C) exponentials a token serve them all, and the pair j = i needs none. The inverse of a unit lower triangle
grows along the same splits: its lower left block is −X₂₂ L₂₁ X₁₁.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import working_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, None]


@dataclass(frozen=True)
class Split:
    """`pairs` neighbouring blocks of `length` tokens each, whose first `half` tokens are the columns."""

    start: int
    pairs: int
    half: int
    length: int

    def tokens(self, x: Tensor) -> Tensor:
        """[..., C, D] → [..., m, length, D], a view."""
        run = x.narrow(-2, self.start, self.pairs * self.length)
        tiles: Tensor = run.unflatten(-2, (self.pairs, self.length))
        return tiles

    def blocks(self, x: Tensor) -> Tensor:
        """[..., C, C] → the diagonal blocks [..., m, length, length], a view."""
        size = self.pairs * self.length
        square = x.narrow(-2, self.start, size).narrow(-1, self.start, size)
        tiles: Tensor = square.unflatten(-1, (self.pairs, self.length)).unflatten(
            -3, (self.pairs, self.length)
        )
        return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    def corner(self, x: Tensor) -> Tensor:
        """[..., C, C] → rows against columns of each block [..., m, length - half, half], a view."""
        return self.blocks(x)[..., self.half :, : self.half]


def splits(size: int) -> list[Split]:
    """All splits of a chunk of `size` tokens, the smallest first; the last block of a level may be short."""
    found = []
    half = 1
    while half < size:
        whole = size // (2 * half)
        if whole:
            found.append(Split(0, whole, half, 2 * half))
        rest = size - whole * 2 * half
        if rest > half:
            found.append(Split(whole * 2 * half, 1, half, rest))
        half *= 2
    return found


def _factors(split: Split, qk: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M·m, 2·rows, K] (q above k) and columns [M·m, half, K], each faded to the row between them."""
    half = split.half
    upper = split.tokens(qk).transpose(1, 2)[..., half:, :]
    rows = torch.empty(upper.shape, dtype=qk.dtype, device=qk.device)
    torch.mul(upper, fade[:, :, None, half:], out=rows)
    columns = split.tokens(qk[:, 1])[:, :, :half] * fade[:, :, :half]
    return rows.flatten(2, 3).flatten(0, 1), columns.flatten(0, 1)


def _fade(split: Split, gate: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """exp of both exponents of a split [M, m, length, K]; then lengthens the sums to the joined blocks.

    before[t] holds Σ g over the tokens of t's block from its second to t, after[t] those behind t.
    Sums over a block, not differences of G: after a run of hard gates G is so large that a mild gate drowns in it.
    """
    half = split.half
    first, middle = split.tokens(before), split.tokens(gate)[:, :, half : half + 1]
    last = split.tokens(after)
    fade = torch.empty(first.shape, dtype=gate.dtype, device=gate.device)
    last[:, :, :half] += middle
    torch.exp(last[:, :, :half], out=fade[:, :, :half])
    torch.exp(first[:, :, half:], out=fade[:, :, half:])
    last[:, :, :half] += last[:, :, half : half + 1]
    first[:, :, half:] += first[:, :, half - 1 : half] + middle
    return fade


def _grow_inverse(split: Split, inverse: Tensor, lower: Tensor) -> None:
    """Fills the corners of the inverse, given L's corners [M, m, rows, half] and the inverses of both blocks."""
    if split.half == 1:
        split.corner(inverse).copy_(-lower)
        return
    blocks, half = split.blocks(inverse), split.half
    above = blocks[..., :half, :half].flatten(0, 1)
    below = blocks[..., half:, half:].flatten(0, 1)
    corner = below @ lower.flatten(0, 1) @ above
    split.corner(inverse).copy_(corner.view(lower.shape).neg_())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for thousands of tiny matrices; bmm is several times slower on an inner axis of one or two."""
    if a.shape[-1] > 2:
        return torch.bmm(a, b)
    total = a[..., :1] * b[:, :1]
    if a.shape[-1] == 2:
        total.addcmul_(a[..., 1:], b[:, 1:])
    return total


class _Chunks(torch.autograd.Function):
    """Written out by hand: autograd would keep and walk about three times as many tensors."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, state: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, heads, key = k.shape
        value = v.shape[-1]
        count = -(-time // size)
        rows = batch * heads
        dtype = working_dtype(q, k, v, gate, beta, state)

        def fold(x: Tensor) -> Tensor:
            """[B, T, H, D] → [B, H, chunks, C, D], zeros behind the end: they write nothing and fade nothing."""
            if count * size != time:
                x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * size - time))
            folded: Tensor = x.transpose(1, 2).unflatten(2, (count, size))
            return folded

        qk = torch.empty(batch, heads, count, 2, size, key, dtype=dtype, device=v.device)
        qk[:, :, :, 0], qk[:, :, :, 1] = fold(q), fold(k)
        qk = qk.view(rows * count, 2, size, key)
        g = fold(gate).to(dtype).reshape(rows * count, size, key)
        vs = fold(v).to(dtype).reshape(rows, count, size, value)
        bs = fold(beta.unsqueeze(-1)).to(dtype).reshape(rows * count, size, 1)

        before, after = torch.zeros_like(g), torch.zeros_like(g)
        scores = g.new_zeros(rows * count, 2, size, size)
        inverse = torch.eye(size, dtype=dtype, device=v.device).repeat(rows * count, 1, 1)
        fades = []
        for split in splits(size):
            fade = _fade(split, g, before, after)
            left, right = _factors(split, qk, fade)
            high, half = split.length - split.half, split.half
            corner = torch.bmm(left, right.mT).view(-1, split.pairs, 2, high, half)
            split.corner(scores).copy_(corner.transpose(1, 2))
            _grow_inverse(split, inverse, corner[:, :, 1] * split.tokens(bs)[:, :, half:])
            fades.append(fade)
        scores[:, 0].diagonal(dim1=-2, dim2=-1).copy_((qk[:, 0] * qk[:, 1]).sum(-1))
        since_start = before.add_(g[:, :1]).exp_()
        until_end = after.exp_()

        output = torch.empty_like(vs)
        written = torch.empty_like(vs)
        queries, keys, starts, ends, a_q, solve, write = (
            x.view(rows, count, *x.shape[1:])
            for x in (qk[:, 0], qk[:, 1], since_start, until_end, scores[:, 0], inverse, bs)
        )
        states: list[Tensor | None] = []
        errors = []
        last = None if state is None else state.to(dtype).reshape(rows, key, value)
        for c in range(count):
            states.append(last)
            error = vs[:, c]
            if last is not None:
                error = torch.baddbmm(error, keys[:, c] * starts[:, c], last, alpha=-1)
            errors.append(error)
            fresh = torch.bmm(solve[:, c], write[:, c] * error)
            written[:, c] = fresh
            seen = torch.bmm(a_q[:, c], fresh)
            kept = (keys[:, c] * ends[:, c]).mT
            if last is None:
                output[:, c] = seen
                last = torch.bmm(kept, fresh)
            else:
                output[:, c] = seen.baddbmm_(queries[:, c] * starts[:, c], last)
                last = torch.baddbmm(last * starts[:, c, -1].unsqueeze(-1), kept, fresh)
        assert last is not None
        ctx.save_for_backward(
            qk, bs, since_start, until_end, scores, inverse, written, *fades, *errors, *states
        )
        ctx.sizes = batch, time, heads, key, value, size, count, len(fades)
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, gate, beta, state)]
        whole = output.view(batch, heads, count * size, value)[:, :, :time].transpose(1, 2)
        return whole.to(v.dtype).contiguous(), last.view(batch, heads, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        batch, time, heads, key, value, size, count, levels = ctx.sizes
        qk, bs, since_start, until_end, scores, inverse, written, *lists = ctx.saved_tensors
        fades, errors, states = lists[:levels], lists[levels : levels + count], lists[levels + count :]
        rows = batch * heads
        d_output, d_last = grads

        def fold(x: Tensor) -> Tensor:
            """[M, ...] → [N, chunks, ...]."""
            return x.view(rows, count, *x.shape[1:])

        d_out = qk.new_zeros(batch, heads, count * size, value)
        if d_output is not None:
            d_out[:, :, :time] = d_output.transpose(1, 2)
        d_out = d_out.view(rows, count, size, value)
        d_state = None if d_last is None else d_last.to(qk.dtype).reshape(rows, key, value)

        d_scores = torch.empty_like(scores)
        d_rows = torch.zeros_like(qk)
        d_columns = qk.new_zeros(rows * count, size, key)
        # What reaches keys and gates through the state that leaves a chunk; nothing does where nobody asks for it.
        carries = count > 1 or d_state is not None
        d_kept = qk.new_zeros(rows, count, size, key) if carries else None
        d_fades = qk.new_zeros(rows, count, size, key) if carries else None
        d_value = torch.empty_like(written)
        d_beta = qk.new_empty(rows, count, size, 1)
        queries, keys, starts, ends = fold(qk[:, 0]), fold(qk[:, 1]), fold(since_start), fold(until_end)
        a_q, a_k, solve, write = fold(scores[:, 0]), fold(scores[:, 1]), fold(inverse), fold(bs)
        d_a, d_r = fold(d_scores), fold(d_rows)
        for c in reversed(range(count)):
            state, fresh, start = states[c], written[:, c], starts[:, c]
            d_fresh = torch.bmm(a_q[:, c].mT, d_out[:, c])
            if d_state is not None and d_kept is not None and d_fades is not None:
                d_fresh.baddbmm_(keys[:, c] * ends[:, c], d_state)
                d_kept[:, c] = torch.bmm(fresh, d_state.mT).mul_(ends[:, c])
                d_fades[:, c, 1:] = (d_kept[:, c] * keys[:, c]).cumsum(1)[:, :-1]
            d_error = torch.bmm(solve[:, c].mT, d_fresh)
            d_lower = torch.bmm(d_error, fresh.mT).neg_()
            d_beta[:, c] = ((d_error * errors[c]).sum(-1) + (d_lower * a_k[:, c]).sum(-1)).unsqueeze(-1)
            d_error.mul_(write[:, c])
            d_value[:, c] = d_error
            d_a[:, c, 0] = torch.bmm(d_out[:, c], fresh.mT)
            d_a[:, c, 1] = d_lower.mul_(write[:, c])
            if state is None:
                d_state = None
                continue
            d_r[:, c, 0] = torch.bmm(d_out[:, c], state.mT).mul_(start)
            d_r[:, c, 1] = torch.bmm(d_error, state.mT).mul_(start).neg_()
            carried = torch.bmm((queries[:, c] * start).mT, d_out[:, c])
            carried.baddbmm_((keys[:, c] * start).mT, d_error, alpha=-1)
            if d_state is not None and d_fades is not None:
                d_fades[:, c] += ((d_state * state).sum(-1) * start[:, -1]).unsqueeze(1)
                carried.addcmul_(d_state, start[:, -1].unsqueeze(-1))
            d_state = carried

        for split, fade in zip(splits(size), fades, strict=True):
            half = split.half
            left, right = _factors(split, qk, fade)
            corner = split.corner(d_scores).transpose(1, 2).reshape(left.shape[0], left.shape[1], half)
            d_left = _product(corner, right).view(-1, split.pairs, 2, split.length - half, key)
            split.tokens(d_rows).transpose(1, 2)[..., half:, :].addcmul_(d_left, fade[:, :, None, half:])
            d_right = _product(corner.mT, left).view(-1, split.pairs, half, key)
            split.tokens(d_columns)[:, :, :half].addcmul_(d_right, fade[:, :, :half])

        # Each q[i] and row k[i] stands beside exp(G[i]), each column k[j] beside exp(-G[j]). Pairs whose exponent
        # is empty are kept out (j = i here, the chunk's last token in d_fades): their two parts cancel, but not
        # to the last bit, and what is left drowns the gradient of a hard gate.
        q, k = qk[:, 0], qk[:, 1]
        d_gate = torch.addcmul(d_rows[:, 0] * q, k, d_rows[:, 1] - d_columns)
        d_gate = d_gate.flip(1).cumsum_(1).flip(1)
        if d_kept is not None and d_fades is not None:
            d_gate += d_fades.view_as(d_gate)
            d_columns += d_kept.view_as(d_columns)
        same = d_scores[:, 0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        d_q = torch.addcmul(d_rows[:, 0], same, k)
        d_k = d_columns.add_(d_rows[:, 1]).addcmul_(same, q)

        def unfold(x: Tensor, dtype: torch.dtype) -> Tensor:
            """Back to [B, T, H, D] in the input's dtype."""
            return x.view(batch, heads, count * size, -1)[:, :, :time].transpose(1, 2).to(dtype)

        d_first = d_state
        if ctx.dtypes[5] is None:
            d_first = None
        elif d_first is not None:
            d_first = d_first.view(batch, heads, key, value).to(ctx.dtypes[5])
        return (
            unfold(d_q, ctx.dtypes[0]),
            unfold(d_k, ctx.dtypes[1]),
            unfold(d_value, ctx.dtypes[2]),
            unfold(d_gate, ctx.dtypes[3]),
            unfold(d_beta, ctx.dtypes[4]).squeeze(-1),
            d_first,
            None,
        )


def channel_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens, or one chunk of the length rounded up to 16; shapes as in `ops.channel_delta`."""
    size = min(chunk, -(-k.shape[1] // 16) * 16)
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Chunks.apply(q, k, v, log_decay, beta, state, size)  # type: ignore[no-untyped-call]
    return result

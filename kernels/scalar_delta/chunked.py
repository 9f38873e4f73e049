"""The delta rule with one decay a head, a chunk at a time, with its backward pass written out.

Letters: B batch, T time, H heads, G groups that share q and k, R = H/G, N = B·G rows, K key, V value,
C tokens of a chunk (a power of two), n chunks.  After arXiv:2406.06484 (the form) and arXiv:2412.06464 (the decay).

With D the running sum of the log-decays in a chunk, Λ[i, j] = exp(D_i − D_j) for j ≤ i and zero elsewhere:
    scores   A_q = (Q Kᵀ) ∘ Λ,   A_k = (K Kᵀ) ∘ Λ without its diagonal
    inverse  X = (1 + Diag(β) A_k)⁻¹
    values   V' = X Diag(β) (V − Diag(exp D) K S)
    o = A_q V' + Diag(exp D) Q S,   S ← exp(D_C) S + Kᵀ Diag(exp(D_C − D)) V'
Every exponent is a sum of log-decays, never positive. Q Kᵀ and K Kᵀ are made once a group; the decays of its heads
scale values and not keys, so the R heads stand side by side in one product with K.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, None]


def _decay(gate: Tensor) -> Tensor:
    """Λ with ones in place of its zeros: log-decays [..., C] → [..., C, C].

    The tokens between j and i are summed one by one, not as differences of D: after a run of hard gates D is so
    large that a mild gate drowns in it.
    """
    size = gate.shape[-1]
    between = torch.ones(size, size, dtype=torch.bool, device=gate.device).triu(1)
    # Transposed, because sums along the last axis are the fast ones.
    return torch.where(between, gate.unsqueeze(-2), 0.0).cumsum(-1).exp_().mT


def _inverse(lower: Tensor) -> Tensor:
    """(1 + L)⁻¹ of strictly lower triangles [..., C, C]: diagonal blocks X₁₁, X₂₂ joined by −X₂₂ L₂₁ X₁₁."""
    size = lower.shape[-1]
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).repeat(lower[..., 0, 0].numel(), 1, 1)
    half = 1
    while half < size:
        pairs = size // (2 * half)

        def tiles(x: Tensor, half: int = half, pairs: int = pairs) -> Tensor:
            """The diagonal blocks of both halves [M, pairs, 2, half, 2, half], a view."""
            cut = x.reshape(-1, pairs, 2, half, pairs, 2, half)
            return cut.diagonal(dim1=1, dim2=4).movedim(-1, 1)

        corner, known = tiles(lower)[:, :, 1, :, 0], tiles(inverse)
        if half > 1:
            above, below = known[:, :, 0, :, 0].flatten(0, 1), known[:, :, 1, :, 1].flatten(0, 1)
            corner = (below @ corner.flatten(0, 1) @ above).view(corner.shape)
        torch.neg(corner, out=known[:, :, 1, :, 0])
        half *= 2
    return inverse.view(lower.shape)


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """Each head's own matrix [..., R, C, C] times its values [..., C, R, V]."""
    return (matrix @ x.transpose(-3, -2)).transpose(-3, -2)


def _fade(x: Tensor, factor: Tensor | None, chunk: int | None = None) -> Tensor:
    """x [..., C, R, V] times a number a head and token, of one chunk [n, N, C, R] or of all; None: nothing fades."""
    if factor is None:
        return x
    return x * (factor if chunk is None else factor[chunk]).unsqueeze(-1)


def _across(state: Tensor, starts: Tensor | None, chunk: int) -> Tensor:
    """A state [N, K, R·V] as it leaves the chunk, or its gradient as it enters."""
    if starts is None:
        return state
    last = starts[chunk, :, -1]
    faded: Tensor = state.unflatten(-1, (last.shape[-1], -1)) * last[:, None, :, None]
    return faded.flatten(2)


@dataclass(frozen=True)
class _Sizes:
    """How a sequence lies in chunks, and how the states of R heads lie side by side."""

    batch: int
    time: int
    groups: int
    shared: int
    count: int
    size: int

    def fold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, ...] → [n, N, C, D], zeros behind the end: they write nothing and fade nothing."""
        x = x.reshape(self.batch, self.time, self.groups, -1)
        if self.count * self.size != self.time:
            x = pad(x, (0, 0, 0, 0, 0, self.count * self.size - self.time))
        folded: Tensor = x.unflatten(1, (self.count, self.size)).permute(1, 0, 3, 2, 4).to(dtype)
        return folded.reshape(self.count, self.batch * self.groups, self.size, -1)

    def unfold(self, x: Tensor, heads: int, dtype: torch.dtype | None) -> Tensor:
        """[n, N, C, D] → [B, T, heads, D / (heads / G)]."""
        x = x.reshape(self.count, self.batch, self.groups, self.size, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(self.batch, self.count * self.size, heads, -1)[:, : self.time].to(dtype)

    def join(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, K, V] → [N, K, R·V]."""
        joined: Tensor = state.to(dtype).unflatten(1, (self.groups, self.shared)).transpose(2, 3)
        return joined.flatten(3).flatten(0, 1)

    def part(self, state: Tensor) -> Tensor:
        """[N, K, R·V] → [B, H, K, V]."""
        parted: Tensor = state.unflatten(-1, (self.shared, -1)).transpose(1, 2)
        return parted.reshape(self.batch, self.groups * self.shared, *parted.shape[2:])


class _Chunks(torch.autograd.Function):
    """Written out by hand: autograd would keep several times as many tensors, and walk each chunk's own."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        beta: Tensor,
        state: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
        shared, count = heads // groups, -(-time // size)
        sizes = _Sizes(batch, time, groups, shared, count, size)
        dtype = working_dtype(q, k, v, gate, beta, state)

        qs, ks, bs = (sizes.fold(x, dtype) for x in (q, k, beta))
        vs = sizes.fold(v, dtype).unflatten(-1, (shared, value))
        a_q = (qs @ ks.mT).tril_().unsqueeze(2)
        a_k = (ks @ ks.mT).tril_(-1).unsqueeze(2)
        decay, starts, ends = None, None, None
        if gate is not None:
            g = sizes.fold(gate, dtype).mT
            decay = _decay(g)
            a_q, a_k = a_q * decay, a_k * decay
            starts, ends = (decay[..., 0] * g[..., :1].exp()).mT, decay[..., -1, :].mT
        inverse = _inverse(bs.mT.unsqueeze(-1) * a_k)

        last = (
            qs.new_zeros(batch * groups, key, shared * value) if state is None else sizes.join(state, dtype)
        )
        before, written = qs.new_empty(count, *last.shape), torch.empty_like(vs)
        for c in range(count):
            before[c] = last
            error = vs[c] - _fade((ks[c] @ last).view_as(vs[c]), starts, c)
            written[c] = _each(inverse[c], bs[c].unsqueeze(-1) * error)
            last = _across(last, starts, c) + ks[c].mT @ _fade(written[c], ends, c).flatten(2)
        output = _each(a_q, written) + _fade((qs @ before).view_as(vs), starts)

        ctx.save_for_backward(qs, ks, vs, bs, decay, starts, ends, a_q, a_k, inverse, before, written)
        ctx.sizes = sizes
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, gate, beta, state)]
        return sizes.unfold(output, heads, v.dtype).contiguous(), sizes.part(last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        qs, ks, vs, bs, decay, starts, ends, a_q, a_k, inverse, before, written = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        dtype, (d_output, d_last) = vs.dtype, grads
        d_out = torch.zeros_like(vs) if d_output is None else sizes.fold(d_output, dtype).view_as(vs)
        d_state = torch.zeros_like(before[0]) if d_last is None else sizes.join(d_last, dtype)

        # What comes from the outputs is known at once, what comes from later chunks only one by one.
        d_read = _fade(d_out, starts).flatten(3)
        d_written, d_before = _each(a_q.mT, d_out), qs.mT @ d_read
        d_after, d_solved, d_recalled = (
            torch.empty_like(before),
            torch.empty_like(vs),
            torch.empty_like(d_read),
        )
        for c in reversed(range(sizes.count)):
            d_after[c] = d_state
            d_fresh = d_written[c] + _fade((ks[c] @ d_state).view_as(vs[c]), ends, c)
            d_solved[c] = _each(inverse[c].mT, d_fresh)
            d_recalled[c] = _fade(bs[c].unsqueeze(-1) * d_solved[c], starts, c).flatten(2)
            d_state = _across(d_state, starts, c) + d_before[c] - ks[c].mT @ d_recalled[c]
        d_value = bs.unsqueeze(-1) * d_solved

        fresh = written.transpose(-3, -2).mT
        d_aq = d_out.transpose(-3, -2) @ fresh
        d_lower = -(d_solved.transpose(-3, -2) @ fresh)
        d_ak = bs.mT.unsqueeze(-1) * d_lower
        recalled = _fade((ks @ before).view_as(vs), starts)
        d_beta = (d_solved * (vs - recalled)).sum(-1) + (d_lower * a_k).sum(-1).mT
        d_gate = None
        if decay is not None:
            # What a pair adds at i it takes away at j; the sums are wide so that it cancels before the pair. Pairs
            # j = i have no decay and are kept out: what is left of them drowns the gradient of a hard gate.
            pairs = (d_aq * a_q).tril_(-1).addcmul_(d_ak, a_k)
            seen = _fade((qs @ before).view_as(vs), starts)
            d_gate = (pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64)).mT
            d_gate += (d_out * seen - d_value * recalled).sum(-1)
            d_gate = d_gate.flip(-2).cumsum(-2).flip(-2).to(dtype)
            kept = _fade((ks @ d_after).view_as(vs) * written, ends).sum(-1)
            d_gate[..., 1:, :] += kept.cumsum(-2)[..., :-1, :]
            through = (d_after * before).unflatten(-1, (sizes.shared, -1)).sum((-3, -1))
            d_gate += (through * starts[..., -1, :]).unsqueeze(-2)
            d_aq, d_ak = d_aq * decay, d_ak * decay
        d_aq, d_ak = d_aq.sum(2).tril_(), d_ak.sum(2).tril_(-1)
        d_q = d_aq @ ks + d_read @ before.mT
        d_k = d_aq.mT @ qs + (d_ak + d_ak.mT) @ ks - d_recalled @ before.mT
        d_k += _fade(written, ends).flatten(3) @ d_after.mT

        def unfold(x: Tensor, heads: int, which: int) -> Tensor:
            return sizes.unfold(x, heads, ctx.dtypes[which])

        heads = sizes.groups * sizes.shared
        return (
            unfold(d_q, sizes.groups, 0),
            unfold(d_k, sizes.groups, 1),
            unfold(d_value, heads, 2),
            None if d_gate is None else unfold(d_gate, heads, 3).squeeze(-1),
            unfold(d_beta, heads, 4).squeeze(-1),
            None if ctx.dtypes[5] is None else sizes.part(d_state).to(ctx.dtypes[5]),
            None,
        )


def scalar_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunks of at most `chunk` tokens; shapes as in `ops.scalar_delta`.

    None is longer than the text, nor much longer than the widths: its scores would cost more than the states spare.
    """
    longest = min(k.shape[1], max(32, k.shape[-1], v.shape[-1]))
    size = min(1 << (longest - 1).bit_length(), 1 << (chunk.bit_length() - 1))
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _Chunks.apply(q, k, v, log_decay, beta, state, size)  # type: ignore[no-untyped-call]
    return result

"""Linear recurrence by the trapezoidal rule, a chunk at a time, with its backward pass written out.

Letters: B batch, T time, R ranks, H heads, K key, V value, C tokens of a chunk, n chunks, M = B·H·n, X = C·R rows.
After Mamba-3, arXiv:2603.15569.

A token j is written with fresh_j when it comes and with late_{j+1} one token later, both before the decay of token
j + 1 acts on it. So every later token sees it with the weight w_j = fresh_j + late_{j+1}, and only j itself sees
fresh_j alone: no output depends on a token that follows it. With D the running sum of the log-decays in a chunk,
    o_i = exp(D_i) q_i S + Σ_{j < i} exp(D_i − D_j) w_j (q_i·k_j) v_j + fresh_i (q_i·k_i) v_i
    S  ← exp(D_C) S + Σ_j exp(D_C − D_j) w_j k_j v_jᵀ
where the last token of all has w = fresh, and the first chunk starts from S + late_0 k_{−1} v_{−1}ᵀ. The sums are in
float64: after a run of hard gates D is so large that a difference of two float32 sums would drown a mild gate.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype

Gradients = tuple[Tensor | None, ...]
LEAST = -1e4


def _carry(written: Tensor, fade: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The states [B·H, n, K, V] before each chunk, and the one after the last."""
    before = torch.empty_like(written)
    state = first
    for c in range(written.shape[1]):
        before[:, c] = state
        state = torch.addcmul(written[:, c], state, fade[:, c, None, None])
    return before, state


def _fold(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, R, H, D] → [M, X, D], zeros behind the end: they write nothing."""
    count = -(-x.shape[1] // size)
    if count * size != x.shape[1]:
        x = pad(x, (0, 0, 0, 0, 0, 0, 0, count * size - x.shape[1]))
    x = x.unflatten(1, (count, size)).permute(0, 4, 1, 3, 2, 5).to(dtype)
    return x.reshape(-1, x.shape[3] * size, x.shape[-1])


def _unfold(x: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
    """[M, X, D] → [B, T, R, H, D], a view where the type stays."""
    batch, time, ranks, heads, size, count = sizes
    x = x.view(batch, heads, count, ranks, size, -1).permute(0, 2, 4, 3, 1, 5)
    return x.flatten(1, 2)[:, :time].to(dtype)


def _rows(x: Tensor, ranks: int) -> Tensor:
    """A number a token [..., C] → one a row [M, X, 1]."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat if ranks == 1 else flat.repeat(1, ranks)).unsqueeze(-1)


def _mixed(decay: Tensor, weight: Tensor, fresh: Tensor) -> Tensor:
    """What token i keeps of token j: [M, C, C], zero above the diagonal."""
    size = decay.shape[-1]
    mix = decay * weight.reshape(-1, 1, size)
    mix.diagonal(dim1=-2, dim2=-1).copy_(fresh.reshape(-1, size))
    return mix


def _spread(mix: Tensor, ranks: int) -> Tensor:
    """[M, C, C], a number for two tokens → [M, X, X], one for each pair of their rows."""
    return mix if ranks == 1 else mix.repeat(1, ranks, ranks)


def _gathered(x: Tensor, ranks: int) -> Tensor:
    """[M, X, X] summed over the rows of two tokens → [M, C, C]."""
    if ranks == 1:
        return x
    size = x.shape[-1] // ranks
    return x.view(-1, ranks, size * ranks * size).sum(1).view(-1, size, ranks, size).sum(2)


class _Chunks(torch.autograd.Function):
    """Written out by hand: autograd would keep and walk about three times as many tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        late: Tensor,
        fresh: Tensor,
        first: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, time, ranks, heads, key = k.shape
        value, count = v.shape[-1], -(-time // size)
        dtype, lanes = first.dtype, batch * heads

        def numbers(x: Tensor) -> Tensor:
            """[B, T, H] → [B·H, n, C], zeros behind the end: they fade nothing."""
            return pad(x.mT, (0, count * size - time)).to(dtype).reshape(lanes, count, size)

        qs, ks, vs = (_fold(x, size, dtype) for x in (q, k, v))
        now = numbers(fresh)
        weight = now.clone()
        weight.view(lanes, -1)[:, :-1] += numbers(late).view(lanes, -1)[:, 1:]
        # Below the bound a decay is nought in every type, and the sum would lose the digits of what comes after.
        total = numbers(gate).double().clamp(min=LEAST).cumsum(-1)
        since_start = total.exp().to(dtype)
        until_end = (total[..., -1:] - total).exp_().to(dtype)
        flat = total.view(-1, size)
        decay = torch.empty(flat.shape[0], size, size, dtype=dtype, device=v.device)
        torch.sub(flat[:, :, None], flat[:, None], out=decay)
        future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu()
        decay.masked_fill_(future, -torch.inf).exp_()

        scores = torch.bmm(qs, ks.mT)
        output = torch.bmm(_spread(_mixed(decay, weight, now), ranks).mul_(scores), vs)
        kept = until_end * weight
        written = torch.bmm(ks.mT, vs * _rows(kept, ranks)).view(lanes, count, key, value)
        before, last = _carry(written, since_start[..., -1], first.reshape(lanes, key, value))
        output.addcmul_(torch.bmm(qs, before.flatten(0, 1)), _rows(since_start, ranks))
        ctx.save_for_backward(qs, ks, vs, scores, decay, since_start, until_end, weight, now, before)
        ctx.sizes = batch, time, ranks, heads, size, count
        ctx.dtypes = [x.dtype for x in (q, k, v, gate, late, fresh)]
        whole = _unfold(output, v.dtype, ctx.sizes)
        return whole.contiguous(), last.view(batch, heads, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        batch, time, ranks, heads, size, count = ctx.sizes
        qs, ks, vs, scores, decay, since_start, until_end, weight, now, before = ctx.saved_tensors
        key, value, lanes = ks.shape[-1], vs.shape[-1], batch * heads
        d_output, d_last = grads
        states, kept = before.flatten(0, 1), until_end * weight

        d_out = torch.zeros_like(vs) if d_output is None else _fold(d_output, size, vs.dtype)

        mix = _mixed(decay, weight, now)
        wide = _spread(mix, ranks)
        d_weights = torch.bmm(d_out, vs.mT)
        d_value = torch.bmm((scores * wide).mT, d_out)
        d_scores = d_weights * wide
        d_mix = _gathered(d_weights.mul_(scores), ranks)

        through = _rows(since_start, ranks)
        d_read = torch.bmm(d_out, states.mT).mul_(through)
        # What the decay since the start of the chunk is asked for, times that decay.
        d_since = (d_read * qs).sum(-1).view(-1, ranks, size).sum(1)
        d_query = d_read.baddbmm_(d_scores, ks)

        d_before = torch.bmm((qs * through).mT, d_out).view(lanes, count, key, value)
        d_written = torch.empty_like(d_before)
        fade = since_start[..., -1]
        d_state = (
            torch.zeros_like(d_before[:, 0])
            if d_last is None
            else d_last.to(vs.dtype).reshape(lanes, key, value)
        )
        for c in reversed(range(count)):
            d_written[:, c] = d_state
            d_state = torch.addcmul(d_before[:, c], d_state, fade[:, c, None, None])
        d_fade = (d_written * before).sum((-2, -1)) * fade
        d_written = d_written.flatten(0, 1)
        d_key = torch.bmm(vs, d_written.mT)
        d_kept = (d_key * ks).sum(-1).view(-1, ranks, size).sum(1)
        d_key = d_key.mul_(_rows(kept, ranks)).baddbmm_(d_scores.mT, qs)
        d_value.addcmul_(torch.bmm(ks, d_written), _rows(kept, ranks))

        d_now = d_mix.diagonal(dim1=-2, dim2=-1).clone().view(lanes, count, size)
        d_weight = (d_mix * decay).sum(-2) + d_kept * until_end.view(-1, size)
        d_weight = d_weight.view(lanes, count, size)
        d_exponent = d_mix.mul_(mix)
        # A pair j < i has the log-decays behind j, up to i. Pairs on one side of a hard gate are left out, not taken
        # off again: its own small gradient would drown in what is left of them.
        d_gate = d_since.flip(-1).cumsum(-1).flip(-1)
        d_gate[:, 1:] += d_exponent.cumsum(-1).tril_(-1).sum(-2)[:, :-1]
        d_gate = d_gate.view(lanes, count, size)
        d_gate[..., 1:] += (d_kept * kept.view(-1, size)).view(lanes, count, size)[..., :-1].cumsum(-1)
        d_gate += d_fade.unsqueeze(-1)
        d_late = torch.zeros_like(d_weight)
        d_late.view(lanes, -1)[:, 1:] = d_weight.view(lanes, -1)[:, :-1]

        def by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
            """[B·H, n, C] → [B, T, H]."""
            return x.view(batch, heads, -1)[..., :time].mT.to(dtype)

        types = ctx.dtypes
        return (
            _unfold(d_query, types[0], ctx.sizes),
            _unfold(d_key, types[1], ctx.sizes),
            _unfold(d_value, types[2], ctx.sizes),
            by_token(d_gate, types[3]),
            by_token(d_late, types[4]),
            by_token(d_now + d_weight, types[5]),
            d_state.view(batch, heads, key, value),
            None,
        )


def first_state(
    dtype: torch.dtype,
    late: Tensor,
    state: Tensor | None,
    previous: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | None:
    """The state [B, H, K, V] with what the first token writes late of the one before; shapes as in `ops.trapezoid`."""
    first = None if state is None else state.to(dtype)
    if previous is None:
        return first
    with torch.autocast(late.device.type, enabled=False):
        start = late[:, 0] if cu_seqlens is None else late[0, cu_seqlens[:-1]]
        keys, values = (x.to(dtype).transpose(1, 2) for x in previous)
        written = keys.mT @ (values * start[:, :, None, None].to(dtype))
        return written if first is None else first + written


def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    late: Tensor,
    fresh: Tensor,
    state: Tensor | None,
    previous: tuple[Tensor, Tensor] | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens, or one as long as the text; shapes as in `ops.trapezoid`."""
    batch, time, _, heads, value = v.shape
    dtype = working_dtype(q, k, v, log_decay, late, fresh, state, *(previous or ()))
    with torch.autocast(q.device.type, enabled=False):
        first = first_state(dtype, late, state, previous)
        if first is None:
            first = torch.zeros(batch, heads, k.shape[-1], value, dtype=dtype, device=v.device)
        result: tuple[Tensor, Tensor] = _Chunks.apply(  # type: ignore[no-untyped-call]
            q, k, v, log_decay, late, fresh, first, min(chunk, time)
        )
    return result

"""Linear recurrence with one decay a head, a chunk at a time.

Letters: B batch, T time, H heads, G groups that share q and k, R = H/G, K key, V value, C tokens of a chunk,
n chunks.  After Mamba-2's state space duality, arXiv:2405.21060.

With D the running sum of the log-decays in a chunk, every exponent is a sum of log-decays, never positive:
    o_i = exp(D_i) q_i S + Σ_{j ≤ i} exp(D_i − D_j) (q_i·k_j) v_j
    S  ← exp(D_C) S + Σ_j exp(D_C − D_j) k_j v_jᵀ
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype
from kernels.decay import chunk_decays


def _carry(written: Tensor, fade: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The states [n, B, G, R, K, V] before each chunk (None: one chunk, from zeros) and the last one.

    written [n, B, G, R, K, V] is what each chunk adds, fade [n, B, G, R, 1, 1] what it leaves of the past.
    """
    if state is None and written.shape[0] == 1:
        return None, written[0]
    last = torch.zeros_like(written[0]) if state is None else state
    before = []
    for c, added in enumerate(written.unbind(0)):
        before.append(last)
        last = last + added if fade is None else torch.addcmul(added, last, fade[c])
    return torch.stack(before), last


def scalar_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens, or one as long as the text; shapes as in `ops.scalar_decay`."""
    with torch.autocast(q.device.type, enabled=False):
        return _scalar_decay(q, k, v, log_decay, state, chunk)


def _scalar_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, time, heads, value = v.shape
    groups, key = k.shape[2:]
    shared = heads // groups
    size = min(chunk, time)
    count = -(-time // size)
    dtype = working_dtype(q, k, v, log_decay, state)

    def fold(x: Tensor) -> Tensor:
        """[B, T, heads, D] → [n, B, heads, C, D], zeros behind the end: they write nothing and fade nothing."""
        if count * size != time:
            x = pad(x, (0, 0, 0, 0, 0, count * size - time))
        folded: Tensor = x.unflatten(1, (count, size)).permute(1, 0, 3, 2, 4)
        return folded.to(dtype)

    qs, ks = (fold(x).reshape(-1, size, key) for x in (q, k))
    vs = fold(v).reshape(-1, shared, size, value)
    weights = torch.bmm(qs, ks.mT).tril().unsqueeze(1)
    since_start, until_end, fade = None, None, None
    if log_decay is not None:
        gate = fold(log_decay.unsqueeze(-1)).reshape(-1, shared, size)
        within, since_start, until_end = chunk_decays(gate)
        weights = weights * within
        since_start, until_end = since_start.unsqueeze(-1), until_end.unsqueeze(-1)
        fade = since_start[:, :, -1:].view(count, batch, groups, shared, 1, 1)
    if log_decay is None and shared > 1:
        output = torch.bmm(weights[:, 0], vs.transpose(1, 2).flatten(2)).unflatten(2, (shared, value))
        output = output.transpose(1, 2)
    else:
        output = torch.bmm(weights.flatten(0, 1), vs.flatten(0, 1)).view_as(vs)

    kept = vs if until_end is None else vs * until_end
    written = torch.bmm(ks.mT, kept.transpose(1, 2).flatten(2)).view(count, batch, groups, key, shared, value)
    first = None if state is None else state.to(dtype).unflatten(1, (groups, shared))
    before, last = _carry(written.transpose(3, 4), fade, first)
    if before is not None:
        wide = before.transpose(3, 4).reshape(-1, key, shared * value)
        recalled = torch.bmm(qs, wide).unflatten(2, (shared, value)).transpose(1, 2)
        output = output + recalled if since_start is None else torch.addcmul(output, recalled, since_start)
    output = output.reshape(count, batch, heads, size, value).permute(1, 0, 3, 2, 4)
    output = output.reshape(batch, count * size, heads, value)[:, :time]
    return output.to(v.dtype).contiguous(), last.reshape(batch, heads, key, value).contiguous()

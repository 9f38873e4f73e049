"""Log-linear attention, a chunk at a time.

Letters: B batch, T time, H heads, G groups that share q and k, R = H/G, L levels, K key, V value, C tokens of a
chunk, n chunks.  After arXiv:2506.04761.

A token's write reaches a later token through the transitions between them alone, and is weighed by the level in
which that one finds it. So each chunk of the base rule is first brought to four quantities, linear in the values:
    A [C, C]  what token i reads of the value of token j ≤ i        q̃ [C, K]  what token i reads of an earlier state
    k̃ [C, K]  what a value leaves in the chunk's last state         P         what the chunk makes of an earlier state
With D the running sum of the log-decays, Λ_ij = exp(D_i − D_j), and M = 1 for the scalar decay, else
(1 + Diag(β) strictLower(KKᵀ ∘ Λ))⁻¹ Diag(β):
    A = (QKᵀ ∘ Λ) M    k̃ = Mᵀ (exp(D_C − D) K)    q̃ = exp(D) Q − A (exp(D) K)    P = exp(D_C) − k̃ᵀ (exp(D) K)
where the last terms of q̃ and P belong to the delta rule. Within a chunk o = (A ∘ weights) V. Chunks are then joined
pair by pair along the tree: the right block of a pair reads the state that the left one left, with one weight.

Positions are absolute: a chunk begins at a multiple of C wherever the text was cut, and empty tokens fill it up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import working_dtype
from kernels.decay import chunk_decays
from kernels.log_linear import reference


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """queries, keys [B, H, n, C, K], values [B, H, n, C, V], passed [B, H, n, 1, 1] or [B, H, n, K, K], scores, weights."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    passed: Tensor
    scores: Tensor
    """[B, H, n, C, C], A above."""
    weights: Tensor
    """[B, H, n, C, L]."""


def _levels_within(size: int, device: torch.device) -> Tensor:
    """[C, C]: the level in which token i finds token j ≤ i of the same chunk; nought elsewhere."""
    place = torch.arange(size, device=device)
    bits = torch.arange(size.bit_length(), device=device)
    return ((place[:, None] ^ place)[..., None] >> bits > 0).sum(-1).tril()


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, where a transition that is one number a head is [..., 1, 1]."""
    single = left.shape[-2:] == (1, 1) or right.shape[-2:] == (1, 1)
    return left * right if single else left @ right


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    size: int,
    before: int,
) -> _Chunks:
    """The four quantities of every chunk, behind `before` empty tokens: they write nothing and fade nothing."""
    time, heads = v.shape[1:3]
    count = -(-(before + time) // size)
    dtype = working_dtype(q, k, v, log_decay, weights, beta)

    def fold(x: Tensor) -> Tensor:
        """[B, T, heads, D] → [B, heads, n, C, D]."""
        x = pad(x, (0, 0, 0, 0, before, count * size - before - time))
        folded: Tensor = x.unflatten(1, (count, size)).permute(0, 3, 1, 2, 4)
        return folded.to(dtype)

    def by_head(x: Tensor) -> Tensor:
        """[B, G, ...] → [B, H, ...]."""
        shared = heads // x.shape[1]
        return x if shared == 1 else x.unsqueeze(2).expand(-1, -1, shared, *x.shape[2:]).flatten(1, 2)

    queries, keys = fold(q), fold(k)
    gate = fold(log_decay.unsqueeze(-1)).squeeze(-1)
    decay, since_start, until_end = chunk_decays(gate)
    scores = by_head((queries @ keys.mT).tril()) * decay
    since_start, until_end = since_start.unsqueeze(-1), until_end.unsqueeze(-1)
    passed = since_start[..., -1:, :]
    queries, keys = by_head(queries), by_head(keys)
    seen, left = queries * since_start, keys * until_end
    if beta is not None:
        strength = fold(beta.unsqueeze(-1))
        lower = ((keys @ keys.mT).tril(-1) * decay) * strength
        inverse = torch.linalg.solve_triangular(
            lower + torch.eye(size, dtype=dtype, device=v.device),
            torch.diag_embed(strength.squeeze(-1)),
            upper=False,
            unitriangular=True,
        )
        erased = keys * since_start
        scores = scores @ inverse
        left = inverse.mT @ left
        seen = seen - scores @ erased
        identity = torch.eye(k.shape[-1], dtype=dtype, device=v.device)
        passed = passed * identity - left.mT @ erased
    return _Chunks(
        queries=seen, keys=left, values=fold(v), passed=passed, scores=scores, weights=fold(weights)
    )


def _bits(number: int) -> list[int]:
    """The places of the ones in a number, the lowest first."""
    return [bit for bit in range(number.bit_length()) if number >> bit & 1]


def _firsts(length: int) -> list[int]:
    """Where the blocks of a text of `length` tokens begin, one for each of `_bits`."""
    return [length >> bit + 1 << bit + 1 for bit in _bits(length)]


def _read_within(chunks: _Chunks, table: Tensor, levels: Tensor | None, before: int) -> Tensor:
    """[B, H, n, C, V]: what each chunk reads of its own tokens; of the first one's, also those before the cut."""
    weights = chunks.weights.gather(-1, table.expand(chunks.scores.shape))
    output: Tensor = (chunks.scores * weights) @ chunks.values
    if levels is None or not before:
        return output
    weights = weights[:, :, 0][..., _firsts(before)]
    queries = (weights.unsqueeze(-1) * chunks.queries[:, :, 0].unsqueeze(-2)).flatten(-2)
    recalled = queries @ levels[:, :, [bit + 1 for bit in _bits(before)]].flatten(2, 3)
    return torch.cat([output[:, :, :1] + recalled.unsqueeze(2), output[:, :, 1:]], dim=2)


def _keep_within(chunks: _Chunks, table: Tensor, levels: Tensor | None, before: int, last: int) -> Tensor:
    """The levels [B, H, log2(C) + 1, K, V] of the last chunk's own tokens, `last` being the place of the last one."""
    found = table[last]
    own = torch.arange(table.shape[0].bit_length(), device=found.device)[:, None] == found
    keys = chunks.keys[:, :, -1].mT.unsqueeze(2) * own.unsqueeze(1)
    low: Tensor = (keys.flatten(2, 3) @ chunks.values[:, :, -1]).unflatten(2, (len(own), -1))
    if levels is None or not before or chunks.keys.shape[2] > 1:
        return low
    passed = _times(chunks.passed[:, :, :1], levels[:, :, [bit + 1 for bit in _bits(before)]])
    return low.index_add(2, found[_firsts(before)], passed)


def _join(
    chunks: _Chunks, output: Tensor, levels: Tensor | None, first: int, before: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Adds what chunks read of one another; and the levels after the last chunk that hold whole chunks, by number.

    Block i of 2^j chunks is the right one of a pair where i is odd; i counts from the beginning of the text.
    """
    size, top = chunks.scores.shape[-1], chunks.weights.shape[-1] - 1
    count = chunks.keys.shape[2]
    queries, passed, state = chunks.queries, chunks.passed, chunks.keys.mT @ chunks.values
    if levels is not None and before:
        old = levels[:, :, [bit + 1 for bit in _bits(before)]].sum(2, keepdim=True)
        state = torch.cat([state[:, :, :1] + _times(passed[:, :, :1], old), state[:, :, 1:]], dim=2)
    known = _neighbours(levels, first, size, top)
    kept: dict[int, Tensor] = {}
    low, high = first, first + count - 1
    for height in range(high.bit_length()):
        level = min(height + size.bit_length(), top)
        if low & 1:
            state = torch.cat([known.get(height, torch.zeros_like(state[:, :, :1])), state], dim=2)
            passed = torch.cat([_identity(passed), passed], dim=2)
        pairs = state.shape[2] // 2
        if pairs:
            left, right = state[:, :, 0 : 2 * pairs : 2], state[:, :, 1::2]
            left_passed, right_passed = passed[:, :, 0 : 2 * pairs : 2], passed[:, :, 1::2]
            rows = [c for c in range(count) if first + c >> height & 1]
            pair = [(first + c >> height + 1) - (low >> 1) for c in rows]
            reading = queries[:, :, rows]
            read = (reading @ left[:, :, pair]) * chunks.weights[:, :, rows, :, level].unsqueeze(-1)
            output = output.index_add(2, torch.tensor(rows, device=output.device), read)
            joined, joined_passed = _times(right_passed, left), _times(right_passed, left_passed)
            if high & 1:
                kept[level] = joined[:, :, -1] + kept.get(level, 0.0)
            queries = queries.index_copy(
                2, torch.tensor(rows, device=output.device), _times(reading, left_passed[:, :, pair])
            )
            state = torch.cat([joined + right, state[:, :, 2 * pairs :]], dim=2)
            passed = torch.cat([joined_passed, passed[:, :, 2 * pairs :]], dim=2)
        low, high = low >> 1, high >> 1
    return output, kept


def _neighbours(levels: Tensor | None, first: int, size: int, top: int) -> dict[int, Tensor]:
    """What lies in whole chunks before the cut, [B, H, 1, K, V], by the height at which it is a left neighbour.

    The last level may hold several blocks; which of them holds it makes no difference to what follows.
    """
    if levels is None:
        return {}
    known: dict[int, Tensor] = {}
    for bit in _bits(first):
        level = min(bit + size.bit_length(), top)
        known[bit] = levels[:, :, level : level + 1]
        if level == top:
            break
    return known


def _identity(passed: Tensor) -> Tensor:
    """A transition [B, H, 1, *, *] that changes nothing."""
    one = torch.eye(passed.shape[-1], dtype=passed.dtype, device=passed.device)
    return one.expand_as(passed[:, :, :1])


def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor | None,
    length: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens at most; shapes as in `ops.log_linear`."""
    with torch.autocast(q.device.type, enabled=False):
        time, count = v.shape[1], weights.shape[-1]
        # No longer than the levels can tell apart, nor than the text asks for.
        size = min(chunk, 1 << (count - 2), max(16, 1 << (time - 1).bit_length()))
        first, before = divmod(length, size)
        if levels is not None:
            levels = reference.merge(
                levels.to(working_dtype(q, k, v, log_decay, weights, beta, levels)), length
            )
        chunks = _chunks(q, k, v, log_decay, weights, beta, size, before)
        table = _levels_within(size, v.device)
        output = _read_within(chunks, table, levels, before)
        output, kept = _join(chunks, output, levels, first, before)
        low = _keep_within(chunks, table, levels, before, (before + time - 1) % size)
        nothing = torch.zeros_like(low[:, :, 0])
        high = [kept.get(level, nothing) for level in range(low.shape[2], count)]
        output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, before : before + time]
        return output.to(v.dtype).contiguous(), torch.cat([low, torch.stack(high, dim=2)], dim=2)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    beta: Tensor | None,
    levels: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """One token, by the levels that hold something alone; shapes as in `ops.log_linear_step`."""
    dtype = working_dtype(q, k, v, log_decay, weights, beta, levels)
    shared = v.shape[1] // k.shape[1]
    inputs = (q, k, v, log_decay, weights, beta, levels)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    with torch.autocast(q.device.type, enabled=False):
        levels = levels.to(dtype)
        levels = levels.clone() if differentiable else levels
        top = levels.shape[2] - 1
        query, key = (x.to(dtype).repeat_interleave(shared, dim=1) for x in (q, k))
        written = v.to(dtype) if beta is None else v.to(dtype) * beta.to(dtype).unsqueeze(-1)
        if length:
            # The transition is the same for all levels, so that they may merge before it.
            free = min((length & -length).bit_length(), top)
            levels[:, :, free] += levels[:, :, :free].sum(2)
            levels[:, :, 1:free] = 0.0
        held = sorted({min(bit + 1, top) for bit in _bits(length)})
        fresh = key.unsqueeze(-1) * written.unsqueeze(-2)
        levels[:, :, 0] = fresh
        if held:
            live = levels[:, :, held] * log_decay.to(dtype).exp()[..., None, None, None]
            if beta is not None:
                recalled = key[:, :, None, None, :] @ live
                erasing = (key * beta.to(dtype).unsqueeze(-1))[:, :, None, :, None]
                live = live - erasing * recalled
            levels[:, :, held] = live
        live = levels[:, :, [0, *held]]
        read = (query[:, :, None, None, :] @ live).squeeze(-2)
        output = (weights.to(dtype)[:, :, [0, *held]].unsqueeze(-1) * read).sum(2)
        return output.to(v.dtype), levels

"""What `kernels.scan_kernels` asks of the rows of a chunk, of which a token may have several.

Letters: H heads, R rows that a token writes and reads, C rows of a chunk.
"""

import triton
import triton.language as tl

from kernels.fused import chunk_sums, pair_decays


@triton.jit
def live_rows(left, R: tl.constexpr, C: tl.constexpr):
    """Which rows of a chunk belong to one of the `left` tokens from its first one on."""
    i = tl.arange(0, C)
    return (i < C // R * R) & (i < left * R)


@triton.jit
def row_decays(gate, left, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """What `chunk_sums` tells of the rows of a chunk, with `left` tokens to come; gate points to its first token."""
    i, fades = tl.arange(0, C), tl.zeros([C], tl.float32)
    if gate is not None:
        # A token's log-decay lies in the first of its rows, and acts on all of them.
        fades = tl.load(gate + i // R * H, mask=live_rows(left, R, C) & (i % R == 0), other=0.0)
    return chunk_sums(fades)


@triton.jit
def row_weights(late, fresh, left, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """What the writes of a chunk's rows weigh for later tokens, and for the token itself [C]."""
    if late is None:
        return tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    else:
        token, live = tl.arange(0, C) // R, live_rows(left, R, C)
        now = tl.load(fresh + token * H, mask=live, other=0.0)
        return now + tl.load(late + (token + 1) * H, mask=live & (token + 1 < left), other=0.0), now


@triton.jit
def mixed(pairs, whole, rest, weight, now, R: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr):
    """Products of pairs of rows, times what the reader keeps of the writer: rows read; with BACK they write."""
    token = tl.arange(0, C) // R
    pairs = pairs * pair_decays(whole, rest, C, BACK, R)
    weight, now = (weight[:, None], now[:, None]) if BACK else (weight[None, :], now[None, :])
    return pairs * tl.where(token[:, None] == token[None, :], now, weight)


@triton.jit
def store_sums(place, x, left, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Write the numbers [C] of the rows of a chunk, summed up for each of its `left` tokens."""
    i = tl.arange(0, C)
    if R > 1:
        x = tl.sum(tl.where(i[:, None] // R == i[None, :], x[:, None], 0.0), 0)
    tl.store(place + i * H, x, mask=(i < C // R) & (i < left))

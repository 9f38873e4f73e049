"""What several Triton kernels share: the bounds of a document, and what decays leave of a chunk.

Letters: B batch, N documents (or B), T time, C tokens of a chunk.
"""

import triton
import triton.language as tl


@triton.jit
def document_bounds(n, T, cu_seqlens, offsets, C: tl.constexpr):
    """First token, length and first chunk of the document n, or of batch entry n where cu_seqlens is None."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - first).to(tl.int32)
        chunk = tl.load(offsets + n).to(tl.int64)
    else:
        first = n * T
        length = T
        chunk = n * tl.cdiv(T, C)
    return first, length, chunk


@triton.jit
def chunk_sums(gate):
    """Log-decays [C] → the running sum in two parts; exp(Σ_{s≤i}) and exp(Σ_{s>j}) [C]; exp(Σ all).

    Behind a hard decay a mild one would drown in a float32 sum. So the sums are taken in float64 and cut into a whole
    and a fractional part, whose differences are both exact, with no float64 tile. Below -1000 a decay is nought in
    every type, and a sum of such would lose the digits of what comes after even so.
    """
    wide = tl.maximum(gate.to(tl.float32), -1e3).to(tl.float64)
    total = tl.cumsum(wide, 0)
    end = tl.sum(wide, 0)
    floor = tl.floor(total)
    since, until = tl.exp(total.to(tl.float32)), tl.exp((end - total).to(tl.float32))
    return floor.to(tl.float32), (total - floor).to(tl.float32), since, until, tl.exp(end.to(tl.float32))


@triton.jit
def pair_decays(whole, rest, C: tl.constexpr, TURNED: tl.constexpr, R: tl.constexpr = 1):
    """exp(Σ_{j<s≤i}) for j ≤ i else 0 [C, C] from the parts of a running sum: rows i, columns j, or turned.

    R rows of a token count as one, where the running sum is the same for all of them.
    """
    i = tl.arange(0, C) // R
    if TURNED:
        between = (whole[None, :] - whole[:, None]) + (rest[None, :] - rest[:, None])
        return tl.exp(tl.where(i[:, None] <= i[None, :], between, float("-inf")))
    else:
        between = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
        return tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))


@triton.jit
def chunk_decays(gate, C: tl.constexpr):
    """Log-decays [C] → exp(Σ_{j<s≤i}) for j ≤ i else 0 [C, C]; exp(Σ_{s≤i}) and exp(Σ_{s>j}) [C]; exp(Σ all)."""
    whole, rest, since, until, fade = chunk_sums(gate)
    return pair_decays(whole, rest, C, False), since, until, fade


@triton.jit
def chunk_place(own, T, cu_seqlens, offsets, owners, C: tl.constexpr):
    """First token of the chunk `own` of all documents, and how many there are from it on: in an unused chunk none."""
    n = tl.load(owners + own).to(tl.int64) if owners is not None else own // tl.cdiv(T, C)
    first, length, chunk = document_bounds(n, T, cu_seqlens, offsets, C)
    begin = (own - chunk) * C
    return first + begin, length - begin


@triton.jit
def chunk_products(
    left,
    right,
    states,
    live,
    low,
    STRIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left rightᵀ [C, C] and left states [C, N], for the columns of the states from `low` on.

    left and right [C, M] have their rows STRIDE apart; states [M, N] have steps of ACROSS and ALONG, so that either of
    K and V may be M. They point to the chunk's and the head's first number.
    """
    i, m = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M)
    columns = low + tl.arange(0, BLOCK_N)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    through = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        inner = start + m
        at = i[:, None] * STRIDE + inner[None, :]
        own = live[:, None] & (inner < M)[None, :]
        inside = (inner < M)[:, None] & (columns < N)[None, :]
        rows = tl.load(left + at, mask=own, other=0.0)
        others = tl.load(right + at, mask=own, other=0.0)
        S = tl.load(states + inner[:, None] * ACROSS + columns[None, :] * ALONG, mask=inside, other=0.0)
        pairs += tl.dot(rows, tl.trans(others), input_precision=PRECISION)
        through += tl.dot(rows, S, input_precision=PRECISION)
    return pairs, through


@triton.jit
def chunk_bounds(chunk, T, DOCUMENTS, cu_seqlens, offsets, C: tl.constexpr):
    """First token of a chunk, counted over all documents, and how many tokens of its document are left from there on.

    For programs of a chunk each. Where documents are packed there may be chunks behind the last one: none are left.
    """
    if cu_seqlens is not None:
        n = 0
        for start in range(0, DOCUMENTS, 128):
            document = start + tl.arange(0, 128)
            ends = tl.load(offsets + 1 + document, mask=document < DOCUMENTS, other=chunk + 1)
            n += tl.sum((ends <= chunk).to(tl.int32))
        n = tl.minimum(n, DOCUMENTS - 1)
        before = (chunk - tl.load(offsets + n)).to(tl.int64) * C
        first = tl.load(cu_seqlens + n).to(tl.int64) + before
        left = (tl.load(cu_seqlens + n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        count = tl.cdiv(T, C)
        before = (chunk % count) * C
        first = (chunk // count).to(tl.int64) * T + before
        left = T - before
    return first, left


@triton.jit
def split_decays(i, last, s, half):
    """Whether the decay of token s lies between token i and the middle of its pair of blocks of `half` tokens: 1 or 0.

    Of two neighbouring blocks the earlier one holds what was written and the later one what reads it: from a token of
    the earlier block all after it count, in the later block all up to `last`. Every pair of tokens is parted so at
    exactly one length of blocks, 1, 2, 4 and so on. The exponents are products of these ones with the log-decays: sums
    of what lies between, none positive, in which no mild decay drowns as it would in a difference of running sums.
    """
    middle = i // (2 * half) * (2 * half) + half
    behind, before = (s > i) & (s < middle), (s >= middle) & (s <= last)
    return tl.where(i < middle, behind, before).to(tl.float16)


@triton.jit
def split_pairs(i, j, half):
    """Whether token j lies in the earlier and token i in the later block of a pair of blocks of `half` tokens."""
    return (i // half == j // half + 1) & (i // half % 2 == 1)


@triton.jit
def load_decays(gate, at, own):
    """Log-decays as the sum of two numbers in float16, the second much smaller, for products with ones and zeros.

    Such products are exact, and cost less than any in float32. Below -200 all decays are alike, nothing in float32:
    so none is infinite, and what float16 rounds away is less than 1e-7 or a millionth of the log-decay.
    """
    decay = tl.load(gate + at, mask=own, other=0.0).to(tl.float32)
    decay = tl.where(decay < -200.0, -200.0, decay)
    high = decay.to(tl.float16)
    return high, (decay - high.to(tl.float32)).to(tl.float16)


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + L)⁻¹ in float32 of a strictly lower triangle L [C, C], C a power of two up to 128.

    The inverses X₁₁, X₂₂ of two neighbouring blocks are joined by −X₂₂ L₂₁ X₁₁, for all pairs of blocks at once, until
    one is left. Powers of L would take fewer products, but outgrow float32 where one key is written again and again.
    """
    i = tl.arange(0, C)
    pair = (i[:, None] == i[None, :] + 1) & (i % 2 == 1)[:, None]
    inverse = tl.where(i[:, None] == i[None, :], 1.0, tl.where(pair, -lower, 0.0))
    for level in tl.static_range(1, 7):
        if 2**level < C:
            block = i // 2**level
            corner = (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]
            below = tl.dot(inverse, tl.where(corner, lower, 0.0), input_precision=PRECISION)
            inverse -= tl.dot(below, inverse, input_precision=PRECISION)
    return inverse

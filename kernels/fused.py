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
def chunk_decays(gate, C: tl.constexpr):
    """Log-decays [C] → exp(Σ_{j<s≤i}) for j ≤ i else 0 [C, C]; exp(Σ_{s≤i}) and exp(Σ_{s>j}) [C]; exp(Σ all).

    Behind a hard decay a mild one would drown in a float32 sum. So the sums are taken in float64 and cut into a whole
    and a fractional part, whose differences are both exact, with no float64 tile.
    """
    i = tl.arange(0, C)
    wide = gate.to(tl.float64)
    total = tl.cumsum(wide, 0)
    end = tl.sum(wide, 0)
    floor = tl.floor(total)
    whole, rest = floor.to(tl.float32), (total - floor).to(tl.float32)
    between = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
    within = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
    until = tl.exp((end - total).to(tl.float32))
    return within, tl.exp(total.to(tl.float32)), until, tl.exp(end.to(tl.float32))

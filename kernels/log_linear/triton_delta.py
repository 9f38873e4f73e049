"""Log-linear attention over the delta rule in Triton: its states by `kernels.delta`, what a token reads of them here.

Letters: B batch, T time, H heads, G groups that share q and k, L levels, K key, V value, C tokens of a chunk, n chunks
of a text, W walks.  After arXiv:2506.04761; the chunk's formulas are in `chunked`.

Levels differ in nothing but the values that they took, so that every walk of `triton`, with erasures, is a delta rule
of the same keys: it takes the values of the chunks that write, starts anew with each block, and is read where readers
are. All walks go at once over what each chunk prepares once. Within a chunk a token reads A ∘ λ of the values, where
A = S X Diag(β) from the scores S and the inverse X that the chunk prepared; with dA the gradient of A and Y = S X,
    dS = dA Diag(β) Xᵀ    and, of the triangle that X inverts,    −Yᵀ dS.
No accumulator is transposed on its way into another product: what is needed both ways is computed both ways.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta import Prepared, Walks, delta, prepare
from kernels.fused import chunk_decays, chunk_place
from kernels.launch import configure, dot_precision, launch
from kernels.log_linear.levels import by_level, levels_of, weighed

OPERATOR = "log_linear"
ROWS = "_delta"
"""How the names of its rows end: those without this are the decay's."""


@triton.jit(do_not_specialize=["T", "TOTAL", "WALKS", "BEFORE"])
def _read(
    v,
    beta,
    weights,
    inverse,
    scores,
    through,
    output,
    T,
    TOTAL,
    WALKS,
    BEFORE,
    H: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of one chunk's output: what it reads of its own tokens, and of the walks, weighed by level."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    own = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1)
    first, left = chunk_place(own, T, None, None, None, CHUNK)
    number = BEFORE + own % tl.cdiv(T, CHUNK)
    token = first * H + h
    i = tl.arange(0, CHUNK)
    values = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    live = i < left
    square = (own * H + h) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    at_v = token * V + i[:, None] * (H * V) + values[None, :]
    own_v = live[:, None] & (values < V)[None, :]
    strength = tl.load(beta + token + i * H, mask=live, other=0.0)
    pairs = tl.dot(tl.load(scores + square), tl.load(inverse + square), input_precision=PRECISION)
    pairs = weighed(pairs * strength[None, :], weights + token * L, live, H, L, NEAR, CHUNK, False)
    value = tl.load(v + at_v, mask=own_v, other=0.0)
    out = tl.dot(pairs.to(value.dtype), value, input_precision=PRECISION)
    if through is not None:
        for walk in range(0, WALKS):
            if (number >> walk) & 1 == 1:
                level = tl.minimum(FAR + walk, L - 1)
                weight = tl.load(weights + token * L + level + i * (H * L), mask=live, other=0.0)
                there = through + walk * TOTAL.to(tl.int64) * (H * V)
                out += tl.load(there + at_v, mask=own_v, other=0.0).to(tl.float32) * weight[:, None]
    tl.store(output + at_v, out.to(output.dtype.element_ty), mask=own_v)


@triton.jit(do_not_specialize=["T", "TOTAL", "WALKS", "BEFORE"])
def _backward(
    q,
    k,
    v,
    gate,
    beta,
    weights,
    inverse,
    scores,
    through,
    d_output,
    d_q,
    d_k,
    d_v,
    d_gate,
    d_beta,
    d_near,
    d_far,
    d_through,
    T,
    TOTAL,
    WALKS,
    BEFORE,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of what one chunk reads of its own tokens, and those of what it reads of the walks."""
    own = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    first, left = chunk_place(own, T, None, None, None, CHUNK)
    number = BEFORE + own % tl.cdiv(T, CHUNK)
    shared, token = first * G + h // (H // G), first * H + h
    kind = v.dtype.element_ty
    i = tl.arange(0, CHUNK)
    live = i < left
    earlier, later = i[:, None] > i[None, :], i[:, None] < i[None, :]
    square = (own * H + h) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    weights += token * L
    strength = tl.load(beta + token + i * H, mask=live, other=0.0)
    solved, read = tl.load(inverse + square), tl.load(scores + square)
    made = tl.dot(read, solved, input_precision=PRECISION)
    made_turned = tl.dot(tl.trans(solved), tl.trans(read), input_precision=PRECISION)
    pairs_turned = weighed(made_turned * strength[:, None], weights, live, H, L, NEAR, CHUNK, True).to(kind)
    d_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_turned = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, V, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        at_v = token * V + i[:, None] * (H * V) + values[None, :]
        own_v = live[:, None] & (values < V)[None, :]
        value = tl.load(v + at_v, mask=own_v, other=0.0)
        d_out = tl.load(d_output + at_v, mask=own_v, other=0.0)
        d_pairs += tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        d_turned += tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        d_value = tl.dot(pairs_turned, d_out, input_precision=PRECISION)
        tl.store(d_v + at_v, d_value.to(kind), mask=own_v)
    if through is not None:
        for walk in range(0, WALKS):
            level = tl.minimum(FAR + walk, L - 1)
            # Where this chunk writes it reads nothing.
            reads = live & ((number >> walk) & 1 == 1)
            weight = tl.load(weights + level + i * (H * L), mask=reads, other=0.0)
            there = walk * TOTAL.to(tl.int64) * (H * V)
            d_weight = tl.zeros([CHUNK], tl.float32)
            for start in range(0, V, BLOCK_V):
                values = start + tl.arange(0, BLOCK_V)
                at_v = token * V + i[:, None] * (H * V) + values[None, :]
                own_v = live[:, None] & (values < V)[None, :]
                d_out = tl.load(d_output + at_v, mask=own_v, other=0.0).to(tl.float32)
                seen = tl.load(through + there + at_v, mask=own_v & reads[:, None], other=0.0).to(tl.float32)
                d_weight += tl.sum(d_out * seen, 1)
                tl.store(d_through + there + at_v, (d_out * weight[:, None]).to(kind), mask=own_v)
            tl.store(d_far + token * WALKS + i * (H * WALKS) + walk, d_weight, mask=live)
    found = levels_of(i[:, None], i[None, :], NEAR)
    change = made * strength[None, :] * d_pairs
    for level in range(0, NEAR):
        d_weight = tl.sum(tl.where(found == level, change, 0.0), 1)
        tl.store(d_near + token * NEAR + i * (H * NEAR) + level, d_weight, mask=live)
    d_pairs = weighed(tl.where(later, 0.0, d_pairs), weights, live, H, L, NEAR, CHUNK, False)
    d_turned = weighed(tl.where(earlier, 0.0, d_turned), weights, live, H, L, NEAR, CHUNK, True)
    d_strength = tl.sum(d_pairs * made, 0)
    d_made, d_made_turned = (d_pairs * strength[None, :]).to(kind), (d_turned * strength[:, None]).to(kind)
    d_scores = tl.dot(d_made, tl.trans(solved), input_precision=PRECISION)
    d_turned = tl.dot(solved, d_made_turned, input_precision=PRECISION)
    d_lower = -tl.dot(made_turned.to(kind), d_scores.to(kind), input_precision=PRECISION)
    d_upper = -tl.dot(d_turned.to(kind), made.to(kind), input_precision=PRECISION)
    fade = tl.load(gate + token + i * H, mask=live, other=0.0)
    within, _since, _until, _whole = chunk_decays(fade, CHUNK)
    # A pair of a token with itself fades by nothing.
    change = tl.where(earlier, d_scores * read.to(tl.float32), 0.0)
    d_scores = (d_scores * within).to(kind)
    d_turned = (d_turned * tl.trans(within)).to(kind)
    d_lower = tl.where(earlier, d_lower * within, 0.0)
    d_upper = tl.where(later, d_upper * tl.trans(within), 0.0)
    d_both = (d_lower * strength[:, None] + d_upper * strength[None, :]).to(kind)
    alike = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        at_k = shared * K + i[:, None] * (G * K) + keys[None, :]
        own_k = live[:, None] & (keys < K)[None, :]
        query, key = tl.load(q + at_k, mask=own_k, other=0.0), tl.load(k + at_k, mask=own_k, other=0.0)
        alike += tl.dot(key, tl.trans(key), input_precision=PRECISION)
        d_query = tl.dot(d_scores, key, input_precision=PRECISION)
        d_key = tl.dot(d_turned, query, input_precision=PRECISION)
        d_key += tl.dot(d_both, key, input_precision=PRECISION)
        at_head = token * K + i[:, None] * (H * K) + keys[None, :]
        tl.store(d_q + at_head, d_query.to(d_q.dtype.element_ty), mask=own_k)
        tl.store(d_k + at_head, d_key.to(d_k.dtype.element_ty), mask=own_k)
    d_lower = d_lower * alike
    tl.store(d_beta + token + i * H, d_strength + tl.sum(d_lower, 1), mask=live)
    # What a pair adds for its later token it takes away for its earlier one.
    change += d_lower * strength[:, None]
    change_by_token = tl.sum(change, 1) - tl.sum(change, 0)
    tl.store(d_gate + token + i * H, tl.cumsum(change_by_token, 0, reverse=True), mask=live)


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        walks: Walks,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        beta: Tensor,
        weights: Tensor,
        through: Tensor | None,
    ) -> Tensor:
        batch, time, heads, value = v.shape
        chunks, _, chunk, _ = prepared.inverse.shape
        row = configure(OPERATOR, "read" + ROWS, (k.shape[-1], value), v)
        sizes = _sizes(q, v, weights, chunk)
        output = torch.empty_like(v)
        launch(
            OPERATOR,
            _read,
            (chunks * triton.cdiv(value, row.blocks["BLOCK_V"]), heads),
            (
                *(v, beta, weights, prepared.inverse, prepared.scores, through, output),
                *(time, batch * time, walks.count, walks.before),
            ),
            {name: size for name, size in sizes.items() if name not in ("G", "K")},
            row,
            like=v,
        )
        ctx.save_for_backward(q, k, v, gate, beta, weights, prepared.inverse, prepared.scores, through)
        ctx.walks = walks
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, beta, weights, inverse, scores, through = ctx.saved_tensors
        walks: Walks = ctx.walks
        batch, time, groups, key = k.shape
        heads, value = v.shape[2:]
        chunks, _, chunk, _ = inverse.shape
        sizes = _sizes(q, v, weights, chunk)
        # Heads that share q and k are summed afterwards.
        kind = v.dtype if groups == heads else torch.float32
        d_q, d_k = (torch.empty(batch, time, heads, key, dtype=kind, device=v.device) for _ in range(2))
        d_v, d_gate, d_beta = (torch.empty_like(x) for x in (v, gate, beta))
        d_near = gate.new_empty(*gate.shape, sizes["NEAR"])
        d_far = gate.new_empty(*gate.shape, walks.count)
        d_through = None if through is None else torch.empty_like(through)
        launch(
            OPERATOR,
            _backward,
            (chunks, heads),
            (
                *(q, k, v, gate, beta, weights, inverse, scores, through, grads[0].to(v.dtype).contiguous()),
                *(d_q, d_k, d_v, d_gate, d_beta, d_near, d_far, d_through),
                *(time, batch * time, walks.count, walks.before),
            ),
            sizes,
            configure(OPERATOR, "backward_read" + ROWS, (key, value), v),
            like=v,
        )
        if groups != heads:
            d_q, d_k = (x.unflatten(2, (groups, -1)).sum(3).to(v.dtype) for x in (d_q, d_k))
        d_weights = by_level(d_near, d_far, weights.shape[-1], 3)
        return None, None, d_q, d_k, d_v, d_gate, d_beta, d_weights, d_through


def _sizes(q: Tensor, v: Tensor, weights: Tensor, chunk: int) -> dict[str, Any]:
    """What the kernels are compiled for; NEAR levels lie in one chunk, and FAR is the next one."""
    levels = weights.shape[-1]
    return {
        "H": v.shape[2],
        "G": q.shape[2],
        "K": q.shape[3],
        "V": v.shape[3],
        "L": levels,
        "NEAR": min(chunk.bit_length(), levels),
        "FAR": chunk.bit_length(),
        "CHUNK": chunk,
        "PRECISION": dot_precision(v.dtype),
    }


def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    weights: Tensor,
    beta: Tensor,
    first: Tensor | None,
    walks: Walks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the levels that the last chunk holds alone [B, H, NEAR, K, V], and those that walks hold [B, H, W, K, V].

    q, k and v of one type, the others in float32, all contiguous; `first` are the walks' states before the text.
    """
    prepared = prepare(OPERATOR, q, k, v, gate, beta, rows=ROWS)
    batch, _, heads, value = v.shape
    chunk = prepared.inverse.shape[-1]
    through, last = None, torch.zeros(batch, heads, 0, k.shape[-1], value, device=v.device)
    if walks.count:
        through, last = delta(OPERATOR, q, k, v, gate, beta, first, prepared, walks=walks, rows=ROWS)
        # What no chunk would read next lies in other walks as well.
        number = walks.before + triton.cdiv(v.shape[1], chunk) - 1
        read_next = number >> torch.arange(walks.count, device=v.device) & 1 == 1
        last = last.where(read_next[:, None, None], 0.0)
    output: Tensor = _Reads.apply(prepared, walks, q, k, v, gate, beta, weights, through)
    near = min(chunk.bit_length(), weights.shape[-1])
    return output, _low(q, k, v, gate, beta, prepared, near), last


def _low(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, prepared: Prepared, near: int
) -> Tensor:
    """The levels that the last token finds in its own chunk, [B, H, NEAR, K, V]: a walk each over this chunk."""
    batch, time = v.shape[:2]
    chunk = prepared.inverse.shape[-1]
    left = (time - 1) % chunk + 1
    apart = torch.arange(left, device=v.device) ^ (left - 1)
    levels = torch.arange(near, device=v.device)
    own = (apart >> levels[:-1, None] > 0).sum(0) == levels[:, None]
    q, k, v, gate, beta = (x[:, time - left :].contiguous() for x in (q, k, v, gate, beta))
    values = v.where(own[:, None, :, None, None], 0.0)
    made = (prepared.inverse, prepared.scores, prepared.fades)
    inverse, scores, fades = (
        x if x is None else x.unflatten(0, (batch, -1))[:, -1].contiguous() for x in made
    )
    assert inverse is not None and scores is not None
    last_chunk = Prepared(inverse=inverse, scores=scores, fades=fades)
    walks = Walks(count=near, before=0)
    _output, low = delta(OPERATOR, q, k, values, gate, beta, None, last_chunk, walks=walks, rows=ROWS)
    return low

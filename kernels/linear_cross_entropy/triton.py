"""Mean cross-entropy of a linear map, a part of the tokens at a time: products by cuBLAS, softmax by a Triton kernel.

Letters: M models trained side by side, N tokens, R tokens of a part, D width, V vocabulary.  After Liger's kernels,
arXiv:2410.10989.

Of each part the logits [M, R, V] are made, and one launch reads them twice, once for the loss and once to write their
gradient in their place, from which two products make the gradients of x and of the weight. So the gradients are ready
before they are asked for, and nothing as large as the logits outlives its part. Making the logits a second time
instead (arXiv:2411.09009) would hold no part of them, but costs four products for three, and all of them written by
hand; these are the three that cuBLAS does best. Nobody is asked how many tokens count, so that no device waits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import wants_gradient
from kernels.launch import configure, launch

OPERATOR = "linear_cross_entropy"
MOST_LOGITS = 2**27
"""Numbers that the logits of one part hold at most: in half precision 256 MiB. It does not depend on N."""
STEP = 64
"""Tokens of a part are a multiple of this, as products of matrices like them."""


@triton.jit(do_not_specialize=["N", "R", "start", "ignored"])
def _softmax(
    logits,
    targets,
    losses,
    N,
    R,
    start,
    ignored,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GRADIENT: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """The losses of some tokens and whether they count; with GRADIENT their logits become the gradients of these."""
    ROWS: tl.constexpr = ELEMENTS // BLOCK_V
    model = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < R
    at = model * N + start + token
    target = tl.load(targets + at, mask=live, other=0)
    asked = live & (target != ignored)
    own = logits + ((model * R + token) * V)[:, None]
    v = tl.arange(0, BLOCK_V)
    # Finite from the start, so that a tile of nothing but −∞ leaves a number.
    peak = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for first in range(0, V, BLOCK_V):
        place = (first + v)[None, :]
        tile = tl.load(own + place, mask=asked[:, None] & (place < V), other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(tile, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(tile - higher[:, None]), 1)
        picked += tl.sum(tl.where(place == target[:, None], tile, 0.0), 1)
        peak = higher
    whole = peak + tl.log(tl.where(asked, total, 1.0))
    # A target outside of the vocabulary must not pass for one within.
    loss = tl.where((target >= 0) & (target < V), whole - picked, float("nan"))
    tl.store(losses + at, tl.where(asked, loss, 0.0), mask=live)
    counts = losses + tl.num_programs(1).to(tl.int64) * N
    tl.store(counts + at, asked.to(tl.float32), mask=live)
    if GRADIENT:
        for first in range(0, V, BLOCK_V):
            place = (first + v)[None, :]
            tile = tl.load(own + place, mask=asked[:, None] & (place < V), other=float("-inf")).to(tl.float32)
            slope = tl.exp(tile - whole[:, None]) - tl.where(place == target[:, None], 1.0, 0.0)
            slope = tl.where(asked[:, None], slope, 0.0)
            tl.store(own + place, slope.to(logits.dtype.element_ty), mask=live[:, None] & (place < V))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignored: int, dtype: torch.dtype, wanted: bool
    ) -> Tensor:
        models, tokens, _ = x.shape
        vocabulary = weight.shape[1]
        ctx.types = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        row = configure(OPERATOR, "forward", (vocabulary,), x)
        block = min(row.blocks["ELEMENTS"], int(triton.next_power_of_2(vocabulary)))
        losses = torch.empty(2, models, tokens, dtype=torch.float32, device=x.device)
        part = max(1, MOST_LOGITS // (models * vocabulary) // STEP) * STEP
        d_x: list[Tensor] = []
        d_weight: Tensor | None = None
        for start in range(0, tokens, part):
            own = x[:, start : start + part]
            logits = torch.bmm(own, weight.mT)
            launch(
                OPERATOR,
                _softmax,
                (triton.cdiv(own.shape[1], row.blocks["ELEMENTS"] // block), models),
                (logits, targets, losses, tokens, own.shape[1], start, ignored),
                {"V": vocabulary, "BLOCK_V": block, "GRADIENT": wanted},
                row,
                like=x,
            )
            if wanted and ctx.needs_input_grad[0]:
                d_x.append(torch.bmm(logits, weight))
            if wanted and ctx.needs_input_grad[1]:
                added = torch.bmm(logits.mT, own)
                if d_weight is not None:
                    d_weight += added
                else:  # Several parts are summed in float32.
                    d_weight = added if part >= tokens else added.float()
        sums = losses.sum(-1)
        joined = torch.cat(d_x, 1) if len(d_x) > 1 else next(iter(d_x), None)
        ctx.save_for_backward(joined, d_weight, sums[1])
        return sums[0] / sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, asked = ctx.saved_tensors
        scale = (grads[0] / asked)[:, None, None]
        d_x, d_weight = (
            None if own is None else torch.mul(own, scale, out=torch.empty_like(own, dtype=dtype))
            for own, dtype in zip(gradients, ctx.types, strict=True)
        )
        return d_x, d_weight, None, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Shapes as in `ops.linear_cross_entropy`. Products are taken in autocast's type, else in x's; sums in float32."""
    device, stacked, wanted = x.device.type, x.dim() == 3, wants_gradient(x, weight)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not stacked:
        x, weight, targets = x[None], weight[None], targets[None]
    with torch.autocast(device, enabled=False):
        losses: Tensor = _LinearCrossEntropy.apply(
            x, weight, targets.contiguous(), ignore_index, dtype, wanted
        )
    return losses if stacked else losses[0]

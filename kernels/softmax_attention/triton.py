"""Softmax attention in Triton kernels: one launch forward, two backward, and one or two a step.

Letters as in `ops`.  The kernels, which other operators launch too, are those of `kernels.fused_attention` and of its
neighbours, after FlashAttention-2, arXiv:2307.08691, and Flash-Decoding.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.attention import Call, attention, attention_step, spans_on
from kernels.softmax_attention.options import Options

OPERATOR = "softmax_attention"


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    spans: Sequence[int] | None,
    scale: float,
    options: Options,
    cu_seqlens: Tensor | None,
    *,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output and, if asked for, the logarithms of the denominators [B, T, H]; shapes as in `ops`."""
    call = Call(
        operator=OPERATOR,
        scale=scale,
        window=window,
        spans=None if spans is None else spans_on(tuple(spans), q.device),
        sinks=options.sinks,
        skipped=options.skipped,
        soft_cap=options.soft_cap,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        sums=with_sums,
    )
    return attention(q, k, v, options.slopes, options.sink_logits, call)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: int,
    spans: Sequence[int] | None,
    sinks: int,
    scale: float,
    options: Options,
    distance: Tensor | None,
) -> Tensor:
    """One query over the first `visible` slots; shapes as in `ops.softmax_attention_step`. Carries no gradient."""
    call = Call(
        operator=OPERATOR,
        scale=scale,
        spans=None if spans is None else spans_on(tuple(spans), q.device),
        sinks=sinks,
        soft_cap=options.soft_cap,
    )
    return attention_step(q, k, v, options.slopes, options.sink_logits, distance, visible, call)[0]

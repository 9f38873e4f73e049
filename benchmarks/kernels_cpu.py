"""The operators on one CPU thread at a proxy's shape, beside the eager forms of the transformers package and of torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

from benchmarks.common import paired, save
from kernels.channel_delta.ops import channel_delta
from kernels.scalar_decay.ops import scalar_decay
from kernels.short_convolution.ops import short_convolution
from kernels.softmax_attention.ops import softmax_attention, softmax_attention_step

BATCH, TIME, HEADS, WIDTH = 32, 64, 2, 16


def backward(run: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward of a sum."""
    return lambda: run().sum().backward()


def main() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (BATCH, TIME, HEADS, WIDTH)
    q, k, v = (F.normalize(torch.randn(shape), dim=-1).requires_grad_() for _ in range(3))
    fade = (-torch.rand(shape)).requires_grad_()
    beta = torch.rand(shape[:3]).requires_grad_()
    by_head = (-torch.rand(shape[:3])).requires_grad_()
    x, taps = torch.randn(BATCH, TIME, 96, requires_grad=True), torch.randn(96, 4, requires_grad=True)

    def peer_conv() -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), taps[:, None], groups=96).mT

    def peer_decay() -> Tensor:
        total = by_head.cumsum(1).transpose(1, 2)
        mask = torch.ones(TIME, TIME).tril().log()
        weights = (
            torch.einsum("bthk,bshk->bhts", q, k) * (total[..., None] - total[..., None, :] + mask).exp()
        )
        return torch.einsum("bhts,bshv->bthv", weights, v)

    measured = {
        "channel_delta over transformers' chunked KDA": paired(
            backward(lambda: channel_delta(q, k, v, fade, beta)[0]),
            backward(lambda: chunk_kimi_delta_attention(q, k, v, g=fade, beta=beta)[0]),
            repetitions=5,
        ),
        "scalar_decay over the whole square": paired(
            backward(lambda: scalar_decay(q, k, v, by_head)[0]), backward(peer_decay), repetitions=20
        ),
        "short_convolution over torch's conv1d": paired(
            backward(lambda: short_convolution(x, taps)[0]), backward(peer_conv), repetitions=20
        ),
        "softmax_attention over torch's SDPA": paired(
            backward(lambda: softmax_attention(q, k, v)),
            backward(
                lambda: F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
                )
            ),
            repetitions=20,
        ),
    }
    long_q, cache = torch.randn(1, 16, 128).bfloat16(), torch.randn(1, 8192, 4, 128).bfloat16()

    def peer_step() -> Tensor:
        keys = cache.transpose(1, 2)
        return F.scaled_dot_product_attention(long_q[:, :, None], keys, keys, enable_gqa=True)

    with torch.inference_mode():
        measured["decode step, bfloat16, 8k tokens, over torch's SDPA"] = paired(
            lambda: softmax_attention_step(long_q, cache, cache, visible=8192), peer_step, repetitions=10
        )
    save("kernels_cpu", {"shape": {"B": BATCH, "T": TIME, "H": HEADS, "K": WIDTH}, "ours_first": measured})


if __name__ == "__main__":
    main()

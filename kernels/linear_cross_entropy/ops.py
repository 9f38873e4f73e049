"""Mean cross-entropy of a linear map to the vocabulary: the public function.

Letters: M models trained side by side, N tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require_axes, require_shape, resolve
from kernels.linear_cross_entropy import chunked, reference
from kernels.stacked import stackable


@stackable(in_front=True)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over the asked tokens of −log softmax(weight x)[target]; NaN where no token is asked.

    x [N, D], weight [V, D], targets [N] int64, of which those that equal `ignore_index` are not asked → a number; or
    with M before each shape, one number for each model [M]. Float32, or float64 where an input is float64. Under
    autocast products are taken in its type. Triton never holds more than a part of the logits [N, V].
    """
    name = "linear_cross_entropy"
    stacked = x.dim() == 3
    lead, letters = ((x.shape[0],), "M, ") if stacked else ((), "")
    require_axes(name, "x", x, f"[{letters}N, D]")
    require_axes(name, "weight", weight, f"[{letters}V, D]")
    tokens, width = x.shape[-2:]
    vocabulary = weight.shape[-2]
    require_shape(name, "weight", weight, (*lead, vocabulary, width), f"[{letters}V, D]")
    require_shape(name, "targets", targets, (*lead, tokens), f"[{letters}N]")
    if targets.dtype != torch.int64:
        raise ValueError(f"{name}: targets are {targets.dtype}, but must be int64; pass targets.long()")
    implementation = resolve(backend, name, x, weight, targets, widths={"V": vocabulary})
    if implementation == "triton":
        from kernels.linear_cross_entropy import triton

        losses: Tensor = triton.linear_cross_entropy(x, weight, targets, ignore_index)
        return losses
    if implementation == "chunked":
        run = chunked.losses if stacked else chunked.loss
        return run(x, weight, targets, ignore_index)
    if not stacked:
        return reference.loss(x, weight, targets, ignore_index)
    return torch.stack([reference.loss(*own, ignore_index) for own in zip(x, weight, targets, strict=True)])

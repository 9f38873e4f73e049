"""Mean cross-entropy of a linear map, one token after another: the meaning of this operator.

Letters: N tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.backend import working_dtype


def loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Of one model: x [N, D], weight [V, D], targets [N]."""
    dtype = working_dtype(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        total, asked = torch.zeros((), dtype=dtype, device=x.device), 0
        for token, target in zip(x.to(dtype), targets.tolist(), strict=True):
            if target != ignore_index:
                logits = weight.to(dtype) @ token
                total = total + logits.logsumexp(0) - logits[target]
                asked += 1
        return total / asked

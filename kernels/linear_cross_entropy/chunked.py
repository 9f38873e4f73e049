"""Mean cross-entropy of a linear map in the calls of torch, where of one model only the asked tokens reach the map.

Letters: M models trained side by side, N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import working_dtype


def loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Of one model: x [N, D], weight [V, D], targets [N]."""
    asked = targets != ignore_index
    logits = F.linear(x[asked], weight)
    return F.cross_entropy(logits.to(working_dtype(logits)), targets[asked])


def losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Of M models [M], one product for all: x [M, N, D], weight [M, V, D], targets [M, N]."""
    logits = torch.bmm(x, weight.mT)
    each = F.cross_entropy(
        logits.to(working_dtype(logits)).flatten(0, 1),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="none",
    )
    return each.view_as(targets).sum(-1) / (targets != ignore_index).sum(-1)

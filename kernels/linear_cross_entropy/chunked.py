"""Mean cross-entropy of a linear map in the calls of torch, where only the asked tokens reach the map.

Letters: N tokens, D width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import working_dtype


def loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Of one model: x [N, D], weight [V, D], targets [N]."""
    asked = targets != ignore_index
    logits = F.linear(x[asked], weight)
    return F.cross_entropy(logits.to(working_dtype(logits)), targets[asked])

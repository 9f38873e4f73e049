"""Windowed softmax attention and its mass in Triton kernels: one launch forward, two backward, and one or two a step.

Letters as in `ops`.  The kernels are those of `kernels.fused_attention` and of its neighbours.

With p the weights of a row and M = 1 / max p its mass, ∂M/∂score_s = M (p_s − [s is the largest]): a gradient of M acts
as one M times as strong of the log-sum-exp, but at the place of the largest score, which the forward pass notes.
"""

from torch import Tensor

from kernels.attention import Call, attention, attention_step

OPERATOR = "window_mass"


def window_mass(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """All queries; shapes as in `ops.window_mass`."""
    call = Call(operator=OPERATOR, scale=scale, window=window, mass=True)
    output, mass = attention(q, k, v, None, None, call)
    assert mass is not None
    return output, mass


def step(q: Tensor, k: Tensor, v: Tensor, visible: int, scale: float) -> tuple[Tensor, Tensor]:
    """One query over the first `visible` slots; shapes as in `ops.window_mass_step`. Carries no gradient."""
    call = Call(operator=OPERATOR, scale=scale, mass=True)
    output, mass = attention_step(q, k, v, None, None, None, visible, call)
    assert mass is not None
    return output, mass

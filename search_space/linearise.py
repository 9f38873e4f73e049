"""Linearisation: a layer of softmax attention, once trained, becomes one of LoLCATs that decodes from a small state.

Letters: B batch, T time, D width.  After LoLCATs, arXiv:2410.10254.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from search_space.mixers.full import FullMixer
from search_space.mixers.lolcats import LoLCATs, LoLCATsMixer
from search_space.mixers.window import WindowMixer

Teacher = FullMixer | WindowMixer


@torch.no_grad()
def linearise(teacher: Teacher, spec: LoLCATs) -> LoLCATsMixer:
    """A hybrid layer with the teacher's projections, norms and gate, whose maps and shares are yet to be learnt.

    Of the spec the window, the features and what concerns the sums count; heads and what is done to them are the
    teacher's. A text no longer than the window is answered as by full attention with these weights.

    Raises:
        ValueError: the spec asks for other heads, or the teacher has what the hybrid has not.
    """
    plan = teacher.plan
    for name in ("heads", "kv_heads", "head_dim"):
        wanted, own = getattr(spec, name), getattr(plan, name)
        if wanted not in (None, own):
            raise ValueError(f"{name}={wanted} is not valid: the teacher has {own}; leave it out")
    more = {
        f"position={plan.positions.kind}": plan.positions.kind not in ("rope", "none"),
        "a soft cap": plan.soft_cap is not None,
        "a learned sink": plan.learned_sink,
        "first tokens kept as sinks": isinstance(teacher, WindowMixer) and teacher.sinks > 0,
        "windows by head": isinstance(teacher, WindowMixer) and len(teacher.runs) > 1,
    }
    for what, there in more.items():
        if there:
            raise ValueError(
                f"a teacher with {what} cannot be linearised: the hybrid layer has no such thing"
            )
    sizes = {name: getattr(plan, name) for name in ("heads", "kv_heads", "head_dim", "qk_norm", "gate")}
    spec = replace(spec, rotary=plan.positions.fraction, **sizes)
    made = LoLCATsMixer(spec.sized(teacher.frame), teacher.frame)
    weight = teacher.query.weight
    made.to(device=weight.device, dtype=weight.dtype)
    made.load_state_dict(teacher.state_dict(), strict=False)
    return made


def transfer_parameters(student: LoLCATsMixer) -> list[nn.Parameter]:
    """What attention transfer learns: the maps and the shares. All other parameters are frozen by this call."""
    learnt = [*student.query_map.parameters(), *student.key_map.parameters(), student.share]
    for weight in student.parameters():
        weight.requires_grad_(any(weight is one for one in learnt))
    return learnt


def attention_transfer_loss(teacher: Teacher, student: LoLCATsMixer, x: Tensor) -> Tensor:
    """The mean square of the difference of their heads' outputs before the gate, for the teacher's inputs [B, T, D].

    The first stage of LoLCATs, whose authors take a thousand times the mean over layers, with AdamW at 0.01. No
    gradient reaches the teacher, nor through what the student has of it.

    Raises:
        ValueError: no token has left the window, so that there is nothing to learn.
    """
    if x.shape[1] <= student.window:
        raise ValueError(
            f"a text of {x.shape[1]} tokens fits the student's window of {student.window}: hand in a longer one"
        )
    with torch.no_grad():
        reach = teacher.runs[0][2] if isinstance(teacher, WindowMixer) else None
        wanted = teacher.plan.attend(*teacher.project(x, 0), teacher.sink, window=reach)
        q, k, v = student.project(x, 0)
    got, _ = student.attend(q, k, v, None)
    return (got.float() - wanted.float()).square().mean()

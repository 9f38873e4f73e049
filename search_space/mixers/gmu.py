"""Gated memory unit: a layer that keeps nothing and gates what an earlier Mamba layer has scanned.

Letters: B batch, T time, D width, I inner width.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.parts import scanned_name
from search_space.setting import choice
from search_space.spec import Cost, Mixer, MixerSpec, Need, Reach, Stream

SCANNED = "mamba"
"""The mixer whose scan is read."""


@dataclass(frozen=True, kw_only=True)
class GMU(MixerSpec):
    """The gated memory unit of SambaY (arXiv:2507.06607): a token's gate on what the last `mamba` before has scanned.

    Where none stands before it, it gates a projection of the token itself: a layer without memory (ours).
    """

    name: ClassVar[str] = "gmu"
    family: ClassVar[str] = "state_space"
    source: ClassVar[str] = "Ren et al. 2025, arXiv:2507.06607"
    reach: ClassVar[Reach] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({"stream", "width"})

    expand: float = choice(2.0, 1.0, 1.5)
    """The inner width where no scan is there to say it."""

    def sized(self, frame: Frame) -> Self:
        del frame
        return replace(self)

    def inner(self, frame: Frame) -> tuple[int, bool]:
        """Channels that are gated, and whether an earlier layer scans them."""
        scans = [dict(settings) for name, settings in frame.place.before if name == SCANNED]
        expand = scans[-1].get("expand", 2.0) if scans else self.expand
        assert isinstance(expand, int | float)
        return int(frame.width * expand), bool(scans)

    def cost(self, frame: Frame) -> Cost:
        inner, scanned = self.inner(frame)
        weights = frame.width * inner * (2 if scanned else 3)
        return Cost(params=weights, flops_prefill=2 * weights, flops_decode=2 * weights)

    def build(self, frame: Frame) -> Mixer:
        return GMUMixer(*self.inner(frame), frame.width)


class GMUMixer(Mixer):
    """y = out(memory · silu(gate x))."""

    def __init__(self, inner: int, scanned: bool, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gate = nn.Linear(width, inner, bias=False)
        self.memory = None if scanned else nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def start(self, batch: int, max_len: int) -> tuple[()]:  # noqa: ARG002
        return ()

    def forward(self, x: Tensor, state: tuple[()] | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def step(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """x [B, T, D]; a step's [B, D] as well, because no token looks at another."""
        memory = self.recall(x, stream)
        return self.out(memory.to(x.dtype) * F.silu(self.gate(x))), state, stream

    def step_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        return self.forward_with(x, state, stream)

    def recall(self, x: Tensor, stream: Stream) -> Tensor:
        """[B, T, I] what an earlier layer has scanned, or a projection of x."""
        if self.memory is not None:
            made: Tensor = self.memory(x)
            return made
        name = scanned_name(self.inner)
        if name not in stream.values:
            raise ValueError(
                "gmu: the stream holds no scan of an earlier layer; run it within its network, or build it for a place with "
                f"no {SCANNED} before"
            )
        return stream.values[name]

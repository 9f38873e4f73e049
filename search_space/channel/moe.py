"""Mixture of experts: a router sends each token to a few of many small gated networks; all tokens may share some.

Letters: N tokens, D width, E experts, F hidden width of an expert, k experts of a token.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.stacked import stackable
from search_space.frame import Frame
from search_space.parts import hidden_width
from search_space.setting import choice
from search_space.spec import Channel, ChannelSpec, Cost, Stream


@dataclass(frozen=True, kw_only=True)
class MoE(ChannelSpec):
    """SwiGLU experts, no token dropped; balanced by a loss (arXiv:2101.03961) or by a bias (arXiv:2408.15664)."""

    name: ClassVar[str] = "moe"
    family: ClassVar[str] = "channel"
    source: ClassVar[str] = "Fedus 2021, arXiv:2101.03961; DeepSeek-V3 2024, arXiv:2412.19437"

    experts: int = choice(16, 8, 32, 64, 72, 128, 256, 512)
    top_k: int = choice(2, 1, 4, 6, 8, 10)
    shared: int = choice(0, 1, 2)
    """Experts that see every token, as one network of so many times the hidden width."""
    shared_gate: bool = choice(False, True)
    """Whether a sigmoid by token weighs the shared ones (Qwen3-Next)."""
    hidden: int | None = choice(512, 768, 1024, 2048, 4096, unit="rank")
    """The hidden width of one expert; None: from the ratio."""
    ratio: float = choice(1.0, 0.25, 0.5, 1.5, 2.0, 3.5)
    router: str = choice("softmax", "sigmoid")
    """softmax is balanced by a loss, sigmoid by a bias that counts in the choice of experts alone."""
    balance: float = choice(0.001, 0.01, 0.0)
    """The coefficient of the loss, or what one step of the optimiser moves a bias."""
    z_loss: float = choice(0.0, 0.001)
    """The coefficient of the mean squared log-sum-exp of a softmax router's logits (arXiv:2202.08906)."""
    renormalise: bool = choice(True, False)
    """Whether the weights of a token's experts sum to one before the scale; a single expert keeps its own weight."""
    scale: float = choice(1.0, 2.446, 2.5)

    def sized(self, frame: Frame) -> Self:
        del frame
        if self.top_k > self.experts:
            raise ValueError(f"moe: top_k={self.top_k} is more than its {self.experts} experts")
        if self.shared_gate and not self.shared:
            raise ValueError("moe: shared_gate=true has nothing to weigh: write shared=1 or more")
        return replace(self)

    def cost(self, frame: Frame) -> Cost:
        self.sized(frame)
        expert = 3 * frame.width * hidden_width(frame, self.hidden, self.ratio)
        others = frame.width * (self.experts + self.shared_gate) + expert * self.shared
        flops = 2 * (others + expert * self.top_k)
        missed = (1 - self.top_k / self.experts) ** frame.batch
        return Cost(
            params=others + expert * self.experts,
            flops_prefill=flops,
            flops_decode=flops,
            idle_params=expert * self.experts * missed,
        )

    def build(self, frame: Frame) -> Channel:
        return MoEChannel(self.sized(frame), frame)


class Experts(nn.Module):
    """The weights of all experts: gate and up in one [E, 2 F, D], down [E, D, F]."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(
            torch.empty(experts, 2 * hidden, width).uniform_(-(width**-0.5), width**-0.5)
        )
        self.down = nn.Parameter(torch.empty(experts, width, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], the experts chosen for each token and their weights [N, k] to [N, D]."""
        return _through(x, chosen, weights, self.gate_up, self.down)


@stackable(each=("gate_up", "down"))
def _through(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [N, D] through the experts chosen for each token.

    Tokens are sorted by expert, and each expert sees its own in one go; none is dropped, and an expert that nobody
    chose is not touched.
    """
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=down.shape[0]).tolist()
    parts = (x[order // k].split(counts), weights.to(x.dtype).flatten()[order, None].split(counts))
    outputs = [
        F.linear(_swiglu(F.linear(own, wide)) * weight, narrow)
        for own, weight, wide, narrow in zip(*parts, gate_up.unbind(), down.unbind(), strict=True)
        if own.shape[0]
    ]
    # Back by the inverse order rather than added up in place, so that the sum has one order on every device.
    y: Tensor = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, k)).sum(1)
    return y


@stackable(each=("chosen",))
def _loads(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens [E] chose each expert."""
    return torch.bincount(chosen.flatten(), minlength=experts).float()


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gated: Tensor = F.silu(gate) * up
    return gated


def choose(scores: Tensor, k: int) -> Tensor:
    """The k best of scores [N, E], the best first: [N, k]. Of equal ones the first, which no top-k promises."""
    left, chosen = scores.detach().clone(), []
    for _ in range(k):
        best = left.argmax(-1, keepdim=True)
        left = left.scatter(-1, best, torch.full_like(best, -torch.inf, dtype=left.dtype))
        chosen.append(best)
    return torch.cat(chosen, dim=-1)


class MoEChannel(Channel):
    """Route in float32, run the chosen experts, add the shared ones."""

    bias: Tensor
    load: Tensor

    def __init__(self, spec: MoE, frame: Frame) -> None:
        super().__init__()
        self.spec = spec
        hidden = hidden_width(frame, spec.hidden, spec.ratio)
        self.router = nn.Linear(frame.width, spec.experts, bias=False)
        self.experts = Experts(spec.experts, frame.width, hidden)
        self.shared_up = nn.Linear(frame.width, 2 * spec.shared * hidden, bias=False) if spec.shared else None
        self.shared_down = nn.Linear(spec.shared * hidden, frame.width, bias=False) if spec.shared else None
        self.shared_gate = nn.Linear(frame.width, 1, bias=False) if spec.shared_gate else None
        self.register_buffer("bias", torch.zeros(spec.experts))
        self.register_buffer("load", torch.zeros(spec.experts), persistent=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], and the chosen experts with their weights [N, k] of x [N, D]; all in float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())
            softmax = self.spec.router == "softmax"
            scores = logits.softmax(-1) if softmax else logits.sigmoid()
            chosen = choose(scores if softmax else scores + self.bias, self.spec.top_k)
            weights = scores.gather(-1, chosen)
            if self.spec.renormalise and self.spec.top_k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, chosen, weights * self.spec.scale

    def mix(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D] through its experts and the shared ones."""
        y: Tensor = self.experts(x, chosen, weights)
        if self.shared_up is None or self.shared_down is None:
            return y
        common: Tensor = self.shared_down(_swiglu(self.shared_up(x)))
        return y + (common if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * common)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, chosen, weights = self.route(flat)
        return self.mix(flat, chosen, weights).view(x.shape)

    def forward_with(self, x: Tensor, state: Any, stream: Stream) -> tuple[Tensor, Any, Stream]:
        flat = x.flatten(0, -2)
        logits, chosen, weights = self.route(flat)
        if self.training:
            counts = _loads(chosen, self.spec.experts)
            if self.spec.router == "sigmoid":
                self.load += counts
            elif self.spec.balance or self.spec.z_loss:
                stream = stream.with_loss(self.loss(logits, counts / counts.sum()))
        return self.mix(flat, chosen, weights).view(x.shape), state, stream

    def loss(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Experts × Σ share of the tokens × mean probability, one where all are alike; and the logits' size."""
        uneven = self.spec.experts * (shares * logits.softmax(-1).mean(0)).sum()
        total: Tensor = self.spec.balance * uneven + self.spec.z_loss * logits.logsumexp(-1).square().mean()
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """Raise the bias of experts that saw fewer tokens than the mean since the last step, lower that of the others."""
        if self.spec.router == "sigmoid":
            self.bias += self.spec.balance * torch.sign(self.load.mean() - self.load)
            self.load.zero_()

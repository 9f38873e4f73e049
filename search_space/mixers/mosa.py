"""Mixture of sparse attention: each group of heads takes only some tokens, which attend to one another alone.

Letters: B batch, T time, D width, H query heads, G key groups, R = H/G, K head width, S slots, n most tokens of a group.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.parts import attend_flops, fit_groups, fit_heads, mean_visible
from search_space.positions import Positions
from search_space.routing import attend_taken
from search_space.setting import choice
from search_space.spec import DTYPES, CacheTensor, Cost, Mixer, MixerSpec, Need, Reach, Stream


@dataclass(frozen=True, kw_only=True)
class MoSA(MixerSpec):
    """Sparse heads that take a part of the tokens (arXiv:2505.00315), in a causal form that is ours.

    In the paper a head takes the best-scored T / sparsity tokens of the whole text, which looks into the future and
    says nothing of decoding. Here a key group takes each token whose score, a sigmoid, is above one half; it starts
    with a share of 1 / sparsity, and a loss in the stream of the pass holds it there. A token that is taken reads the
    last `size` that its group took, and what it reads is weighed by its score; where it is not taken the group adds
    nothing. The first group takes every token, in place of the paper's dense heads, so that no token goes by
    unread; with a single group nothing is sparse.
    """

    name: ClassVar[str] = "mosa"
    family: ClassVar[str] = "sparse"
    reach: ClassVar[Reach] = "chosen"
    source: ClassVar[str] = "Piękos 2025, arXiv:2505.00315; causal threshold ours"
    needs: ClassVar[frozenset[Need]] = frozenset({"stream"})

    size: int | None = choice(128, 256, 512, 1024, 2048, unit="tokens", searched=True)
    """Taken tokens that a group keeps."""
    sparsity: int = choice(4, 1, 2, 8, 16, 32)
    """Tokens over taken tokens; with 1 all are taken, and only weighed by their scores."""
    balance: float = choice(0.01, 0.1, 0.0)
    """The coefficient of the loss that holds the share."""
    heads: int | None = choice(8, 16, 32, 64, unit="heads")
    kv_heads: int | None = choice(1, 2, 4, 8, unit="groups")
    head_dim: int | None = choice(64, 128, 256, unit="head")
    rotary: float = choice(1.0, 0.5, 0.25, 0.0)

    def sized(self, frame: Frame) -> Self:
        heads, head_dim = fit_heads(frame, self.heads, self.head_dim)
        kv_heads = fit_groups("mosa", frame, heads, self.kv_heads or heads)
        size = self.size or max(4, frame.train_length // 8 // 4 * 4)
        return replace(self, size=size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    def cost(self, frame: Frame) -> Cost:
        spec = self.sized(frame)
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim
        inner, cached = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        weights = frame.width * (2 * (inner + cached) + spec.kv_heads)
        slots = min(frame.context, spec.size)
        held = frame.batch * slots * cached * frame.dtype_bytes
        counts = frame.batch * spec.kv_heads * 8
        # The first group takes all, the others their share.
        taken = max(1, frame.context // spec.sparsity)
        others = (spec.kv_heads - 1) / spec.sparsity * mean_visible(taken, spec.size)
        seen = (others + mean_visible(frame.context, spec.size)) / spec.kv_heads
        return Cost(
            params=weights + spec.kv_heads,
            flops_prefill=2 * weights + attend_flops(spec.heads, spec.head_dim, spec.head_dim, seen),
            flops_decode=2 * weights + attend_flops(spec.heads, spec.head_dim, spec.head_dim, slots),
            cache=tuple(
                CacheTensor(name=name, stored_bytes=bytes_, read_bytes=bytes_)
                for name, bytes_ in {"keys": held, "values": held, "counts": counts}.items()
            ),
        )

    def build(self, frame: Frame) -> Mixer:
        return MoSAMixer(self.sized(frame), frame)


@dataclass(frozen=True, kw_only=True)
class MoSAState:
    """Rings of keys and values [B, S, G, K]: the token that a group took as its number c lies in slot c mod S.

    `counts` [B, G] says how many it took; `length` tokens were seen.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    length: int


class MoSAMixer(Mixer):
    """Project and rotate, score, let each group attend among the tokens that it takes, weigh, project."""

    def __init__(self, spec: MoSA, frame: Frame) -> None:
        super().__init__()
        assert spec.size and spec.heads and spec.kv_heads and spec.head_dim
        self.spec, self.frame, self.size = spec, frame, spec.size
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        cached = spec.kv_heads * spec.head_dim
        self.query = nn.Linear(frame.width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(frame.width, cached, bias=False)
        self.value = nn.Linear(frame.width, cached, bias=False)
        self.router = nn.Linear(frame.width, self.kv_heads)
        if spec.sparsity > 1:
            # Of inputs of variance one the fresh weights make scores of variance one third.
            nn.init.constant_(self.router.bias, NormalDist().inv_cdf(1 / spec.sparsity) / 3**0.5)
        self.out = nn.Linear(self.heads * self.head_dim, frame.width, bias=False)

    def start(self, batch: int, max_len: int) -> MoSAState:
        device, dtype = self.query.weight.device, DTYPES[self.frame.dtype]
        shape = (batch, min(max_len, self.size), self.kv_heads, self.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        counts = torch.zeros(batch, self.kv_heads, device=device, dtype=torch.int64)
        return MoSAState(keys=keys, values=values, counts=counts, length=0)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] to queries [B, T, G, R, K], keys and values [B, T, G, K], rotated by their places in the text."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value)
        )
        positions = Positions.of(self.frame, "rope", self.spec.rotary)
        return positions.turn(q, start).unflatten(2, (self.kv_heads, -1)), positions.turn(k, start), v

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [..., G] of x [..., D], in float32 whatever is around, and whether they are taken."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float(), self.router.bias.float())
        dense = self.kv_heads if self.spec.sparsity == 1 else 1
        taken = (logits > 0) | (torch.arange(self.kv_heads, device=x.device) < dense)
        return logits.sigmoid(), taken

    def grown(self, state: MoSAState, tokens: int) -> int:
        """The length after so many more tokens; ValueError where a ring shorter than `size` may lose some of them."""
        slots, end = state.keys.shape[1], state.length + tokens
        if end > slots and slots < self.size:
            raise ValueError(f"{end} tokens do not fit a ring of {slots}: start it with a larger max_len")
        return end

    def forward(self, x: Tensor, state: MoSAState | None = None) -> tuple[Tensor, Any]:
        y, state, _ = self.forward_with(x, state, Stream())
        return y, state

    def forward_with(self, x: Tensor, state: MoSAState | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        q, k, v = self.project(x, state.length if state else 0)
        scores, taken = self.route(x)
        if self.training and self.spec.balance and self.spec.sparsity > 1 and self.kv_heads > 1:
            # The squared error of each group's share; its gradient is that of the mean scores.
            soft = scores[..., 1:].mean((0, 1))
            share = taken[..., 1:].float().mean((0, 1)) + soft - soft.detach()
            stream = stream.with_loss(self.spec.balance * (share * self.spec.sparsity - 1).square().mean())
        if state is not None:
            end, slots = self.grown(state, x.shape[1]), state.keys.shape[1]
            number = state.counts[:, None] - slots + torch.arange(slots, device=x.device)[:, None]
            index = (number % slots)[..., None].expand_as(state.keys)
            k = torch.cat([state.keys.gather(1, index).to(k.dtype), k], dim=1)
            v = torch.cat([state.values.gather(1, index).to(v.dtype), v], dim=1)
            # Nobody asks what the old tokens saw.
            q = F.pad(q, (0, 0, 0, 0, 0, 0, slots, 0))
            taken = torch.cat([number >= 0, taken], dim=1)
            state = self.keep(state, k, v, taken, end)
        groups = [slice(0, 1), slice(1, None)][: self.kv_heads]
        parts = [attend_taken(q[:, :, g], k[:, :, g], v[:, :, g], taken[:, :, g], self.size) for g in groups]
        read = torch.cat(parts, dim=2)[:, -x.shape[1] :] * scores[..., None].to(v.dtype)
        return self.out(read.flatten(2).to(x.dtype)), state, stream

    def keep(self, state: MoSAState, k: Tensor, v: Tensor, taken: Tensor, length: int) -> MoSAState:
        """The state after the taken of keys and values [B, S + T, G, K], the first S of them its own in order."""
        slots = state.keys.shape[1]
        counts = state.counts + taken[:, slots:].sum(1)
        # Of all that were ever taken, the last in each slot; and how many taken lie between it and the end.
        slot = torch.arange(slots, device=k.device)[:, None]
        back = (counts[:, None] - 1 - slot) % slots
        order = taken.to(torch.uint8).argsort(dim=1, stable=True)
        index = order.gather(1, order.shape[1] - 1 - back)[..., None].expand_as(state.keys)
        empty = (back >= counts[:, None])[..., None]
        keys, values = (x.gather(1, index).masked_fill(empty, 0.0).to(state.keys.dtype) for x in (k, v))
        return MoSAState(keys=keys.detach(), values=values.detach(), counts=counts, length=length)

    def step(self, x: Tensor, state: MoSAState) -> tuple[Tensor, MoSAState]:
        q, k, v = (part[:, 0] for part in self.project(x[:, None], state.length))
        scores, taken = self.route(x)
        length, slots = self.grown(state, 1), state.keys.shape[1]
        slot = torch.arange(slots, device=x.device)[:, None]
        here = ((slot == state.counts[:, None] % slots) & taken[:, None])[..., None]
        keys = torch.where(here, k[:, None].to(state.keys.dtype), state.keys)
        values = torch.where(here, v[:, None].to(state.values.dtype), state.values)
        counts = state.counts + taken
        with torch.autocast(x.device.type, enabled=False):
            dots = torch.einsum("bgrk,bsgk->bgrs", q.float(), keys.float()) * self.head_dim**-0.5
            hidden = (slot >= counts[:, None]).transpose(1, 2)[:, :, None] & (counts > 0)[:, :, None, None]
            weights = dots.masked_fill(hidden, -torch.inf).softmax(-1)
            weights = weights * (scores * taken)[..., None, None]
            read = torch.einsum("bgrs,bsgk->bgrk", weights, values.float())
        kept = MoSAState(keys=keys, values=values, counts=counts, length=length)
        return self.out(read.flatten(1).to(x.dtype)), kept

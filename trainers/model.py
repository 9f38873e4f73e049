"""The network that a layout describes: pre-norm residual layers, alone as a stack or between embedding and head.

Letters: B batch, T time, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.short_convolution.ops import short_convolution
from search_space.cost import build_mixer, frames_of
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.parts import Norm
from search_space.spec import Stream
from search_space.vocabulary import channel_of

NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """What the layer's mixer keeps, and what its channel mixer keeps: () for most."""

    mixer: Any
    channel: Any


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + channel(norm(x)) unless the layer has no channel mixer."""

    def __init__(self, layer: Layer, frame: Frame) -> None:
        super().__init__()
        self.mixer_norm = Norm(frame.width, eps=NORM_EPSILON)
        self.mixer = build_mixer(layer, frame)
        has_channel = layer.channel.mixer != "none"
        self.channel_norm = Norm(frame.width, eps=NORM_EPSILON) if has_channel else None
        self.channel = channel_of(layer.channel).build(frame) if has_channel else None

    def start(self, batch: int, max_len: int) -> BlockState:
        """An empty state."""
        channel = () if self.channel is None else self.channel.start(batch)
        return BlockState(mixer=self.mixer.start(batch, max_len), channel=channel)

    def forward(self, x: Tensor, state: BlockState | None, stream: Stream) -> tuple[Tensor, Any, Stream]:
        """[B, T, D] to [B, T, D], continuing from a state if one is given, and the pass's stream as it goes on."""
        y, own, stream = self.mixer.forward_with(self.mixer_norm(x), state.mixer if state else None, stream)
        x = x + y
        if self.channel is None or self.channel_norm is None:
            return x, BlockState(mixer=own, channel=()) if state else None, stream
        y, kept, stream = self.channel.forward_with(
            self.channel_norm(x), state.channel if state else None, stream
        )
        return x + y, BlockState(mixer=own, channel=kept) if state else None, stream

    def step(self, x: Tensor, state: BlockState, stream: Stream) -> tuple[Tensor, BlockState, Stream]:
        """One token, [B, D] to [B, D]."""
        y, own, stream = self.mixer.step_with(self.mixer_norm(x), state.mixer, stream)
        x = x + y
        if self.channel is None or self.channel_norm is None:
            return x, BlockState(mixer=own, channel=()), stream
        y, kept, stream = self.channel.step_with(self.channel_norm(x), state.channel, stream)
        return x + y, BlockState(mixer=own, channel=kept), stream

    def after_step(self) -> None:
        """Called once after every step of the optimiser."""
        self.mixer.after_step()
        if self.channel is not None:
            self.channel.after_step()


class Stack(nn.Module):
    """All layers of a network, without embedding and head: what the target frame prices and measures."""

    def __init__(self, network: Layout, frame: Frame) -> None:
        super().__init__()
        frames = frames_of(network, frame)
        self.blocks = nn.ModuleList(
            Block(layer, own) for layer, own in zip(network.layers, frames, strict=True)
        )

    def start(self, batch: int, max_len: int) -> list[Any]:
        """An empty state for each layer."""
        return [block.start(batch, max_len) for block in self._blocks()]

    def forward(self, x: Tensor, states: Sequence[Any] | None = None) -> tuple[Tensor, list[Any] | None]:
        """[B, T, D] to [B, T, D]."""
        x, kept, _ = self.forward_with(x, states, Stream())
        return x, kept

    def forward_with(
        self, x: Tensor, states: Sequence[Any] | None, stream: Stream
    ) -> tuple[Tensor, list[Any] | None, Stream]:
        """`forward`, and what the pass's stream holds at its end."""
        kept: list[Any] = []
        for index, block in enumerate(self._blocks()):
            x, state, stream = block(x, states[index] if states else None, stream)
            kept.append(state)
        return x, kept if states else None, stream

    def step(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """One token, [B, D] to [B, D]."""
        kept, stream = [], Stream()
        for block, state in zip(self._blocks(), states, strict=True):
            x, state, stream = block.step(x, state, stream)
            kept.append(state)
        return x, kept

    def after_step(self) -> None:
        """Called once after every step of the optimiser."""
        for block in self._blocks():
            block.after_step()

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


class ProxyModel(nn.Module):
    """Embedding, a short convolution over the embeddings, the layers, a norm and a head.

    The convolution (`stem_taps` tokens; 0 for none) lets every layout see its last few tokens from the first layer on.
    Without it a short run measures how fast attention finds its previous-token heads, not what a layout can recall:
    mixers that carry a convolution of their own would win by that alone (Zoology, arXiv:2312.04927, does the same).
    """

    def __init__(self, layout: Layout, frame: Frame, *, stem_taps: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(frame.vocabulary, frame.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        taps = torch.zeros(frame.width, stem_taps)
        if stem_taps:
            taps.normal_(std=0.3)
            taps[:, -1] += 1.0
        self.stem = nn.Parameter(taps) if stem_taps else None
        self.stack = Stack(layout, frame)
        self.norm = Norm(frame.width, eps=NORM_EPSILON)
        self.head = nn.Linear(frame.width, frame.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to the features [B, T, D] that the head reads."""
        return self.read(tokens)[0]

    def read(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens [B, T] to features [B, T, D], and what the layers want added to the loss."""
        x = self.embedding(tokens)
        if self.stem is not None:
            x, _ = short_convolution(x, self.stem)
        x, _, stream = self.stack.forward_with(x, None, Stream())
        features: Tensor = self.norm(x)
        return features, stream.losses

    def after_step(self) -> None:
        """Called once after every step of the optimiser."""
        self.stack.after_step()

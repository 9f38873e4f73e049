"""The network that a layout describes: pre-norm residual layers, alone as a stack or between embedding and head.

Letters: B batch, T time, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.short_convolution.ops import short_convolution
from search_space.cost import build_mixer
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.vocabulary import channel_of

NORM_EPSILON = 1e-6


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + channel(norm(x)) unless the layer has no channel mixer."""

    def __init__(self, layer: Layer, frame: Frame) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(frame.width, eps=NORM_EPSILON)
        self.mixer = build_mixer(layer, frame)
        has_channel = layer.channel.mixer != "none"
        self.channel_norm = nn.RMSNorm(frame.width, eps=NORM_EPSILON) if has_channel else None
        self.channel = channel_of(layer.channel).build(frame) if has_channel else None

    def start(self, batch: int, max_len: int) -> Any:
        """The mixer's empty state."""
        return self.mixer.start(batch, max_len)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """[B, T, D] to [B, T, D], continuing from a state if one is given."""
        y, state = self.mixer(self.mixer_norm(x), state)
        return self._through_channel(x + y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token, [B, D] to [B, D]."""
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self._through_channel(x + y), state

    def _through_channel(self, x: Tensor) -> Tensor:
        if self.channel is None or self.channel_norm is None:
            return x
        y: Tensor = x + self.channel(self.channel_norm(x))
        return y


class Stack(nn.Module):
    """All layers of a network, without embedding and head: what the target frame prices and measures."""

    def __init__(self, network: Layout, frame: Frame) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer, frame) for layer in network.layers)

    def start(self, batch: int, max_len: int) -> list[Any]:
        """An empty state for each layer."""
        return [block.start(batch, max_len) for block in self._blocks()]

    def forward(self, x: Tensor, states: Sequence[Any] | None = None) -> tuple[Tensor, list[Any] | None]:
        """[B, T, D] to [B, T, D]."""
        kept: list[Any] = []
        for index, block in enumerate(self._blocks()):
            x, state = block(x, states[index] if states else None)
            kept.append(state)
        return x, kept if states else None

    def step(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """One token, [B, D] to [B, D]."""
        kept: list[Any] = []
        for block, state in zip(self._blocks(), states, strict=True):
            x, state = block.step(x, state)
            kept.append(state)
        return x, kept

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
        self.norm = nn.RMSNorm(frame.width, eps=NORM_EPSILON)
        self.head = nn.Linear(frame.width, frame.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to the features [B, T, D] that the head reads."""
        x = self.embedding(tokens)
        if self.stem is not None:
            x, _ = short_convolution(x, self.stem)
        x, _ = self.stack(x)
        features: Tensor = self.norm(x)
        return features

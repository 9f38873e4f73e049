"""What sparse mixers promise of their memory: nothing that they make in training grows with the square of the text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_space.cost import build_mixer
from search_space.frame import Frame
from search_space.vocabulary import read

TIME = 1024
LAYERS = (
    "window[size=32]",
    "window[size=32,sinks=4,spans=halving]",
    "longformer[size=32,prefix=0]",
    "longformer[size=32,prefix=16,dilation=2]",
    "bigbird[block=16,first=1,near=2,random=1]",
    "fixed[stride=32,summary=4,mode=layer]",
    "strided[stride=32,mode=layer]",
    "mosa[size=32]",
    "infini[segment=32]",
    "transformer_xl[segment=32,memory=32]",
    "compressive[segment=32,memory=32,slots=8]",
)
"""Layers whose visible keys do not grow with the text."""
BY_BLOCK = (
    "moba[block=16,top_k=2]",
    "fixed[stride=32,summary=4]",
    "strided[stride=32]",
    "nsa[block=32,stride=32,selected=64,window=32]",
)
"""Layers that read, or weigh, one in so many of all earlier tokens."""


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest(text: str, time: int) -> int:
    """Elements of the largest tensor of a forward and backward pass of two heads."""
    frame = Frame(width=32, train_length=TIME, context=time, dtype="float32")
    mixer = build_mixer(read(f"{text.rstrip(']')},heads=2,head_dim=16]/none").layers[0], frame)
    x = torch.randn(1, time, 32, requires_grad=True)
    with Largest() as seen:
        mixer(x)[0].sum().backward()
    return seen.elements


@pytest.mark.parametrize("text", LAYERS)
def test_tensors_grow_with_the_length(text: str) -> None:
    once, twice = largest(text, TIME), largest(text, 2 * TIME)
    assert 0 < once < TIME**2
    assert twice <= 2.2 * once


@pytest.mark.parametrize("text", BY_BLOCK)
def test_no_tensor_holds_a_quarter_of_a_square(text: str) -> None:
    assert 0 < largest(text, 2 * TIME) < TIME**2


def test_a_square_is_seen() -> None:
    """The measure itself: full attention with a cap on its scores holds them all."""
    assert largest("full[soft_cap=30]", 128) >= 128**2

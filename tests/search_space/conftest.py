"""What the tests of the vocabulary share: one thread, small frames, and a measure of closeness."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(scope="session")
def small() -> Frame:
    """A frame in which everything runs in milliseconds, and cached numbers lose nothing."""
    return Frame(width=64, train_length=64, context=96, dtype="float32", vocabulary=64)


@pytest.fixture(scope="session")
def far() -> Callable[[Tensor, Tensor], float]:
    """The largest difference of two tensors, over the root mean square of the second."""

    def measure(got: Tensor, wanted: Tensor) -> float:
        assert got.shape == wanted.shape
        scale = wanted.double().square().mean().sqrt().clamp(min=1e-30)
        return float((got.double() - wanted.double()).abs().max() / scale)

    return measure


@pytest.fixture(scope="session")
def shake() -> Callable[[nn.Module], None]:
    """Move every vector of parameters off its initial constant, so that no gain of one or bias of nought hides a fault."""

    def move(module: nn.Module) -> None:
        with torch.no_grad():
            for weight in module.parameters():
                if weight.dim() == 1:
                    weight.add_(0.2 * torch.randn_like(weight))

    return move

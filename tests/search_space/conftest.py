"""What the tests of the vocabulary share: one thread, small frames, and a measure of closeness."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame, Place
from search_space.state import tensors_of


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


@pytest.fixture(scope="session")
def weights_of() -> Callable[..., Tensor]:
    """What each token reads of each [T, T], where all that is seen weighs alike: every weight is 1 over their number.

    Queries are nought, values name their token, and one head is let out; whole and stepped must agree.
    """

    def measure(
        spec: Any, length: int, *, head: int = 0, place: Place | None = None, train: int = 64
    ) -> Tensor:
        width = -(-length // 8) * 8
        frame = Frame(
            width=width, train_length=train, context=length, dtype="float32", place=place or Place()
        )
        mixer = replace(spec, head_dim=width, rotary=0.0).build(frame)
        with torch.no_grad():
            for name, weight in mixer.named_parameters():
                if "query" in name:
                    weight.zero_()
                elif "value" in name:
                    weight.copy_(torch.eye(width).repeat(weight.shape[0] // width, 1))
                elif "out" in name:
                    weight.zero_()
                    weight[:, head * width : (head + 1) * width] = torch.eye(width)
            x = torch.eye(width)[None, :length]
            whole, state, rows = mixer(x)[0], mixer.start(1, length), []
            for t in range(length):
                y, state = mixer.step(x[:, t], state)
                rows.append(y)
            torch.testing.assert_close(torch.stack(rows, dim=1), whole, rtol=1e-5, atol=1e-6)
        return whole[0, :, :length]

    return measure


@pytest.fixture(scope="session")
def bytes_touched() -> Callable[..., int]:
    """Bytes of the state that a step at the end of the context reads; all others may be NaN without its noticing."""

    def measure(spec: Any, frame: Frame) -> int:
        mixer = spec.build(frame).eval()
        x = torch.randn(frame.batch, frame.context, frame.width)
        state = mixer.start(frame.batch, frame.context)
        with torch.no_grad():
            if frame.context > 1:
                _, state = mixer(x[:, :-1], state)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors_of(state)]
        places = iter(leaves)
        with torch.enable_grad():
            y, after = mixer.step(x[:, -1], exchange(state, lambda _: next(places).clone()))
            grads = torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True, allow_unused=True)
        # A row of a cache is used if it has a gradient, or is the one that the step writes and then reads.
        before = [tensor.clone() for tensor in tensors_of(state)]
        used = [(grad != 0).any(-1, keepdim=True) for grad in grads]
        poisoned = iter([old.where(one, torch.nan) for old, one in zip(before, used, strict=True)])
        with torch.no_grad():
            again, _ = mixer.step(x[:, -1], exchange(state, lambda _: next(poisoned)))
        assert torch.equal(again, y.detach())
        written = [
            (new.detach() != old).any(-1, keepdim=True) & ~one
            for new, old, one in zip(tensors_of(after), before, used, strict=True)
        ]
        return sum(
            int((one | two).sum()) * old.shape[-1] * old.element_size()
            for one, two, old in zip(used, written, before, strict=True)
        )

    return measure


def exchange(state: Any, into: Callable[[Tensor], Tensor]) -> Any:
    """The same state with other tensors, in the order of `tensors_of`."""
    if isinstance(state, Tensor):
        return into(state)
    if isinstance(state, tuple):
        return tuple(exchange(part, into) for part in state)
    if is_dataclass(state):
        values = {item.name: exchange(getattr(state, item.name), into) for item in fields(state)}
        return replace(state, **values)  # type: ignore[type-var]
    return state

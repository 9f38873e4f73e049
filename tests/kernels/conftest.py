"""What the operators' tests share: a measure of distance, a comparison of backends, poisoned memory."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels.backend import is_poisoned

Call = Callable[..., tuple[Tensor, ...]]
OPERATORS = [
    import_module(f"kernels.{found.name}.ops") for found in iter_modules(kernels.__path__) if found.ispkg
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory holds NaN in every test here, so that a forgotten cell shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rescue() -> None:
    """Asked for by tests that hand in NaN: the reference may answer in place of a poisoned chunk form."""


@pytest.fixture(autouse=True)
def _no_rescue(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a poisoned chunk form is a defect, which the reference must not hide."""
    if "rescue" in request.fixturenames:
        return

    def refuse(output: Tensor) -> bool:
        assert not is_poisoned(output), "the chunk form made NaN or infinity"
        return False

    for ops in OPERATORS:
        if hasattr(ops, "is_poisoned"):
            monkeypatch.setattr(ops, "is_poisoned", refuse)


def _near(actual: Tensor, expected: Tensor, bound: float = 1e-5, floor: float = 0.0, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    assert actual.is_complex() == expected.is_complex(), name
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert actual.isfinite().all(), f"{name}: not finite"
    assert expected.isfinite().all(), f"{name}: the expectation is not finite"
    size = max(expected.double().square().mean().sqrt().item(), floor)
    error = (actual.double() - expected.double()).square().mean().sqrt().item()
    assert error <= bound * size, f"{name}: error {error:.2e} for a size of {size:.2e}"


@pytest.fixture
def near() -> Callable[..., None]:
    """Asserts that both are finite, real or complex alike, and that the RMS of the error is within `bound` of the expectation's RMS."""
    return _near


def _derive(call: Call, backend: str, inputs: Sequence[Tensor], ask: Sequence[int] | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(backend, *leaves)
    asked = [outputs[i] for i in (range(len(outputs)) if ask is None else ask)]
    torch.manual_seed(1)
    cotangents = [torch.randn(output.shape).to(output.dtype) for output in asked]
    gradients = torch.autograd.grad(asked, leaves, cotangents, materialize_grads=True)
    return [output.detach() for output in outputs] + list(gradients)


@pytest.fixture
def agree() -> Callable[..., None]:
    """Asserts that `chunked` equals `reference` in every output and in the gradient of every input.

    call(backend, *inputs) returns a tuple of tensors; `ask` names the outputs whose gradient is taken.
    """

    def check(
        call: Call,
        inputs: dict[str, Tensor],
        bound: float = 1e-5,
        floor: float = 0.0,
        ask: Sequence[int] | None = None,
    ) -> None:
        before = {name: x.clone() for name, x in inputs.items()}
        expected = _derive(call, "reference", list(inputs.values()), ask)
        actual = _derive(call, "chunked", list(inputs.values()), ask)
        outputs = len(expected) - len(inputs)
        names = [f"output {i}" for i in range(outputs)] + [f"gradient of {name}" for name in inputs]
        for name, a, b in zip(names, actual, expected, strict=True):
            assert a.dtype == b.dtype, name
            _near(a, b, bound, floor, name)
        for name, x in inputs.items():
            assert torch.equal(x, before[name]), f"{name} was modified"

    return check


class _Fresh(TorchDispatchMode):
    """Notes the largest tensor that any operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.fixture
def largest_bytes() -> Callable[[Callable[[], object]], int]:
    """Bytes of the largest tensor that a call allocates."""

    def measure(call: Callable[[], object]) -> int:
        with _Fresh() as fresh:
            call()
        return fresh.largest

    return measure

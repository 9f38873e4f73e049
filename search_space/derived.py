"""What a module works out from its parameters alone, kept from one decoding step to the next."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """A value that is made again as soon as one of its sources is another tensor or was written to.

    Where gradients are taken it is made every time, so that they reach the sources. Writing behind a tensor's back,
    through `.data`, is not seen.
    """

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.value: T | None = None

    def get(self, sources: Iterable[Tensor], make: Callable[[], T]) -> T:
        """The value, by `make` where there is none yet that still holds."""
        if torch.is_grad_enabled():
            return make()
        key = tuple(
            (id(source), source.data_ptr(), source.dtype, 0 if source.is_inference() else source._version)
            for source in sources
        )
        if self.value is None or key != self.key:
            self.key, self.value = key, make()
        return self.value

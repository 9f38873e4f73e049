"""Operators under `torch.func.vmap`: the members of a stack become entries of the batch, so one call serves them all.

Several models of one layout are trained as one whose parameters have a leading axis of members (HFTA,
arXiv:2102.02344, calls it horizontal fusion). Most operations know such an axis; an operator with kernels of its own
does not, but it treats every batch entry alone, and M members of B entries are M·B entries to it.

Letters: M members, B batch.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

P = ParamSpec("P")
R = TypeVar("R")


def is_stacked(value: object) -> bool:
    """Whether a value is a tensor that stands for one of each member."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def stackable(
    *, shared: Sequence[str] = (), own: Sequence[str] = (), each: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An operator that may be called under vmap, its members side by side in the batch.

    Every tensor has the batch on its first axis but for the `shared` ones, which no member may have for itself, the
    `own` ones, parameters of which the operator takes one for each batch entry as well, and those of `each`, which
    know no batch: where members differ in one of them, the operator is called once for each member.
    """

    def decorate(operator: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(operator)

        @wraps(operator)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch._C._are_functorch_transforms_active():
                return operator(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
            if not any(map(is_stacked, tensors.values())):
                return operator(*args, **kwargs)
            rest = {name: value for name, value in bound.items() if name not in tensors}
            run = partial(operator, **rest)
            kinds = {
                **dict.fromkeys(shared, "shared"),
                **dict.fromkeys(own, "own"),
                **dict.fromkeys(each, "each"),
            }
            named = tuple((name, kinds.get(name, "batch")) for name in tensors)
            result: R = _Stacked.apply(  # type: ignore[no-untyped-call]
                run, named, *tensors.values()
            )
            return result

        return call

    return decorate


class _Stacked(torch.autograd.Function):
    """Only its rule for vmap is ever used; inside it, autograd records the operator as it always does."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("a stacked operator is called under vmap alone")

    @staticmethod
    def setup_context(*_: Any) -> None:
        raise AssertionError("a stacked operator is called under vmap alone")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        run: Callable[..., Any],
        named: tuple[tuple[str, str], ...],
        *tensors: Tensor,
    ) -> tuple[Any, Any]:
        members = info.batch_size
        fronted = [
            (name, kind, x if dim is None else x.movedim(dim, 0), dim is not None)
            for (name, kind), x, dim in zip(named, tensors, in_dims[2:], strict=True)
        ]
        if any(kind == "each" and differs for _, kind, _, differs in fronted):
            results = [
                run(**{name: x[m] if differs else x for name, _, x, differs in fronted})
                for m in range(members)
            ]
            output = _stack(results)
        else:
            batch = next(x.shape[int(differs)] for _, kind, x, differs in fronted if kind == "batch")
            folded = {
                name: _fold(name, x, differs, kind, members, batch) for name, kind, x, differs in fronted
            }
            output = tree_map(lambda x: x.unflatten(0, (members, -1)), run(**folded))
        return output, tree_map(lambda _: 0, output)


def _fold(name: str, x: Tensor, differs: bool, kind: str, members: int, batch: int) -> Tensor:
    """A tensor as the operator takes it, with M·B batch entries."""
    if not differs:
        return x if kind != "batch" else x.expand(members, *x.shape).flatten(0, 1)
    if kind == "shared":
        raise ValueError(f"{name} differs between the members of a stack, but must be the same for all")
    return x.flatten(0, 1) if kind == "batch" else x.repeat_interleave(batch, 0)


def _stack(results: Sequence[Any]) -> Any:
    """The members' results, tensors or tuples of them, stacked."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results))
    return tuple(torch.stack(column) for column in zip(*results, strict=True))

"""Operators under `torch.func.vmap`: the members of a stack become entries of the batch, so one call serves them all.

Several models of one layout are trained as one whose parameters have a leading axis of members (HFTA,
arXiv:2102.02344, calls it horizontal fusion). Most operations know such an axis; an operator with kernels of its own
does not, but it treats every batch entry alone, and M members of B entries are M·B entries to it.

Letters: M members, B batch.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[str, int]
"""An argument, and which of the tensors in it where it is a tuple of them."""


def is_stacked(value: object) -> bool:
    """Whether a value is a tensor that stands for one of each member."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def stackable(
    *,
    shared: Sequence[str] = (),
    own: Sequence[str] = (),
    each: Sequence[str] = (),
    in_front: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An operator that may be called under vmap, its members side by side in the batch.

    Every tensor, and every one in a tuple, has the batch on its first axis but for the `shared` ones, which no member may have for itself, the
    `own` ones, parameters of which the operator takes one for each batch entry as well, and those of `each`, which
    know no batch: where members differ in one of them, the operator is called once for each member. With `in_front`
    nothing has a batch, but the operator takes several models by itself, as an axis before those of every tensor.
    """

    def decorate(operator: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(operator).parameters)
        kinds = {
            **dict.fromkeys(names, "front" if in_front else "batch"),
            **dict.fromkeys(shared, "shared"),
            **dict.fromkeys(own, "own"),
            **dict.fromkeys(each, "each"),
        }

        @wraps(operator)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch._C._are_functorch_transforms_active():
                return operator(*args, **kwargs)
            # As `signature.bind` does where a call is right, in a tenth of its time; a wrong one fails below.
            bound: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            if len(bound) != len(args) + len(kwargs):
                return operator(*args, **kwargs)
            nests = {name: tree_flatten(value) for name, value in bound.items() if isinstance(value, tuple)}
            tensors = {(name, 0): value for name, value in bound.items() if isinstance(value, Tensor)}
            for name, (leaves, _) in nests.items():
                tensors |= {(name, i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            if not any(map(is_stacked, tensors.values())):
                return operator(*args, **kwargs)

            def run(tensors: Mapping[Place, Tensor]) -> R:
                flat = {name: tensors.get((name, 0), value) for name, value in bound.items()}
                for name, (leaves, shape) in nests.items():
                    own = [tensors.get((name, i), leaf) for i, leaf in enumerate(leaves)]
                    flat[name] = tree_unflatten(own, shape)
                return operator(**flat)  # type: ignore[call-arg]

            return _call_once(run, tensors, kinds)

        return call

    return decorate


def _call_once(
    run: Callable[[Mapping[Place, Tensor]], R], tensors: Mapping[Place, Tensor], kinds: Mapping[str, str]
) -> R:
    """The operator called below vmap on the members' own tensors, its results put back under vmap.

    What functorch does for an autograd.Function with a rule for vmap, without its walks through nested values, which
    took longer than a small proxy's arithmetic.
    """
    interpreter = retrieve_current_functorch_interpreter()
    level, members = interpreter.level(), interpreter.batch_size()  # type: ignore[attr-defined]
    fronted = [(place, kinds[place[0]], *_unwrapped(x, level)) for place, x in tensors.items()]
    with interpreter.lower():
        if not any(differs for *_, differs in fronted):
            return run(tensors)
        if any(kind == "each" and differs for _, kind, _, differs in fronted):
            results = [
                run({place: x[m] if differs else x for place, _, x, differs in fronted})
                for m in range(members)
            ]
            output = _stack(results)
        elif any(kind == "front" for _, kind, *_ in fronted):
            output = run(
                {place: x if differs else x.expand(members, *x.shape) for place, _, x, differs in fronted}
            )
        else:
            batch = next(x.shape[int(differs)] for _, kind, x, differs in fronted if kind == "batch")
            output = run(
                {
                    place: _fold(place[0], x, differs, kind, members, batch)
                    for place, kind, x, differs in fronted
                }
            )
            output = tree_map(lambda x: x.unflatten(0, (members, -1)), output)
    result: R = tree_map(lambda x: torch._C._functorch._add_batch_dim(x, 0, level), output)
    return result


def _unwrapped(x: Tensor, level: int) -> tuple[Tensor, bool]:
    """What lies under vmap of this level, members first, and whether they have one each."""
    inner, dim = torch._C._functorch._unwrap_batched(x, level)
    return (inner, False) if dim is None else (inner.movedim(dim, 0), True)


def _fold(name: str, x: Tensor, differs: bool, kind: str, members: int, batch: int) -> Tensor:
    """A tensor as the operator takes it, with M·B batch entries."""
    if not differs:
        return x if kind != "batch" else x.expand(members, *x.shape).flatten(0, 1)
    if kind == "shared":
        raise ValueError(f"{name} differs between the members of a stack, but must be the same for all")
    return x.flatten(0, 1) if kind == "batch" else x.repeat_interleave(batch, 0)


def _stack(results: Sequence[Any]) -> Any:
    """The members' results, tensors or tuples of them, stacked."""
    return tree_map(lambda *members: torch.stack(members), *results)
